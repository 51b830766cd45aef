"""Whatever is in a file, it is read or refused by name, within bounds of memory and time.

These are a few thousand inputs; ``scripts/fuzz`` makes a million, each from a number of its own.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from random import Random

import generators
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import FIXED_BYTES, TARGETS, Target, check

every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS, indirect=True)
hurried = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """A target whose directory is ``tmp_path``."""
    chosen: Target = request.param
    chosen.prepare(tmp_path)
    return chosen


@every_target
def test_any_input_is_read_or_refused(target: Target, tmp_path: Path) -> None:
    """Driven by hypothesis, which finds the smallest input that fails."""

    @hurried
    @given(st.randoms(use_true_random=False))
    def run(random: Random) -> None:
        check(target, target.make(random), tmp_path)

    run()


@every_target
def test_seeded_inputs_are_read_or_refused(target: Target, tmp_path: Path) -> None:
    """The numbers are the same each time, so that both outcomes can be counted on."""
    outcomes = {
        check(target, target.make(Random(seed)), tmp_path)  # noqa: S311 - repeatable on purpose
        for seed in range(300)
    }

    assert outcomes == {True, False}


@every_target
def test_memory_is_bounded_by_a_multiple_of_the_input(target: Target, tmp_path: Path) -> None:
    check(target, target.make(Random(0)), tmp_path)  # noqa: S311 - fills caches
    tracemalloc.start()
    try:
        for seed in range(50):
            content = target.make(Random(seed))  # noqa: S311
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            check(target, content, tmp_path)
            taken = tracemalloc.get_traced_memory()[1] - before
            assert taken <= FIXED_BYTES + target.multiple * len(content), seed
    finally:
        tracemalloc.stop()


def _pairs(count: int) -> bytes:
    """A list of ``count`` pairs of different keys, in the memo at 0."""
    return (
        b"](" + b"".join(b"M" + n.to_bytes(2, "little") + b"N\x86" for n in range(count)) + b"eq\0"
    )


_ORDERED = b"ccollections\nOrderedDict\nq\1"
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\nq\1"
_PARAMETER = b"ctorch._utils\n_rebuild_parameter\nq\1"
_STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\x06tQq\2"
_ONE_HASH = 2**61 - 1  # the modulus of Python's hash of numbers


def _colliding(count: int) -> bytes:
    keys = [(n * _ONE_HASH).to_bytes(16, "little") for n in range(1, count)]
    return b"}(" + b"".join(b"\x8a\x10" + key + b"N" for key in keys) + b"u."


LARGE = {
    # Each of the first four took time or memory that grew with the square of the file.
    "copies of a list of items": lambda: _pairs(20_000) + _ORDERED + b"h\1h\0\x85R" * 20_000 + b".",
    "copies of many arguments": lambda: (
        _STORAGE + b"(h\2" + b"N" * 100_000 + b"tq\0" + _REBUILD + b"h\1h\0R" * 50_000 + b"."
    ),
    "copies of many hooks": lambda: (
        b"(" + b"N" * 300_000 + b"tq\0" + _PARAMETER + b"h\1h\0R" * 100_000 + b"."
    ),
    "keys of one hash": lambda: _colliding(50_000),
    "empty lists": lambda: b"]" * 100_000,
    "empty dicts": lambda: b"}" * 100_000,
    "memo": lambda: b"N" + b"\x94" * 100_000,
    "marks": lambda: b"(" * 100_000,
    "list in list": lambda: b"]" * 50_000 + b"a" * 49_999 + b".",
    "state dicts": lambda: _ORDERED + b")R0h\1" * 100_000,
    "tuples": lambda: b"N" + b"\x85" * 100_000 + b".",
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_large_pickle_costs_no_more_than_its_size(
    make: Callable[[], bytes], tmp_path: Path
) -> None:
    content = generators.archive({"x/data.pkl": make(), "x/data/0": bytes(24)})
    target = TARGETS["pickle"]
    tracemalloc.start()
    try:
        assert not check(target, content, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= FIXED_BYTES + target.multiple * len(content)


def test_shape_shared_by_many_tensors_costs_no_more_than_its_size(tmp_path: Path) -> None:
    shape = b"(" + b"K\1" * 50_000 + b"tq\0"
    rest = shape + b"h\0\x89NtR"
    first = b"X\5\0\0\0first" + _REBUILD + b"(" + _STORAGE + b"K\0" + rest
    others = b"".join(b"X\5\0\0\0%05dh\1(h\2K\0h\0h\0\x89NtR" % n for n in range(50_000))
    raw = b"}(" + first + others + b"u."
    content = generators.archive({"x/data.pkl": raw, "x/data/0": bytes(24)})

    assert not check(TARGETS["pickle"], content, tmp_path)


WIDE_JSON = {
    "lists": b"[" + b"[]," * 100_000 + b"0]",
    "objects": b"[" + b"{}," * 100_000 + b"0]",
    "open lists": b"[" * 300_000,
    "open lists among strings": b'["",' * 100_000,
    "quotes": b'"' * 300_000,
    "escaped quotes": b'"' + b'\\"' * 100_000,
    "backslashes": b'"' + b"\\" * 1_000_001,
    "one key": b"{" + b'"":0,' * 200_000 + b'"":0}',
    "long numbers": b"[" + (b"9" * 4000 + b",") * 250 + b"0]",
    "long name": b'{"' + b"\\u0007" * 100_000 + b'":{}}',
    "wide character": b'["\xf0\x9f\x98\x80' + b"a" * 300_000 + b'"]',
}


@pytest.mark.parametrize(
    "target", [TARGETS[name] for name in ("shard", "index", "config", "manifest")], indirect=True
)
@pytest.mark.parametrize("raw", WIDE_JSON.values(), ids=WIDE_JSON)
def test_large_json_costs_no_more_than_its_size(raw: bytes, target: Target, tmp_path: Path) -> None:
    if target.name == "shard":
        raw = b'{"a":' + raw + b"}"
        raw = len(raw).to_bytes(8, "little") + raw
    tracemalloc.start()
    try:
        check(target, raw, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= FIXED_BYTES + target.multiple * len(raw)
