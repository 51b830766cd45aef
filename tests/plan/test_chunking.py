"""Chunks cover every element of every input once, and land where they are looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streammerge.assignment.types import Action
from streammerge.checkpoint.types import ShardFile
from streammerge.dtypes import DType
from streammerge.plan.chunking import (
    Chunk,
    ModelRead,
    Piece,
    ReadSpan,
    Residence,
    iter_units,
    padded,
    plan_reads,
    reads_twice,
)
from streammerge.plan.types import (
    InputModel,
    MemoryProjection,
    MergePlan,
    OutputLayout,
    Resources,
    TensorInput,
    TensorTask,
)
from streammerge.statistics import BLOCK

FLOATS = [DType.F64, DType.F32, DType.BF16, DType.F8_E4M3]
NUMELS = st.one_of(
    st.integers(0, 70),
    st.integers(0, 3 * BLOCK),
    st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 9 * BLOCK + 5]),
)


def plan_of(tasks: list[TensorTask], resources: Resources, n_models: int) -> MergePlan:
    """Return a plan whose tasks and resources are as given, and whose rest does not matter here."""
    return MergePlan(
        version=1,
        method="linear",
        semantics="peft",
        recipe="",
        seed=0,
        keep_non_finite=False,
        compute_dtype=DType.F32,
        has_base=False,
        models=tuple(InputModel(f"sources[{i}]", str(i)) for i in range(n_models)),
        files=tuple(ShardFile(Path(str(i)), 0, 0, "") for i in range(2 * n_models)),
        settings=(),
        tasks=tuple(tasks),
        model_scope=False,
        layout=OutputLayout((), None),
        resources=resources,
        memory=MemoryProjection(0, 0, 0, 0, 0, 0, 0),
        bytes_to_read=0,
        input_nbytes=0,
        dropped=(),
        copied_from_base=(),
    )


def task(
    name: str,
    numel: int,
    inputs: tuple[TensorInput | None, ...],
    *,
    dtype: DType = DType.F32,
    action: Action = Action.MERGE,
) -> TensorTask:
    return TensorTask(name, (numel,), numel, dtype, action, inputs, 0, 0, 0, 0)


def resources(slot_bytes: int, slots: int = 16, output_slot_bytes: int | None = None) -> Resources:
    return Resources(
        slot_bytes=slot_bytes,
        slots=slots,
        output_slot_bytes=slot_bytes if output_slot_bytes is None else output_slot_bytes,
        output_slots=2,
        statistics_bytes=0,
        readers=1,
        workers=1,
        writers=1,
    )


@st.composite
def plans(draw: st.DrawFn) -> MergePlan:
    """Any tensors in any files in any order, cut for slots of any size that planning may choose."""
    n_models = draw(st.integers(1, 3))
    numels = draw(st.lists(NUMELS, min_size=1, max_size=8))
    dtypes = [[draw(st.sampled_from(FLOATS)) for _ in range(n_models)] for _ in numels]
    places: list[list[TensorInput]] = [[] for _ in numels]
    for model in range(n_models):
        # Each model stores its tensors in an order of its own, over two files.
        cursors = [80, 80]
        stored = {}
        for index in draw(st.permutations(range(len(numels)))):
            file = draw(st.integers(0, 1))
            stored[index] = TensorInput(2 * model + file, cursors[file], dtypes[index][model])
            cursors[file] += numels[index] * dtypes[index][model].itemsize
        for index, entry in stored.items():
            places[index].append(entry)
    tasks = []
    for index, numel in enumerate(numels):
        action = draw(st.sampled_from([Action.MERGE, Action.MERGE, Action.COPY]))
        inputs: tuple[TensorInput | None, ...] = tuple(places[index])
        dtype = draw(st.sampled_from(FLOATS))
        if action is Action.COPY:
            chosen = draw(st.integers(0, n_models - 1))
            inputs = tuple(e if m == chosen else None for m, e in enumerate(inputs))
            dtype = places[index][chosen].dtype
        tasks.append(task(f"t{index}", numel, inputs, dtype=dtype, action=action))

    def first_read(each: TensorTask) -> tuple[int, int]:
        entry = next(entry for entry in each.inputs if entry is not None)
        return entry.file, entry.offset

    tasks.sort(key=first_read)
    widest = max(entry.dtype.itemsize for each in tasks for entry in each.inputs if entry)
    slot_bytes = BLOCK * widest * draw(st.sampled_from([1, 2, 4, 8]))
    ratio = max(
        (each.dtype.itemsize / widest_of(each) for each in tasks if each.action is Action.MERGE),
        default=0.0,
    )
    given_resources = resources(slot_bytes, 3 * n_models, int(slot_bytes * ratio))
    return plan_of(tasks, given_resources, n_models)


def widest_of(each: TensorTask) -> int:
    return max(entry.dtype.itemsize for entry in each.inputs if entry is not None)


def is_merged(each: TensorTask) -> bool:
    """What must be seen whole first, where every merge needs statistics of its tensor."""
    return each.action is Action.MERGE


def is_never(_each: TensorTask) -> bool:
    """The same where no merge does."""
    return False


def chunks_of(plan: MergePlan, must_look: Callable[[TensorTask], bool] = is_never) -> list[Chunk]:
    return [chunk for unit in iter_units(plan, must_look=must_look) for chunk in unit.chunks]


def pieces_read(
    plan: MergePlan, chunk: Chunk
) -> Iterator[tuple[ModelRead, Piece, TensorInput, int]]:
    """Yield every piece of every model with its place in the slot."""
    for read in plan_reads(plan, chunk):
        for piece, place in zip(chunk.pieces, read.placements, strict=True):
            entry = plan.tasks[piece.task].inputs[read.model]
            if entry is None:
                assert place == -1
            else:
                yield read, piece, entry, place


@given(plans(), st.sampled_from([is_merged, is_never]))
@settings(deadline=None)
def test_pieces_cover_every_element_once_in_order(
    plan: MergePlan, must_look: Callable[[TensorTask], bool]
) -> None:
    covered = [0] * len(plan.tasks)
    for chunk in chunks_of(plan, must_look):
        for piece in chunk.pieces:
            assert covered[piece.task] == piece.start
            covered[piece.task] += piece.numel

    assert covered == [each.numel for each in plan.tasks]


@given(plans())
@settings(deadline=None)
def test_tensors_without_elements_are_merged_too(plan: MergePlan) -> None:
    """Nothing is written for them, but the manifest speaks of every tensor."""
    seen = {piece.task for chunk in chunks_of(plan) for piece in chunk.pieces}

    assert seen == set(range(len(plan.tasks)))


@given(plans())
@settings(deadline=None)
def test_pieces_start_at_a_block(plan: MergePlan) -> None:
    for chunk in chunks_of(plan):
        assert all(piece.start % BLOCK == 0 for piece in chunk.pieces)


@given(plans())
@settings(deadline=None)
def test_a_piece_of_a_tensor_is_alone_in_its_chunk(plan: MergePlan) -> None:
    for chunk in chunks_of(plan):
        whole = [piece.numel == plan.tasks[piece.task].numel for piece in chunk.pieces]
        assert all(whole) or len(whole) == 1


@given(plans())
@settings(deadline=None)
def test_a_slot_holds_what_it_receives(plan: MergePlan) -> None:
    for chunk in chunks_of(plan):
        for read in plan_reads(plan, chunk):
            ends = [span.slot_offset + span.nbytes for span in read.spans]
            assert max(ends, default=0) <= plan.resources.slot_bytes
            # One behind the other, so none overwrites another.
            for (_, end), (begin, _) in pairwise(
                (span.slot_offset, span.slot_offset + span.nbytes) for span in read.spans
            ):
                assert end <= begin


@given(plans())
@settings(deadline=None)
def test_an_output_slot_holds_what_is_merged_into_it(plan: MergePlan) -> None:
    for chunk in chunks_of(plan):
        cursor = 0
        for piece in chunk.pieces:
            if plan.tasks[piece.task].action is Action.MERGE:
                nbytes = piece.numel * plan.tasks[piece.task].dtype.itemsize
                assert cursor + nbytes <= plan.resources.output_slot_bytes
                cursor += padded(nbytes)


@given(plans())
@settings(deadline=None)
@example(
    # A tensor without elements between two that are neighbours in the file.
    plan_of(
        [
            task("a", 3, (TensorInput(0, 80, DType.BF16),), dtype=DType.BF16),
            task("empty", 0, (TensorInput(1, 80, DType.BF16),), dtype=DType.BF16),
            task("b", 5, (TensorInput(0, 86, DType.BF16),), dtype=DType.BF16),
        ],
        resources(8 * BLOCK),
        1,
    )
)
def test_every_byte_lands_where_the_piece_is_looked_for(plan: MergePlan) -> None:
    for chunk in chunks_of(plan):
        for read, piece, entry, place in pieces_read(plan, chunk):
            nbytes = piece.numel * entry.dtype.itemsize
            if not nbytes:
                continue
            begin = entry.offset + piece.start * entry.dtype.itemsize
            # The one span that brings the piece puts its first byte where it belongs.
            bringing = [
                span
                for span in read.spans
                if span.file == entry.file
                and span.offset <= begin
                and begin + nbytes <= span.offset + span.nbytes
                and span.slot_offset + begin - span.offset == place
            ]
            assert len(bringing) == 1, (piece, read)


@given(plans())
@settings(deadline=None)
def test_no_byte_is_read_twice_or_in_vain(plan: MergePlan) -> None:
    for chunk in chunks_of(plan):
        for read in plan_reads(plan, chunk):
            entries = [(plan.tasks[p.task].inputs[read.model], p) for p in chunk.pieces]
            wanted = sum(p.numel * e.dtype.itemsize for e, p in entries if e is not None)
            assert sum(span.nbytes for span in read.spans) == wanted
            assert all(span.nbytes for span in read.spans)


@given(plans())
@settings(deadline=None)
def test_every_piece_is_aligned_to_its_element_size(plan: MergePlan) -> None:
    """Torch refuses to view anything else as tensor."""
    for chunk in chunks_of(plan):
        for _, piece, entry, place in pieces_read(plan, chunk):
            # Where nothing lies, nothing is misaligned.
            assert place % entry.dtype.itemsize == 0 or piece.numel == 0


@given(plans())
@settings(deadline=None)
def test_a_chunk_takes_slots_for_exactly_the_models_that_it_reads(plan: MergePlan) -> None:
    for chunk in chunks_of(plan):
        reading = {
            model
            for piece in chunk.pieces
            for model, entry in enumerate(plan.tasks[piece.task].inputs)
            if entry is not None
        }
        assert chunk.models == tuple(sorted(reading))


@given(plans(), st.integers(1, 60))
@settings(deadline=None)
def test_what_is_read_twice_is_known_before(plan: MergePlan, slots: int) -> None:
    """The plan's bytes to read, and the schedule, must speak of the same tensors."""
    plan = replace(plan, resources=replace(plan.resources, slots=slots))
    for unit in iter_units(plan, must_look=is_merged):
        for index in {piece.task for chunk in unit.chunks for piece in chunk.pieces}:
            if plan.tasks[index].action is Action.MERGE:
                streamed = unit.residence is Residence.STREAMED
                assert streamed == reads_twice(plan, plan.tasks[index])


@given(plans(), st.integers(1, 60))
@settings(deadline=None)
def test_what_is_kept_fits_the_slots(plan: MergePlan, slots: int) -> None:
    plan = replace(plan, resources=replace(plan.resources, slots=slots))
    for unit in iter_units(plan, must_look=is_merged):
        if unit.residence is Residence.RESIDENT:
            assert sum(len(chunk.models) for chunk in unit.chunks) <= slots
            assert all(len(chunk.pieces) == 1 for chunk in unit.chunks)


def neighbours(*numels: int, dtype: DType = DType.F32) -> list[TensorTask]:
    """Return tensors that lie back to back in one file."""
    cursor = 80
    tasks = []
    for index, numel in enumerate(numels):
        entry = TensorInput(0, cursor, dtype)
        tasks.append(task(f"t{index}", numel, (entry,), dtype=dtype))
        cursor += numel * dtype.itemsize
    return tasks


def test_neighbours_in_the_file_become_one_request() -> None:
    plan = plan_of(neighbours(3, 5, 7), resources(4 * BLOCK), 1)
    (chunk,) = chunks_of(plan)

    (read,) = plan_reads(plan, chunk)

    assert read.spans == (ReadSpan(file=0, offset=80, nbytes=60, slot_offset=0),)
    assert read.placements == (0, 12, 32)


def test_a_gap_in_the_file_is_not_read() -> None:
    first, second, third = neighbours(3, 5, 7)
    plan = plan_of([first, third], resources(4 * BLOCK), 1)
    del second
    (chunk,) = chunks_of(plan)

    (read,) = plan_reads(plan, chunk)

    assert read.spans == (ReadSpan(0, 80, 12, 0), ReadSpan(0, 112, 28, 64))


def test_a_joined_request_is_split_where_elements_would_be_misaligned() -> None:
    """Three bytes of one tensor, and then eight-byte elements directly behind them."""
    narrow = task("a", 3, (TensorInput(0, 80, DType.F8_E4M3),), dtype=DType.F8_E4M3)
    wide = task("b", 2, (TensorInput(0, 83, DType.F64),), dtype=DType.F64)
    plan = plan_of([narrow, wide], resources(8 * BLOCK), 1)
    (chunk,) = chunks_of(plan)

    (read,) = plan_reads(plan, chunk)

    assert read.spans == (ReadSpan(0, 80, 3, 0), ReadSpan(0, 83, 16, 64))


def test_small_tensors_share_a_chunk_until_the_slot_is_full() -> None:
    # Each takes exactly half a slot.
    plan = plan_of(neighbours(BLOCK // 2, BLOCK // 2, BLOCK // 2), resources(4 * BLOCK), 1)

    assert [len(chunk.pieces) for chunk in chunks_of(plan)] == [2, 1]


def test_a_batch_ends_when_the_output_slot_is_full() -> None:
    """The output may be wider than the inputs."""
    plan = plan_of(
        neighbours(BLOCK, BLOCK, dtype=DType.BF16), resources(4 * BLOCK, output_slot_bytes=8), 1
    )
    assert [len(chunk.pieces) for chunk in chunks_of(plan)] == [1, 1]


@pytest.mark.parametrize(
    ("numel", "expected"),
    [
        # Exactly a slot is not cut.
        (BLOCK, [(0, BLOCK)]),
        (BLOCK + 1, [(0, BLOCK), (BLOCK, 1)]),
        (3 * BLOCK, [(0, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, BLOCK)]),
    ],
)
def test_large_tensors_are_cut_at_blocks(numel: int, expected: list[tuple[int, int]]) -> None:
    plan = plan_of(neighbours(numel), resources(4 * BLOCK), 1)

    pieces = [piece for chunk in chunks_of(plan) for piece in chunk.pieces]

    assert [(piece.start, piece.numel) for piece in pieces] == expected


def test_small_tensors_before_a_large_one_go_first() -> None:
    plan = plan_of(neighbours(5, 2 * BLOCK, 7), resources(4 * BLOCK), 1)

    order = [piece.task for chunk in chunks_of(plan) for piece in chunk.pieces]

    assert order == [0, 1, 1, 2]


def test_a_tensor_that_exactly_fills_the_slots_is_kept() -> None:
    """Three chunks of one input in three slots."""
    plan = plan_of(neighbours(3 * BLOCK), resources(4 * BLOCK, slots=3), 1)
    (unit,) = iter_units(plan, must_look=is_merged)
    assert unit.residence is Residence.RESIDENT

    plan = plan_of(neighbours(3 * BLOCK), resources(4 * BLOCK, slots=2), 1)
    (unit,) = iter_units(plan, must_look=is_merged)
    assert unit.residence is Residence.STREAMED
