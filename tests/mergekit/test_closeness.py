"""What cannot be compared number by number: rounded models, random masks, what comes out of the model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from configs import EXACT
from models import Tensors, load_model
from test_recipes import MakeModels, merge, run_mergekit
from transformers import AutoModelForCausalLM

ROUNDED = (
    "linear",
    "slerp",
    "nuslerp",
    "nuslerp of task vectors",
    "multislerp",
    "karcher",
    "model_stock",
    "task_arithmetic",
    "task_arithmetic with lambda",
    "linear of slices, with gradients in each",
)
"""Those that choose nothing, so that rounding alone is seen."""
LAYER = re.compile(r"\.(\d+)\.")
RANDOM = {
    "dare_linear": 0.4,
    "dare_ties": 0.7,
    "della_linear": 0.5,
    "della": 0.5,
}


def in_bfloat16(paths: dict[str, Path], directory: Path) -> dict[str, Path]:
    made = {}
    for name, path in paths.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        made[name] = directory / name
        model.save_pretrained(made[name])
    return made


def distance(model: Tensors, other: Tensors) -> float:
    return sum(float(torch.dist(model[name].double(), other[name].double()) ** 2) for name in other)


@pytest.mark.parametrize("name", ROUNDED)
def test_bfloat16_is_no_farther_from_float64_than_mergekits(
    name: str, made: MakeModels, tmp_path: Path
) -> None:
    paths = in_bfloat16(made("llama"), tmp_path)
    text = EXACT[name].format(**paths)
    exact = run_mergekit(f"{text}\ndtype: float64\n", tmp_path / "exact")

    theirs = run_mergekit(text, tmp_path / "theirs")
    ours, _ = merge(text, tmp_path)

    assert {tensor.dtype for tensor in ours.values()} == {torch.bfloat16}
    assert distance(ours, exact) <= distance(theirs, exact) * (1 + 1e-6)


@pytest.mark.parametrize(("method", "density"), RANDOM.items())
def test_random_methods_keep_as_many_and_rescale_alike(
    method: str, density: float, made: MakeModels, tmp_path: Path
) -> None:
    """Of the L1 norm that is kept by rescaling, and of what is kept at all."""
    paths = made("llama")
    text = (
        f"merge_method: {method}\nbase_model: {paths['a']}\nmodels:\n"
        f"- {{model: {paths['b']}, parameters: {{weight: 1, density: {density}}}}}\n"
        "parameters: {normalize: false}\n"
    )
    base, tuned = load_model(paths["a"]), load_model(paths["b"])

    for merged in (run_mergekit(text, tmp_path / "theirs"), merge(text, tmp_path)[0]):
        kept = total = 0
        for name, tensor in merged.items():
            change = (tensor.double() - base[name].double()).abs()
            whole = (tuned[name].double() - base[name].double()).abs()
            if whole.sum() == 0 or tensor.ndim == 1:
                continue
            torch.testing.assert_close(change.sum(), whole.sum(), rtol=1e-4, atol=0)
            kept += int((change > 0).sum())
            total += int((whole > 0).sum())
        deviation = (density * (1 - density) / total) ** 0.5
        assert abs(kept / total - density) < 6 * deviation


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "mixtral", "mamba"])
def test_results_generate_what_a_merge_in_memory_does(
    architecture: str, made: MakeModels, tmp_path: Path
) -> None:
    """Layers of models of different depth, put together by transformers' own names for them."""
    paths = made(architecture)
    _, out = merge(EXACT["layers of models of different depth"].format(**paths), tmp_path)

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)

    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    parts = [("b", range(4)), ("deep", range(2, 6)), ("c", range(3, 4))]
    states = {
        name: AutoModelForCausalLM.from_pretrained(paths[name]).state_dict() for name, _ in parts
    }
    tied = model.config.tie_word_embeddings
    state: Tensors = {}
    for name in states["b"]:
        if LAYER.search(name) is None:
            last = not tied and "embed" not in name and "wte" not in name and "wpe" not in name
            state[name] = states["c" if last or "norm" in name or "ln_f" in name else "b"][name]
    layers = [(name, layer) for name, of in parts for layer in of]
    for number, (source, layer) in enumerate(layers):
        for name, tensor in states[source].items():
            found = LAYER.search(name)
            if found is not None and int(found[1]) == layer:
                state[LAYER.sub(f".{number}.", name, count=1)] = tensor
    expected = AutoModelForCausalLM.from_config(model.config)
    expected.load_state_dict(state)
    prompt = torch.arange(5).unsqueeze(0)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.eval().generate(prompt, **options), expected.eval().generate(prompt, **options)
    )
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        name: t.shape for name, t in state.items()
    }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
