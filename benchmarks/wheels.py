"""What a machine without a network lacks for measuring, as wheels: collected here, installed there.

The machine is taken to have torch, Triton, numpy, safetensors, psutil, tqdm, PyYAML, transformers,
peft and pytest with its plugins. The wheels are for CPython 3.12 on x86-64 Linux.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.models import ROOT

FOLDER = ROOT / ".gpu-wheels"
MOST_NBYTES = 60 * 2**20
"""Of all wheels together: more takes longer to copy than to measure with."""
MERGEKIT_REQUIREMENT = "mergekit==0.1.5"
WITH_WHAT_THEY_ASK_FOR = ("pydantic>=2.6", "setuptools>=77,<82")
"""Small ones; pydantic takes one version of its core only. setuptools compiles the kernels, and torch
takes none from 82 on."""
ALONE = ("blake3>=1.0", MERGEKIT_REQUIREMENT, "immutables>=0.21,<1")
"""mergekit asks for torch and transformers, too: those are there."""
MODULES = ("blake3", "pydantic", "mergekit")
"""What is imported of them: where all of it is found, nothing is installed."""
_TARGET = (
    "--only-binary=:all:",
    *("--python-version", "3.12", "--implementation", "cp"),
    *("--platform", "manylinux_2_28_x86_64"),
    *("--platform", "manylinux_2_17_x86_64"),
    *("--platform", "manylinux2014_x86_64"),
)
_PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def pack(folder: Path, *, call: Callable[[Sequence[str]], object]) -> list[Path]:
    """Collect the wheels in ``folder``, instead of what is in it, and return them.

    Args:
        folder: Where they go; it stays as it is if they cannot be collected.
        call: Runs a command, and raises if it fails.

    Raises:
        SystemExit: They are larger than may be.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for requirements, more in ((WITH_WHAT_THEY_ASK_FOR, ()), (ALONE, ("--no-deps",))):
        call([*_PIP, "download", *more, *_TARGET, "--dest", str(partial), *requirements])
    wheels = sorted(partial.glob("*.whl"))
    refusal = check_size({wheel.name: wheel.stat().st_size for wheel in wheels})
    if refusal is not None:
        shutil.rmtree(partial)
        raise SystemExit(refusal)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return [folder / wheel.name for wheel in wheels]


def check_size(nbytes: dict[str, int]) -> str | None:
    """Return why wheels of these sizes are refused; None if they are small enough."""
    total = sum(nbytes.values())
    if total <= MOST_NBYTES:
        return None
    largest = max(nbytes, key=lambda name: nbytes[name])
    return (
        f"the wheels take {total / 2**20:.1f} MiB, {MOST_NBYTES / 2**20:.0f} MiB may be packed; "
        f"the largest is {largest} with {nbytes[largest] / 2**20:.1f} MiB"
    )


def missing_modules() -> list[str]:
    """Return which modules of the wheels this interpreter does not find."""
    return [name for name in MODULES if importlib.util.find_spec(name) is None]


def find_wheels(folder: Path) -> list[Path]:
    """Return the wheels in a folder.

    Raises:
        FileNotFoundError: There are none.
    """
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise FileNotFoundError(
            f"no wheels in {folder.name}/; make them with scripts/gpu_check pack"
        )
    return wheels


def install_command(wheels: Sequence[Path], target: Path) -> list[str]:
    """Return the command that installs wheels below ``target``, without a network."""
    # They are there as they were chosen: nothing is asked of an index.
    alone = ["--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    return [*_PIP, "install", *alone, *map(str, wheels)]


def unpack(wheels: Sequence[Path], target: Path) -> None:
    """Do what that command does to these wheels, where there is no pip: they are modules alone."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
