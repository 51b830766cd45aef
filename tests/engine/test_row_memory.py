"""What is found about rows is found once where there is memory for it, and never changes a bit."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from models import BLOCK, Models, assert_same_model, recipe_of, recut, without_kernels

import streammerge
from streammerge.engine.compiled.rows import CompiledRows
from streammerge.engine.plain import PlainStage
from streammerge.statistics.rounds import RowMemory

SHAPES = {
    "small": (40, 300),
    "one chunk": (700, 500),
    "several": (3000, 700),
    "short rows": (9000, 63),
    "line": (BLOCK + 7,),
}


def test_what_is_remembered_is_recalled_once_all_of_it_is_known() -> None:
    memory = RowMemory(6, 2)
    found = np.arange(9.0).reshape(3, 3)

    memory.remember(2, found)

    recalled = memory.recall(2, 3)
    assert recalled is not None
    np.testing.assert_array_equal(recalled, found[:, :2])
    assert memory.recall(1, 2) is None
    assert memory.recall(3, 3) is None
    assert RowMemory.nbytes_of(6, 2) == 6 * 17
    assert RowMemory.nbytes_of(6, 0) == 0


def recipe(models: Models) -> dict[str, object]:
    generator = torch.Generator().manual_seed(3)

    def draw(scale: float) -> dict[str, torch.Tensor]:
        return {k: torch.randn(s, generator=generator) * scale for k, s in SHAPES.items()}

    base = draw(1.0)
    tuned = {name: base[name] + change for name, change in draw(0.1).items()}
    paths = [models.write({k: t.bfloat16() for k, t in each.items()}) for each in (base, tuned)]
    return recipe_of("arcee_fusion", paths[0], paths[1:])


def count_rows(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how many rows of each tensor are asked about, from now on."""
    asked: Counter[str] = Counter()
    compiled, plain = CompiledRows._ask, PlainStage._ask_rows

    def ask(self, setting, operands, wanted, known):
        asked[wanted.segment.part.task.name] += len(known.numbers)
        return compiled(self, setting, operands, wanted, known)

    def ask_plainly(self, programs, piece, block, known, *, check):
        asked[block.segments[0].part.task.name] += len(known.numbers)
        return plain(self, programs, piece, block, known, check=check)

    monkeypatch.setattr(CompiledRows, "_ask", ask)
    monkeypatch.setattr(PlainStage, "_ask_rows", ask_plainly)
    return asked


@pytest.mark.parametrize("plainly", [False, True])
def test_rows_are_asked_about_once_unless_there_is_no_room(
    models: Models, monkeypatch: pytest.MonkeyPatch, *, plainly: bool
) -> None:
    plan = streammerge.plan(recipe(models), memory="3GiB", workers=2)
    tight = recut(plan, slots=2, workers=1, statistics_bytes=1)
    with without_kernels() if plainly else nullcontext():
        asked = count_rows(monkeypatch)
        remembered, _ = models.merge(plan)
        at_first = dict(asked)
        asked.clear()
        found_again, _ = models.merge(tight)

    assert_same_model(found_again, remembered)
    assert at_first.pop("short rows") > SHAPES["short rows"][0]
    # Those of a sample are asked about with their neighbours once more.
    assert 3000 <= at_first.pop("several") < 3300
    assert at_first == {"small": 40, "one chunk": 700, "line": 1}
    assert asked["several"] >= 2 * SHAPES["several"][0]
