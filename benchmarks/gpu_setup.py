"""The first steps on a machine with an accelerator: what it is, what it lacks, whether the tests pass.

Nothing here needs more than the standard library until the wheels are installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from benchmarks import environment
from benchmarks.models import ROOT
from benchmarks.steps import Limit, Log, Outcome, call
from benchmarks.wheels import FOLDER, find_wheels, install_command, missing_modules, unpack

MEMORY_DIRECTORY = Path("/dev/shm")  # noqa: S108 - in memory is what it is for
_NVIDIA_SMI = (
    "name,driver_version,memory.total,memory.free,pcie.link.gen.current,pcie.link.width.current,"
    "clocks.max.sm,clocks.max.memory,power.limit,compute_cap"
)
_VERSIONS = """
import json, platform
found = {"python": platform.python_version()}
for name in ("torch", "triton", "numpy"):
    try:
        found[name] = __import__(name).__version__
    except ImportError:
        found[name] = None
print(json.dumps(found))
"""
_LOADING = """
import sys
from streammerge.native.library import find_kernels
found = find_kernels()
sys.exit(found if isinstance(found, str) else 0)
"""
_COMPILING = "from benchmarks.environment import compile_modules; compile_modules()"
KERNELS = ROOT / "streammerge" / "native" / "_kernels.so"
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_TEST_PROCESSES = 4
"""Tests share the device: a few start and wait side by side, many would only take its memory."""
_TEST_SECONDS = 60
"""One test; the slowest takes seconds on a CPU."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a check runs."""

    work: Path
    """A directory of its own, in memory if there is room; removed at the end."""
    log: Log
    """What commands say."""
    device: str
    """The accelerator, or ``cpu``, which then stands in for it."""


def tell_facts(place: Place, limit: Limit) -> Outcome:
    """Find out what the machine is."""
    said = call([sys.executable, "-c", _VERSIONS], cwd=ROOT, limit=limit, log=place.log)
    return Outcome(
        {
            "nvidia_smi": ask_nvidia_smi(place, limit),
            "versions": json.loads(said.splitlines()[-1]),
            "machine": environment.machine_facts(place.work),
            "memory_limit_nbytes": memory_limit(),
            "available_nbytes": available_memory(),
            "shared_memory_free_nbytes": free_nbytes(MEMORY_DIRECTORY),
            "disk_free_nbytes": free_nbytes(Path(tempfile.gettempdir())),
            "compiler": shutil.which("cc") is not None or shutil.which("gcc") is not None,
        }
    )


def ask_nvidia_smi(place: Place, limit: Limit) -> list[dict[str, str]] | None:
    """Return what the driver's tool says of every device; None without the tool."""
    command = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv,noheader"]
    try:
        said = call(command, cwd=ROOT, limit=limit, log=place.log)
    except (OSError, subprocess.CalledProcessError):
        return None
    names = _NVIDIA_SMI.split(",")
    rows = (line.split(", ") for line in said.splitlines() if line.strip())
    return [dict(zip(names, row, strict=False)) for row in rows]


def memory_limit() -> int | None:
    """Return the memory that this process and its children may have; None if nothing limits it."""
    for path in _LIMITS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        # The older interface says a number near 2^63 where there is no limit.
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def available_memory() -> int:
    """Return the bytes of memory that could be had now, by the kernel and the limit."""
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    fields = dict(line.split(":") for line in text.splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit = memory_limit()
    return free if limit is None else min(free, limit)


def free_nbytes(directory: Path) -> int:
    """Return the bytes that are free there; 0 if there is no such place."""
    return shutil.disk_usage(directory).free if directory.is_dir() else 0


def room_in_memory() -> int:
    """Return the bytes of files that memory has room for, a quarter of it left to programs."""
    return min(free_nbytes(MEMORY_DIRECTORY), available_memory() * 3 // 4)


def room_at(work: Path) -> int:
    """Return the bytes of files that a directory has room for."""
    return room_in_memory() if work.is_relative_to(MEMORY_DIRECTORY) else free_nbytes(work)


def install(place: Place, limit: Limit) -> Outcome:
    """Install the wheels for this process and all it starts, unless all of it is there."""
    missing = missing_modules()
    if missing:
        target = Path(tempfile.mkdtemp(prefix="wheels-", dir=place.work))
        found = find_wheels(FOLDER)
        if importlib.util.find_spec("pip") is None:
            unpack(found, target)
        else:
            call(install_command(found, target), cwd=ROOT, limit=limit, log=place.log)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *([before] if before else [])])
        sys.path.insert(0, str(target))
        importlib.invalidate_caches()
    still = missing_modules()
    return Outcome(
        {"installed": missing, "versions": environment.own_versions()},
        f"not in the wheels: {', '.join(still)}" if still else None,
    )


def compile_kernels(place: Place, limit: Limit) -> Outcome:
    """Compile the kernels in place, which takes half a minute of one core, and load them."""
    before = _changed_at(KERNELS)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", "--force"]
    command += ["--build-temp", str(place.work / "build")]
    call(command, cwd=ROOT, limit=limit, log=place.log)
    # Where they cannot be compiled the build goes on without them, and an older library stays.
    if _changed_at(KERNELS) == before:
        return Outcome({}, "the kernels were not compiled; the log has what the compiler said")
    outcome = load_kernels(place, limit)
    return Outcome(outcome.values | {"compiled": True})


def load_kernels(place: Place, limit: Limit) -> Outcome:
    """See that the kernels can be loaded.

    Raises:
        subprocess.CalledProcessError: They cannot; its message says why.
    """
    call([sys.executable, "-c", _LOADING], cwd=ROOT, limit=limit, log=place.log)
    return Outcome({"compiled": False})


def compile_modules(place: Place, limit: Limit) -> Outcome:
    """Compile all modules of Python, which every start of a program would do where none has."""
    call([sys.executable, "-c", _COMPILING], cwd=ROOT, limit=limit, log=place.log)
    return Outcome()


def _changed_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def find_tests() -> list[Path]:
    """Return the files of tests that need an accelerator: others import what may not be there."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in tests if "mark.gpu" in path.read_text(encoding="utf-8")]


def run_tests(place: Place, limit: Limit) -> Outcome:
    """Run the tests that need an accelerator."""
    report = place.work / "tests.xml"
    processes = min(_TEST_PROCESSES, environment.machine_facts(place.work)["cores"])
    command = [
        *[sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--durations=10"],
        *["-p", "no:cacheprovider", f"--timeout={_TEST_SECONDS}", f"--junit-xml={report}"],
        *["-n", str(processes), "--dist", "worksteal", f"--basetemp={place.work / 'tests'}"],
        *[str(path.relative_to(ROOT)) for path in find_tests()],
    ]
    try:
        said = call(command, cwd=ROOT, limit=limit, log=place.log)
    except subprocess.CalledProcessError as error:
        said = str(error.stderr)
    finally:
        shutil.rmtree(place.work / "tests", ignore_errors=True)
    if not report.exists():
        lines = said.strip().splitlines() or ["it said nothing"]
        return Outcome({}, f"no test was run: {lines[-1]}")
    return judge_tests(report.read_text(encoding="utf-8"), on_a_device=place.device != "cpu")


def judge_tests(report: str, *, on_a_device: bool) -> Outcome:
    """Return what a report in JUnit's XML means.

    Args:
        report: Its text.
        on_a_device: Whether there is an accelerator, with which a test has to have run.
    """
    suite = next(ET.fromstring(report).iter("testsuite"))  # noqa: S314 - pytest wrote it
    counts = {
        name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
    }
    bad = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    values: dict[str, Any] = {**counts, "passed": passed, "seconds": float(suite.get("time", "0"))}
    if bad:
        return Outcome(values | {"failed": bad[:40]}, f"{len(bad)} failed, the first is {bad[0]}")
    if on_a_device and passed == 0:
        return Outcome(values, f"none of {counts['tests']} tests ran")
    return Outcome(values)
