"""mergekit's recipes, of every key and every kind of value; ``{a}`` stands for a model's directory."""

from __future__ import annotations

_TWO = "models:\n- model: {b}\n  parameters: {{weight: 0.6}}\n- model: {c}\n  parameters: {{weight: 0.3}}\n"
_SPARSE = (
    "models:\n- model: {b}\n  parameters: {{weight: 0.6, density: 0.5}}\n"
    "- model: {c}\n  parameters: {{weight: 0.3, density: 0.7}}\n"
)
_ALL = "models: [{{model: {a}}}, {{model: {b}}}, {{model: {c}}}]\n"
_PAIR = "models: [{{model: {a}}}, {{model: {b}}}]\n"
_ARC = (
    "merge_method: slerp\nbase_model: {a}\nslices:\n- sources:\n"
    "  - {{model: {a}, layer_range: [0, 4]}}\n  - {{model: {b}, layer_range: [0, 4]}}\n"
)

EXACT: dict[str, str] = {
    # linear
    "linear": "merge_method: linear\n" + _TWO,
    "linear not normalized": "merge_method: linear\nparameters: {{normalize: false}}\n" + _TWO,
    "linear of three, one with the weight for all": (
        "merge_method: linear\nparameters: {{weight: 0.5}}\n"
        "models: [{{model: {a}, parameters: {{weight: 1.5}}}}, {{model: {b}}}, {{model: {c}}}]\n"
    ),
    "linear merges the base too": (
        "merge_method: linear\nbase_model: {a}\nparameters: {{weight: 0.25}}\n" + _TWO
    ),
    "linear with its base among the models": (
        "merge_method: linear\nbase_model: {a}\nmodels:\n"
        "- {{model: {a}, parameters: {{weight: 2}}}}\n- {{model: {b}, parameters: {{weight: 1}}}}\n"
    ),
    "linear, negative": (
        "merge_method: linear\nparameters: {{normalize: false}}\nmodels:\n"
        "- {{model: {a}, parameters: {{weight: 1}}}}\n- {{model: {b}, parameters: {{weight: 1}}}}\n"
        "- {{model: {c}, parameters: {{weight: -1}}}}\n"
    ),
    "linear with a gradient": (
        "merge_method: linear\nmodels:\n"
        "- {{model: {b}, parameters: {{weight: [1, 0.2, 0.7]}}}}\n"
        "- {{model: {c}, parameters: {{weight: [0, 1]}}}}\n"
    ),
    "linear with filters": (
        "merge_method: linear\nmodels:\n- model: {b}\n  parameters:\n    weight:\n"
        "    - {{filter: mlp, value: 0.9}}\n    - {{filter: attn, value: [0.1, 0.8]}}\n"
        "    - {{value: 0.4}}\n- {{model: {c}, parameters: {{weight: 0.5}}}}\n"
    ),
    "linear, a filter that falls back on the value for all": (
        "merge_method: linear\nparameters: {{weight: 0.3}}\nmodels:\n"
        "- {{model: {b}, parameters: {{weight: [{{filter: mlp, value: 0.9}}]}}}}\n- {{model: {c}}}\n"
    ),
    "linear, numbers in quotes": (
        "merge_method: linear\nmodels:\n- {{model: {b}, parameters: {{weight: '0.5'}}}}\n"
        "- {{model: {c}, parameters: {{weight: '2'}}}}\n"
    ),
    # slerp
    "slerp": "merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.3}}\n" + _PAIR,
    "slerp at its ends": (
        "merge_method: slerp\nbase_model: {a}\n" + _PAIR + "parameters: {{t: [0, 1]}}\n"
    ),
    "slerp, the base listed last": (
        "merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.3}}\n"
        "models: [{{model: {b}}}, {{model: {a}}}]\n"
    ),
    "slerp, the base not listed": (
        "merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.3}}\nmodels: [{{model: {b}}}]\n"
    ),
    "slerp of slices with the usual gradients": (
        _ARC + "parameters:\n  t:\n  - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}\n"
        "  - {{filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}}\n  - value: 0.5\n"
    ),
    "slerp, one filter": _ARC + "parameters: {{t: [{{filter: '*', value: 0.2}}]}}\n",
    "slerp, a filter without a list": (
        _ARC + "parameters: {{t: {{filter: '*', value: [0.2, 0.6]}}}}\n"
    ),
    "slerp with a value for each slice": (
        "merge_method: slerp\nbase_model: {a}\nslices:\n- sources:\n"
        "  - {{model: {a}, layer_range: [0, 2]}}\n  - {{model: {b}, layer_range: [0, 2]}}\n"
        "  parameters: {{t: 0.8}}\n- sources:\n"
        "  - {{model: {a}, layer_range: [2, 4]}}\n  - {{model: {b}, layer_range: [2, 4]}}\n"
        "  parameters: {{t: [0.1, 0.4]}}\n"
    ),
    "slerp, t of a slice before that of all": (
        "merge_method: slerp\nbase_model: {a}\nparameters: {{t: 0.5}}\nslices:\n- sources:\n"
        "  - {{model: {a}, layer_range: [0, 3]}}\n  - {{model: {b}, layer_range: [0, 3]}}\n"
        "  parameters: {{t: {{filter: mlp, value: 0.9}}}}\n- sources:\n"
        "  - {{model: {a}, layer_range: [3, 4]}}\n  - {{model: {b}, layer_range: [3, 4]}}\n"
    ),
    "slerp of layers of different depth": (
        "merge_method: slerp\nbase_model: {a}\nparameters: {{t: [0.2, 0.9]}}\nslices:\n- sources:\n"
        "  - {{model: {a}, layer_range: [0, 4]}}\n  - {{model: {deep}, layer_range: [2, 6]}}\n"
    ),
    # nuslerp, multislerp, karcher
    "nuslerp": "merge_method: nuslerp\n" + _TWO,
    "nuslerp of task vectors": "merge_method: nuslerp\nbase_model: {a}\n" + _TWO,
    "nuslerp by rows": ("merge_method: nuslerp\nparameters: {{nuslerp_flatten: false}}\n" + _TWO),
    "nuslerp by columns": (
        "merge_method: nuslerp\n"
        "parameters: {{nuslerp_flatten: false, nuslerp_row_wise: true}}\n" + _TWO
    ),
    "nuslerp with gradients": (
        "merge_method: nuslerp\nmodels:\n- {{model: {b}, parameters: {{weight: [0, 1]}}}}\n"
        "- {{model: {c}, parameters: {{weight: [1, 0]}}}}\n"
    ),
    "multislerp": "merge_method: multislerp\n" + _TWO,
    "multislerp of task vectors": (
        "merge_method: multislerp\nbase_model: {a}\nparameters: {{eps: 1.0e-7}}\n" + _TWO
    ),
    "multislerp, weights as they are": (
        "merge_method: multislerp\nparameters: {{normalize_weights: false}}\n" + _TWO
    ),
    "karcher": "merge_method: karcher\n" + _ALL,
    "karcher, few steps": "merge_method: karcher\nparameters: {{max_iter: 2, tol: 1.0e-4}}\n"
    + _ALL,
    # model_stock
    "model_stock": "merge_method: model_stock\nbase_model: {a}\n" + _ALL,
    "model_stock by filters": (
        "merge_method: model_stock\nbase_model: {a}\nparameters: {{filter_wise: true}}\n" + _ALL
    ),
    # the family of task arithmetic
    "task_arithmetic": "merge_method: task_arithmetic\nbase_model: {a}\n" + _TWO,
    "task_arithmetic with lambda": (
        "merge_method: task_arithmetic\nbase_model: {a}\nparameters: {{lambda: 0.7}}\n" + _TWO
    ),
    "task_arithmetic normalized": (
        "merge_method: task_arithmetic\nbase_model: {a}\nparameters: {{normalize: true}}\n" + _TWO
    ),
    "task_arithmetic with the base listed": (
        "merge_method: task_arithmetic\nbase_model: {a}\nparameters: {{weight: 0.4}}\n" + _ALL
    ),
    "task_arithmetic with gradients and filters": (
        "merge_method: task_arithmetic\nbase_model: {a}\nmodels:\n"
        "- {{model: {b}, parameters: {{weight: [{{filter: mlp, value: [0, 1]}}, {{value: 0.2}}]}}}}\n"
        "- {{model: {c}, parameters: {{weight: [1, 0.5, 0]}}}}\n"
    ),
    "task_arithmetic, lambda over the layers": (
        "merge_method: task_arithmetic\nbase_model: {a}\nparameters: {{lambda: [0.1, 1]}}\n" + _TWO
    ),
    "task_arithmetic, int8_mask": (
        "merge_method: task_arithmetic\nbase_model: {a}\nparameters: {{int8_mask: true}}\n" + _TWO
    ),
    "ties": "merge_method: ties\nbase_model: {a}\n" + _SPARSE,
    "ties not normalized": (
        "merge_method: ties\nbase_model: {a}\nparameters: {{normalize: false}}\n" + _SPARSE
    ),
    "ties, all kept": "merge_method: ties\nbase_model: {a}\n" + _TWO,
    "ties rescaled, with lambda and int8_mask": (
        "merge_method: ties\nbase_model: {a}\n"
        "parameters: {{rescale: true, lambda: 0.8, int8_mask: true}}\n" + _SPARSE
    ),
    "ties, values for all": (
        "merge_method: ties\nbase_model: {a}\n"
        "parameters: {{density: 0.4, weight: 0.5, normalize: true}}\n" + _ALL
    ),
    "ties with gradients of density and weight": (
        "merge_method: ties\nbase_model: {a}\nmodels:\n"
        "- {{model: {b}, parameters: {{density: [1, 0.7, 0.1], weight: 1.0}}}}\n"
        "- model: {c}\n  parameters:\n    density: 0.33\n    weight:\n"
        "    - {{filter: mlp, value: 0.5}}\n    - value: 0\n"
        "- {{model: {a}}}\n"
    ),
    "breadcrumbs": (
        "merge_method: breadcrumbs\nbase_model: {a}\nparameters: {{gamma: 0.05}}\n" + _SPARSE
    ),
    "breadcrumbs normalized": (
        "merge_method: breadcrumbs\nbase_model: {a}\n"
        "parameters: {{normalize: true, gamma: 0.02, lambda: 1.1}}\n" + _SPARSE
    ),
    "breadcrumbs, gamma of a model": (
        "merge_method: breadcrumbs\nbase_model: {a}\nmodels:\n"
        "- {{model: {b}, parameters: {{weight: 1, density: 0.9, gamma: 0.2}}}}\n"
        "- {{model: {c}, parameters: {{weight: 1, density: 0.5, gamma: [0, 0.3]}}}}\n"
    ),
    "breadcrumbs_ties": "merge_method: breadcrumbs_ties\nbase_model: {a}\n" + _SPARSE,
    "breadcrumbs_ties rescaled": (
        "merge_method: breadcrumbs_ties\nbase_model: {a}\nparameters: {{rescale: true}}\n" + _SPARSE
    ),
    "dare_linear, all kept": "merge_method: dare_linear\nbase_model: {a}\n" + _TWO,
    "dare_ties, all kept": (
        "merge_method: dare_ties\nbase_model: {a}\nparameters: {{density: 1.0}}\n" + _TWO
    ),
    "dare_ties, all kept, normalized": (
        "merge_method: dare_ties\nbase_model: {a}\nparameters: {{normalize: true}}\n" + _TWO
    ),
    "dare_ties, nothing kept": (
        "merge_method: dare_ties\nbase_model: {a}\nparameters: {{density: 0}}\n" + _TWO
    ),
    "della, nothing kept": (
        "merge_method: della\nbase_model: {a}\nparameters: {{density: 0}}\n" + _TWO
    ),
    # others
    "sce": "merge_method: sce\nbase_model: {a}\n" + _ALL,
    "sce of what varies": (
        "merge_method: sce\nbase_model: {a}\nparameters: {{select_topk: 0.3}}\n" + _ALL
    ),
    "sce over the layers": (
        "merge_method: sce\nbase_model: {a}\nparameters: {{select_topk: [0.9, 0.2]}}\n" + _ALL
    ),
    "ram": "merge_method: ram\nbase_model: {a}\n" + _ALL,
    "ram, epsilon": "merge_method: ram\nbase_model: {a}\nparameters: {{epsilon: 0.002}}\n" + _ALL,
    "ramplus_tl": "merge_method: ramplus_tl\nbase_model: {a}\n" + _ALL,
    "ramplus_tl, all parameters": (
        "merge_method: ramplus_tl\nbase_model: {a}\n"
        "parameters: {{r: 0.3, alpha: 0.5, epsilon: 0.003}}\n" + _ALL
    ),
    "nearswap": ("merge_method: nearswap\nbase_model: {a}\nparameters: {{t: 0.002}}\n" + _PAIR),
    "nearswap over the layers": (
        "merge_method: nearswap\nbase_model: {a}\nparameters: {{t: [0.0001, 0.01]}}\n" + _PAIR
    ),
    "arcee_fusion": "merge_method: arcee_fusion\nbase_model: {a}\n" + _PAIR,
    # layers
    "passthrough of one model": "merge_method: passthrough\nmodels: [{{model: {b}}}]\n",
    "passthrough, scaled": (
        "merge_method: passthrough\nmodels:\n- model: {b}\n"
        "parameters: {{scale: [{{filter: o_proj, value: 0.5}}, {{filter: down_proj, value: 0}}, "
        "{{value: 1}}]}}\n"
    ),
    "layers of two models": (
        "merge_method: passthrough\nslices:\n- sources: [{{model: {a}, layer_range: [0, 3]}}]\n"
        "- sources: [{{model: {b}, layer_range: [1, 4]}}]\n"
    ),
    "layers of models of different depth": (
        "merge_method: passthrough\nslices:\n- sources: [{{model: {b}, layer_range: [0, 4]}}]\n"
        "- sources: [{{model: {deep}, layer_range: [2, 6]}}]\n"
        "- sources: [{{model: {c}, layer_range: [3, 4]}}]\n"
    ),
    "one model's layers twice": (
        "merge_method: passthrough\nslices:\n- sources: [{{model: {a}, layer_range: [0, 3]}}]\n"
        "- sources: [{{model: {a}, layer_range: [1, 3]}}]\n"
        "- sources: [{{model: {a}, layer_range: [2, 4]}}]\n"
    ),
    "layers with a base that is not merged": (
        "merge_method: passthrough\nbase_model: {b}\nslices:\n"
        "- sources: [{{model: {b}, layer_range: [0, 2]}}]\n"
        "- sources: [{{model: {c}, layer_range: [0, 4]}}]\n"
    ),
    "linear of slices, with gradients in each": (
        "merge_method: linear\nslices:\n- sources:\n"
        "  - {{model: {b}, layer_range: [0, 2], parameters: {{weight: [0, 1]}}}}\n"
        "  - {{model: {c}, layer_range: [2, 4], parameters: {{weight: 0.5}}}}\n- sources:\n"
        "  - {{model: {c}, layer_range: [0, 3], parameters: {{weight: [1, 0.5]}}}}\n"
        "  - {{model: {deep}, layer_range: [3, 6], parameters: {{weight: 0.1}}}}\n"
        "  parameters: {{normalize: false}}\n"
    ),
    "ties of slices": (
        "merge_method: ties\nbase_model: {a}\nparameters: {{density: 0.5}}\nslices:\n- sources:\n"
        "  - {{model: {a}, layer_range: [0, 2]}}\n"
        "  - {{model: {b}, layer_range: [0, 2], parameters: {{weight: 0.4}}}}\n"
        "  - {{model: {c}, layer_range: [0, 2], parameters: {{weight: 0.9, density: 0.2}}}}\n"
        "- sources:\n  - {{model: {a}, layer_range: [2, 4]}}\n"
        "  - {{model: {c}, layer_range: [2, 4], parameters: {{weight: 1}}}}\n"
    ),
    "task_arithmetic of slices, one with a base of its own": (
        "merge_method: task_arithmetic\nbase_model: {a}\nparameters: {{weight: 0.7}}\nslices:\n- sources:\n"
        "  - {{model: {a}, layer_range: [0, 2]}}\n  - {{model: {b}, layer_range: [0, 2]}}\n"
        "  - {{model: {c}, layer_range: [1, 3]}}\n"
        "- base_model: {b}\n  sources:\n  - {{model: {c}, layer_range: [2, 4], parameters: {{weight: 0.4}}}}\n"
        "  - {{model: {b}, layer_range: [1, 3]}}\n  - {{model: {a}, layer_range: [2, 4]}}\n"
    ),
    "ties of slices, each with its base": (
        "merge_method: ties\nparameters: {{density: 0.5, weight: 0.8}}\nslices:\n"
        "- base_model: {b}\n  sources:\n  - {{model: {b}, layer_range: [0, 3]}}\n"
        "  - {{model: {a}, layer_range: [0, 3]}}\n  - {{model: {c}, layer_range: [0, 3]}}\n"
        "- base_model: {c}\n  sources:\n  - {{model: {a}, layer_range: [1, 3]}}\n"
        "  - {{model: {c}, layer_range: [2, 4]}}\n  parameters: {{weight: [0.2, 1]}}\n"
    ),
    "slerp of slices, the first with a base of its own": (
        "merge_method: slerp\nbase_model: {a}\nparameters: {{t: [0.2, 0.9]}}\nslices:\n"
        "- base_model: {c}\n  sources:\n  - {{model: {c}, layer_range: [0, 3]}}\n"
        "  - {{model: {deep}, layer_range: [1, 4]}}\n- sources:\n  - {{model: {a}, layer_range: [3, 4]}}\n"
        "  - {{model: {c}, layer_range: [3, 4]}}\n"
    ),
    "nuslerp of slices with bases": (
        "merge_method: nuslerp\nparameters: {{weight: 0.5}}\nslices:\n"
        "- base_model: {a}\n  sources:\n  - {{model: {a}, layer_range: [0, 2]}}\n"
        "  - {{model: {b}, layer_range: [0, 2]}}\n  - {{model: {c}, layer_range: [0, 2]}}\n"
        "- base_model: {b}\n  sources:\n  - {{model: {b}, layer_range: [2, 4]}}\n"
        "  - {{model: {a}, layer_range: [2, 4], parameters: {{weight: 0.3}}}}\n"
        "  - {{model: {c}, layer_range: [2, 4]}}\n"
    ),
    "linear of slices, which take no base": (
        "merge_method: linear\nparameters: {{weight: 1}}\nslices:\n- base_model: {a}\n  sources:\n"
        "  - {{model: {b}, layer_range: [0, 4]}}\n  - {{model: {c}, layer_range: [0, 4]}}\n"
    ),
    # what is stored
    "out_dtype": "merge_method: linear\ndtype: float32\nout_dtype: bfloat16\n" + _TWO,
    "dtype float64": "merge_method: linear\ndtype: float64\n" + _TWO,
    "dtype float32": "merge_method: slerp\nbase_model: {a}\ndtype: float32\n"
    "parameters: {{t: 0.5}}\n" + _PAIR,
}
"""Those whose result is a matter of arithmetic."""
