"""What is wrong with a block that holds a value which is not finite.

Memory: 24 bytes per element of a block, once, in the arrays of numpy.
"""

from __future__ import annotations

import numpy as np

from streammerge.engine.finite import refuse_operand
from streammerge.engine.pieces import PieceInMemory
from streammerge.plan.types import MergePlan


def refuse_operands(
    piece: PieceInMemory,
    begin: int,
    end: int,
    plan: MergePlan,
    *,
    loads_base: bool,
    subtracts: bool,
) -> None:
    """Raise the error about the first operand that is not finite; return if all are.

    Args:
        piece: The piece.
        begin: First element of the block in the piece.
        end: End of the block.
        plan: Names the models.
        loads_base: Whether the base is loaded.
        subtracts: Whether operands are sources minus the base.

    Raises:
        NonFiniteError: With tensor, model, element and value.
    """
    setting = plan.settings[piece.first.task.setting]
    base = piece.inputs[setting.models[0]] if subtracts else None
    models = setting.models if loads_base and base is None else setting.sources
    with np.errstate(all="ignore"):
        for model in models:
            stored = piece.inputs[model]
            assert stored is not None  # noqa: S101 - the machine has read it
            vector = stored.widen(begin, end).astype(np.float32)
            if base is not None:
                vector -= base.widen(begin, end).astype(np.float32)
            if not np.isfinite(vector).all():
                refuse_operand(vector, piece, begin, plan, model)
