"""The numbers of a report, against plain computations in float64 on whole tensors."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    MEMORY,
    Models,
    Tensors,
    load_model,
    recipe_of,
    recut,
    without_kernels,
    write_adapter,
)
from torch import Tensor

import streammerge
from streammerge.checkpoint import outputfile
from streammerge.native.library import load_kernels
from streammerge.statistics import BLOCK

draws = pytest.mark.skipif(
    importlib.util.find_spec("vl_convert") is None, reason="pip install 'streammerge[report]'"
)
"""Of tests that write a report beside a merge, with its page."""
SHAPES = {
    "model.embed.weight": (700, 802),
    "model.layers.0.mlp.weight": (2 * BLOCK // 512 + 3, 512),
    "model.layers.1.mlp.weight": (96, 64),
    "model.layers.1.norm.weight": (33,),
    "model.layers.10.mlp.weight": (96, 64),
    "empty": (0,),
    "head": (1,),
}


def draw(dtype: torch.dtype, seed: int, base: Tensors | None = None) -> Tensors:
    """Draw a model, or a fine-tune of one, in which a third of the elements stay as they are."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator) * 0.02
        if base is not None:
            moves = torch.rand(shape, generator=generator) < 0.7
            values = base[name].float() + values * moves * 0.1
        tensors[name] = values.to(dtype)
    return tensors


def expected_of(base: Tensor | None, sources: Sequence[Tensor], result: Tensor) -> dict[str, Any]:
    """Compute what can be known without a method, in float64."""
    zero = torch.zeros_like(result, dtype=torch.float64)
    # Task vectors are float32, as merges compute them.
    vectors = [
        (source.float() - base.float() if base is not None else source.float()).double().flatten()
        for source in sources
    ]
    change = (result.float() - (base.float() if base is not None else zero.float())).double()
    change = change.flatten()
    numel = change.numel()
    found: dict[str, Any] = {"change_norm": float(change.norm())}
    if base is not None:
        found["base_norm"] = float(base.double().norm())
    for at, vector in enumerate(vectors):
        square = float(vector @ vector)
        if not numel:
            continue
        found[f"norm.{at}"] = math.sqrt(square)
        found[f"unchanged.{at}"] = float((vector == 0).double().mean())
        found[f"largest.{at}"] = float(vector.abs().max())
        found[f"largest_at.{at}"] = int(vector.abs().argmax())
        if square:
            found[f"carried.{at}"] = float(change @ vector) / square
    if len(vectors) > 1 and numel:
        stacked = torch.stack(vectors)
        opposed = (stacked > 0).any(0) & (stacked < 0).any(0)
        found["conflicts"] = float(opposed.double().mean())
    for one, other in combinations(range(len(vectors)), 2):
        norms = float(vectors[one].norm() * vectors[other].norm())
        if norms:
            found[f"cosine.{one}.{other}"] = float(vectors[one] @ vectors[other]) / norms
    return found


def check(
    report: streammerge.Report,
    base: Tensors | None,
    sources: Sequence[Tensors],
    merged: Mapping[str, Tensor],
) -> None:
    table = report.table("tensors")
    for name in merged:
        row = table["name"].index(name)
        expected = expected_of(
            None if base is None else base[name], [each[name] for each in sources], merged[name]
        )
        for column, value in expected.items():
            actual = table[column][row]
            if isinstance(value, int) or column.startswith(("unchanged", "conflicts", "largest")):
                assert actual == value, (name, column)
            else:
                assert actual == pytest.approx(value, rel=1e-9, abs=1e-12), (name, column)


CASES = [
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.3, "scope": "model"}),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.1}),
    ("task_arithmetic", {"weight": [0.3, 0.9]}),
    ("dare_linear", {"density": 0.5}),
    ("della", {"density": 0.5}),
    ("sce", {"select_topk": 0.4}),
    ("nuslerp", {}),
    ("tsv_m", {}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "parameters"), CASES, ids=str)
def test_numbers_are_those_of_whole_tensors(
    method: str, parameters: dict[str, Any], dtype: torch.dtype, models: Models
) -> None:
    if method == "tsv_m" and dtype is not torch.float32:
        pytest.skip("decompositions take long, and one type shows as much")
    base = draw(dtype, 0)
    sources = [draw(dtype, 1, base), draw(dtype, 2, base)]
    recipe = recipe_of(
        method,
        models.write(base),
        [models.write(each) for each in sources],
        parameters=parameters,
    )
    merged, _ = models.merge(recipe)

    report = streammerge.analyze(recipe, memory=MEMORY)

    check(report, base, sources, merged)


def test_sources_without_a_base_are_compared_by_their_own_values(models: Models) -> None:
    sources = [draw(torch.float32, seed) for seed in range(3)]
    recipe = recipe_of("linear", None, [models.write(each) for each in sources])
    merged, _ = models.merge(recipe)

    report = streammerge.analyze(recipe, memory=MEMORY)

    check(report, None, sources, merged)
    assert "base_norm" not in report.table("tensors")


@pytest.mark.parametrize("count", [1, 5, 16])
def test_any_number_of_sources_has_its_numbers(count: int, models: Models) -> None:
    base = draw(torch.float32, 0)
    sources = [draw(torch.float32, seed, base) for seed in range(1, count + 1)]
    recipe = recipe_of(
        "ties",
        models.write(base),
        [models.write(each) for each in sources],
        parameters={"density": 0.5},
    )
    merged, _ = models.merge(recipe)

    report = streammerge.analyze(recipe, memory=MEMORY)

    check(report, base, sources, merged)
    pairs = [name for name in report.table("tensors") if name.startswith("cosine")]
    assert len(pairs) == count * (count - 1) // 2


@pytest.mark.parametrize("merging", ["task_arithmetic", "ties"])
def test_adapters_are_the_products_that_they_add(merging: str, models: Models) -> None:
    base = draw(torch.float32, 0)
    targets = {name: SHAPES[name] for name in SHAPES if "mlp" in name}
    adapters = [write_adapter(models.root / f"adapter{n}", targets, seed=n) for n in range(2)]
    parameters = {"density": 0.4} if merging == "ties" else {}
    recipe = recipe_of(merging, models.write(base), adapters, parameters=parameters)

    table = streammerge.analyze(recipe, memory=MEMORY).table("tensors")

    assert set(table["name"]) == set(targets)
    for row, name in enumerate(table["name"]):
        products = [_product_of(adapter, str(name)) for adapter in adapters]
        for at, product in enumerate(products):
            assert table[f"norm.{at}"][row] == pytest.approx(float(product.norm()), rel=1e-6)
        cosine = float((products[0] * products[1]).sum() / products[0].norm() / products[1].norm())
        assert table["cosine.0.1"][row] == pytest.approx(cosine, abs=1e-6)


def _product_of(adapter: Path, name: str) -> Tensor:
    factors = load_model(adapter)
    module = f"base_model.model.{name.removesuffix('.weight')}"
    left, right = factors[f"{module}.lora_B.weight"], factors[f"{module}.lora_A.weight"]
    return 2.0 * (left.double() @ right.double())


def test_kept_sets_are_those_of_the_trims(models: Models) -> None:
    base = draw(torch.float32, 0)
    sources = [draw(torch.float32, 1, base), draw(torch.float32, 2, base)]
    recipe = recipe_of(
        "ties",
        models.write(base),
        [models.write(each) for each in sources],
        parameters={"density": 0.3},
    )

    table = streammerge.analyze(recipe, memory=MEMORY).table("tensors")

    row = table["name"].index("model.embed.weight")
    kept = []
    for at, source in enumerate(sources):
        vector = (source["model.embed.weight"] - base["model.embed.weight"]).flatten()
        k = int(0.3 * vector.numel())
        order = torch.argsort(vector.abs(), descending=True, stable=True)[:k]
        mask = torch.zeros_like(vector, dtype=torch.bool)
        mask[order] = True
        kept.append(torch.where(mask, vector, 0.0).double())
        assert table[f"threshold.{at}"][row] == float(vector.abs()[order[-1]])
        assert table[f"density.{at}"][row] == k / vector.numel()
        share = float(kept[-1].norm() / vector.double().norm())
        assert table[f"kept_norm.{at}"][row] == pytest.approx(share, rel=1e-12)
    one, other = (each != 0 for each in kept)
    assert table["overlap.0.1"][row] == int((one & other).sum()) / int((one | other).sum())
    opposed = (kept[0] * kept[1] < 0).double().mean()
    assert table["kept_conflicts"][row] == float(opposed)


METHODS = {
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.5},
    "model_stock": {},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_do_not_depend_on_how_the_work_is_cut_or_by_what_it_is_done(
    method: str, dtype: torch.dtype, models: Models
) -> None:
    base = draw(dtype, 0)
    sources = [models.write(draw(dtype, seed, base)) for seed in (1, 2)]
    recipe = recipe_of(method, models.write(base), sources, parameters=METHODS[method])
    planned = streammerge.plan(recipe, memory=MEMORY, report=True)
    assert isinstance(planned, streammerge.MergePlan)
    plans = [
        planned,
        recut(planned, slots=6, workers=1),
        recut(planned, slots=9, workers=3, slot_blocks=2),
    ]

    found = [_without_run(streammerge.analyze(each)) for each in plans]
    with without_kernels():
        found.append(_without_run(streammerge.analyze(recipe, memory=MEMORY)))

    assert all(each == found[0] for each in found)


def test_adapters_have_the_same_numbers_with_and_without_kernels(models: Models) -> None:
    base = draw(torch.bfloat16, 0)
    targets = {name: SHAPES[name] for name in SHAPES if "mlp" in name}
    adapters = [write_adapter(models.root / f"adapter{n}", targets, seed=n) for n in range(2)]
    recipe = recipe_of("ties", models.write(base), adapters, parameters={"density": 0.4})

    found = [_without_run(streammerge.analyze(recipe, memory=MEMORY))]
    with without_kernels():
        found.append(_without_run(streammerge.analyze(recipe, memory=MEMORY)))

    assert found[0] == found[1]


def _without_run(report: streammerge.Report) -> dict[str, Any]:
    return {key: value for key, value in report.document.items() if key != "run"}


def stop_after(writes: int, planned: Any, out: Path) -> None:
    """Begin a merge, and end it once so much was written."""
    written = 0
    write_at = outputfile.OutputFile.write_at

    def stop(self: outputfile.OutputFile, *arguments: Any, **keywords: Any) -> None:
        nonlocal written
        write_at(self, *arguments, **keywords)
        written += 1
        if written == writes:
            raise RuntimeError("stopped")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputfile.OutputFile, "write_at", stop)
        with pytest.raises(streammerge.StreamMergeError, match="stopped"):
            streammerge.merge(planned, out)


@draws
def test_a_resumed_merge_has_the_report_of_an_undisturbed_one(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = draw(torch.bfloat16, 0)
    sources = [models.write(draw(torch.bfloat16, seed, base)) for seed in (1, 2)]
    recipe = recipe_of("ties", models.write(base), sources, parameters={"density": 0.3})
    planned = streammerge.plan(recipe, memory=MEMORY, report=True)
    assert isinstance(planned, streammerge.MergePlan)
    planned = recut(planned, slots=9, workers=2)
    monkeypatch.setattr(outputfile, "SYNC_BYTES", BLOCK)
    out = models.new_output()
    stop_after(5, planned, out)

    manifest = streammerge.merge(planned, out, resume=True)

    assert manifest.run.resumed
    made = streammerge.read_report(out)
    assert made.document["run"]["resumed"]
    expected = _without_run(streammerge.analyze(planned)) | {"kind": "merge"}
    assert _without_run(made) == expected


@draws
def test_a_merge_in_parts_has_the_report_of_one_process(models: Models) -> None:
    base = draw(torch.bfloat16, 0)
    sources = [models.write(draw(torch.bfloat16, seed, base)) for seed in (1, 2)]
    recipe = recipe_of("ties", models.write(base), sources, parameters={"density": 0.3})
    planned = streammerge.plan(recipe, memory=MEMORY, report=True)
    assert isinstance(planned, streammerge.MergePlan)
    out = models.new_output()

    for part in (1, 2):
        streammerge.merge_part(planned, out, part=part, parts=2)

    expected = _without_run(streammerge.analyze(planned)) | {"kind": "merge"}
    assert _without_run(streammerge.read_report(out)) == expected


@draws
def test_a_merge_that_began_without_a_report_is_not_resumed_with_one(models: Models) -> None:
    base = draw(torch.float32, 0)
    recipe = recipe_of("linear", None, [models.write(base), models.write(draw(torch.float32, 1))])
    out = models.new_output()
    planned = streammerge.plan(recipe, memory=MEMORY)

    stop_after(2, planned, out)

    with pytest.raises(streammerge.StreamMergeError, match="report was None, is made"):
        streammerge.merge(recipe, out, memory=MEMORY, resume=True, report=True)


def test_groups_add_up_their_tensors(models: Models) -> None:
    base = draw(torch.float32, 0)
    sources = [draw(torch.float32, 1, base), draw(torch.float32, 2, base)]
    recipe = recipe_of("task_arithmetic", models.write(base), [models.write(s) for s in sources])

    report = streammerge.analyze(recipe, memory=MEMORY)

    tensors, layers = report.table("tensors"), report.table("layers")
    assert layers["layer"] == ["", "model.layers.0", "model.layers.1", "model.layers.10"]
    row = layers["layer"].index("model.layers.1")
    own = [at for at, layer in enumerate(tensors["layer"]) if layer == "model.layers.1"]
    norm = math.sqrt(sum(float(tensors["norm.0"][at] or 0) ** 2 for at in own))
    assert layers["norm.0"][row] == pytest.approx(norm, rel=1e-12)
    assert layers["largest.0"][row] == max(tensors["largest.0"][at] for at in own)
    modules = report.table("modules")
    assert modules["tensors"][modules["module"].index("mlp.weight")] == 3
    model = report.table("model")
    whole = [torch.cat([t.flatten() for t in each.values()]) for each in (base, *sources)]
    first, second = whole[1] - whole[0], whole[2] - whole[0]
    cosine = float(torch.dot(first, second) / first.norm() / second.norm())
    assert model["cosine.0.1"][0] == pytest.approx(cosine, abs=1e-5)
    assert len(report.table("cells")["layer"]) == len(tensors["name"])


def test_histograms_count_one_element_in_256(models: Models) -> None:
    base = {"w": torch.zeros(3 * BLOCK + 300)}
    source = {"w": torch.full((3 * BLOCK + 300,), 0.75)}
    source["w"][::2] = 0.0
    recipe = recipe_of("task_arithmetic", models.write(base), [models.write(source)])

    found = streammerge.analyze(recipe, memory=MEMORY).document["histograms"]

    counts = np.array(found["counts"][0])
    # Three runs of 1,024 elements, and two of the rest.
    assert counts.sum() == 3 * 1024 + 2
    place = int(np.searchsorted(found["edges"], 0.75, "right")) - 1
    assert counts[0] == counts[place] == 3 * 512 + 1


def test_a_plan_without_a_report_has_no_numbers_to_analyze(models: Models) -> None:
    recipe = recipe_of("linear", None, [models.write(draw(torch.float32, 0))] * 2)
    planned = streammerge.plan(recipe, memory=MEMORY)
    assert isinstance(planned, streammerge.MergePlan)

    with pytest.raises(ValueError, match="report=True"):
        streammerge.analyze(planned)
    with pytest.raises(ValueError, match="report=True"):
        streammerge.merge(planned, models.new_output(), report=True)


def test_combinations_of_adapters_have_no_report(models: Models) -> None:
    adapters = [write_adapter(models.root / f"a{n}", {"x.weight": (8, 8)}, seed=n) for n in (1, 2)]
    recipe = recipe_of("linear", None, adapters)

    with pytest.raises(streammerge.StreamMergeError, match="combines adapters without a base"):
        streammerge.plan(recipe, memory=MEMORY, report=True)


def test_a_report_counts_in_the_memory_of_a_plan(models: Models) -> None:
    recipe = recipe_of("linear", None, [models.write(draw(torch.float32, 0))] * 2)

    without = streammerge.plan(recipe, memory=MEMORY)
    planned = streammerge.plan(recipe, memory=MEMORY, report=True)

    assert dataclasses.asdict(planned)["survey"]
    assert planned.memory.growth > without.memory.growth
    assert load_kernels() is None or planned.memory.scratch > without.memory.scratch


def test_a_device_finds_the_numbers_of_the_cpu(models: Models, devices: Any) -> None:
    base = draw(torch.float32, 0)
    sources = [models.write(draw(torch.float32, seed, base)) for seed in (1, 2)]
    recipe = recipe_of("ties", models.write(base), sources, parameters={"density": 0.3})
    expected = _without_run(streammerge.analyze(recipe, memory=MEMORY))
    devices()

    found = streammerge.analyze(recipe, memory=MEMORY, device="cuda:0")

    assert _without_run(found) == expected
    assert found.document["run"]["device"] == "cuda:0"


def test_parts_of_a_tensor_that_differ_in_size_have_rows_of_their_own(models: Models) -> None:
    base, other = {"w": torch.zeros(8, 4)}, {"w": torch.ones(10, 4)}
    recipe = recipe_of(
        "task_arithmetic", models.write(base), [models.write(other)], mismatch="common"
    )

    report = streammerge.analyze(recipe, memory=MEMORY)

    table = report.table("tensors")
    assert (table["name"], table["numel"], table["norm.0"]) == (["w"], [32], [math.sqrt(32)])


@draws
def test_each_output_of_a_grid_has_a_report(models: Models) -> None:
    base = draw(torch.float32, 0)
    recipe = recipe_of("ties", models.write(base), [models.write(draw(torch.float32, 1, base))])
    outs = [models.new_output() for _ in range(2)]
    recipes = [recipe | {"parameters": {"density": density}} for density in (0.1, 0.4)]

    streammerge.merge_together(list(zip(recipes, outs, strict=True)), memory=MEMORY, report=True)

    found = [streammerge.read_report(out).table("model")["density.0"][0] for out in outs]
    assert found == [pytest.approx(0.1, rel=1e-2), pytest.approx(0.4, rel=1e-2)]


def test_results_of_earlier_recipes_are_compared_as_they_are_computed(models: Models) -> None:
    base = draw(torch.float32, 0)
    tuned = [draw(torch.float32, seed, base) for seed in (1, 2)]
    paths = [models.write(each) for each in tuned]
    earlier = recipe_of("linear", None, paths)
    made, _ = models.merge(earlier)
    recipe = recipe_of("task_arithmetic", models.write(base), [models.write(made)])
    merged, _ = models.merge(recipe)

    report = streammerge.analyze(recipe, memory=MEMORY)

    check(report, base, [made], merged)
