"""Methods that ask all that can be asked, so that the engine is tested with more than the package has.

A directory in the search path of ``streammerge.methods`` makes them methods like others; see
``asking_methods`` in ``tests/methods/test_rounds_of_methods.py``. Each has a twin in numpy and float64,
which is given ``[sources, numel]`` task vectors of a whole scope and returns the change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from streammerge.methods.base import (
    DENSITY,
    SCOPE,
    TIE_POLICY,
    WEIGHT,
    MergeMethod,
    Operand,
    Scope,
    Work,
    parameter,
)
from streammerge.statistics.rounds import Answers, Found, Rank, Round
from streammerge.statistics.topk import TiePolicy, kept_count
from streammerge.tiles.program import Vote
from streammerge.tiles.writing import (
    Row,
    Sheet,
    Sink,
    dot,
    exponential,
    in_top,
    keep_largest,
    largest,
    logarithm,
    majority_mean,
    maximum,
    minimum,
    ranked,
    square_root,
    total,
    weighted_sum,
    where,
)


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of all methods here."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""


@dataclass(frozen=True, slots=True)
class TrimParams:
    """Parameters of those that trim."""

    weight: tuple[float, ...] = parameter(WEIGHT)
    """Factor per source."""
    density: tuple[float, ...] = parameter(DENSITY)
    """Fraction kept per source, in [0, 1]."""
    scope: str = parameter(SCOPE)
    """``tensor`` or ``model``."""
    tie_policy: str = parameter(TIE_POLICY)
    """Which ties are kept."""


# -- a Gram matrix


def dotted(params: Params) -> Work:
    """Return the sum weighted by how much each task vector has in common with all of them."""

    def sinks(sheet: Sheet) -> Sequence[Sink]:
        vectors = sheet.task_vectors
        return [dot(a, b) for i, a in enumerate(vectors) for b in vectors[: i + 1]]

    def settle(answers: Answers) -> Sequence[float]:
        n = len(params.weight)
        products = np.zeros((n, n))
        products[np.tril_indices(n)] = answers.totals
        products += np.tril(products, -1).T
        return [float(each) for each in _shares(products)]

    def merge(sheet: Sheet) -> Row:
        shares = [sheet.number(index) for index in range(sheet.sources)]
        rows = [v * w for v, w in zip(sheet.task_vectors, params.weight, strict=True)]
        return sheet.base + weighted_sum(rows, shares)

    return Work(merge, (Round(sinks, settle=settle, about=("dotted",)),), Scope(params.scope))


def _shares(products: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.maximum(np.diagonal(products), 1e-30))
    return np.abs(products / norms[:, None] / norms[None]).sum(axis=1) / len(products)


def dotted_in_numpy(vectors: np.ndarray, params: Params) -> np.ndarray:
    return (_shares(vectors @ vectors.T) * np.array(params.weight)) @ vectors


# -- two rounds of totals, the second of which needs what the first has found


def around_mean(params: Params) -> Work:
    """Return the mean of normalised vectors, and each vector by its distance from that."""

    def norms(sheet: Sheet) -> Sequence[Sink]:
        return [each for v in sheet.task_vectors for each in (dot(v, v), largest(abs(v)))]

    def settle_norms(answers: Answers) -> Sequence[float]:
        squares, most = answers.totals[::2], answers.totals[1::2]
        return [*(max(each, 1e-30) ** 0.5 for each in squares), *(max(m, 1e-30) for m in most)]

    def normalised(sheet: Sheet) -> list[Row]:
        return [v / sheet.number(i) for i, v in enumerate(sheet.task_vectors)]

    def distances(sheet: Sheet) -> Sequence[Sink]:
        rows = normalised(sheet)
        mean = weighted_sum(rows, [1 / len(rows)] * len(rows))
        return [*(dot(r - mean, r - mean) for r in rows), total(abs(mean))]

    def settle_distances(answers: Answers) -> Sequence[float]:
        *squares, spread = answers.totals
        before = answers.before.numbers[: len(squares)]
        return [
            w / (1 + d) * norm / (1 + spread / answers.numel) if answers.numel else 0.0
            for w, d, norm in zip(params.weight, squares, before, strict=True)
        ]

    def merge(sheet: Sheet) -> Row:
        n = sheet.sources
        capped = [
            minimum(maximum(v / sheet.number(n + i), -0.5), 0.5)
            for i, v in enumerate(sheet.task_vectors)
        ]
        return sheet.base + weighted_sum(capped, [sheet.number(2 * n + i) for i in range(n)])

    first = Round(norms, settle=settle_norms, about=("norms",))
    second = Round(distances, settle=settle_distances, about=("distances", params.weight))
    return Work(merge, (first, second), Scope(params.scope))


def around_mean_in_numpy(vectors: np.ndarray, params: Params) -> np.ndarray:
    norms = np.sqrt(np.maximum((vectors * vectors).sum(axis=1), 1e-30))
    most = np.maximum(np.abs(vectors).max(axis=1, initial=0), 1e-30)
    rows = vectors / norms[:, None]
    mean = rows.mean(axis=0)
    squares = ((rows - mean) ** 2).sum(axis=1)
    spread = np.abs(mean).sum() / max(1, mean.size)
    factors = np.array(params.weight) / (1 + squares) * norms / (1 + spread)
    return factors @ np.clip(vectors / most[:, None], -0.5, 0.5)


# -- ranks of values that are computed from all sources


def shared_top(params: TrimParams) -> Work:
    """Return the sum where all sources together change most, and a tenth of it elsewhere."""

    def changes(sheet: Sheet) -> Row:
        rows = [abs(v) for v in sheet.task_vectors]
        return weighted_sum(rows, [1.0] * len(rows))

    def ranks(numel: int, _before: Found) -> Sequence[Rank]:
        return [Rank(kept_count(params.density[0], numel), TiePolicy(params.tie_policy))]

    def merge(sheet: Sheet) -> Row:
        summed = weighted_sum(sheet.task_vectors, params.weight)
        return sheet.base + where(in_top(changes(sheet), 0), summed, summed * 0.125)

    asked = Round(lambda sheet: [ranked(changes(sheet))], ranks, about=(params.density,))
    return Work(merge, (asked,), Scope(params.scope), kept=lambda _: ())


def shared_top_in_numpy(vectors: np.ndarray, params: TrimParams) -> np.ndarray:
    k = kept_count(params.density[0], vectors.shape[1])
    keep = _keep(np.abs(vectors).sum(axis=0), k, params.tie_policy)
    return np.where(keep, 1.0, 0.125) * (np.array(params.weight) @ vectors)


def _keep(values: np.ndarray, k: int, policy: str) -> np.ndarray:
    """Return which of finite values a trim keeps, by a stable sort."""
    magnitudes = np.abs(values)
    keep = np.zeros(values.size, dtype=bool)
    order = np.argsort(-magnitudes, kind="stable")
    keep[order[: max(0, k)]] = True
    if 0 < k < values.size:
        threshold = magnitudes[order[k - 1]]
        if policy == "inclusive":
            keep = magnitudes >= threshold
        elif policy == "strict":
            keep = magnitudes > threshold
    return keep


# -- how many are kept is found; three rounds, of which the last looks at what the second keeps


def found_density(params: TrimParams) -> Work:
    """Return what is left of sparse vectors when more of them is trimmed, at its old size."""
    policy = TiePolicy(params.tie_policy)

    def sizes(sheet: Sheet) -> Sequence[Sink]:
        return [each for v in sheet.task_vectors for each in (total(abs(v)), dot(v, v))]

    def shares(answers: Answers) -> Sequence[float]:
        # The participation ratio: 1 where all entries are equal, towards 0 where few are large.
        sums, squares = answers.totals[::2], answers.totals[1::2]
        numel = max(1, answers.numel)
        return [
            min(1.0, density * s * s / (q * numel)) if q > 0 else 1.0
            for density, s, q in zip(params.density, sums, squares, strict=True)
        ]

    def ranks(numel: int, before: Found) -> Sequence[Rank]:
        return [Rank(kept_count(share, numel), policy) for share in before.numbers]

    def trimmed(sheet: Sheet) -> list[Row]:
        return [keep_largest(v, i) for i, v in enumerate(sheet.task_vectors)]

    def factors(answers: Answers) -> Sequence[float]:
        n = len(params.weight)
        return [
            weight * (share if left > 0 else 0.0) / max(left, 1e-30)
            for weight, share, left in zip(
                params.weight, answers.before.numbers[:n], answers.totals, strict=True
            )
        ]

    def merge(sheet: Sheet) -> Row:
        n = sheet.sources
        return sheet.base + weighted_sum(trimmed(sheet), [sheet.number(n + i) for i in range(n)])

    rounds = (
        Round(sizes, settle=shares, about=("sizes", params.density)),
        Round(
            lambda sheet: [ranked(v) for v in sheet.task_vectors],
            ranks,
            about=("ranks", params.density, policy),
        ),
        Round(
            lambda sheet: [total(abs(row)) for row in trimmed(sheet)],
            settle=factors,
            about=("left", params.density, params.weight, policy),
        ),
    )
    return Work(merge, rounds, Scope(params.scope))


def found_density_in_numpy(vectors: np.ndarray, params: TrimParams) -> np.ndarray:
    change = np.zeros(vectors.shape[1])
    for v, density, weight in zip(vectors, params.density, params.weight, strict=True):
        squares = (v * v).sum()
        share = min(1.0, density * np.abs(v).sum() ** 2 / (squares * v.size)) if squares else 1.0
        left = v * _keep(v, kept_count(share, v.size), params.tie_policy)
        size = np.abs(left).sum()
        change += weight * (share if size > 0 else 0.0) / max(size, 1e-30) * left
    return change


# -- functions, and a sign vote, with numbers that were found


def squashed(params: Params) -> Work:
    """Return the mean of what agrees, of vectors pressed together by roots and exponentials."""

    def most(sheet: Sheet) -> Sequence[Sink]:
        return [largest(abs(v)) for v in sheet.task_vectors]

    def merge(sheet: Sheet) -> Row:
        rows = []
        for index, v in enumerate(sheet.task_vectors):
            part = abs(v) / sheet.number(index)
            pressed = square_root(part) * exponential(part * -1.0) + logarithm(part + 1.0)
            rows.append(where(v > 0.0, pressed, pressed * -1.0))
        numbers = [sheet.number(index) for index in range(sheet.sources)]
        mean = majority_mean(rows, vote=Vote.FREQUENCY, factors=numbers, shares=params.weight)
        return sheet.base + mean

    asked = Round(most, settle=lambda a: [max(each, 1e-30) for each in a.totals], about=("most",))
    return Work(merge, (asked,), Scope(params.scope))


def squashed_in_numpy(vectors: np.ndarray, params: Params) -> np.ndarray:
    most = np.maximum(np.abs(vectors).max(axis=1, initial=0), 1e-30)[:, None]
    part = np.abs(vectors) / most
    pressed = np.sqrt(part) * np.exp(-part) + np.log(part + 1)
    rows = np.where(vectors > 0, pressed, -pressed)
    elected = np.where(np.sign(rows).sum(axis=0) >= 0, 1.0, -1.0)
    agree = rows * elected > 0
    shares = (agree * np.array(params.weight)[:, None]).sum(axis=0)
    return (agree * rows * most).sum(axis=0) / np.where(shares == 0, 1, shares)


METHODS = tuple(
    MergeMethod(
        name=name,
        summary="Made up for tests.",
        reference="tests",
        params=params,
        operand=Operand.TASK_VECTORS,
        work=work,
        examples=tuple(examples),
    )
    for name, params, work, examples in (
        ("dotted", Params, dotted, ({"weight": (0.5, 0.75)}, {"scope": "model"})),
        ("around_mean", Params, around_mean, ({"weight": (0.5, -1.0)}, {"scope": "model"})),
        (
            "shared_top",
            TrimParams,
            shared_top,
            (
                {"density": 0.3},
                {"density": 0.3, "tie_policy": "inclusive"},
                {"density": 0.3, "tie_policy": "strict", "scope": "model"},
                {"density": 0.6, "scope": "model"},
                {"density": 0.0},
                {"density": 1.0, "scope": "model"},
            ),
        ),
        (
            "found_density",
            TrimParams,
            found_density,
            ({"density": (0.4, 0.8)}, {"density": 0.3, "scope": "model"}, {"density": 0.0}),
        ),
        ("squashed", Params, squashed, ({"weight": (1.0, 2.0)}, {"scope": "model"})),
    )
)

IN_NUMPY: Mapping[str, Callable[[np.ndarray, Any], np.ndarray]] = {
    "dotted": dotted_in_numpy,
    "around_mean": around_mean_in_numpy,
    "shared_top": shared_top_in_numpy,
    "found_density": found_density_in_numpy,
    "squashed": squashed_in_numpy,
}
