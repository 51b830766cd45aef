"""``--fast`` still asks for every law once, and names nothing that is not there."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from documented import ROOT
from fast import TAKES_LONG

LAWS = {
    "exact": (
        "methods/test_laws.py::test_streaming_equals_whole_tensors_in_memory",
        "methods/test_merged_values.py",
        "test_functional.py::test_ties",
        "statistics/test_magnitude.py::test_the_search_equals_a_stable_sort",
    ),
    "the same bits": (
        "methods/test_laws.py::test_output_bytes_depend_on_nothing_but_recipe_and_inputs",
        "methods/test_laws.py::test_the_seed_decides_the_bits_of_random_methods_alone",
        "native/test_native.py",
    ),
    "bounded memory": ("test_memory.py::test_measured_peak_stays_within_the_plan",),
    "nothing silent": ("test_bad_input.py", "plan/test_refusals.py", "recipe/test_parsing.py"),
    "nothing lost": ("test_every_exit.py", "test_verify.py", "test_vouching.py"),
    "inputs are data": (
        "test_security.py::test_a_merge_runs_no_pickle_no_program_and_opens_no_connection",
        "checkpoint/test_torchfile.py",
        "checkpoint/test_header.py",
    ),
}
"""What CONTRIBUTING promises, and tests of it; that imports go one way, the checks before the tests see."""


@pytest.fixture(scope="module")
def collected() -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "--fast",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_every_law_is_asked_for(collected: list[str]) -> None:
    for law, tests in LAWS.items():
        for test in tests:
            assert any(line.startswith(f"tests/{test}") for line in collected), (law, test)


def test_every_law_of_methods_is_tried_on_one_case(collected: list[str]) -> None:
    source = (ROOT / "tests/methods/test_laws.py").read_text()
    tried = [line.split("[")[0] for line in collected if "/test_laws.py::" in line]

    names = re.findall(r"^def (test_\w+)", source, re.MULTILINE)
    # In the order of their cases, which any new method changes.
    assert sorted(tried) == sorted(f"tests/methods/test_laws.py::{name}" for name in names)


def test_what_is_left_out_is_there() -> None:
    tests = ROOT / "tests"
    names = {path.name for path in tests.rglob("*")}
    names |= {
        name
        for path in tests.rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }

    assert {name for name in TAKES_LONG if name not in names} == set()
