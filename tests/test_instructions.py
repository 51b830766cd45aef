"""The compiled kernels take no more instructions per element than they did; see benchmarks/instructions.py."""

import pytest

pytest.importorskip("benchmarks", reason="needs the project's root on the path")

from benchmarks import instructions
from benchmarks.instructions import compare_counts
from benchmarks.kernels import BY_ELEMENT
from benchmarks.models import RESULTS

FIGURES = {"merge ties BF16": 10.0, "find ties BF16": 20.0}
COMMITTED = sorted(RESULTS.glob("instructions-*.json"))


def test_kernels_take_as_many_instructions_as_before() -> None:
    reason = instructions.find_obstacle()
    if reason is not None:
        pytest.skip(reason)
    place = instructions.figures_path()
    if not place.exists():
        pytest.skip(f"no figures are committed for {instructions.name_compiler()}")

    counts = instructions.count_instructions()

    assert compare_counts(counts, instructions.read_figures(place)) == []


def test_what_changes_by_more_than_the_tolerance_is_named() -> None:
    counts = {"merge ties BF16": 10.51, "find ties BF16": 20.99}
    (line,) = compare_counts(counts, FIGURES)
    assert line.startswith("merge ties BF16: 10.51 instructions per element, 10.00 before (+5.1%)")
    assert "python -m benchmarks.instructions --write" in line

    # Fewer, too: figures that are not renewed would let half of a gain be lost again.
    (line,) = compare_counts({"merge ties BF16": 9.5, "find ties BF16": 18.9}, FIGURES)
    assert line.startswith("find ties BF16: 18.90 instructions per element, 20.00 before (-5.5%)")


def test_what_only_one_side_has_is_named() -> None:
    assert compare_counts({"merge ties BF16": 10.0, "merge new BF16": 1.0}, FIGURES) == [
        "merge new BF16: is counted, and has no figure",
        "find ties BF16: has a figure, and is not counted",
    ]


@pytest.mark.parametrize("place", COMMITTED, ids=lambda place: place.stem)
def test_every_method_that_the_kernels_run_has_a_figure(place) -> None:
    figures = instructions.read_figures(place)

    missing = {f"merge {name} BF16" for name in BY_ELEMENT} - figures.keys()
    assert not missing, "run `python -m benchmarks.instructions --write`"
    assert min(figures.values()) > 1
