"""mergekit's merge methods: what they are called here, and what their parameters are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

Leaf = bool | int | float | str
"""A single value of a parameter."""


class BaseRole(Enum):
    """What a method does with ``base_model``."""

    REQUIRED = "task vectors are taken from it"
    OPTIONAL = "task vectors are taken from it, if there is one"
    ORDINARY = "one model among the others"


@dataclass(frozen=True, slots=True)
class Key:
    """A parameter."""

    native: str
    """What it is called here."""
    of_model: bool = False
    """Whether every model has its own; else values of models have no effect."""
    required: bool = False
    """Whether there is no default."""
    default: Leaf | None = None
    """What has to be said where the recipe says nothing; None where this tool's default is the same."""
    words: Mapping[Leaf, Leaf] = field(default_factory=dict)
    """What values are called here; empty for those that are the same."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A merge method."""

    native: str
    """What it is called here."""
    base: BaseRole
    """What it does with a base."""
    keys: Mapping[str, Key] = field(default_factory=dict)
    """Its parameters."""


_WEIGHT = Key("weight", of_model=True, required=True)
_DENSITY = Key("density", of_model=True, default=1.0)
_LAMBDA = Key("lambda")
_RESCALE = Key("rescale", words={True: "l1", False: "none"})
_DIVISOR = Key("divisor", words={True: "weights", False: "none"})
_ARITHMETIC = {"weight": _WEIGHT, "normalize": _DIVISOR, "lambda": _LAMBDA}
_SPARSE = _ARITHMETIC | {"density": _DENSITY, "rescale": _RESCALE}
_GAMMA = {"gamma": Key("gamma", of_model=True)}
_EPSILON = {"epsilon": Key("epsilon", of_model=True)}

METHODS: Mapping[str, Foreign] = {
    "linear": Foreign(
        "linear", BaseRole.ORDINARY, {"weight": _WEIGHT, "normalize": Key("normalize")}
    ),
    "passthrough": Foreign(
        "passthrough", BaseRole.ORDINARY, {"scale": Key("scale", of_model=True)}
    ),
    "karcher": Foreign(
        "karcher", BaseRole.ORDINARY, {"max_iter": Key("max_iter"), "tol": Key("tol")}
    ),
    "slerp": Foreign("slerp", BaseRole.REQUIRED, {"t": Key("t", required=True)}),
    "nearswap": Foreign("nearswap", BaseRole.REQUIRED, {"t": Key("t", required=True)}),
    "arcee_fusion": Foreign("arcee_fusion", BaseRole.REQUIRED),
    "nuslerp": Foreign("nuslerp", BaseRole.OPTIONAL, {"weight": _WEIGHT}),
    "multislerp": Foreign(
        "multislerp",
        BaseRole.OPTIONAL,
        {"weight": _WEIGHT, "normalize_weights": Key("normalize"), "eps": Key("eps")},
    ),
    "model_stock": Foreign("model_stock", BaseRole.REQUIRED, {"filter_wise": Key("filter_wise")}),
    "task_arithmetic": Foreign("task_arithmetic", BaseRole.REQUIRED, _ARITHMETIC),
    "ties": Foreign("ties", BaseRole.REQUIRED, _SPARSE),
    "dare_ties": Foreign("dare_ties", BaseRole.REQUIRED, _SPARSE),
    "dare_linear": Foreign("dare_linear", BaseRole.REQUIRED, _SPARSE),
    "breadcrumbs": Foreign("breadcrumbs", BaseRole.REQUIRED, _SPARSE | _GAMMA),
    "breadcrumbs_ties": Foreign("breadcrumbs_ties", BaseRole.REQUIRED, _SPARSE | _GAMMA),
    "della": Foreign("della", BaseRole.REQUIRED, _SPARSE | _EPSILON),
    "della_linear": Foreign("della_linear", BaseRole.REQUIRED, _SPARSE | _EPSILON),
    "sce": Foreign("sce", BaseRole.REQUIRED, {"select_topk": Key("select_topk")}),
    "ram": Foreign("ram", BaseRole.REQUIRED, {"epsilon": Key("epsilon")}),
    "ramplus_tl": Foreign(
        "ramplus_tl",
        BaseRole.REQUIRED,
        {"r": Key("r"), "alpha": Key("alpha"), "epsilon": Key("epsilon")},
    ),
}
"""By mergekit's names."""
NUSLERP_SWITCHES = ("nuslerp_flatten", "nuslerp_row_wise")
"""Two switches of one method, which together say what this tool calls ``axis``."""
IDLE = ("int8_mask",)
"""Parameters that change no number."""
PARAMETERS = frozenset(
    [*(key for each in METHODS.values() for key in each.keys), *NUSLERP_SWITCHES, *IDLE]
)
"""Every parameter of any method."""
