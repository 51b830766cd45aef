"""Merges two small models with whatever streammerge is installed, and compares with plain numpy.

python merging.py [--kernels | --no-kernels] [--without-torch]

--kernels        the compiled kernels have to be there
--no-kernels     they must not
--without-torch  torch must not be there, and what needs it has to say so by name

Imports nothing of the tests and nothing that a merge does not need: it runs in empty environments.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

import streammerge
from streammerge.native.library import find_kernels, load_kernels

SCRIPT = Path(sysconfig.get_path("scripts")) / "streammerge"


def main() -> int:
    """Try what the arguments say; an assertion fails where something is wrong."""
    print(sys.version.split()[0], streammerge.__file__, find_kernels())  # noqa: T201 - what was tried
    assert "--kernels" not in sys.argv or load_kernels() is not None, find_kernels()
    assert "--no-kernels" not in sys.argv or load_kernels() is None, find_kernels()
    without_torch = "--without-torch" in sys.argv
    assert not without_torch or importlib.util.find_spec("torch") is None
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        models = [write_model(root / name, seed) for seed, name in enumerate(("base", "a", "b"))]
        if without_torch and load_kernels() is None:
            refuse(root, "task_arithmetic", "there are no compiled kernels")
            return 0
        merge(root, models)
        if without_torch:
            refuse(root, "iso_c", "the method decomposes whole matrices")
    return 0


def write_model(path: Path, seed: int) -> dict[str, np.ndarray]:
    path.mkdir()
    values = np.random.default_rng(seed).standard_normal((300, 70)).astype(np.float32)
    save_file({"layer.weight": values}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return {"layer.weight": values}


def merge(root: Path, models: list[dict[str, np.ndarray]]) -> None:
    run(
        root,
        "merge",
        "--method",
        "task_arithmetic",
        "--base",
        "base",
        "a:0.5",
        "b:0.25",
        "-o",
        "out",
    )
    run(root, "verify", "out")

    base, first, second = (model["layer.weight"] for model in models)
    expected = base + (np.float32(0.5) * (first - base) + np.float32(0.25) * (second - base))
    merged = load_file(root / "out" / "model.safetensors")["layer.weight"]
    np.testing.assert_array_equal(merged, expected)


def refuse(root: Path, method: str, reason: str) -> None:
    """See what needs torch refused by name, before anything is written."""
    done = run(root, "merge", "--method", method, "--base", "base", "a", "b", "-o", "no", code=1)

    assert reason in done, done
    assert "that needs torch, which is not installed" in done, done
    assert not (root / "no").exists()


def run(root: Path, *arguments: str, code: int = 0) -> str:
    """Run the installed command and return what it says on standard error."""
    done = subprocess.run(
        [str(SCRIPT), *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr


if __name__ == "__main__":
    sys.exit(main())
