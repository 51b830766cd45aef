"""What a result was measured on and with: machine, versions, commit. No names of hosts, no paths."""

from __future__ import annotations

import compileall
import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.measuring import drop_page_cache
from benchmarks.models import ROOT

_LIST_VERSIONS = """
import json, platform
from importlib.metadata import distributions
print(json.dumps({"python": platform.python_version()} | {
    found.metadata["Name"]: found.version for found in distributions()}))
"""


def machine_facts(directory: Path) -> dict[str, Any]:
    """Return what the machine is, with the kind of disk that ``directory`` is on."""
    release = re.match(r"[\d.]+", platform.release())
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_nbytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {release[0] if release else ''}".strip(),
        "architecture": platform.machine(),
        "disk": _disk_kind(directory),
        "file_system": _file_system(directory),
    }


def disk_rates(files: Sequence[Path], directory: Path) -> dict[str, float]:
    """Measure reading and writing apart, as the floor does them, in bytes per second.

    Args:
        files: What is read, cold; as many bytes are written.
        directory: Where it is written.
    """
    nbytes = sum(file.stat().st_size for file in files)
    rates = {}
    for name, arguments in {
        "read": ["--read", *map(str, files)],
        "write": ["--write-nbytes", str(nbytes)],
    }.items():
        drop_page_cache(files, everything=False)
        with TemporaryDirectory(dir=directory) as parent:
            command = [sys.executable, "-m", "benchmarks.floor", f"{parent}/out", *arguments]
            finished = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        rates[f"{name}_bytes_per_second"] = nbytes / json.loads(finished.stdout)["seconds"]
    return rates


def hide_paths(message: str, work: Path) -> str:
    """Return a message without the places of this project and of its files on this machine."""
    for place, name in ((work, "WORK"), (ROOT, "ROOT"), (Path.home(), "HOME")):
        message = message.replace(f"{place}/", f"{name}/")
    return message


def compile_modules() -> None:
    """Compile this environment's modules, as pip does and as the first import would.

    An environment installed without that, under ``PYTHONDONTWRITEBYTECODE``, compiles all of torch
    in every run: 2 s that say nothing about a merger. The contenders' environment is pip's work.
    """
    for directory in (ROOT / "streammerge", Path(sysconfig.get_path("purelib"))):
        compileall.compile_dir(directory, quiet=2, workers=0)


def own_versions() -> dict[str, str]:
    """Return the version of every package beside this project, and of Python."""
    found = {entry.metadata["Name"]: entry.version for entry in distributions()}
    return dict(sorted({"python": platform.python_version(), **found}.items()))


def versions_of(python: Path) -> dict[str, str]:
    """Return the version of every package in another environment, and of its Python."""
    command = [str(python), "-c", _LIST_VERSIONS]
    finished = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(sorted(json.loads(finished.stdout).items()))


def commit() -> tuple[str, bool]:
    """Return the commit that is checked out, and whether files differ from it, results aside.

    A copy without its history has the commit ``unknown``.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown", True
    changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return head.strip(), bool(changes is None or changes.strip())


def _git(*arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return finished.stdout if finished.returncode == 0 else None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _disk_kind(directory: Path) -> str:
    """Return what the kernel says of the disk: its bus or model family, and whether it turns."""
    device = directory.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    # A partition's queue is that of its disk.
    disk = place if (place / "queue").is_dir() else place.parent
    try:
        rotational = (disk / "queue" / "rotational").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
    kinds = {"nvme": "NVMe", "vd": "virtual (virtio)", "xvd": "virtual", "sd": "SCSI or SATA"}
    family = next((kind for prefix, kind in kinds.items() if disk.name.startswith(prefix)), "other")
    return f"{family}, {'rotational flag set' if rotational == '1' else 'solid state'}"


def _file_system(directory: Path) -> str:
    """Return the type of the file system that holds ``directory``."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    mounts = [line.split()[1:3] for line in lines]
    holding = [(point, kind) for point, kind in mounts if directory.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]
