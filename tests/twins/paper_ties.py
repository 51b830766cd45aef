"""TIES as its authors' notebook does it: over whole models, with ties and cancelled votes resolved.

Source: Yadav et al. 2023, arXiv:2306.01708, Algorithm 1, and ``src/ties_minimal.ipynb`` in
prateeky2806/ties-merging.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twins.shapes import Array, Model, join_model, part_model, subtract_base


def ties_over_model(
    base: Model, sources: Sequence[Model], *, keep: float, lambda_: float = 1.0
) -> dict[str, Array]:
    """Return whole models merged; a model of one tensor gives the same per tensor.

    1. Trim: of all entries of a task vector the ``int(keep * numel) + 1`` largest stay, and all
       that equal the smallest of those.
    2. Elect: the sign of the sum. Where that is 0, the sign of the sum of all elected signs; where
       that is 0 too, -.
    3. Merge: the mean over the entries of that sign, times ``lambda_``.

    Args:
        base: All tensors.
        sources: One or more, with the same tensors.
        keep: Fraction kept, in [0, 1].
        lambda_: A factor on the whole change.

    Differs from the notebook: ``keep`` of 1 keeps everything, where it fails; a number above 1 is
    no percentage.
    """
    start, tasks = subtract_base(join_model(base), [join_model(source) for source in sources])
    if start.size == 0:
        return part_model(start, base)
    trimmed = [_trim(task, keep) for task in tasks]
    elected = np.sign(sum(trimmed, start=np.zeros_like(start)))
    elected = np.where(elected == 0, np.sign(np.sum(elected)), elected)
    total, count = np.zeros_like(start), np.zeros_like(start)
    for task in trimmed:
        agrees = np.where(elected > 0, task > 0, task < 0)
        total = total + np.where(agrees, task, 0.0)
        count = count + agrees
    return part_model(start + lambda_ * total / np.maximum(count, 1.0), base)


def _trim(task: Array, keep: float) -> Array:
    magnitudes = np.abs(task)
    k = min(int(keep * task.size) + 1, task.size)
    threshold = np.sort(magnitudes)[task.size - k]
    return np.where(magnitudes >= threshold, task, 0.0)
