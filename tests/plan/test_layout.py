"""Every output byte has one place, and the safetensors library finds what was put there."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streammerge.assignment.types import Action, AssignedTensor
from streammerge.dtypes import DType
from streammerge.plan.layout import plan_layout, render_header, render_indexes
from streammerge.plan.types import OutputLayout

NAMES = st.one_of(
    st.from_regex(r"layers\.[0-9]{1,3}\.(mlp|attn)\.weight", fullmatch=True),
    # Anything that UTF-8 can spell, but not the one name that the format keeps for itself.
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
)
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[AssignedTensor]:
    names = draw(st.lists(NAMES, min_size=1, max_size=20, unique=True))
    return [
        tensor(name, draw(SHAPES), draw(st.sampled_from([d for d in DType if d is not DType.F4])))
        for name in names
    ]


def tensor(name: str, shape: tuple[int, ...] = (4,), dtype: DType = DType.F32) -> AssignedTensor:
    return AssignedTensor(name, shape, dtype, Action.MERGE, (), 0)


def nbytes(each: AssignedTensor) -> int:
    return prod(each.shape) * each.dtype.itemsize


@dataclass(frozen=True)
class PlanOf:
    """As much of a plan as headers and index are made from."""

    tasks: list[Task]
    layout: OutputLayout


@dataclass(frozen=True)
class Task:
    name: str
    shape: tuple[int, ...]
    dtype: DType
    numel: int

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.shape


def plan_of(tensors: list[AssignedTensor], layout: OutputLayout) -> PlanOf:
    return PlanOf([Task(t.name, t.shape, t.dtype, prod(t.shape)) for t in tensors], layout)


@given(tensor_lists(), st.integers(1, 400))
@settings(deadline=None)
def test_tensors_lie_back_to_back_after_their_header(
    tensors: list[AssignedTensor], max_shard_bytes: int
) -> None:
    layout, places = plan_layout(tensors, max_shard_bytes)

    for index, shard in enumerate(layout.shards):
        cursor = shard.header_nbytes
        for task in shard.tasks:
            assert places[task] == (index, cursor)
            cursor += nbytes(tensors[task])
        assert cursor == shard.nbytes == shard.header_nbytes + shard.data_nbytes
    assert sorted(task for shard in layout.shards for task in shard.tasks) == [*range(len(tensors))]
    assert layout.nbytes == sum(shard.nbytes for shard in layout.shards)


@given(tensor_lists(), st.integers(1, 400))
@settings(deadline=None)
def test_every_element_is_aligned_to_its_size(
    tensors: list[AssignedTensor], max_shard_bytes: int
) -> None:
    layout, places = plan_layout(tensors, max_shard_bytes)

    assert all(shard.header_nbytes % 8 == 0 for shard in layout.shards)
    for each, (_, offset) in zip(tensors, places, strict=True):
        assert offset % each.dtype.itemsize == 0


@given(tensor_lists(), st.integers(1, 400))
@settings(deadline=None)
def test_a_shard_is_within_the_limit_or_holds_one_tensor_with_data(
    tensors: list[AssignedTensor], max_shard_bytes: int
) -> None:
    layout, _ = plan_layout(tensors, max_shard_bytes)

    for shard in layout.shards:
        with_data = [task for task in shard.tasks if nbytes(tensors[task])]
        assert shard.data_nbytes <= max_shard_bytes or len(with_data) == 1


@given(tensor_lists(), st.integers(1, 400))
@settings(deadline=None)
def test_no_two_neighbouring_shards_would_fit_into_one(
    tensors: list[AssignedTensor], max_shard_bytes: int
) -> None:
    layout, _ = plan_layout(tensors, max_shard_bytes)
    names = [[tensors[task] for task in shard.tasks] for shard in layout.shards]

    for shard, following in zip(layout.shards, names[1:], strict=False):
        assert shard.data_nbytes + sum(map(nbytes, following)) > max_shard_bytes


@given(tensor_lists(), st.integers(1, 400), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_in_which_tensors_come_changes_nothing(
    tensors: list[AssignedTensor], max_shard_bytes: int, random: object
) -> None:
    """The inputs' sharding decides that order, and may not show in the output."""
    shuffled = list(tensors)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    def placed(given: list[AssignedTensor]) -> dict[str, tuple[int, int]]:
        _, places = plan_layout(given, max_shard_bytes)
        return dict(zip((t.name for t in given), places, strict=True))

    assert placed(shuffled) == placed(tensors)


@given(tensor_lists(), st.integers(1, 400))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_safetensors_reads_the_header_as_planned(
    tmp_path: Path, tensors: list[AssignedTensor], max_shard_bytes: int
) -> None:
    tensors = [t for t in tensors if t.dtype not in {DType.F8_E4M3, DType.F8_E5M2, DType.BF16}]
    layout, _ = plan_layout(tensors, max_shard_bytes)
    plan = plan_of(tensors, layout)

    for index, shard in enumerate(layout.shards):
        header = render_header(plan, index)  # type: ignore[arg-type]
        assert len(header) == shard.header_nbytes
        path = tmp_path / "shard.safetensors"
        path.write_bytes(header + bytes(shard.data_nbytes))
        with safetensors.safe_open(path, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            found = {
                name: (
                    tuple(opened.get_slice(name).get_shape()),
                    opened.get_slice(name).get_dtype(),
                )
                for name in opened.keys()  # noqa: SIM118 - it is no dict
            }
        planned = [tensors[task] for task in shard.tasks]
        assert found == {t.name: (t.shape, t.dtype.value) for t in planned}


@pytest.mark.parametrize("dtype", DType)
def test_every_dtype_is_one_that_safetensors_knows(dtype: DType, tmp_path: Path) -> None:
    layout, _ = plan_layout([tensor("a", (4,), dtype)], 100)
    header = render_header(plan_of([tensor("a", (4,), dtype)], layout), 0)  # type: ignore[arg-type]
    path = tmp_path / "shard.safetensors"
    path.write_bytes(header + bytes(layout.shards[0].data_nbytes))

    with safetensors.safe_open(path, framework="pt") as opened:
        assert opened.get_slice("a").get_dtype() == dtype.value


def test_layers_are_stored_in_the_order_of_their_numbers() -> None:
    names = ["layers.10.w", "layers.9.w", "layers.2.w", "embed", "layers.02.w", "norm"]
    tensors = [tensor(name) for name in names]

    layout, _ = plan_layout(tensors, 10**9)

    stored = [names[task] for task in layout.shards[0].tasks]
    assert stored == ["embed", "layers.02.w", "layers.2.w", "layers.9.w", "layers.10.w", "norm"]


def test_layers_are_split_over_shards_in_the_order_of_their_numbers() -> None:
    names = [f"layers.{index}.w" for index in range(12)]

    _, places = plan_layout([tensor(name) for name in names], 3 * 16)

    assert [shard for shard, _ in places] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_wider_types_come_first_in_a_shard() -> None:
    tensors = [
        tensor("a", (3,), DType.U8),
        tensor("b", (3,), DType.BF16),
        tensor("c", (3,), DType.F64),
        tensor("d", (3,), DType.F32),
        tensor("e", (3,), DType.I64),
    ]

    layout, _ = plan_layout(tensors, 10**9)

    assert [tensors[task].name for task in layout.shards[0].tasks] == ["c", "e", "d", "b", "a"]


def test_one_shard_has_the_plain_name_and_no_index() -> None:
    layout, _ = plan_layout([tensor("a")], 10**9)

    assert [shard.name for shard in layout.shards] == ["model.safetensors"]
    assert layout.index_name is None


def test_several_shards_are_numbered_from_one() -> None:
    layout, _ = plan_layout([tensor(name) for name in "abc"], 16)

    assert [shard.name for shard in layout.shards] == [
        f"model-{index:05d}-of-00003.safetensors" for index in (1, 2, 3)
    ]
    assert layout.index_name == "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        # A tensor larger than the limit is alone, and does not drag its neighbours along.
        ([1, 100, 1], 10, [[0], [1], [2]]),
        # Exactly full is not too full.
        ([5, 5, 1], 10, [[0, 1], [2]]),
        # One byte more is.
        ([5, 6], 10, [[0], [1]]),
        # The first tensor never leaves an empty shard before it.
        ([11, 1], 10, [[0], [1]]),
        # Nothing at all takes no room.
        ([10, 0, 0], 10, [[0, 1, 2]]),
    ],
)
def test_shards_are_filled_up_to_the_limit(
    sizes: list[int], limit: int, expected: list[list[int]]
) -> None:
    tensors = [tensor(f"t{i}", (size,), DType.U8) for i, size in enumerate(sizes)]

    layout, _ = plan_layout(tensors, limit)

    assert [sorted(shard.tasks) for shard in layout.shards] == expected


@given(tensor_lists(), st.integers(1, 100))
@settings(deadline=None)
def test_the_index_names_every_tensor_and_the_bytes_of_all(
    tensors: list[AssignedTensor], max_shard_bytes: int
) -> None:
    layout, places = plan_layout(tensors, max_shard_bytes)

    indexes = render_indexes(plan_of(tensors, layout))  # type: ignore[arg-type]
    if layout.index_name is None:
        assert not indexes
        return
    index = json.loads(indexes[layout.index_name])

    assert index["metadata"] == {
        "total_size": sum(map(nbytes, tensors)),
        "total_parameters": sum(prod(t.shape) for t in tensors),
    }
    assert index["weight_map"] == {
        t.name: layout.shards[shard].name for t, (shard, _) in zip(tensors, places, strict=True)
    }
    assert list(index["weight_map"]) == sorted(index["weight_map"])


def test_an_index_is_spelled_as_transformers_spells_it_with_names_as_they_are() -> None:
    tensors = [tensor("b.weight"), tensor("größe")]
    layout, _ = plan_layout(tensors, 16)

    (content,) = render_indexes(plan_of(tensors, layout)).values()  # type: ignore[arg-type]

    assert content.decode() == (
        '{\n  "metadata": {\n    "total_parameters": 8,\n    "total_size": 32\n  },\n  "weight_map": {\n'
        '    "b.weight": "model-00001-of-00002.safetensors",\n'
        '    "größe": "model-00002-of-00002.safetensors"\n  }\n}\n'
    )


def test_a_model_without_tensors_is_a_shard_without_tensors() -> None:
    layout, places = plan_layout([], 100)

    assert places == []
    assert [shard.data_nbytes for shard in layout.shards] == [0]


def test_headers_are_compact_json() -> None:
    """Tools that only look at the first bytes expect an object right after the length."""
    layout, _ = plan_layout([tensor("ü")], 100)

    header = render_header(plan_of([tensor("ü")], layout), 0)  # type: ignore[arg-type]

    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert re.fullmatch(rb'\{"__metadata__":\{"format":"pt"\},"\xc3\xbc":\{[^ ]*\}\} *', header[8:])


@given(tensor_lists())
@settings(deadline=None)
def test_headers_are_what_the_standard_library_writes(tensors: list[AssignedTensor]) -> None:
    layout, _ = plan_layout(tensors, None, metadata=(("format", "pt"), ("von", '\u00fc"\\')))
    (shard,) = layout.shards
    fields: dict[str, object] = {"__metadata__": {"format": "pt", "von": '\u00fc"\\'}}
    begin = 0
    for index in shard.tasks:
        each = tensors[index]
        end = begin + nbytes(each)
        fields[each.name] = {
            "dtype": each.dtype.value,
            "shape": list(each.shape),
            "data_offsets": [begin, end],
        }
        begin = end

    header = render_header(plan_of(tensors, layout), 0)  # type: ignore[arg-type]

    expected = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    assert header[8:].rstrip(b" ") == expected
    assert len(header) % 8 == 0
