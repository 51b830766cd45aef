"""What adapters make of the base, as operands of the compiled machine.

A block's products are computed, and all that is done with them is the machine's, in one sweep. Products of
two stored factors take no torch; what else adapters do is read the plain way.

Memory: a block of float32 for every source of a tensor that adapters change, and one more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from streammerge.adapters.onto_base.deltas import Delta
from streammerge.adapters.onto_base.products import PlainProduct
from streammerge.dtypes import DType
from streammerge.engine.compiled.bench import Encoded
from streammerge.engine.compiled.operands import UNUSED, StoredOperand
from streammerge.engine.finite import refuse_operand
from streammerge.engine.pieces import PieceInMemory
from streammerge.engine.reading import Bench, BlockReader
from streammerge.engine.segments import Segment
from streammerge.lazily import torch
from streammerge.methods.programs import Programs
from streammerge.native.library import DIFFERENCE_CODE, DTYPE_CODES
from streammerge.plan.demanding import most_changed_sources
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK
from streammerge.tiles.program import Op


class ChangedOperands:
    """Computes operands for one worker."""

    def __init__(self, plan: MergePlan, programs: Sequence[Programs], bench: Bench | None) -> None:
        """Allocate rows.

        Args:
            plan: The plan.
            programs: What its method does, for each of its settings.
            bench: What the worker reads blocks with the plain way; None where there are products of
                stored factors alone, and the plan needs no torch.
        """
        self._plan = plan
        self._bench = bench
        sources = most_changed_sources(programs, plan.tasks)
        self._rows = np.empty((sources, BLOCK if sources else 0), dtype=np.float32)
        self._more = np.empty(BLOCK if sources and bench is None else 0, dtype=np.float32)

    def serve(self, piece: PieceInMemory, encoded: Encoded) -> bool:
        """Return whether the machine can take a piece, given what adapters make of it."""
        setting = self._plan.settings[piece.first.task.setting]
        # Of a source that is asked for both ways there would be two rows; rows of a matrix that must be
        # seen whole may be wider than a block.
        if piece.first.task.row or (encoded.subtracts and encoded.program.uses(Op.SOURCE)):
            return False
        if len(piece.parts) > 1 or len(setting.sources) > len(self._rows):
            return False
        stored = [piece.inputs[model] for model in setting.models]
        if encoded.loads_base and stored[0] is None:
            return False
        return all(each is None or each.dtype in DTYPE_CODES for each in stored)

    def of_range(
        self, piece: PieceInMemory, encoded: Encoded, begin: int, end: int, segment: Segment
    ) -> list[StoredOperand]:
        """Return the operands of a part of a block, which are good until the next call.

        Args:
            piece: The inputs.
            encoded: What will be run.
            begin: First element in the piece.
            end: End in the piece.
            segment: What it is of the tensor.
        """
        setting = self._plan.settings[piece.first.task.setting]
        self._fill_rows(piece, encoded, begin, end, segment)
        code = DIFFERENCE_CODE if encoded.subtracts else DTYPE_CODES[DType.F32]
        operands = []
        if setting.has_base:
            base = piece.inputs[setting.models[0]]
            loaded = base if encoded.loads_base else None
            operands.append(UNUSED if loaded is None else StoredOperand.of(loaded))
        for source, model in enumerate(setting.sources):
            stored = piece.inputs[model]
            if stored is not None and not (piece.deltas and piece.deltas[model]):
                operands.append(StoredOperand.of(stored))
                continue
            address = self._rows[source].ctypes.data
            operands.append(StoredOperand(address - begin * 4, 4, code))
        return operands

    def _fill_rows(
        self, piece: PieceInMemory, encoded: Encoded, begin: int, end: int, segment: Segment
    ) -> None:
        """Compute what adapters make of a part of a block."""
        reader = None
        if self._bench is not None:
            reader = BlockReader(
                self._bench,
                piece,
                begin,
                end - begin,
                [segment],
                program=encoded.program,
                check=False,
            )
        setting = self._plan.settings[piece.first.task.setting]
        for source, model in enumerate(setting.sources):
            deltas = piece.deltas[model] if piece.deltas else ()
            if piece.inputs[model] is not None and not deltas:
                continue
            row = self._rows[source, : end - begin]
            if reader is not None:
                read = reader.task_vector if encoded.subtracts else reader.source
                read(source, torch.from_numpy(row))
            else:
                self._add_products(row, deltas, piece.first.start + begin)

    def _add_products(
        self, row: NDArray[np.float32], deltas: Sequence[Delta | PlainProduct], start: int
    ) -> None:
        """Write the sum of some products from a flat index of the tensor on."""
        if not deltas:
            row.fill(0.0)
        more = self._more[: row.size]
        for index, delta in enumerate(deltas):
            assert isinstance(delta, PlainProduct)  # noqa: S101 - the planner saw no others
            if index == 0:
                delta.fill(row, start)
            else:
                delta.fill(more, start)
                with np.errstate(all="ignore"):
                    np.add(row, more, out=row)

    def refuse(
        self, piece: PieceInMemory, encoded: Encoded, begin: int, end: int, segment: Segment
    ) -> None:
        """Raise the error about the first operand that is not finite; return if all are.

        Raises:
            NonFiniteError: With tensor, model, element and value.
        """
        setting = self._plan.settings[piece.first.task.setting]
        self._fill_rows(piece, encoded, begin, end, segment)
        loads = [*setting.sources]
        if encoded.program.uses(Op.BASE):
            loads.insert(0, setting.models[0])
        for model in loads:
            stored = piece.inputs[model]
            if stored is None or (piece.deltas and piece.deltas[model]):
                values = self._rows[setting.sources.index(model), : end - begin]
            else:
                values = stored.widen(begin, end).astype(np.float32)
                if encoded.subtracts and model in setting.sources:
                    base = piece.inputs[setting.models[0]]
                    assert base is not None  # noqa: S101 - the machine has read it
                    with np.errstate(all="ignore"):
                        values -= base.widen(begin, end).astype(np.float32)
            if not np.isfinite(values).all():
                refuse_operand(values, piece, begin, self._plan, model)
