"""Adapters as sources keep the laws in every element type, in awkward shapes, cut off and resumed.

``test_adapters_as_sources.py`` has every example of every method, in one element type.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from covering import choose, cover
from models import (
    MEMORY,
    Models,
    assert_same_bits,
    assert_same_model,
    product_of,
    recut,
    write_model,
)
from oracles import apply_to_whole_tensors
from torch import Tensor

import streammerge
from streammerge import merging
from streammerge.checkpoint import outputfile
from streammerge.cli.arguments import main
from streammerge.errors import DiskSpaceError
from streammerge.plan.chunking import most_around
from streammerge.plan.codec import parse_plan
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK
from tests.adapters.onto_base.test_adapters_as_sources import write_adapter
from tests.adapters.tiny import Tensors
from tests.methods.test_laws import CASES, DTYPES, Case, keeps_base, with_densities
from tests.test_resume import bytes_of, interrupt_after

RANK = 6
SHAPES = {
    "handful": (5, 60_001),  # fewer rows than are multiplied at once, and more than a block
    "line": (1, BLOCK + 1000),  # a single row that is longer than a block
    "column": (BLOCK + 1000, 1),
    "odd": (411, 777),  # rows lie across the end of a block
    "square": (48, 48),
    "norm": (48,),
}
MODULES = ["handful", "line", "column", "odd", "square"]
FEW = {case.method: case for case in reversed(CASES) if case.number == 0}
"""One example of each method."""
SWEEPS = {f"{case.method} over the model": case for case in CASES if "scope" in case.parameters}


def draw(dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
    }


def draw_factors(seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B of every module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(RANK, SHAPES[name][1], generator=generator) / 4,
            torch.randn(SHAPES[name][0], RANK, generator=generator) / 4,
        )
        for name in MODULES
    }


def write_lora(path: Path, factors: dict[str, tuple[Tensor, Tensor]], **config: Any) -> Path:
    tensors = {}
    for name, (down, up) in factors.items():
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return write_adapter(path, tensors, target_modules=list(factors), r=RANK, **config)


def recipe_for(case: Case, base: Path, sources: list[Path], **document: Any) -> dict[str, Any]:
    return case.recipe(base, sources, **document) | {"base": str(base)}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [write_lora(root / str(seed), draw_factors(seed)) for seed in (1, 2)]


def vectors_of(seed: int, dtype: torch.dtype) -> Tensors:
    """Return what an adapter adds, multiplied as a whole."""
    products = {
        f"{name}.weight": product_of(up.to(dtype), down.to(dtype)) * (3 / RANK)
        for name, (down, up) in draw_factors(seed).items()
    }
    return {"norm.weight": torch.zeros(SHAPES["norm"], dtype=dtype)} | products


def smallest_cut(plan: MergePlan) -> MergePlan:
    return recut(plan, slots=1, workers=1, statistics_bytes=1)


# -- values


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case.method}-{dtype}")
        for case, dtype in cover(
            choose(FEW.values(), lambda case: case.parts, lambda _: ""),
            list(DTYPES),
            lambda case: case.parts,
        )
    ],
)
def test_every_element_type_gives_whole_task_vectors_results_in_any_cut(
    case: Case, dtype: str, adapters: list[Path], models: Models
) -> None:
    base = draw(DTYPES[dtype])
    compute = torch.float64 if dtype == "float64" else torch.float32
    document = {"compute_dtype": "float64"} if dtype == "float64" else {}
    recipe = recipe_for(case, models.write(base), adapters, **document)
    plan = streammerge.plan(recipe, memory=MEMORY, workers=3)
    merged, _ = models.merge(plan)
    again, _ = models.merge(smallest_cut(plan))

    assert_same_model(again, merged)
    vectors = [vectors_of(seed, compute) for seed in (1, 2)][: case.of(2)]
    whole = apply_to_whole_tensors(
        case.method,
        base,
        [{name: base[name].to(compute) + each[name] for name in base} for each in vectors],
        case.parameters,
        compute_dtype=compute,
        has_base=True,
        vectors=vectors,
    )
    for name, tensor in merged.items():
        expected = whole[name].to(compute)
        # Matrices of fewer than 16 rows or columns are multiplied in another order of addition,
        # which may also decide between two magnitudes beside the threshold, or the sign of a sum.
        eps = torch.finfo(DTYPES[dtype]).eps
        close = torch.isclose(tensor.to(compute), expected, rtol=4 * eps, atol=4 * eps)
        allowed = 0 if case.parameter("density") is None else tensor.numel() // 20_000 + 1
        assert int(close.logical_not().sum()) <= allowed, name
        if name == "odd.weight" and dtype != "float64":
            assert_same_bits(tensor, whole[name], name)
        if name == "norm.weight":
            # No adapter changes it, so that it may be copied.
            assert_same_bits(tensor, base[name] if keeps_base(case) else whole[name], name)


def test_the_seed_decides_the_bits_of_random_methods_alone(
    adapters: list[Path], models: Models
) -> None:
    base = models.write(draw(torch.float32))
    for case in FEW.values():
        # Where the seed is of no matter, two merges are the same merge twice.
        seeds = (3, 3, 4) if case.random else (3, 4)
        results = [models.merge(recipe_for(case, base, adapters, seed=seed))[0] for seed in seeds]

        if case.random:
            assert_same_model(results[1], results[0])
        differs = not torch.equal(results[-1]["odd.weight"], results[0]["odd.weight"])
        assert differs is case.random, case.id


@pytest.mark.parametrize(
    "case",
    choose(with_densities(), lambda case: case.parts, lambda case: case.method),
    ids=lambda case: case.id,
)
def test_density_zero_keeps_the_base_and_density_one_everything(
    case: Case, adapters: list[Path], models: Models
) -> None:
    tensors = draw(torch.float32)
    base = models.write(tensors)

    def at(density: float) -> tuple[Tensors, Any]:
        changed = Case(case.method, case.number, case.parameters | {"density": density})
        return models.merge(recipe_for(changed, base, adapters[:1] * 2))

    nothing, manifest = at(0.0)
    assert_same_model(nothing, tensors)
    assert manifest.tensors["odd.weight"].density == (0.0, 0.0)
    everything, manifest = at(1.0)
    assert manifest.tensors["odd.weight"].density == (1.0, 1.0)
    vectors = [vectors_of(1, torch.float32)] * 2
    whole = apply_to_whole_tensors(
        case.method,
        tensors,
        [{name: tensors[name] + each[name] for name in tensors} for each in vectors],
        case.parameters | {"density": 1.0},
        vectors=vectors,
    )
    torch.testing.assert_close(everything["odd.weight"], whole["odd.weight"], rtol=1e-5, atol=1e-5)


def test_equal_magnitudes_of_products_follow_the_tie_policy(models: Models, tmp_path: Path) -> None:
    """A product of signs has one magnitude only, so that every element is a tie."""
    shape = (600, 700)
    generator = torch.Generator().manual_seed(1)
    up = torch.randint(0, 2, (shape[0], 1), generator=generator) * 2.0 - 1
    base = models.write({"odd.weight": torch.zeros(shape)})
    adapter = write_adapter(
        tmp_path / "signs",
        {"odd.lora_A.weight": torch.ones(1, shape[1]), "odd.lora_B.weight": up},
        target_modules=["odd"],
        r=1,
        lora_alpha=1,
    )
    numel = shape[0] * shape[1]
    kept = {}
    for policy in ("exact", "inclusive", "strict"):
        recipe = {
            "method": "magnitude_prune",
            "base": str(base),
            "sources": [{"path": str(adapter)}],
            "parameters": {"density": 0.3, "tie_policy": policy},
        }
        plan = streammerge.plan(recipe, memory=MEMORY)
        merged, _ = models.merge(smallest_cut(plan))
        assert_same_model(merged, models.merge(plan)[0])
        kept[policy] = merged["odd.weight"].reshape(-1) != 0

    count = int(0.3 * numel)
    assert kept["exact"][:count].all()
    assert not kept["exact"][count:].any()
    assert kept["inclusive"].all()
    assert not kept["strict"].any()


# -- cut off


def in_pieces(plan: MergePlan) -> MergePlan:
    around = max(most_around(task.row) for task in plan.tasks)
    resources = replace(
        plan.resources,
        slot_bytes=2 * (BLOCK + around),
        slots=6,
        output_slot_bytes=2 * (BLOCK + around),
        output_slots=3,
    )
    return replace(plan, resources=resources)


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DoRA: its norms are found anew by whoever resumes."""
    factors = {name: each for name, each in draw_factors(3).items() if name in ("odd", "square")}
    tensors = {}
    for name, (down, up) in factors.items():
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        tensors[f"{name}.lora_magnitude_vector"] = torch.full((SHAPES[name][0],), 20.0)
    path = tmp_path_factory.mktemp("dora") / "dora"
    return write_adapter(path, tensors, target_modules=[*factors], r=RANK, use_dora=True)


ENDS = cover((FEW | SWEEPS).values(), ["cut off", "disk full"], lambda case: case.parts)


def those_that_end(how: str) -> pytest.MarkDecorator:
    """Try those cases that end so; every step of programs is among them, whatever the end."""
    cases = [case for case, end in ENDS if end == how]
    return pytest.mark.parametrize("cut", cases, ids=lambda case: case.id, indirect=True)


@pytest.fixture
def cut(
    request: pytest.FixtureRequest, adapters: list[Path], norms: Path, models: Models
) -> MergePlan:
    case = request.param
    base = models.write(draw(torch.bfloat16), "base")
    recipe = recipe_for(case, base, [adapters[0], norms], output={"max_shard_size": "1MB"})
    return in_pieces(streammerge.plan(recipe, memory=MEMORY, workers=2))


@pytest.fixture(autouse=True)
def _sync_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputfile, "SYNC_BYTES", 2 * BLOCK)


@those_that_end("cut off")
def test_a_merge_that_is_cut_off_twice_ends_with_the_same_bytes(
    cut: MergePlan, tmp_path: Path
) -> None:
    streammerge.merge(cut, tmp_path / "whole")
    for writes in (1, 2):
        interrupt_after(cut, tmp_path / "out", writes, resume=True)

    manifest = streammerge.merge(cut, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert manifest.run.resumed


def test_another_scaling_in_the_configuration_is_another_merge(
    models: Models, tmp_path: Path
) -> None:
    """The factors are the same file, the recipe is the same text."""
    base = models.write(draw(torch.bfloat16), "base")
    adapter = write_lora(tmp_path / "adapter", draw_factors(1))
    recipe = recipe_for(FEW["task_arithmetic"], base, [adapter])
    interrupt_after(in_pieces(streammerge.plan(recipe, memory=MEMORY)), tmp_path / "out", 2)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 4}))

    with pytest.raises(streammerge.StreamMergeError, match="--overwrite"):
        streammerge.merge(recipe, tmp_path / "out", memory=MEMORY, resume=True)


@those_that_end("disk full")
def test_a_full_disk_ends_the_merge_and_loses_nothing(
    cut: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []

    class FullDisk(outputfile.OutputFile):
        def _write_some(self, offset: int, buffer: memoryview) -> int:
            if offset and sum(written) >= 3 * BLOCK:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = super()._write_some(offset, buffer)
            written.append(count if offset else 0)
            return count

    with monkeypatch.context() as patch:
        patch.setattr(merging, "OutputFile", FullDisk)
        with pytest.raises(DiskSpaceError, match="the disk is full"):
            streammerge.merge(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    streammerge.merge(cut, tmp_path / "out", resume=True)
    streammerge.merge(cut, tmp_path / "whole")

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


# -- the command line


def test_every_command_takes_a_base_with_adapters(
    adapters: list[Path], norms: Path, models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    root = models.root
    recipe = root / "recipe.yaml"
    sources = [adapters[0], norms, write_model(root / "tuned", draw(torch.bfloat16))]
    base = models.write(draw(torch.bfloat16), "base")
    recipe.write_text(yaml.safe_dump(recipe_for(FEW["ties"], base, sources)))

    assert main(["plan", str(recipe), "--json", "--memory", MEMORY]) == 0
    planned = parse_plan(capsys.readouterr().out)
    assert main(["merge", str(recipe), str(root / "out"), "--memory", MEMORY, "--quiet"]) == 0
    assert main(["verify", str(root / "out")]) == 0
    against = ["--against", str(recipe), "--sample", "1", "--memory", MEMORY]
    assert main(["verify", str(root / "out"), *against]) == 0
    capsys.readouterr()
    assert main(["inspect", str(root / "out"), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    shapes = {name: tuple(entry["shape"]) for name, entry in found["tensors"].items()}
    assert shapes == {f"{name}.weight": shape for name, shape in SHAPES.items()}
    streammerge.merge(planned, root / "from plan")
    assert bytes_of(root / "from plan") == bytes_of(root / "out")


def test_verify_finds_that_another_adapter_was_merged(
    adapters: list[Path], models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    root = models.root
    base = models.write(draw(torch.bfloat16), "base")
    case = FEW["task_arithmetic"]
    streammerge.merge(recipe_for(case, base, adapters[:1]), root / "out", memory=MEMORY)
    other = root / "other.yaml"
    other.write_text(yaml.safe_dump(recipe_for(case, base, adapters[1:])))

    against = ["--against", str(other), "--sample", "1", "--memory", MEMORY, "--json"]
    assert main(["verify", str(root / "out"), *against]) == 1

    differing = json.loads(capsys.readouterr().out)["against"]["differing"]
    assert {each["tensor"] for each in differing} == {f"{name}.weight" for name in MODULES}
