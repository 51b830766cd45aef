"""Merged values and files, bit for bit, against whole models in memory and against PEFT."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from models import (
    BLOCK,
    INDEX_NAME,
    Models,
    Tensors,
    assert_same_bits,
    assert_same_model,
    load_model,
    recipe_of,
    recut,
    residence_of,
    tight_plan,
)
from oracles import merge_in_memory, model_trims, trim_by_sorting
from safetensors import safe_open
from safetensors.torch import load_file

import streammerge
from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.checkpoint.outputform import MANIFEST_NAME, RECIPE_NAME
from streammerge.errors import MemoryBudgetError
from streammerge.plan.chunking import Residence
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.planning import Machine, plan_merge
from streammerge.plan.types import MergePlan
from streammerge.rng import keep_mask, stream_key
from streammerge.units import MIB

BIG = (2, 2 * BLOCK + 1001)
"""Five blocks, the last one short."""


def smooth(seed: int, n_models: int, shapes: dict[str, tuple[int, ...]]) -> list[Tensors]:
    """Return models of normal numbers; sources lie near the base."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    near = [
        {n: t + torch.randn(t.shape, generator=generator) * 0.1 for n, t in base.items()}
        for _ in range(n_models - 1)
    ]
    return [base, *near]


def coarse(
    seed: int, n_models: int, shapes: dict[str, tuple[int, ...]], levels: int = 5
) -> list[Tensors]:
    """Return models on a grid: task vectors have 2 * levels + 1 values, zero often among them."""
    generator = torch.Generator().manual_seed(seed)

    def grid(shape: tuple[int, ...], top: int) -> torch.Tensor:
        return torch.randint(-top, top + 1, shape, generator=generator) / 8

    base = {name: grid(shape, 20) for name, shape in shapes.items()}
    near = [{n: t + grid(shapes[n], levels) for n, t in base.items()} for _ in range(n_models - 1)]
    return [base, *near]


def in_every_residence(recipe: Any, name: str, *, inputs: int) -> dict[str, MergePlan]:
    """Plan a merge so that tensor ``name`` is held in every way there is."""
    plan = streammerge.plan(recipe, memory="3GiB", workers=2)
    chunks = next(-(-task.numel // BLOCK) for task in plan.tasks if task.name == name)
    plans = {
        "passing": recut(plan, slots=2 * inputs, slot_blocks=chunks),
        "resident": recut(plan, slots=chunks * inputs + 1, workers=3),
        "streamed": recut(plan, slots=inputs, workers=1),
        # Without room for magnitudes every threshold is found by histograms.
        "streamed, histograms": recut(plan, slots=2 * inputs, statistics_bytes=1),
        "resident, histograms": recut(plan, slots=chunks * inputs, statistics_bytes=1),
    }
    for what, planned in plans.items():
        assert residence_of(planned, name) is Residence(what.split(",")[0])
    return plans


# 1. Trimming, where many magnitudes equal the threshold.


@pytest.mark.parametrize("policy", ["exact", "inclusive", "strict"])
@pytest.mark.parametrize("density", [1e-5, 0.2, 0.77, 0.999])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_ties_at_the_threshold_follow_the_policy_in_every_residence(
    method: str, density: float, policy: str, models: Models
) -> None:
    # At 0.999 the threshold is 0: more is to be kept than is not zero.
    base, *sources = coarse(3, 3, {"big": BIG, "small": (40, 5)})
    parameters = {
        "density": [density, density / 2],
        "weight": [0.7, -1.3],
        "tie_policy": policy,
    }
    recipe = recipe_of(
        method, models.write(base), [models.write(each) for each in sources], parameters=parameters
    )
    expected = merge_in_memory(method, base, sources, parameters)

    for what, plan in in_every_residence(recipe, "big", inputs=3).items():
        merged, _ = models.merge(plan)
        assert_same_bits(merged["big"], expected["big"], what)
        assert_same_bits(merged["small"], expected["small"], what)


@pytest.mark.parametrize("density", [0.0, 0.001, 0.5, 0.9999999, 1.0])
def test_every_density_gives_functionals_result_on_whole_tensors(
    density: float, models: Models
) -> None:
    base, *sources = smooth(5, 4, {"big": BIG, "small": (7, 5), "one": (1,)})
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    weights = [0.5, 1.25, -0.75]
    tasks = {n: [each[n] - base[n] for each in sources] for n in base}
    calls = {
        "ties": lambda each: streammerge.functional.ties(each, weights, density),
        "magnitude_prune": lambda each: streammerge.functional.magnitude_prune(
            each, weights, density
        ),
    }
    for method, call in calls.items():
        parameters = {"density": density, "weight": weights}
        recipe = recipe_of(method, base_path, paths, parameters=parameters)
        merged, _ = models.merge(recut(streammerge.plan(recipe, memory="3GiB"), slots=9))
        assert_same_model(merged, {n: base[n] + call(tasks[n]) for n in base})


@pytest.mark.parametrize("n_sources", [*range(1, 10), 17])
@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "linear", "dare_ties"])
def test_any_number_of_sources_is_summed_from_left_to_right(
    method: str, n_sources: int, models: Models
) -> None:
    """In every column: sizes beside multiples of the vector width, of a block, of several blocks.

    For up to four sources that is what torch.sum gives, which the oracle demands as well.
    """
    shapes = {"big": (BLOCK * 2 + 77,), "block": (BLOCK,), "small": (7, 13), "one": (1,)}
    base, *sources = smooth(n_sources, n_sources + 1, shapes)
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    parameters: dict[str, Any] = {"weight": [0.1 * (index + 1) for index in range(n_sources)]}
    if method not in {"linear", "task_arithmetic"}:
        parameters["density"] = 0.6
    on_tasks = method != "linear"
    recipe = recipe_of(method, base_path if on_tasks else None, paths, parameters=parameters)
    plan = recut(streammerge.plan(recipe, memory="2GiB"), slots=2 * n_sources + 2)
    merged, _ = models.merge(plan)

    expected = merge_in_memory(method, base if on_tasks else None, sources, parameters)
    assert_same_model(merged, expected)


def test_torchs_own_threads_do_not_matter(models: Models) -> None:
    base, *sources = smooth(8, 8, {"big": BIG})
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    recipe = recipe_of("ties", base_path, paths, parameters={"density": 0.3})
    before = torch.get_num_threads()
    merged = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            merged.append(models.merge(recipe, workers=2)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)

    assert_same_model(merged[1], merged[0])
    assert_same_model(merged[2], merged[0])


@pytest.mark.filterwarnings("ignore:The density .* no pruning will be performed")
@pytest.mark.parametrize("density", [0.2, 0.9, 1.0])
def test_peft_gives_the_same_bits_where_no_magnitudes_are_equal(
    density: float, models: Models
) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    generator = torch.Generator().manual_seed(1)
    numel = BLOCK + 500
    base = {"weight": torch.zeros(numel)}
    # Each magnitude once, so that torch.topk has no choice.
    magnitudes = torch.arange(1, numel + 1) / 1024
    sources = [
        {
            "weight": magnitudes[torch.randperm(numel, generator=generator)]
            * (torch.randint(0, 2, (numel,), generator=generator) * 2 - 1)
        }
        for _ in range(3)
    ]
    tasks = [each["weight"] for each in sources]
    weights = torch.tensor([0.3, -1.1, 2.0])
    expected = {
        "ties": peft.ties(tasks, weights, density),
        "magnitude_prune": peft.magnitude_prune(tasks, weights, density),
        "task_arithmetic": peft.task_arithmetic(tasks, weights),
    }
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    for method, tensor in expected.items():
        parameters: dict[str, Any] = {"weight": [0.3, -1.1, 2.0]}
        if method != "task_arithmetic":
            parameters["density"] = density
        recipe = recipe_of(method, base_path, paths, parameters=parameters)
        merged, _ = models.merge(recut(streammerge.plan(recipe, memory="3GiB"), slots=4))
        assert_same_bits(merged["weight"], tensor, method)


# 2. One threshold per source over the whole model.

MODEL_SHAPES = {
    "layers.10.weight": (BLOCK + 3,),
    "layers.2.weight": (300, 700),
    "embed": (17, 3),
    "norm": (129,),
    "none": (0,),
    "scale": (),
}


@pytest.mark.parametrize("policy", ["exact", "inclusive", "strict"])
@pytest.mark.parametrize("density", [0.0001, 0.35, 0.97])
def test_a_model_wide_threshold_equals_sorting_the_whole_model(
    density: float, policy: str, models: Models
) -> None:
    base, *sources = coarse(9, 3, MODEL_SHAPES, levels=3)
    parameters = {
        "density": [density, 0.5],
        "scope": "model",
        "tie_policy": policy,
        "weight": [0.5, 0.25],
    }
    # The order of names decides which ties are kept, whatever the order in the files.
    base_path = models.write(base, shards=3, layout="reversed")
    paths = [models.write(sources[0]), models.write(sources[1], shards=2, layout="interleaved")]
    recipe = recipe_of("magnitude_prune", base_path, paths, parameters=parameters)
    plan = streammerge.plan(recipe, memory="3GiB", workers=2)
    expected = merge_in_memory("magnitude_prune", base, sources, parameters)
    trims = model_trims(base, sources, parameters)

    for cut in (
        plan,
        tight_plan(recipe),
        recut(plan, slots=3),
        recut(plan, slots=6, workers=4, statistics_bytes=1),
    ):
        merged, manifest = models.merge(cut)
        assert_same_model(merged, expected)
        for record in manifest.tensors.values():
            assert record.thresholds == tuple(trim.threshold for trim in trims)
        kept = [
            sum(record.density[source] * record.numel for record in manifest.tensors.values())
            for source in range(2)
        ]
        assert kept == pytest.approx([trim.keep.sum() for trim in trims])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_wide_ties_equals_sorting_the_whole_model(
    dtype: torch.dtype, models: Models
) -> None:
    base, *sources = [
        {name: tensor.to(dtype) for name, tensor in each.items()}
        for each in smooth(2, 4, MODEL_SHAPES)
    ]
    parameters = {"density": [0.1, 0.5, 0.9], "scope": "model"}
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    recipe = recipe_of("ties", base_path, paths, parameters=parameters)
    expected = merge_in_memory("ties", base, sources, parameters)
    plan = streammerge.plan(recipe, memory="3GiB", workers=2)

    for cut in (plan, recut(plan, slots=4), recut(plan, slots=8, statistics_bytes=1)):
        assert_same_model(models.merge(cut)[0], expected)


def test_copied_and_integer_tensors_have_no_part_in_a_model_wide_threshold(models: Models) -> None:
    base, *sources = coarse(4, 3, MODEL_SHAPES)
    steps = torch.arange(70_000)
    base_path, *paths = [models.write(each | {"steps": steps}) for each in (base, *sources)]
    recipe = recipe_of(
        "ties",
        base_path,
        paths,
        parameters={"density": 0.3, "scope": "model"},
        rules=[{"tensors": "layers.2.*", "copy": 1}, {"tensors": "norm", "drop": True}],
    )
    left = {"layers.2.weight", "norm"}
    base, *others = [
        {name: tensor for name, tensor in each.items() if name not in left}
        for each in (base, *sources)
    ]
    expected = merge_in_memory("ties", base, others, {"density": 0.3, "scope": "model"})
    plan = streammerge.plan(recipe, memory="3GiB", workers=2)

    for cut in (plan, recut(plan, slots=3, slot_blocks=1)):
        merged, manifest = models.merge(cut)
        copied = {"layers.2.weight": sources[1]["layers.2.weight"], "steps": steps}
        assert_same_model(merged, expected | copied)
        assert manifest.dropped == ("norm",)


# 3. The other methods' arithmetic.


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(1.0,), (0.6, 0.4), (0.3, -0.1, 2.0), (1.0, 2.0, 3.0, 4.0)])
def test_linear_adds_from_left_to_right_in_float32(
    weights: tuple[float, ...], *, normalize: bool, models: Models
) -> None:
    _, *sources = smooth(6, len(weights) + 1, {"big": BIG, "small": (11,)})
    parameters = {"weight": weights, "normalize": normalize}
    recipe = recipe_of(
        "linear", None, [models.write(each) for each in sources], parameters=parameters
    )
    merged, _ = models.merge(recipe)

    for name, tensor in merged.items():
        total = sources[0][name] * weights[0]
        exact = sources[0][name].double() * weights[0]
        for source, weight in zip(sources[1:], weights[1:], strict=True):
            total = total + source[name] * weight
            exact = exact + source[name].double() * weight
        if normalize:
            total = total / sum(weights)
            exact = exact / sum(weights)
        assert_same_bits(tensor, total)
        # A product, a sum and a quotient, each rounded to 24 bits, of numbers below 6.
        size = 6 * sum(abs(weight) for weight in weights) / (sum(weights) if normalize else 1)
        assert float((tensor.double() - exact).abs().max()) < size * (len(weights) + 2) * 2**-24


@pytest.mark.parametrize("density", [0.1, 0.5, (0.3, 1.0)])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_by_position_and_records_what_it_kept(
    method: str, density: Any, models: Models
) -> None:
    base, *sources = smooth(12, 3, {"big": BIG, "small": (9, 9)})
    parameters = {"density": density, "weight": (1.0, 0.5)}
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    recipe = recipe_of(method, base_path, paths, parameters=parameters, seed=42)
    merged, manifest = models.merge(recut(streammerge.plan(recipe, memory="3GiB"), slots=6))

    assert_same_model(merged, merge_in_memory(method, base, sources, parameters, seed=42))
    densities = density if isinstance(density, tuple) else (density, density)
    for name, record in manifest.tensors.items():
        kept = [
            keep_mask(stream_key(42, source, name), 0, record.numel, each).sum() / record.numel
            for source, each in enumerate(densities)
        ]
        assert record.density == tuple(kept)
        assert record.thresholds == ()


def test_float64_keeps_what_float32_would_round_away(models: Models) -> None:
    base = {"weight": torch.ones(BLOCK + 5, dtype=torch.float64)}
    sources = [{"weight": base["weight"] + 2.0**-40 * (index + 1)} for index in range(2)]
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    for compute, expected in (("float64", 1 + 3 * 2.0**-40), ("float32", 1.0)):
        recipe = recipe_of("task_arithmetic", base_path, paths, compute_dtype=compute)
        merged, _ = models.merge(recipe)
        assert_same_bits(merged["weight"], torch.full_like(base["weight"], expected))


# 4. Parameters by tensor and source.


def test_rules_and_sources_change_parameters_by_tensor(models: Models) -> None:
    shapes = {"a.mlp": BIG, "b.mlp": (50,), "a.attn": (40, 40), "head": (30,)}
    base, *sources = coarse(13, 3, shapes)
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    recipe = recipe_of(
        "ties",
        base_path,
        [{"path": paths[0], "weight": 0.6}, {"path": paths[1], "weight": 0.4, "density": 0.3}],
        parameters={"density": 0.2},
        rules=[
            {"tensors": "a.mlp", "density": [0.9, 0.05], "majority_sign_method": "frequency"},
            {"tensors": "*.mlp", "density": 0.1, "weight": 2.0},
            {"tensors": "head", "density": 1.0},
        ],
    )
    own = {
        "a.mlp": {
            "density": (0.9, 0.05),
            "weight": (0.6, 0.4),
            "majority_sign_method": "frequency",
        },
        "b.mlp": {"density": 0.1, "weight": 2.0},
        "a.attn": {"density": (0.2, 0.3), "weight": (0.6, 0.4)},
        "head": {"density": 1.0, "weight": (0.6, 0.4)},
    }
    plan = streammerge.plan(recipe, memory="3GiB", workers=2)
    for cut in (plan, recut(plan, slots=3)):
        merged, _ = models.merge(cut)
        for name, parameters in own.items():
            alone = merge_in_memory(
                "ties", {name: base[name]}, [{name: s[name]} for s in sources], parameters
            )
            assert_same_bits(merged[name], alone[name], name)


# 5. Which tensors there are, and what becomes of those that are not merged.


def test_tensors_are_copied_and_dropped_as_the_rules_say(models: Models) -> None:
    base, *sources = smooth(14, 3, {"a": BIG, "b": (10,), "c": (20,), "d": (30,)})
    base["only.base"], sources[0]["only.source"] = torch.rand(5), torch.rand(6)
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    recipe = recipe_of(
        "task_arithmetic",
        base_path,
        paths,
        rules=[
            {"tensors": "a", "copy": "base"},
            {"tensors": "b", "copy": 1, "dtype": "keep"},
            {"tensors": "c", "drop": True},
            {"tensors": "only.source", "copy": 0},
        ],
        missing="base",
        output={"dtype": "bfloat16"},
    )
    merged, manifest = models.merge(recipe)

    # Copies have the output's type, unless a rule says that they keep their own.
    expected = {"a": base["a"], "only.source": sources[0]["only.source"]}
    expected["only.base"] = base["only.base"]
    expected = {name: tensor.bfloat16() for name, tensor in expected.items()}
    expected["b"] = sources[1]["b"]
    rest = [{"d": each["d"]} for each in (base, *sources)]
    expected |= merge_in_memory("task_arithmetic", rest[0], rest[1:], dtype=torch.bfloat16)
    assert_same_model(merged, expected)
    assert manifest.dropped == ("c",)
    assert manifest.copied_from_base == ("only.base",)
    actions = {name: record.action for name, record in manifest.tensors.items()}
    converted = dict.fromkeys(["a", "only.source", "only.base"], "convert")
    assert actions == converted | {"b": "copy", "d": "merge"}


def test_integers_and_bool_are_copied_when_all_inputs_agree(models: Models) -> None:
    integers = {
        "ids": torch.arange(BLOCK + 9),  # large enough to be cut
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    base, *sources = [each | integers for each in smooth(15, 3, {"w": (100,)})]
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    recipe = recipe_of("task_arithmetic", base_path, paths)
    plan = streammerge.plan(recipe, memory="3GiB")
    floats = [{"w": each["w"]} for each in (base, *sources)]
    expected = integers | merge_in_memory("task_arithmetic", floats[0], floats[1:])

    for cut in (plan, recut(plan, slots=3)):
        merged, manifest = models.merge(cut)
        assert_same_model(merged, expected)
        assert manifest.tensors["ids"].action == "copy if equal"


# 6. Element types and files of the inputs.

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, *FP8])
@pytest.mark.parametrize("output", [torch.float32, torch.float16, torch.bfloat16, *FP8])
def test_the_float32_result_is_rounded_once_to_the_output_dtype(
    stored: torch.dtype, output: torch.dtype, models: Models
) -> None:
    base, *sources = [
        {name: tensor.to(stored) for name, tensor in each.items()}
        for each in smooth(16, 3, {"big": (BLOCK + 11,), "small": (3, 5)})
    ]
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    parameters = {"density": 0.4, "weight": (0.7, 0.9)}
    recipe = recipe_of(
        "ties",
        base_path,
        paths,
        parameters=parameters,
        output={"dtype": str(output).removeprefix("torch.")},
    )
    merged, _ = models.merge(recut(streammerge.plan(recipe, memory="3GiB"), slots=3))

    wide = merge_in_memory("ties", base, sources, parameters, dtype=torch.float32)
    assert_same_model(merged, {name: tensor.to(output) for name, tensor in wide.items()})


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float32, torch.float16), torch.float32),
        (FP8, torch.bfloat16),
    ],
)
def test_a_promoted_result_holds_the_values_of_all_inputs(
    stored: tuple[torch.dtype, torch.dtype], expected: torch.dtype, models: Models
) -> None:
    drawn = [
        {name: tensor.to(dtype) for name, tensor in each.items()}
        for each, dtype in zip(smooth(18, 2, {"w": (64, 3)}), stored, strict=True)
    ]
    paths = [models.write(each) for each in drawn]
    name = str(stored[0]).removeprefix("torch.")
    (paths[0] / "config.json").write_text(json.dumps({"model_type": "x", "torch_dtype": name}))
    out = models.new_output()

    streammerge.merge(recipe_of("linear", None, paths, output={"dtype": "promoted"}), out)

    mean = (drawn[0]["w"].float() + drawn[1]["w"].float()) / 2
    assert_same_model(load_model(out), {"w": mean.to(expected)})
    said = json.loads((out / "config.json").read_text())["torch_dtype"]
    assert said == str(expected).removeprefix("torch.")


def test_every_model_may_store_its_own_dtype(models: Models) -> None:
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    drawn = smooth(17, 4, {"big": BIG, "small": (5,), "other": (64, 3)})
    base, *sources = [
        {name: tensor.to(dtype) for name, tensor in each.items()}
        for each, dtype in zip(drawn, dtypes, strict=True)
    ]
    # And within one model.
    base["small"] = base["small"].to(torch.float32)
    sources[0]["other"] = sources[0]["other"].to(torch.bfloat16)
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    parameters = {"density": 0.5}
    recipe = recipe_of("magnitude_prune", base_path, paths, parameters=parameters)
    plan = streammerge.plan(recipe, memory="3GiB", workers=2)
    expected = merge_in_memory("magnitude_prune", base, sources, parameters)

    assert expected["big"].dtype == torch.bfloat16
    for cut in (plan, recut(plan, slots=4), recut(plan, slots=24)):
        assert_same_model(models.merge(cut)[0], expected)


def test_torch_files_give_the_bytes_that_safetensors_files_give(models: Models) -> None:
    drawn = smooth(18, 3, {"big": BIG, "t": (33, 5), "scalar": ()})
    parameters = {"density": 0.3}

    def merged(**options: Any) -> Tensors:
        base, *paths = [models.write(each, **options) for each in drawn]
        return models.merge(recipe_of("ties", base, paths, parameters=parameters))[0]

    expected = merged()
    assert_same_model(merged(binary=True), expected)
    assert_same_model(merged(binary=True, shards=2, layout="reversed"), expected)


def test_transposed_and_shared_tensors_of_torch_files_are_read_in_flat_order(
    models: Models,
) -> None:
    shared = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    base, source = {"w": torch.zeros(6, 4)}, {"w": torch.zeros(6, 4)}
    paths = []
    for index, tensors in enumerate((base, source)):
        path = models.root / f"{index}.bin"
        torch.save(tensors | {"tied": shared, "again": shared}, path)
        paths.append(path)
    merged, _ = models.merge(recipe_of("linear", None, paths))

    assert_same_model(merged, {"w": base["w"], "tied": shared, "again": shared})


# 7. The files of the output.


def test_shards_hold_what_the_index_says_and_no_more_than_allowed(models: Models) -> None:
    shapes = {f"layers.{index}.w": (1000 + index,) for index in range(12)} | {"huge": (30_000,)}
    base, *sources = smooth(19, 3, shapes)
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    recipe = recipe_of("task_arithmetic", base_path, paths, output={"max_shard_size": "10KB"})
    out = models.new_output()
    manifest = streammerge.merge(recipe, out, memory="3GiB")

    index = json.loads((out / INDEX_NAME).read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    total = 0
    for shard in shards:
        tensors = load_file(out / shard)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        assert nbytes <= 10_000 or list(tensors) == ["huge"]
        assert sorted(n for n, s in index["weight_map"].items() if s == shard) == sorted(tensors)
        with safe_open(out / shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        total += nbytes
    assert index["metadata"]["total_size"] == total
    assert_same_model(load_model(out), merge_in_memory("task_arithmetic", base, sources))
    assert sorted(path.name for path in out.iterdir()) == sorted([*manifest.files, MANIFEST_NAME])


def test_the_same_recipe_gives_the_same_files(models: Models) -> None:
    base, *paths = [models.write(each) for each in smooth(20, 3, {"big": BIG, "small": (5, 5)})]
    recipe = recipe_of("ties", base, paths, parameters={"density": 0.2})
    outs = [models.new_output(), models.new_output()]
    for out, workers in zip(outs, (1, 3), strict=True):
        streammerge.merge(recipe, out, memory="3GiB", workers=workers)

    first, second = ((out / "model.safetensors").read_bytes() for out in outs)
    assert first == second
    manifests = [json.loads((out / MANIFEST_NAME).read_text()) for out in outs]
    for manifest in manifests:
        # The model card has the name of the directory for a title.
        del manifest["run"], manifest["digest"], manifest["files"]["README.md"]
    assert manifests[0] == manifests[1]


def test_the_stored_recipe_makes_the_same_model_again(models: Models) -> None:
    base, *paths = [models.write(each) for each in smooth(21, 3, {"big": BIG, "small": (5, 5)})]
    recipe = recipe_of(
        "dare_ties",
        base,
        [{"path": paths[0], "weight": 0.1}, {"path": paths[1], "density": 0.25}],
        parameters={"density": 0.75},
        rules=[{"tensors": "small", "copy": 0}],
        seed=2**64 - 1,
        output={"dtype": "bfloat16", "max_shard_size": 100_000},
    )
    out, again = models.new_output(), models.new_output()
    first = streammerge.merge(recipe, out, memory="3GiB")
    second = streammerge.merge(out / RECIPE_NAME, again, memory="3GiB")

    assert (out / RECIPE_NAME).read_text() == first.recipe == second.recipe
    assert_same_model(load_model(again), load_model(out))


def test_the_manifest_records_counts_and_thresholds_of_every_source(models: Models) -> None:
    shapes = {"big": BIG, "small": (40,), "tiny": (3,), "empty": (0,)}
    base, *sources = coarse(22, 3, shapes)
    # Task vectors that are mostly zero: the k-th magnitude is 0 there.
    base["sparse"] = torch.ones(500)
    for source in sources:
        source["sparse"] = base["sparse"] + (torch.arange(500) < 20)
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    densities = (0.3, 0.05)
    for policy in ("exact", "inclusive", "strict"):
        parameters = {"density": densities, "tie_policy": policy}
        recipe = recipe_of("ties", base_path, paths, parameters=parameters)
        plan = streammerge.plan(recipe, memory="3GiB", workers=2)
        for cut in (plan, recut(plan, slots=3)):
            _, manifest = models.merge(cut)
            for name, record in manifest.tensors.items():
                trims = [
                    trim_by_sorting((s[name] - base[name]).reshape(-1).numpy(), density, policy)
                    for s, density in zip(sources, densities, strict=True)
                ]
                assert record.thresholds == tuple(trim.threshold for trim in trims), name
                kept = tuple(int(trim.keep.sum()) / max(record.numel, 1) for trim in trims)
                assert record.density == kept, (name, policy)


def least_plan(recipe: Any) -> MergePlan:
    """Plan with so little memory that no input can be kept."""
    parsed = streammerge.load_recipe(recipe)
    base, *sources = [
        streammerge.read_checkpoint(path)
        for path in (parsed.base, *(s.path for s in parsed.sources))
    ]
    for budget in range(MIB, 500 * MIB, MIB // 4):
        machine = Machine(
            budget=budget, baseline=lambda *, torch: 0, workers=1, readers=2, writers=1
        )
        try:
            return plan_merge(parsed, base, sources, machine)
        except MemoryBudgetError:
            continue
    raise AssertionError("nothing fits")


def check_bytes_read(
    models: Models, blocks: int, parameters: dict[str, Any], *, passes: int, tight: bool
) -> None:
    """Check the plan's count by hand, and what was read against the plan."""
    shapes = {"big": (blocks * BLOCK - 30,), "small": (9,)}
    drawn = [each | {"ids": torch.arange(100)} for each in smooth(23, 3, shapes)]
    base, *paths = [models.write(each) for each in drawn]
    big, small, ids = (sum(each[name].nbytes for each in drawn) for name in drawn[0])
    method = "ties" if parameters else "task_arithmetic"
    recipe = recipe_of(method, base, paths, parameters=parameters)
    plan = least_plan(recipe) if tight else streammerge.plan(recipe, memory="2GiB", workers=2)

    # Small tensors are never read twice for themselves, integers not for the model either.
    twice = small if "scope" in parameters else 0
    assert plan.input_nbytes == big + small + ids
    sampled = plan.bytes_to_read - (passes * big + small + twice + ids)
    # Up to two blocks everything is collected; a sample is an eighth at most.
    assert 0 < sampled <= big // 8 if passes == 2 and blocks > 2 else sampled == 0
    for kind in ByteSourceKind:
        _, manifest = models.merge(plan, byte_source=kind)
        assert manifest.run.bytes_by_stage["read"] == plan.bytes_to_read, kind


@pytest.mark.parametrize(
    ("parameters", "passes", "tight"),
    [
        ({}, 1, False),
        ({}, 1, True),
        ({"density": 0.2}, 1, False),
        ({"density": 0.2}, 2, True),
        ({"density": 0.2, "scope": "model"}, 2, False),
        ({"density": 0.2, "scope": "model"}, 2, True),
    ],
)
def test_the_bytes_read_are_those_the_plan_states(
    parameters: dict[str, Any], passes: int, *, tight: bool, models: Models
) -> None:
    # Three blocks do not stay in the smallest memory; beyond two, a sample comes before a sweep.
    check_bytes_read(models, 3, parameters, passes=passes, tight=tight)


@pytest.mark.parametrize("parameters", [{"density": 0.2}, {"density": 0.2, "scope": "model"}])
def test_the_plan_states_the_bytes_that_a_sample_reads_too(
    parameters: dict[str, Any], models: Models
) -> None:
    # Several sweeps of several chunks.
    check_bytes_read(models, 6, parameters, passes=2, tight=True)


def test_a_plan_survives_json(models: Models) -> None:
    base, *paths = [models.write(each) for each in smooth(24, 3, {"big": BIG, "small": (9,)})]
    recipe = recipe_of(
        "ties",
        base,
        paths,
        parameters={"density": [0.2, 0.1]},
        output={"dtype": "float16", "max_shard_size": 4096},
    )
    plan = streammerge.plan(recipe, memory="3GiB", workers=2)
    again = parse_plan(dump_plan(plan))

    assert again == plan
    assert_same_model(models.merge(again)[0], models.merge(recipe)[0])


def test_one_file_may_be_base_and_source_at_once(models: Models) -> None:
    base, source = smooth(25, 2, {"big": BIG, "small": (9,)})
    base_path, path = models.write(base), models.write(source)
    recipe = recipe_of("task_arithmetic", base_path, [base_path, path, path])
    merged, manifest = models.merge(recipe)

    assert_same_model(merged, merge_in_memory("task_arithmetic", base, [base, source, source]))
    assert len(manifest.inputs) == 2


# 8. NaN and infinity, let through.


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("ties", {"density": 0.3}), ("magnitude_prune", {"density": 0.3, "scope": "model"})],
)
def test_values_that_are_not_finite_are_merged_alike_in_every_residence(
    method: str, parameters: dict[str, Any], models: Models
) -> None:
    base, *sources = coarse(27, 3, {"big": BIG, "small": (40,)})
    for each in (base, *sources):
        flat = each["big"].view(-1)
        flat[::1009], flat[5::1013], flat[7::1019] = float("nan"), float("inf"), -float("inf")
    base_path, *paths = [models.write(each) for each in (base, *sources)]
    recipe = recipe_of(method, base_path, paths, parameters=parameters, non_finite="keep")
    expected, manifest = models.merge(recipe)
    found = sum(int((~each["big"].isfinite()).sum()) for each in (base, *sources))

    assert manifest.tensors["big"].not_finite == found
    assert (expected["big"][~base["big"].isfinite()].isfinite()).sum() == 0
    for what, plan in in_every_residence(recipe, "big", inputs=3).items():
        merged, again = models.merge(plan)
        # The bits of a NaN tell where it came from; any NaN is as good as another.
        for name in expected:
            np.testing.assert_array_equal(merged[name].numpy(), expected[name].numpy(), what)
        assert again.tensors == manifest.tensors, what


def test_more_nan_than_entries_to_keep_leave_nothing_else(models: Models) -> None:
    source = {"w": torch.arange(1000.0)}
    source["w"][::3] = float("nan")
    paths = [models.write({"w": torch.zeros(1000)}), models.write(source)]
    recipe = recipe_of(
        "magnitude_prune", paths[0], paths[1:], parameters={"density": 0.1}, non_finite="keep"
    )
    merged, _ = models.merge(recipe)

    # NaN ranks above every number, so that no number is among the largest 100; see functional.
    expected = streammerge.functional.magnitude_prune([source["w"]], [1.0], 0.1)
    np.testing.assert_array_equal(merged["w"].numpy(), expected.numpy())


@pytest.mark.slow
def test_a_tensor_too_large_to_collect_is_sampled_first_and_exact(models: Models) -> None:
    # 12 million elements: the sample chooses a band, and its guess is checked against a sort.
    shapes = {"big": (12_000_000,)}
    for make in (smooth, coarse):
        base, *sources = make(26, 3, shapes)
        base_path, *paths = [models.write(each) for each in (base, *sources)]
        for density in (1e-6, 0.2, 0.99):
            parameters = {"density": density}
            recipe = recipe_of("ties", base_path, paths, parameters=parameters)
            expected = merge_in_memory("ties", base, sources, parameters)
            plan = streammerge.plan(recipe, memory="2GiB", workers=2)
            for cut in (plan, recut(plan, slots=12), recut(plan, slots=12, statistics_bytes=1)):
                assert_same_model(models.merge(cut)[0], expected)


def test_masks_that_are_equal_everywhere_are_copied(models: Models) -> None:
    """Minus infinity less itself is no number."""
    mask = torch.full((7, 7), float("-inf")).triu(1)
    base, *sources = smooth(5, 3, {"a": (40,)})
    for each in (base, *sources):
        each["attn_mask"] = mask.clone()
    recipe = recipe_of("ties", models.write(base), [models.write(each) for each in sources])
    recipe["parameters"] = {"density": 0.5}
    recipe["output"] = {"dtype": "bfloat16"}

    merged, manifest = models.merge(recipe)

    assert torch.equal(merged["attn_mask"], mask)
    assert [note.text for note in manifest.notes] == [
        "1 mask(s) are copied if equal everywhere, not merged: attn_mask"
    ]


def test_copies_may_grow_more_than_anything_that_is_merged(models: Models) -> None:
    """Output buffers have room for them too."""
    drawn = smooth(6, 2, {"a": (40,), "b": (3 * BLOCK + 5,)})
    base, source = ({name: each.bfloat16() for name, each in model.items()} for model in drawn)
    recipe = recipe_of("linear", models.write(base), [models.write(source)])
    recipe["rules"] = [{"tensors": "b", "copy": "base"}, {"tensors": "a", "dtype": "keep"}]
    recipe["output"] = {"dtype": "float32"}

    merged, _ = models.merge(recipe)

    assert merged["a"].dtype is torch.bfloat16
    assert torch.equal(merged["b"], base["b"].float())
