"""Counts the instructions that the compiled kernels take per element, under valgrind.

    python -m benchmarks.instructions            compare with the figures that are committed
    python -m benchmarks.instructions --write    write the figures anew

A count is the same on every run and under any load, so that a slower kernel can be told where no time
can be measured. It says nothing of caches and memory: ``benchmarks/test_kernels.py`` times. Whatever
changes by more than :data:`TOLERANCE`, to either side, is named, and the exit code is 1. Figures are
those of one compiler, kept in a file of its name.

The kernels are compiled from their sources as they are, with an installation's flags, for one
instruction set: for all three, of which valgrind would run the same one, takes 15 s longer, and the counts
are the same to 0.1 %. A method is at work on one tensor, as in ``benchmarks/test_kernels.py``. Counted is
what runs inside ``ffi_call``, by which ctypes calls: the kernels and what they call of the system's
library, and nothing of Python.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.kernels import BY_ELEMENT, ROW_NUMEL, Drawn, Merging
from benchmarks.models import RESULTS, ROOT
from benchmarks.reporting import align
from streammerge.adapters.onto_base.products import PlainProduct
from streammerge.dtypes import DType
from streammerge.native.library import SWITCH, load_kernels

TOLERANCE = 0.05
"""How much of a figure a count may differ by; compilers of one version differ by less."""
TARGET = "avx2"
"""The instruction set: the largest that the kernels are compiled for and valgrind knows."""
SHAPE = (512, ROW_NUMEL)
NUMEL = SHAPE[0] * ROW_NUMEL
IN_OTHER_TYPES = ("task_arithmetic", "ties")
"""Methods counted in float16 and float32 too: loading and storing are all that differs."""
RANK = 64
"""Of the two factors that are multiplied."""
Counts = Mapping[str, float]
"""Instructions per element of the result, by what was done."""

_MARKS = """
#include <valgrind/callgrind.h>
void start(void);
void begin(void);
void end(const char *name);
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void begin(void) { CALLGRIND_ZERO_STATS; }
void end(const char *name) { CALLGRIND_DUMP_STATS_AT(name); }
"""
"""Tells valgrind what to count."""


def main(arguments: Sequence[str]) -> int:
    """Count, compare and print or write what the command line asks for and return the exit code."""
    summary = (__doc__ or "").split("\n", maxsplit=1)[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=summary)
    parser.add_argument("--write", action="store_true", help="write the figures anew")
    options = parser.parse_args(arguments)
    reason = find_obstacle()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    place = figures_path()
    counts = count_instructions()
    if options.write:
        document = {"compiler": name_compiler(), "target": TARGET, "elements": NUMEL}
        document["instructions_per_element"] = {name: round(n, 3) for name, n in counts.items()}
        place.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"written to {place}")
        return 0
    if not place.exists():
        print(f"no figures for this compiler, {place.name}; write them with --write")
        print(render_counts(counts, {}))
        return 2
    figures = read_figures(place)
    print(render_counts(counts, figures))
    differences = compare_counts(counts, figures)
    print("\n".join(differences) or f"all within {TOLERANCE:.0%} of {place.name}")
    return int(bool(differences))


def find_obstacle() -> str | None:
    """Return why nothing can be counted here; None where it can."""
    if shutil.which("valgrind") is None:
        return "valgrind, which counts, is not installed"
    if shutil.which("gcc") is None:
        return "gcc, whose code the figures are for, is not installed"
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or TARGET not in cpu.read_text(encoding="utf-8").split():
        return f"this processor has no {TARGET}, or does not say so"
    including = ["gcc", "-fsyntax-only", "-include", "valgrind/callgrind.h", "-xc", os.devnull]
    if subprocess.run(including, capture_output=True, check=False).returncode:
        return "valgrind's header callgrind.h is not installed"
    return None


def name_compiler() -> str:
    """Return the compiler with its version."""
    asked = ["gcc", "-dumpfullversion"]
    version = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    return f"gcc-{version}"


def figures_path() -> Path:
    """Return where the figures for the compiler of this machine are, if there are any."""
    return RESULTS / f"instructions-{name_compiler()}-{TARGET}.json"


def read_figures(place: Path) -> Counts:
    """Return the figures in a file."""
    figures: Counts = json.loads(place.read_text(encoding="utf-8"))["instructions_per_element"]
    return figures


def compare_counts(counts: Counts, figures: Counts) -> list[str]:
    """Return what is wrong, a line each: counts that differ, and what only one side has."""
    lines = [f"{name}: is counted, and has no figure" for name in counts if name not in figures]
    for name, figure in figures.items():
        if name not in counts:
            lines.append(f"{name}: has a figure, and is not counted")
        elif abs(counts[name] - figure) > TOLERANCE * figure:
            change = counts[name] / figure - 1
            lines.append(
                f"{name}: {counts[name]:.2f} instructions per element, {figure:.2f} before "
                f"({change:+.1%}); if that is meant, run python -m benchmarks.instructions --write"
            )
    return lines


def render_counts(counts: Counts, figures: Counts) -> str:
    """Return the table for a terminal."""
    rows = [["", "instructions per element", "figure"]]
    rows += [
        [n, f"{c:.2f}", f"{figures[n]:.2f}" if n in figures else ""] for n, c in counts.items()
    ]
    return "\n".join(align(rows))


def count_instructions() -> Counts:
    """Return the counts of the kernels as their sources are now.

    Raises:
        subprocess.CalledProcessError: They cannot be compiled, or a merge failed.
        RuntimeError: ctypes does not call them by a function that valgrind can see.
    """
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        package = directory / "streammerge"
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "streammerge", package, ignore=ignored)
        _compile_kernels(package)
        marks = directory / "marks.so"
        compiling = ["gcc", "-fPIC", "-shared", "-xc", "-", "-o", str(marks)]
        subprocess.run(compiling, input=_MARKS, check=True, text=True)
        subprocess.run(
            [
                *("valgrind", "--quiet", "--tool=callgrind", "--instr-atstart=no"),
                "--toggle-collect=ffi_call",
                f"--callgrind-out-file={directory / 'counts'}",
                *(sys.executable, "-m", "benchmarks.instructions", "--run", str(marks)),
            ],
            check=True,
            cwd=directory,
            env={name: value for name, value in os.environ.items() if name != SWITCH}
            | {"PYTHONPATH": os.pathsep.join([str(directory), str(ROOT)]), "PYTHONHASHSEED": "0"},
        )
        counts = dict(_read_counts(directory))
    if not all(counts.values()):
        raise RuntimeError("valgrind did not see ffi_call: this Python has a libffi of its own")
    return counts


def _compile_kernels(package: Path) -> None:
    """Compile the kernels into a copy of the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    sources = [str(ROOT / source) for source in extension["sources"]]
    flags = [*extension["extra-compile-args"], "-fwrapv", f"-m{TARGET}", "-DFOR_ONE_CPU"]
    library = package / "native" / f"_kernels{suffix}"
    subprocess.run(["gcc", *flags, "-fPIC", "-shared", *sources, "-o", str(library)], check=True)


def _read_counts(directory: Path) -> Iterator[tuple[str, float]]:
    """Yield what was done with its count, from the files that valgrind wrote, in their order."""
    places = sorted(directory.glob("counts.*"), key=lambda place: int(place.suffix[1:]))
    for place in places:
        text = place.read_text(encoding="utf-8", errors="replace")
        done = re.search(r"^desc: Trigger: Client Request: (.+)$", text, re.MULTILINE)
        total = re.search(r"^summary: (\d+)$", text, re.MULTILINE)
        if done and total:
            yield done[1], int(total[1]) / NUMEL


def _run_all(marks: ctypes.CDLL) -> None:
    """Do everything that is counted; this process runs under valgrind."""

    @contextmanager
    def counted(name: str) -> Iterator[None]:
        marks.begin()
        yield
        marks.end(name.encode())

    if load_kernels() is None:
        raise SystemExit("the kernels were compiled, and cannot be loaded")
    with tempfile.TemporaryDirectory() as directory:
        prepared = [
            (f"{name} {dtype}", Merging.of(name, drawn))
            for dtype in (DType.BF16, DType.F16, DType.F32)
            for drawn in (Drawn.at_random(SHAPE, dtype, Path(directory)),)
            for name in (BY_ELEMENT if dtype is DType.BF16 else IN_OTHER_TYPES)
        ]
    out = np.empty(NUMEL * DType.F32.itemsize, np.uint8)
    # Only now: until then it is several times as fast.
    marks.start()
    for name, merging in prepared:
        if merging.programs.rounds:
            with counted(f"find {name}"):
                found = merging.find()
        else:
            found = merging.find()
        with counted(f"merge {name}"):
            merging.merge(found, out)
    with counted(f"product of rank {RANK}"):
        _multiply()


def _multiply() -> None:
    """Multiply two factors, as baking does."""
    kernels = load_kernels()
    assert kernels is not None  # noqa: S101 - loaded before
    rows, columns = SHAPE
    tiles, up = np.ones(RANK * columns, np.float32), np.ones((rows, RANK), np.float32)
    out = np.empty(SHAPE, np.float32)
    call = PlainProduct(tiles, up, columns, 0.5).call(out, adds=False)
    kernels.change_range(ctypes.addressof(call), start=0, numel=rows * columns)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        _run_all(ctypes.CDLL(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
