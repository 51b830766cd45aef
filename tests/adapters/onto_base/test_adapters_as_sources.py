"""What holds for every method holds with adapters as sources, alone and beside models.

The tensors span blocks in awkward ways: rows that do not divide a block, rows wider than what is
multiplied at once, single rows, products stored the other way round, kernels.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from covering import choose, cover, share
from models import (
    MEMORY,
    Models,
    assert_same_bits,
    assert_same_model,
    product_of,
    recut,
    tight_plan,
    write_model,
)
from oracles import apply_to_whole_tensors
from safetensors.torch import save_file

import streammerge
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.types import MergePlan
from tests.adapters.tiny import Tensors
from tests.methods.test_laws import CASES, Case, keeps_base

RANK = 8
SHAPES = {
    "odd": (240, 1101),  # rows lie across the end of a block
    "wide": (20, 40_000),  # a row is multiplied in parts
    "row": (1, 3000),
    "conv": (32, 30, 3, 3),
    "conv1d": (1201, 220),  # stored [in, out]
    "embed": (1000, 300),  # rows of tokens, one of them across the end of a block
    "vocabulary": (900, 320),
    "head": (300, 64),
    "norm": (300,),
    "plain": (40, 50),
}
TOKENS = [3, 873, 874, 999]
Kind = dict[str, Any]


def draw_base() -> Tensors:
    generator = torch.Generator().manual_seed(5)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in SHAPES.items()
    }


def write_adapter(path: Path, tensors: Tensors, **config: Any) -> Path:
    path.mkdir(parents=True)
    save_file(
        {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()},
        path / "adapter_model.safetensors",
    )
    document = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3} | config
    (path / "adapter_config.json").write_text(json.dumps(document))
    return path


def factors(module: str, generator: torch.Generator) -> Tensors:
    """Return the two factors of a module, as PEFT stores those of its kind."""
    first, *others = SHAPES[module]
    random = lambda *shape: torch.randn(*shape, generator=generator) / 4  # noqa: E731
    if module == "vocabulary":
        return {
            f"{module}.lora_embedding_A": random(RANK, first),
            f"{module}.lora_embedding_B": random(others[0], RANK),
        }
    if module == "conv1d":
        first, others = others[0], [first]
    ones = [1] * (len(others) - 1)
    return {
        f"{module}.lora_A.weight": random(RANK, *others),
        f"{module}.lora_B.weight": random(first, RANK, *ones),
    }


def product(module: str, tensors: Tensors, scaling: float) -> torch.Tensor:
    """Return ``scaling * B @ A`` as it is stored, multiplied as a whole."""
    down, up = (
        next(
            tensor
            for name, tensor in tensors.items()
            if name.startswith((f"{module}.lora_{side}", f"{module}.lora_embedding_{side}"))
        )
        for side in "AB"
    )
    whole = product_of(up.flatten(1), down.flatten(1)) * scaling
    if module in ("conv1d", "vocabulary"):
        whole = whole.T
    return whole.reshape(SHAPES[module])


@dataclass(frozen=True)
class Stored:
    """A base and its sources on disk, and each source as a whole model in float32."""

    base: Path
    resharded: Path
    sources: dict[str, Path]
    tensors: Tensors
    models: dict[str, Tensors]
    """What each source makes of the base, in float32."""
    vectors: dict[str, Tensors]
    """What it adds, in float32: products themselves, where it adds products."""


Made = tuple[Path, Tensors, Tensors]
"""Where a source is, the tensors that it changes as it makes them, and the products that it adds."""


def make_lora(directory: Path, base: Tensors) -> Made:
    """A LoRA on layers of all kinds, with rows of tokens and a module trained whole."""
    generator = torch.Generator().manual_seed(6)
    modules = ["odd", "wide", "row", "conv", "conv1d", "vocabulary"]
    tensors: Tensors = {}
    for module in modules:
        tensors |= factors(module, generator)
    rows = torch.randn(len(TOKENS), 300, generator=generator)
    head = torch.randn(SHAPES["head"], generator=generator)
    path = write_adapter(
        directory / "lora",
        tensors | {"embed.token_adapter.trainable_tokens_delta": rows, "head.weight": head},
        target_modules=modules,
        modules_to_save=["head"],
        trainable_token_indices={"embed": TOKENS},
    )
    sums = {f"{module}.weight": product(module, tensors, 3 / RANK) for module in modules}
    embed = base["embed.weight"].float()
    embed[TOKENS] = rows
    whole = {name: base[name].float() + added for name, added in sums.items()}
    return path, whole | {"embed.weight": embed, "head.weight": head}, sums


def make_dora(directory: Path, base: Tensors) -> Made:
    """A DoRA whose norms are those of rows, and of columns where the layer is transposed."""
    generator = torch.Generator().manual_seed(7)
    modules = ["odd", "wide", "conv1d", "plain"]
    tensors: Tensors = {}
    whole: Tensors = {}
    for module in modules:
        own = factors(module, generator)
        weight = base[f"{module}.weight"].float()
        changed = weight + product(module, own, 3 / RANK)
        dim = 0 if module == "conv1d" else 1
        norms = changed.double().square().sum(dim=dim).sqrt().float()
        magnitude = norms * (1 + torch.randn(norms.shape, generator=generator) / 10)
        factor = (magnitude / norms).unsqueeze(dim)
        whole[f"{module}.weight"] = changed * factor
        tensors |= own | {f"{module}.lora_magnitude_vector": magnitude}
    path = write_adapter(directory / "dora", tensors, target_modules=modules, use_dora=True)
    return path, whole, {}


def make_ia3(directory: Path, base: Tensors) -> Made:
    generator = torch.Generator().manual_seed(8)
    shapes = {"odd": (240, 1), "wide": (1, 40_000), "plain": (40, 1)}
    scales = {
        name: 1 + torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()
    }
    path = write_adapter(
        directory / "ia3",
        {f"{name}.ia3_l": scale for name, scale in scales.items()},
        peft_type="IA3",
        target_modules=[*shapes],
        feedforward_modules=["wide"],
        r=None,
        lora_alpha=None,
    )
    whole = {f"{name}.weight": base[f"{name}.weight"].float() * scales[name] for name in shapes}
    return path, whole, {}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    root = tmp_path_factory.mktemp("adapters")
    base = draw_base()
    generator = torch.Generator().manual_seed(9)
    tuned = {
        name: (tensor.float() + torch.randn(tensor.shape, generator=generator) / 8).bfloat16()
        for name, tensor in base.items()
    }
    made = {
        "lora": make_lora(root, base),
        "dora": make_dora(root, base),
        "ia3": make_ia3(root, base),
        "model": (
            write_model(root / "tuned", tuned),
            {name: tensor.float() for name, tensor in tuned.items()},
            {},
        ),
    }
    start = {name: tensor.float() for name, tensor in base.items()}
    whole = {name: start | changed for name, (_, changed, _) in made.items()}
    return Stored(
        base=write_model(root / "base", base),
        resharded=write_model(root / "base3", base, shards=3, layout="reversed"),
        sources={name: path for name, (path, _, _) in made.items()},
        tensors=base,
        models=whole,
        vectors={
            name: {key: sums.get(key, whole[name][key] - start[key]) for key in base}
            for name, (_, _, sums) in made.items()
        },
    )


MIXES = {"adapters": ("lora", "dora"), "beside a model": ("lora", "model"), "ia3": ("ia3", "model")}
SUMS = MIXES["beside a model"]
# Products reach a program as any operand does, so that what is new is how they are made.
CHOSEN = choose(CASES, lambda case: case.parts, lambda _: "")
RUNS = [
    *cover(CHOSEN, ["adapters", "beside a model"], lambda case: case.parts),
    # Operands do not differ between methods of one kind; every one sees them once.
    *(
        (case, "ia3")
        for case in CASES
        if (case.method, case.number) in (("ties", 0), ("linear", 0))
    ),
]


def recipe_for(case: Case, base: Path, sources: list[Path], **document: Any) -> dict[str, Any]:
    """Return the recipe; a base is needed by every method, since an adapter changes one."""
    return case.recipe(base, sources, **document) | {"base": str(base)}


@dataclass(frozen=True)
class Merged:
    """One example of one method on one mix of sources, merged in the plainest way."""

    case: Case
    mix: str
    names: tuple[str, ...]
    recipe: dict[str, Any]
    tensors: Tensors

    def paths(self, stored: Stored) -> list[Path]:
        return [stored.sources[name] for name in self.names]


@pytest.fixture(
    scope="module",
    params=RUNS,
    ids=lambda param: f"{param[0].id}-{param[1]}",
)
def merged(
    request: pytest.FixtureRequest, stored: Stored, tmp_path_factory: pytest.TempPathFactory
) -> Merged:
    case, mix = request.param
    names = MIXES[mix][: case.of(2)]
    recipe = recipe_for(case, stored.base, [stored.sources[name] for name in names])
    tensors, _ = Models(tmp_path_factory.mktemp("merged")).merge(recipe, workers=1)
    return Merged(case, mix, names, recipe, tensors)


CUTS = share(
    RUNS,
    ["smallest cut", "large", "tight budget, other shards"],
    lambda run: run[0].parts | {("mix", run[1])},
    lambda run: (run[0].id, run[1]),
)
"""How each of them is merged once more."""


def smallest_cut(plan: MergePlan) -> MergePlan:
    """One chunk of one block in flight, and no room to collect magnitudes."""
    inputs = len({index for task in plan.tasks for index, e in enumerate(task.inputs) if e})
    return recut(plan, slots=inputs, workers=1, statistics_bytes=1)


def test_bytes_depend_on_nothing_but_recipe_and_inputs(
    merged: Merged, stored: Stored, models: Models
) -> None:
    plan = streammerge.plan(merged.recipe, memory="3GiB", workers=3)
    resharded = recipe_for(
        merged.case, stored.resharded, merged.paths(stored), output={"max_shard_size": "1MB"}
    )
    variants = {
        "smallest cut": smallest_cut(plan),
        "large": recut(plan, slots=40, workers=4, output_slots=5, slot_blocks=3),
        "tight budget, other shards": tight_plan(resharded, workers=2),
    }
    for what in CUTS[merged.case.id, merged.mix]:
        tensors, _ = models.merge(variants[what])

        assert sorted(tensors) == sorted(merged.tensors)
        for name, tensor in merged.tensors.items():
            assert_same_bits(tensors[name], tensor, f"{what}: {name}")


def expected_of(merged: Merged, stored: Stored) -> Tensors:
    """Merge whole task vectors in memory."""
    case = merged.case
    return apply_to_whole_tensors(
        case.method,
        stored.tensors,
        [stored.models[name] for name in merged.names],
        case.parameters,
        has_base=True,
        vectors=[stored.vectors[name] for name in merged.names],
    )


def test_streaming_equals_whole_task_vectors_in_memory(merged: Merged, stored: Stored) -> None:
    """Sums are equal bit for bit; norms and quotients may round once more in between."""
    exact = merged.names == SUMS[: len(merged.names)]
    for name, expected in expected_of(merged, stored).items():
        if exact:
            assert_same_bits(merged.tensors[name], expected, name)
        else:
            torch.testing.assert_close(
                merged.tensors[name].float(), expected.float(), rtol=2**-7, atol=2**-7, msg=name
            )


def test_a_plan_survives_its_json(merged: Merged) -> None:
    plan = streammerge.plan(merged.recipe, memory=MEMORY)

    assert parse_plan(dump_plan(plan)) == plan


def digests(*directories: Path) -> dict[Path, str]:
    files = sorted(path for each in directories for path in each.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_inputs_are_unmodified(stored: Stored, models: Models) -> None:
    before = digests(stored.base, *stored.sources.values())
    ties = next(case for case in CASES if case.method == "ties")
    models.merge(recipe_for(ties, stored.base, [stored.sources["lora"], stored.sources["dora"]]))

    assert digests(stored.base, *stored.sources.values()) == before


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.id)
def test_adapters_that_add_nothing_give_the_base(
    case: Case, stored: Stored, models: Models, tmp_path: Path
) -> None:
    if not keeps_base(case):
        pytest.skip("its parameters do not add up to one")
    generator = torch.Generator().manual_seed(6)
    tensors = factors("odd", generator) | factors("vocabulary", generator)
    zeroed = {name: t if "_A" in name else torch.zeros_like(t) for name, t in tensors.items()}
    path = write_adapter(tmp_path / "zero", zeroed, target_modules=["odd", "vocabulary"])

    got, _ = models.merge(recipe_for(case, stored.base, [path, path]))

    assert_same_model(got, stored.tensors)


def test_an_adapter_and_its_merged_model_are_the_same_source(
    stored: Stored, models: Models, tmp_path: Path
) -> None:
    """For a method on models, whose operands are then the same; in float32, without rounding."""
    case = next(case for case in CASES if case.method == "linear")
    base = {name: tensor.float() for name, tensor in stored.tensors.items()}
    base_path = write_model(tmp_path / "base", base)
    model = write_model(tmp_path / "model", stored.models["lora"])
    other = stored.sources["model"]

    adapter, _ = models.merge(recipe_for(case, base_path, [stored.sources["lora"], other]))
    materialised, _ = models.merge(recipe_for(case, base_path, [model, other]))

    assert_same_model(adapter, materialised)


def test_verify_merges_a_sample_again(stored: Stored, tmp_path: Path) -> None:
    ties = next(case for case in CASES if case.method == "ties")
    recipe = recipe_for(ties, stored.base, [stored.sources["lora"], stored.sources["model"]])
    streammerge.merge(recipe, tmp_path / "out")

    assert not streammerge.verify_files(tmp_path / "out").damages
    comparison = streammerge.verify_against(recipe, tmp_path / "out", fraction=1.0)
    assert comparison.nbytes == sum(tensor.nbytes for tensor in stored.tensors.values())
    assert not comparison.differing
