"""What adapters make of the base, as operands of the compiled machine.

Products of two stored factors are the machine's, too: it computes a block of each into a row, and does
with it what programs say, many blocks to a call. What else adapters do is read the plain way, a block
at a time.

Memory: a block of float32 for every source of a tensor that adapters change.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from streammerge.adapters.onto_base.products import PlainProduct
from streammerge.dtypes import DType
from streammerge.engine.compiled.bench import Encoded
from streammerge.engine.compiled.operands import UNUSED, PieceOperands, StoredOperand
from streammerge.engine.finite import refuse_operand
from streammerge.engine.pieces import PieceInMemory
from streammerge.engine.reading import Bench, BlockReader
from streammerge.engine.segments import Segment
from streammerge.lazily import torch
from streammerge.methods.programs import Programs
from streammerge.native.library import DIFFERENCE_CODE, DTYPE_CODES, Kernels
from streammerge.native.machine import ChangeCall
from streammerge.plan.demanding import most_changed_sources
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK
from streammerge.tiles.program import Op


class ChangedOperands:
    """Computes operands for one worker."""

    def __init__(
        self,
        kernels: Kernels,
        plan: MergePlan,
        programs: Sequence[Programs],
        bench: Bench | None,
    ) -> None:
        """Allocate rows.

        Args:
            kernels: The compiled functions.
            plan: The plan.
            programs: What its method does, for each of its settings.
            bench: What the worker reads blocks with the plain way; None where there are products of
                stored factors alone, and the plan needs no torch.
        """
        self._kernels = kernels
        self._plan = plan
        self._bench = bench
        sources = most_changed_sources(programs, plan.tasks)
        self._rows = np.empty((sources, BLOCK if sources else 0), dtype=np.float32)

    def operands_of(self, piece: PieceInMemory, encoded: Encoded) -> PieceOperands | None:
        """Return what the machine reads of a piece that adapters change; None if it cannot.

        Each job has operands of its own, those of :meth:`of_range`, where not all that adapters change is
        products of stored factors.
        """
        if not self.serve(piece, encoded):
            return None
        return self._of_piece(piece, encoded) if self._bench is None else PieceOperands(None)

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

    def _of_piece(self, piece: PieceInMemory, encoded: Encoded) -> PieceOperands:
        """Return what the machine needs to compute what adapters change of a piece itself."""
        setting = self._plan.settings[piece.first.task.setting]
        calls = []
        for source, model in enumerate(setting.sources):
            deltas = piece.deltas[model] if piece.deltas else ()
            if not deltas and piece.inputs[model] is None:
                # Nothing at all is added to the base.
                self._rows[source].fill(0.0)
            for index, delta in enumerate(deltas):
                assert isinstance(delta, PlainProduct)  # noqa: S101 - the planner saw no others
                calls.append(delta.call(self._rows[source], adds=index > 0))
        stored = self._operands(piece, encoded)
        return PieceOperands(stored, (ChangeCall * len(calls))(*calls), piece.first.start)

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
        self._fill_rows(piece, encoded, begin, end, segment)
        return self._operands(piece, encoded)

    def _operands(self, piece: PieceInMemory, encoded: Encoded) -> list[StoredOperand]:
        """Return what to read, where rows hold what adapters make of a job's elements."""
        setting = self._plan.settings[piece.first.task.setting]
        code = DIFFERENCE_CODE if encoded.subtracts else DTYPE_CODES[DType.F32]
        operands = []
        if setting.has_base:
            base = piece.inputs[setting.models[0]]
            loaded = base if encoded.loads_base else None
            operands.append(UNUSED if loaded is None else StoredOperand.of(loaded))
        for source, model in enumerate(setting.sources):
            stored = piece.inputs[model]
            if stored is not None and self._is_stored(piece, model):
                operands.append(StoredOperand.of(stored))
            else:
                # A row begins where the job does.
                operands.append(StoredOperand(self._rows[source].ctypes.data, 0, code))
        return operands

    def _is_stored(self, piece: PieceInMemory, model: int) -> bool:
        """Return whether a model's values are read as they are stored."""
        return piece.inputs[model] is not None and not (piece.deltas and piece.deltas[model])

    def _fill_rows(
        self, piece: PieceInMemory, encoded: Encoded, begin: int, end: int, segment: Segment
    ) -> None:
        """Compute what adapters make of a part of a block."""
        if self._bench is None:
            ours = self._of_piece(piece, encoded)
            for change in ours.changes or ():
                self._kernels.change_range(
                    ctypes.addressof(change), start=ours.start + begin, numel=end - begin
                )
            return
        reader = BlockReader(
            self._bench,
            piece,
            begin,
            end - begin,
            [segment],
            program=encoded.program,
            check=False,
        )
        read = reader.task_vector if encoded.subtracts else reader.source
        setting = self._plan.settings[piece.first.task.setting]
        for source, model in enumerate(setting.sources):
            if not self._is_stored(piece, model):
                read(source, torch.from_numpy(self._rows[source, : end - begin]))

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
            if stored is None or not self._is_stored(piece, model):
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
