"""From recipe and headers to a plan: what is merged, in which order, and that it can be run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.assignment.types import Action
from streammerge.checkpoint.types import Checkpoint, ShardFile, TensorEntry
from streammerge.dtypes import DType
from streammerge.errors import (
    MemoryBudgetError,
    MissingTensorError,
    PlanError,
    RecipeError,
    ShapeMismatchError,
)
from streammerge.methods import discover_methods
from streammerge.plan.asking import find_method
from streammerge.plan.chunking import Chunk, iter_units
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.planning import Machine, plan_merge
from streammerge.plan.sweeps import Needs
from streammerge.plan.types import PLAN_VERSION, MergePlan
from streammerge.recipe.parsing import parse_recipe, recipe_from_mapping
from streammerge.recipe.types import Recipe, Semantics
from streammerge.statistics import BLOCK, count_blocks
from streammerge.units import GIB, KIB, MIB

MACHINE = Machine(
    budget=4 * GIB, baseline=lambda *, torch: 200 * MIB, workers=3, readers=4, writers=2
)
METHODS = {name: method.parameters for name, method in discover_methods().items()}

Tensors = dict[str, tuple[DType, tuple[int, ...]]]
SMALL: Tensors = {
    "embed": (DType.BF16, (11, 7)),
    "layers.2.w": (DType.BF16, (7, 7)),
    "layers.10.w": (DType.BF16, (7, 7)),
    "norm": (DType.F32, (7,)),
    "ids": (DType.I64, (1, 5)),
}


def checkpoint(path: str, tensors: Tensors, *, shards: int = 1) -> Checkpoint:
    """Return headers that no file stands behind; tensors go round robin over the shards."""
    cursors = [100] * shards
    entries = {}
    for index, (name, (dtype, shape)) in enumerate(tensors.items()):
        shard = index % shards
        entry = TensorEntry(name, dtype, shape, shard, cursors[shard])
        cursors[shard] += entry.nbytes
        entries[name] = entry
    files = tuple(
        ShardFile(Path(f"/{path}/{index}.safetensors"), size, 1, f"digest of {path} {index}")
        for index, size in enumerate(cursors)
    )
    ordered = sorted(entries.values(), key=lambda entry: (entry.file, entry.offset))
    return Checkpoint(Path(f"/{path}"), files, {entry.name: entry for entry in ordered}, None)


def recipe(method: str, sources: int, *, base: bool = True, **document: Any) -> Recipe:
    document |= {
        "method": method,
        "sources": [
            {"path": f"s{index}"} | extra
            for index, extra in enumerate(document.pop("source_parameters", [{}] * sources))
        ],
    }
    if base:
        document["base"] = "base"
    return recipe_from_mapping(document, origin="recipe", methods=METHODS)


def plan(
    asked: Recipe, *tensors: Tensors, machine: Machine = MACHINE, shards: int = 1
) -> MergePlan:
    """Plan with one set of tensors per model, the base's first if there is one."""
    paths = [path.path.name for path in asked.sources]
    models = [
        checkpoint(path, each, shards=shards)
        for path, each in zip(
            ["base", *paths] if asked.base is not None else paths, tensors, strict=True
        )
    ]
    base, sources = (models[0], models[1:]) if asked.base is not None else (None, models)
    return plan_merge(asked, base, sources, machine)


def by_name(planned: MergePlan) -> dict[str, Any]:
    return {task.name: task for task in planned.tasks}


# -- what happens to each tensor


def test_every_tensor_is_merged_copied_or_dropped() -> None:
    asked = recipe(
        "ties",
        2,
        parameters={"density": 0.5},
        rules=[
            {"tensors": "norm", "copy": "base"},
            {"tensors": "layers.2.*", "copy": 1},
            {"tensors": "embed", "drop": True},
        ],
    )

    planned = plan(asked, SMALL, SMALL, SMALL)

    actions = {task.name: task.action for task in planned.tasks}
    assert actions == {
        "layers.2.w": Action.COPY,
        "layers.10.w": Action.MERGE,
        "norm": Action.COPY,
        "ids": Action.COPY_IF_EQUAL,
    }
    assert planned.dropped == ("embed",)
    taking_part = {
        task.name: [entry is not None for entry in task.inputs] for task in planned.tasks
    }
    assert taking_part["norm"] == [True, False, False]
    assert taking_part["layers.2.w"] == [False, False, True]
    assert taking_part["layers.10.w"] == taking_part["ids"] == [True, True, True]


def test_a_base_that_the_method_does_not_use_is_not_read() -> None:
    planned = plan(recipe("linear", 2), SMALL, SMALL, SMALL)

    assert all(task.inputs[0] is None for task in planned.tasks)


def test_the_output_keeps_the_dtype_of_the_base() -> None:
    wide = SMALL | {"embed": (DType.F32, (11, 7))}

    assert by_name(plan(recipe("task_arithmetic", 1), SMALL, wide))["embed"].dtype is DType.BF16
    # The base lends its dtype even where its values take no part.
    assert by_name(plan(recipe("linear", 1), SMALL, wide))["embed"].dtype is DType.BF16
    assert by_name(plan(recipe("linear", 1, base=False), wide))["embed"].dtype is DType.F32


@pytest.mark.parametrize(("rule", "norm"), [({}, DType.F16), ({"dtype": "keep"}, DType.F32)])
def test_the_asked_dtype_is_for_all_floats_but_those_that_keep_theirs(
    rule: dict[str, str], norm: DType
) -> None:
    asked = recipe(
        "linear",
        1,
        base=False,
        output={"dtype": "float16"},
        rules=[{"tensors": "norm", "copy": 0} | rule],
    )

    dtypes = {task.name: task.dtype for task in plan(asked, SMALL).tasks}

    assert dtypes == {
        "embed": DType.F16,
        "layers.2.w": DType.F16,
        "layers.10.w": DType.F16,
        "norm": norm,
        "ids": DType.I64,
    }


def test_a_merged_tensor_may_keep_its_dtype_too() -> None:
    rules = [{"tensors": "norm", "dtype": "keep"}]
    asked = recipe("linear", 1, base=False, output={"dtype": "float16"}, rules=rules)

    assert by_name(plan(asked, SMALL))["norm"].dtype is DType.F32


def test_all_missing_tensors_are_reported_at_once() -> None:
    fewer = {name: SMALL[name] for name in ("embed", "ids")}

    with pytest.raises(MissingTensorError) as caught:
        plan(recipe("linear", 2, base=False), SMALL, fewer)

    assert "3 tensor(s)" in str(caught.value)
    assert "not in sources[1] (s1): 3\n    layers.2.w\n    layers.10.w\n    norm" in str(
        caught.value
    )
    assert '{tensors: "layers.*.w", copy: 0}' in str(caught.value)


def test_a_dropped_tensor_may_be_missing_anywhere() -> None:
    more = SMALL | {"extra": (DType.F32, (3,))}
    asked = recipe("linear", 2, base=False, rules=[{"tensors": "extra", "drop": True}])

    assert plan(asked, SMALL, more).dropped == ("extra",)


def test_a_copied_tensor_may_have_any_shape_elsewhere() -> None:
    """A vocabulary that grew: the larger embedding is taken as it is."""
    grown = SMALL | {"embed": (DType.BF16, (13, 7))}
    asked = recipe("linear", 2, base=False, rules=[{"tensors": "embed", "copy": 1}])

    assert by_name(plan(asked, SMALL, grown))["embed"].shape == (13, 7)
    with pytest.raises(ShapeMismatchError, match=r"embed: shape \[11, 7\] in .*, \[13, 7\]"):
        plan(recipe("linear", 2, base=False), SMALL, grown)


def test_the_first_matching_rule_counts() -> None:
    asked = recipe(
        "ties",
        1,
        parameters={"density": 0.5},
        rules=[
            {"tensors": "layers.2.*", "density": 0.25},
            {"tensors": "layers.*", "density": 0.125},
        ],
    )

    planned = plan(asked, SMALL, SMALL)

    densities = {
        task.name: dict(planned.settings[task.setting].values)["density"]
        for task in planned.tasks
        if task.action is Action.MERGE
    }
    assert densities == {
        "layers.2.w": (0.25,),
        "layers.10.w": (0.125,),
        "embed": (0.5,),
        "norm": (0.5,),
    }


def test_equal_settings_are_one() -> None:
    asked = recipe(
        "ties",
        2,
        parameters={"density": 0.5},
        rules=[{"tensors": "norm", "density": 0.5}, {"tensors": "embed", "density": [0.5, 0.5]}],
    )

    assert len(plan(asked, SMALL, SMALL, SMALL).settings) == 1


# -- scopes and weights


def test_a_varying_density_is_refused_for_a_threshold_of_the_model() -> None:
    def asked(scope: str) -> Recipe:
        return recipe(
            "ties",
            1,
            parameters={"density": 0.5, "scope": scope},
            rules=[{"tensors": "norm", "density": 0.25}],
        )

    with pytest.raises(RecipeError, match="same density"):
        plan(asked("model"), SMALL, SMALL)
    assert not plan(asked("tensor"), SMALL, SMALL).model_scope


def test_a_rule_about_integers_varies_no_density() -> None:
    asked = recipe(
        "ties",
        1,
        parameters={"density": 0.5, "scope": "model"},
        rules=[{"tensors": "ids", "density": 0.125}],
    )

    assert plan(asked, SMALL, SMALL).model_scope


def test_what_varies_besides_the_density_may_vary_under_model_scope() -> None:
    asked = recipe(
        "ties",
        1,
        parameters={"density": 0.5, "scope": "model"},
        rules=[{"tensors": "norm", "weight": 0.25}],
    )

    assert plan(asked, SMALL, SMALL).model_scope


def test_blocks_of_a_model_wide_scope_are_numbered_by_name() -> None:
    """Not by file or order of work, which sharding would change."""
    tensors: Tensors = {
        "c": (DType.F32, (2 * BLOCK + 1,)),
        "a": (DType.F32, (5,)),
        "b": (DType.F32, (BLOCK,)),
        "i": (DType.I64, (BLOCK,)),
        "d": (DType.F32, (1,)),
    }
    asked = recipe("ties", 1, parameters={"density": 0.5, "scope": "model"})

    for shards in (1, 2, 5):
        tasks = by_name(plan(asked, tensors, tensors, shards=shards))
        assert [tasks[name].scope_block for name in "abcd"] == [0, 1, 2, 5]


@pytest.mark.parametrize(
    ("weights", "refused"),
    [
        ([1.0, -1.0], True),
        ([0.0, 0.0], True),
        ([-0.0, 0.0], True),
        # Rounds to 5.6e-17, and is what was asked for.
        ([0.1 + 0.2, -0.3], False),
        ([1.0, -0.5], False),
    ],
)
def test_weights_that_sum_to_zero_do_not_divide(
    weights: list[float],
    refused: bool,  # noqa: FBT001
) -> None:
    asked = recipe("linear", 2, base=False, parameters={"weight": weights})

    if refused:
        with pytest.raises(RecipeError, match="sum to 0"):
            plan(asked, SMALL, SMALL)
    else:
        plan(asked, SMALL, SMALL)


# -- order and place


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_work_goes_through_the_files_of_the_first_model_in_order(shards: int) -> None:
    planned = plan(recipe("linear", 2, base=False), SMALL, SMALL, shards=shards)

    places = [(entry.file, entry.offset) for task in planned.tasks if (entry := task.inputs[0])]

    assert places == sorted(places)


@pytest.mark.parametrize("shards", [2, 3])
def test_the_layout_does_not_depend_on_how_the_inputs_are_sharded(shards: int) -> None:
    def stored(planned: MergePlan) -> dict[str, tuple[int, int]]:
        return {task.name: (task.shard, task.offset) for task in planned.tasks}

    asked = recipe("linear", 2, base=False, output={"max_shard_size": 200})

    assert stored(plan(asked, SMALL, SMALL, shards=shards)) == stored(plan(asked, SMALL, SMALL))


def test_layout_and_tasks_name_the_same_tensors() -> None:
    planned = plan(recipe("linear", 1, base=False, output={"max_shard_size": 200}), SMALL, shards=3)

    for index, shard in enumerate(planned.layout.shards):
        tasks = [planned.tasks[each] for each in shard.tasks]
        assert {task.shard for task in tasks} == {index}
        assert [task.offset for task in tasks] == sorted(task.offset for task in tasks)


def test_a_rule_that_matches_no_tensor_is_refused() -> None:
    asked = recipe("linear", 2, rules=[{"tensors": "*.mpl.*", "copy": 0}])

    with pytest.raises(RecipeError, match=r'rules\[0\]\.tensors: "\*\.mpl\.\*" matches no tensor'):
        plan(asked, SMALL, SMALL, SMALL)


def test_a_file_that_two_models_share_is_opened_once() -> None:
    asked = recipe("task_arithmetic", 2)
    model = checkpoint("same", SMALL, shards=2)

    planned = plan_merge(asked, model, [model, model], MACHINE)

    assert planned.files == model.files


def test_bytes_to_read_count_a_model_wide_scope_twice() -> None:
    merged = sum(
        TensorEntry("", dtype, shape, 0, 0).nbytes
        for dtype, shape in SMALL.values()
        if dtype.is_float
    )
    ids = 5 * 8

    once = plan(recipe("ties", 1, parameters={"density": 0.5}), SMALL, SMALL)
    twice = plan(recipe("ties", 1, parameters={"density": 0.5, "scope": "model"}), SMALL, SMALL)

    assert once.bytes_to_read == once.input_nbytes == 2 * (merged + ids)
    # So few elements are collected at once, without a sample.
    assert twice.bytes_to_read == 2 * (2 * merged + ids)


def test_bytes_to_read_count_a_tensor_twice_that_is_too_large_to_keep() -> None:
    numel = 200_000_000
    large: Tensors = {"large": (DType.F32, (numel,)), "small": (DType.F32, (7,))}
    asked = recipe("ties", 1, parameters={"density": 0.01})

    small_machine = replace(MACHINE, budget=600 * MIB)
    planned = plan(asked, large, large, machine=small_machine)

    # Besides the sweep, a sample that tells where to look.
    sample = planned.bytes_to_read - planned.input_nbytes - 2 * 4 * numel
    assert 0 < sample < 2 * 4 * numel / 100
    assert plan(asked, large, large).bytes_to_read == planned.input_nbytes


def test_bytes_to_write_are_the_sizes_of_the_files() -> None:
    planned = plan(recipe("linear", 1, base=False), SMALL)

    assert planned.bytes_to_write == sum(shard.nbytes for shard in planned.layout.shards)


# -- a plan that is made can be run


TENSOR_SETS = st.dictionaries(
    st.sampled_from([f"t{index}" for index in range(8)]),
    st.tuples(
        st.sampled_from([DType.F32, DType.BF16, DType.F64]),
        st.one_of(st.integers(0, 9), st.integers(0, 5 * BLOCK)).map(lambda size: (size,)),
    ),
    min_size=1,
)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[Recipe, list[Tensors]]:
    tensors = draw(TENSOR_SETS)
    sources = draw(st.integers(1, 4))
    base = draw(st.booleans())
    method = draw(st.sampled_from(["linear", "ties", "task_arithmetic"])) if base else "linear"
    places = [*range(sources), *(["base"] if base else [])]
    rules = [
        {"tensors": name, "copy": draw(st.sampled_from(places))}
        for name in tensors
        if draw(st.booleans())
    ]
    document: dict[str, Any] = {"rules": rules}
    if method == "ties":
        scope = draw(st.sampled_from(["tensor", "model"]))
        document["parameters"] = {"density": 0.5, "scope": scope}
    asked = recipe(method, sources, base=base, **document)
    return asked, [tensors] * (sources + base)


def smallest_budget(asked: Recipe, *tensors: Tensors) -> int:
    """Return the smallest budget that is accepted, or a little more."""
    with pytest.raises(MemoryBudgetError) as caught:
        plan(asked, *tensors, machine=replace(MACHINE, budget=1))
    named = re.search(r"--memory (\d+)MiB or more", str(caught.value))
    assert named is not None
    # The named one leaves room for a process that starts a little larger; here it never does.
    high = int(named[1]) * MIB
    low = high - 17 * MIB
    while high - low > 128 * KIB:
        middle = (low + high) // 2
        try:
            plan(asked, *tensors, machine=replace(MACHINE, budget=middle))
            high = middle
        except MemoryBudgetError:
            low = middle
    return high


def chunks_of(planned: MergePlan) -> list[Chunk]:
    needs = Needs(planned, find_method(planned.method))
    units = iter_units(planned, must_look=needs.must_look)
    return [chunk for unit in units for chunk in unit.chunks]


def check_slots(planned: MergePlan) -> None:
    """Check that every chunk gets its slots: it takes them at once, and would wait for ever."""
    for chunk in chunks_of(planned):
        assert len(chunk.models) <= planned.resources.slots


@given(jobs(), st.integers(1, 5), st.one_of(st.just(0), st.integers(0, 64 * MIB)))
@settings(deadline=None, max_examples=100)
def test_no_chunk_waits_for_more_slots_than_there_are(
    job: tuple[Recipe, list[Tensors]], shards: int, spare: int
) -> None:
    asked, tensors = job
    machine = replace(MACHINE, budget=smallest_budget(asked, *tensors) + spare)

    planned = plan(asked, *tensors, machine=machine, shards=shards)

    assert planned.memory.peak <= machine.budget
    check_slots(planned)


def test_copies_from_a_base_that_is_not_merged_get_their_slot_in_the_smallest_budget() -> None:
    """A merge reads the sources, a copy the base, and both may share a chunk."""
    tensors: Tensors = {"a": (DType.F32, (5,)), "b": (DType.F32, (5,))}
    asked = recipe("linear", 3, rules=[{"tensors": "b", "copy": "base"}])
    budget = smallest_budget(asked, *[tensors] * 4)

    planned = plan(asked, *[tensors] * 4, machine=replace(MACHINE, budget=budget))

    check_slots(planned)


def test_copies_from_every_source_get_their_slots() -> None:
    """Tensors without elements are small enough to share a chunk even when nothing is merged."""
    tensors: Tensors = dict.fromkeys("abc", (DType.F32, (0,)))
    rules = [{"tensors": name, "copy": index} for index, name in enumerate(tensors)]
    asked = recipe("linear", 3, base=False, rules=rules)

    check_slots(plan(asked, *[tensors] * 3))


def test_a_model_of_which_all_is_copied_is_read_in_large_chunks() -> None:
    """Thousands of small copies must not become thousands of chunks."""
    tensors: Tensors = {f"t{index}": (DType.F32, (5,)) for index in range(1000)}
    asked = recipe("linear", 1, base=False, rules=[{"tensors": "*", "copy": 0}])

    assert len(chunks_of(plan(asked, tensors))) < 10


@given(jobs())
@settings(deadline=None, max_examples=50)
def test_a_plan_survives_json(job: tuple[Recipe, list[Tensors]]) -> None:
    planned = plan(job[0], *job[1])

    assert parse_plan(dump_plan(planned)) == planned


def test_a_plan_prints_the_same_when_it_was_read_back() -> None:
    planned = plan(recipe("linear", 1, base=False), SMALL)

    assert str(parse_plan(dump_plan(planned))) == str(planned)
    assert str(planned).startswith("method ")


@given(jobs())
@settings(deadline=None, max_examples=50)
def test_the_recipe_in_a_plan_is_the_recipe_it_was_made_from(
    job: tuple[Recipe, list[Tensors]],
) -> None:
    planned = plan(job[0], *job[1])

    # It says whose definition of the method was meant, too.
    assert parse_recipe(planned.recipe, origin="recipe", methods=METHODS) == replace(
        job[0], semantics=Semantics(planned.semantics)
    )


def test_a_plan_of_another_version_is_refused() -> None:
    document = json.loads(dump_plan(plan(recipe("linear", 1, base=False), SMALL)))
    document["version"] = PLAN_VERSION + 1

    with pytest.raises(PlanError, match=f"version {PLAN_VERSION + 1}, this is version"):
        parse_plan(json.dumps(document))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}'])
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        parse_plan(text)


def test_the_scope_counts_the_blocks_of_every_merged_tensor() -> None:
    tensors: Tensors = {name: (DType.F32, (size,)) for name, size in (("a", 0), ("b", 3))}
    asked = recipe("ties", 1, parameters={"density": 0.5, "scope": "model"})

    tasks = by_name(plan(asked, tensors, tensors))

    # A tensor without elements has no block, so its neighbour may start at the same one.
    assert count_blocks(0) == 0
    assert (tasks["a"].scope_block, tasks["b"].scope_block) == (0, 0)


# -- what people read


def test_the_table_names_the_parts_that_a_person_decides_by() -> None:
    asked = recipe("ties", 2, parameters={"density": 0.5}, rules=[{"tensors": "norm", "copy": 0}])

    table = str(plan(asked, SMALL, SMALL, SMALL))

    for words in (
        "ties (peft semantics), computed in F32",
        "sources[1]",
        "3 merged, 1 copied, 1 copied if equal everywhere; stored as BF16, F32, I64",
        "density=0.5",
        "every input byte is read once",
        ".safetensors",
        "of 4.0 GiB",
    ):
        assert words in table


def test_an_unknown_method_is_named_with_a_near_one() -> None:
    with pytest.raises(RecipeError, match='no method "dare_lineer"; did you mean "dare_linear"'):
        find_method("dare_lineer")
