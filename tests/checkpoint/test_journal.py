"""Lines of a journal are read back as they were written, and no other is taken for one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from streammerge.checkpoint.digests import DIGEST_BYTES
from streammerge.checkpoint.journal import (
    Divided,
    PartDone,
    PieceDone,
    Record,
    ScopeFound,
    _as_document,
    _line,
    parse_line,
)
from streammerge.errors import ResumeError

LEAF = "0123456789abcdef" * (DIGEST_BYTES // 8)
TOP = (0.5, 10, 2, 3, 1, -1, 0)
SURVEY = (((7, -3),), (12, 0), ((0.25, -1),), (((0, 4), (5, 6)),))
"""Sums, counts, largest values and histograms."""
PIECE = PieceDone(
    3, 262144, 100, LEAF * 2, (1, 2), 0, (3, 4), (0.5, 1), (2.5,), survey=()
)  # fmt: skip
SCOPE = ScopeFound(-1, (TOP, (1, 10, 0, 0, 0, -1, -1)), (0.5, -2))
PART = PartDone(1.5, 1, 2, 3, 4, 5, "cpu", 0)
RECORDS: list[Record] = [PIECE, replace(PIECE, survey=SURVEY), SCOPE, Divided(3), PART]


def read(record: Record, **fields: Any) -> Record | None:
    """Write a record with other values in some fields, and read its line."""
    return parse_line(_line(_as_document(record) | fields).removesuffix(b"\n"))


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_line_is_read_back_as_it_was_written(record: Record) -> None:
    assert read(record) == record


@pytest.mark.parametrize("at", [0, 5, 16, 17, 40, -1])
def test_a_line_of_which_a_byte_differs_is_none(at: int) -> None:
    line = bytearray(_line(_as_document(PIECE)).removesuffix(b"\n"))
    line[at] ^= 1

    assert parse_line(bytes(line)) is None


ODD = [
    (SCOPE, "task", -2),
    (SCOPE, "task", 0.0),
    (SCOPE, "tops", None),
    (SCOPE, "tops", {}),
    (SCOPE, "tops", [list(TOP), list(TOP[:-1])]),
    (SCOPE, "tops", [[*TOP, 0]]),
    (SCOPE, "tops", ["abcdefg"]),
    (SCOPE, "tops", [["0.5", *TOP[1:]]]),
    *((SCOPE, "tops", [[*TOP[:at], -2, *TOP[at + 1 :]]]) for at in range(1, len(TOP))),
    *((SCOPE, "tops", [[*TOP[:at], 0.5, *TOP[at + 1 :]]]) for at in range(1, len(TOP))),
    (SCOPE, "numbers", [0.5, "1"]),
    (SCOPE, "numbers", [True]),
    (SCOPE, "numbers", 0.5),
    (PIECE, "survey", SURVEY[:3]),
    (PIECE, "survey", (*SURVEY, ())),
    *(
        (PIECE, "survey", (*SURVEY[:at], odd, *SURVEY[at + 1 :]))
        for at, odd in (
            (0, [[7, -3, 0]]),
            (0, [[7, 0.5]]),
            (0, 7),
            (1, [12, -1]),
            (1, 12),
            (2, [[0.25, -2]]),
            (2, [["0.25", -1]]),
            (3, [[[0]]]),
            (3, [[[0, -4]]]),
            (3, [[0, 4]]),
        )
    ),
    (PIECE, "survey", "none"),
    (PIECE, "leaves", LEAF.upper()),
    (PIECE, "leaves", LEAF + "0"),
    (PIECE, "leaves", 7),
    (PIECE, "kept", [-1]),
    (PIECE, "kept", 1),
    (PIECE, "not_finite", -1),
    (PIECE, "thresholds", [None]),
    (Divided(3), "parts", -1),
    (Divided(3), "parts", 2.0),
    (PART, "seconds", "1.5"),
    (PART, "device", 0),
    (PART, "workers", -1),
    (PART, "damaged", True),
]


@pytest.mark.parametrize(("record", "field", "value"), ODD)
def test_a_field_that_is_never_so_is_refused_by_name(
    record: Record, field: str, value: object
) -> None:
    with pytest.raises(ResumeError, match=rf"a journal: .*{field}.*give --overwrite"):
        read(record, **{field: value})


def test_zeros_and_the_least_index_are_taken() -> None:
    least = ScopeFound(0, ((0, 0, 0, 0, 0, -1, -1),), ())

    assert read(least) == least
    assert read(PartDone(0, 0, 0, 0, 0, 0, "", 0)) == PartDone(0, 0, 0, 0, 0, 0, "", 0)
