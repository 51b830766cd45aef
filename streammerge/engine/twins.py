"""Tensors that are one in memory and stored twice: compared before the work begins.

Memory: two pieces of :data:`_PIECE_BYTES`.
"""

from __future__ import annotations

from collections.abc import Sequence

from streammerge.checkpoint.bytesource import ByteSource
from streammerge.checkpoint.ties import TIE_KEY
from streammerge.errors import CheckpointError, printable
from streammerge.plan.types import MergePlan, StoredTwins

_PIECE_BYTES = 2**18


def check_twins(plan: MergePlan, sources: Sequence[ByteSource]) -> None:
    """Return if tensors that a model's configuration says are one hold the same bytes.

    Args:
        plan: The plan.
        sources: Open input files, by their index in the plan.

    Raises:
        CheckpointError: Two of them differ, so that the files are two models, depending on who
            loads them.
    """
    pieces = bytearray(_PIECE_BYTES), bytearray(_PIECE_BYTES)
    for twins in plan.twins:
        _compare(plan, twins, sources, pieces)


def _compare(
    plan: MergePlan,
    twins: StoredTwins,
    sources: Sequence[ByteSource],
    pieces: tuple[bytearray, bytearray],
) -> None:
    for begin in range(0, twins.one.nbytes, _PIECE_BYTES):
        views = [memoryview(piece)[: twins.one.nbytes - begin] for piece in pieces]
        for entry, view in zip((twins.one, twins.other), views, strict=True):
            sources[entry.file].read_into(entry.offset + begin, view)
        if views[0] != views[1]:
            byte = next(
                i for i, (one, other) in enumerate(zip(*views, strict=True)) if one != other
            )
            element = (begin + byte) // twins.one.dtype.itemsize
            raise CheckpointError(
                f"{plan.files[twins.other.file].path}: {printable(twins.other.name)} and "
                f"{printable(twins.one.name)} are one tensor in {twins.label}, by its configuration or, if it has none, that of another model, "
                f"but differ from flat element {element} on, so that it depends on the program that "
                f"loads it which one counts; if both do, set {TIE_KEY}: false in its config.json; if "
                f"only {printable(twins.one.name)} does, add a rule "
                f"{{tensors: {twins.other.name!r}, drop: true}}"
            )
