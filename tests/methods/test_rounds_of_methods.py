"""What holds for every method holds for methods that ask more than those in the package do.

They total, rank what is computed across sources, and ask again about what they have found. Files in
``made_up`` become methods as those of the package do: they lie in its search path.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import Parts, cover, parts_of, share
from fake_backend import COMPUTE, COPY_IN, MakeDevices
from models import (
    BLOCK,
    MEMORY,
    Models,
    Tensors,
    assert_same_model,
    load_model,
    recipe_of,
    recut,
    residence_of,
    tight_plan,
    without_kernels,
)
from oracles import apply_to_whole_tensors
from test_laws import SHAPES, draw

import streammerge
import streammerge.methods
from streammerge.checkpoint import outputfile
from streammerge.checkpoint.verifying import verify_files
from streammerge.engine import scheduling
from streammerge.engine.scopes import ScopeStatistics
from streammerge.methods import discover_methods
from streammerge.plan.chunking import Residence
from streammerge.plan.types import MergePlan

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
NAMES = (
    "around_mean", "by_size", "by_sparsity", "shared_top", "found_density", "dotted", "squashed",
    "trim_and_drop",
)  # fmt: skip


@contextmanager
def made_up_methods() -> Iterator[None]:
    """Let the files in ``made_up`` be methods."""
    with pytest.MonkeyPatch.context() as patch:
        where = [*streammerge.methods.__path__, str(Path(__file__).parent / "made_up")]
        patch.setattr(streammerge.methods, "__path__", where)
        discover_methods.cache_clear()
        yield
    discover_methods.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def made_up() -> Iterator[None]:
    with made_up_methods():
        yield


@dataclass(frozen=True)
class Case:
    """One example of one method."""

    method: str
    number: int

    @property
    def parameters(self) -> dict[str, Any]:
        return discover_methods()[self.method].examples[self.number]

    def recipe(self, paths: list[Path], **document: Any) -> dict[str, Any]:
        return recipe_of(self.method, paths[0], paths[1:], parameters=self.parameters, **document)


COUNTS = {"shared_top": 6, "found_density": 3}
CASES = [Case(name, number) for name in NAMES for number in range(COUNTS.get(name, 2))]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method}-{case.number}")


def test_every_example_is_tested() -> None:
    there = {name: discover_methods()[name].examples for name in NAMES}

    assert sum(map(len, there.values())) == len(CASES)


CUTS = ["tightest", "kept", "two blocks", "resharded", "without kernels", "kept without kernels"]


def in_types() -> Iterator[Any]:
    """Yield cases with element types, and how they are cut: every step of their programs with each."""

    def parts(case: Case) -> Parts:
        return parts_of(case.method, case.parameters, has_base=True)

    with made_up_methods():
        pairs = cover(CASES, list(DTYPES), parts)
        cuts = share(
            pairs,
            CUTS,
            lambda pair: parts(pair[0]) | {("dtype", pair[1])},
            lambda pair: (pair[0].method, pair[0].number, pair[1]),
        )
    for case, dtype in pairs:
        names = cuts[case.method, case.number, dtype]
        yield pytest.param(case, dtype, names, id=f"{case.method}-{case.number}-{dtype}")


@pytest.mark.parametrize(("case", "dtype", "cuts"), in_types())
def test_output_bytes_depend_on_nothing_but_recipe_and_inputs(
    case: Case, dtype: str, cuts: list[str], models: Models
) -> None:
    """Also equal to whole tensors in memory, whose totals and ranks are found plainly."""
    tensors = draw(DTYPES[dtype])
    compute = torch.float64 if dtype == "float64" else torch.float32
    document = {"compute_dtype": "float64"} if dtype == "float64" else {}
    paths = [models.write(each) for each in tensors]
    recipe = case.recipe(paths, **document)
    plan = streammerge.plan(recipe, memory="3GiB", workers=3)
    expected = apply_to_whole_tensors(
        case.method, tensors[0], tensors[1:], case.parameters, compute_dtype=compute
    )
    merged, manifest = models.merge(plan)
    assert_same_model(merged, expected)

    tightest = recut(plan, slots=3, workers=1, statistics_bytes=1)
    kept = recut(plan, slots=24, workers=4, output_slots=5)
    two_blocks = recut(plan, slots=7, slot_blocks=2, workers=2)
    assert residence_of(tightest, "z.grid") is Residence.STREAMED
    assert residence_of(kept, "z.grid") is Residence.RESIDENT
    resharded = [
        models.write(each, shards=n, layout="interleaved") for n, each in enumerate(tensors, 1)
    ]
    in_shards = case.recipe(resharded, output={"max_shard_size": BLOCK * 4}, **document)
    variants = {
        "tightest": lambda: tightest,
        "kept": lambda: kept,
        "two blocks": lambda: two_blocks,
        "resharded": lambda: tight_plan(in_shards, workers=4),
        "without kernels": lambda: tightest,
        "kept without kernels": lambda: kept,
    }
    for cut in cuts:
        with without_kernels() if "without" in cut else contextlib.nullcontext():
            again, told = models.merge(variants[cut]())
        assert_same_model(again, expected)
        assert told.tensors == manifest.tensors


def exact(sources: int, seed: int = 3) -> list[Tensors]:
    """Return models whose differences, and sums of them, are exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def values(name: str) -> torch.Tensor:
        if name == "zeros":
            return torch.zeros(SHAPES[name])
        if name == "z.grid":
            return torch.randint(-24, 25, SHAPES[name], generator=generator) / 16
        return (torch.randn(SHAPES[name], generator=generator) * 1024).round() / 4096

    base = {name: values(name) for name in SHAPES}
    return [base, *({n: t + values(n) for n, t in base.items()} for _ in range(sources))]


@every_case
def test_results_are_those_of_numpy_in_float64(case: Case, models: Models) -> None:
    method = discover_methods()[case.method]
    if method.random:
        pytest.skip("has a test of its own")
    from streammerge.methods import questions

    base, *tuned = exact(2)
    merged, _ = models.merge(case.recipe([models.write(each) for each in (base, *tuned)]))
    values = {}
    for spec in method.parameters:
        value = case.parameters.get(spec.name, spec.default)
        values[spec.name] = (
            (value,) * 2 if spec.per_source and not isinstance(value, tuple) else value
        )
    params = method.params(**values)
    in_numpy = questions.IN_NUMPY[case.method]
    names = sorted(base)
    scopes = [names] if params.scope == "model" else [[name] for name in names]
    for scope in scopes:
        flat = [
            torch.cat([model[name].double().reshape(-1) for name in scope]).numpy()
            for model in (base, *tuned)
        ]
        expected = flat[0] + in_numpy(np.stack(flat[1:]) - flat[0], params)
        found = torch.cat([merged[name].reshape(-1) for name in scope]).numpy()
        largest = np.abs(expected).max(initial=1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("method", ["by_size", "by_sparsity", "trim_and_drop"])
def test_what_is_kept_at_random_is_told_and_as_much_as_was_asked_for(
    method: str, models: Models
) -> None:
    base, *tuned = exact(2)
    paths = [models.write(each) for each in (base, *tuned)]
    parameters = {"density": [0.5, 0.25], "weight": [1.0, 0.0]}
    merged, manifest = models.merge(recipe_of(method, paths[0], paths[1:], parameters=parameters))

    name = "m.smooth"
    changed = float((merged[name] != base[name]).double().mean())
    vector = (tuned[0][name] - base[name]).double().abs()
    expected = {
        "by_size": float(vector.mean() / vector.max() / 2),
        "by_sparsity": 1.0,
        "trim_and_drop": 0.25,
    }[method]
    assert abs(changed - expected) < 0.01
    told = manifest.tensors[name].density
    assert told is not None
    trims = {"trim_and_drop": 0.5}.get(method, expected)
    assert abs(told[0] - trims) < 0.01


# -- killed, and resumed


class Stop(Exception):  # noqa: N818 - it is no error
    """Ends a merge from outside."""


def in_small_pieces(plan: MergePlan) -> MergePlan:
    resources = replace(
        plan.resources, slot_bytes=4 * BLOCK, slots=24, output_slot_bytes=4 * BLOCK, output_slots=3
    )
    return replace(plan, resources=resources)


def interrupt_after(plan: MergePlan, out: Path, writes: int) -> None:
    """Begin or continue a merge and end it once so many pieces were written."""
    done = 0
    write_at = outputfile.OutputFile.write_at

    def count(self: outputfile.OutputFile, *arguments: Any, **keywords: Any) -> None:
        nonlocal done
        write_at(self, *arguments, **keywords)
        done += 1
        if done > writes:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputfile, "SYNC_BYTES", 2 * BLOCK)
        patch.setattr(outputfile.OutputFile, "write_at", count)
        with pytest.raises(streammerge.StreamMergeError, match="Stop"):
            streammerge.merge(plan, out, resume=True)


@every_case
def test_a_merge_that_is_killed_again_and_again_has_the_same_bytes(
    case: Case, models: Models, tmp_path: Path
) -> None:
    paths = [models.write(each) for each in draw(torch.float32)]
    plan = in_small_pieces(streammerge.plan(case.recipe(paths), memory=MEMORY, workers=2))
    expected, manifest = models.merge(plan)
    out = tmp_path / "out"
    for writes in (1, 2, 3):
        interrupt_after(plan, out, writes)
    resumed = streammerge.merge(plan, out, resume=True)

    assert_same_model(load_model(out), expected)
    assert resumed.run.resumed
    assert resumed.tensors == manifest.tensors
    assert not verify_files(out).damages


@pytest.mark.parametrize("share", [0.0, 0.4, 0.6, 0.9])
@pytest.mark.parametrize("method", ["around_mean", "found_density", "shared_top", "dotted"])
def test_a_sweep_over_the_model_goes_on_in_the_round_that_it_had_reached(
    method: str, share: float, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [models.write(each) for each in draw(torch.float32)]
    parameters: dict[str, Any] = {"scope": "model"}
    if "density" in {spec.name for spec in discover_methods()[method].parameters}:
        parameters["density"] = 0.3
    recipe = recipe_of(method, paths[0], paths[1:], parameters=parameters)
    plan = recut(
        streammerge.plan(recipe, memory=MEMORY), slots=6, workers=1, statistics_bytes=2**23
    )
    expected, undisturbed = models.merge(plan)
    monkeypatch.setattr(scheduling, "SNAPSHOT_SECONDS", 0.0)
    save = ScopeStatistics.save
    saves = 0
    stop_at = -1

    def save_and_stop(self: ScopeStatistics, path: Path) -> None:
        nonlocal saves
        # What is in flight is counted later; waiting for it makes the test see some of it.
        time.sleep(0.02)
        save(self, path)
        saves += 1
        if saves == stop_at:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(ScopeStatistics, "save", save_and_stop)
        assert_same_model(models.merge(plan)[0], expected)
    stop_at = 1 + int(share * (saves - 1))
    saves = 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ScopeStatistics, "save", save_and_stop)
        with pytest.raises(streammerge.StreamMergeError, match="Stop"):
            streammerge.merge(plan, out)
    manifest = streammerge.merge(plan, out, resume=True)

    assert_same_model(load_model(out), expected)
    assert manifest.tensors == undisturbed.tensors
    read = manifest.run.bytes_by_stage["read"]
    assert read < undisturbed.run.bytes_by_stage["read"] or share == 0


# -- on a device, and with many sources


@every_case
def test_no_cut_changes_a_byte_on_a_device(
    case: Case, devices: MakeDevices, models: Models
) -> None:
    """Totals are added in another order there; what depends on none has the bytes of the CPU."""
    paths = [models.write(each) for each in draw(torch.float32)]
    recipe = case.recipe(paths)
    on_the_cpu, manifest = models.merge(recipe, device="cpu")
    devices(eager=frozenset({COPY_IN, COMPUTE}))
    plan = streammerge.plan(recipe, memory=MEMORY, workers=2, device="cuda:0")
    expected, told = models.merge(plan)

    for name, tensor in on_the_cpu.items():
        torch.testing.assert_close(expected[name], tensor, rtol=1e-6, atol=1e-6)
    if case.method in {"shared_top", "trim_and_drop", "by_size", "by_sparsity", "squashed"}:
        # Largest values, whole numbers and ranks have no order.
        assert_same_model(expected, on_the_cpu)
        assert told.tensors == manifest.tensors
    for slots, blocks in ((3, 1), (24, 3)):
        cut = recut(plan, slots=slots, slot_blocks=blocks, workers=1)
        assert cut.device is not None
        cut = replace(cut, device=replace(cut.device, step_numel=blocks * BLOCK))
        again, also_told = models.merge(cut)
        assert_same_model(again, expected)
        assert also_told.tensors == told.tensors


@pytest.mark.parametrize("sources", [17, 64])
@pytest.mark.parametrize("method", ["dotted", "found_density", "shared_top", "around_mean"])
def test_many_sources_ask_many_questions(method: str, sources: int, models: Models) -> None:
    generator = torch.Generator().manual_seed(sources)
    shapes = {"large": BLOCK + 77, "small": 900}
    tensors = [
        {n: torch.randn(numel, generator=generator).bfloat16() for n, numel in shapes.items()}
        for _ in range(sources + 1)
    ]
    base, *paths = [models.write(each) for each in tensors]
    known = {spec.name for spec in discover_methods()[method].parameters}
    parameters = {"density": 0.3, "weight": 1 / sources, "scope": "model"}
    parameters = {name: value for name, value in parameters.items() if name in known}
    recipe = recipe_of(method, base, paths, parameters=parameters)
    expected = apply_to_whole_tensors(method, tensors[0], tensors[1:], parameters)

    assert not streammerge.plan(recipe, memory=MEMORY).needs_torch
    assert_same_model(models.merge(recipe)[0], expected)
    with without_kernels():
        assert_same_model(models.merge(tight_plan(recipe))[0], expected)
