"""Wheel and source distribution, built and installed in empty environments, merge.

Each on the oldest and the newest supported Python of this machine, without torch, which is half a
gigabyte: what the compiled kernels do needs none. Without a compiler and without torch everything is
refused by name; with this environment's torch, if that fits the version, it merges.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRIAL = ROOT / "tests/installed/merging.py"
OLDEST = (3, 11)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIBRARIES = [each for each in PROJECT["dependencies"] if not each.startswith("torch")]
LEFT_OUT = {".git", ".venv", "build", "dist", "__pycache__", ".mypy_cache", "results"}
WAYS = ["wheel", "source", "source without a compiler"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.name != "posix", reason="environments are laid out as on POSIX"),
]


@pytest.fixture(scope="module")
def pythons() -> list[str]:
    """Return the oldest and the newest supported interpreter, of all that are here."""
    places = [Path(each) for each in os.get_exec_path()]
    places += sorted(Path.home().glob(".pyenv/versions/*/bin"))
    found: dict[tuple[int, ...], str] = {}
    for place in places:
        for path in sorted(place.glob("python3*")):
            if not re.fullmatch(r"python3(\.\d+)?", path.name):
                continue
            asked = [str(path), "-c", "import platform, venv; print(platform.python_version())"]
            done = subprocess.run(asked, capture_output=True, text=True, check=False)
            if done.returncode == 0 and re.fullmatch(r"[\d.]+", done.stdout.strip()):
                version = tuple(map(int, done.stdout.strip().split(".")))
                found.setdefault(version, str(path))
    versions = sorted(version for version in found if version >= OLDEST)
    return [found[version] for version in (versions[0], versions[-1])]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a wheel and a source distribution, built from a copy of the project."""
    pytest.importorskip("build")
    root = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, root / "copy", ignore=lambda _, names: [n for n in names if _leave(n)])
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(root), "."]
    subprocess.run(command, cwd=root / "copy", check=True, capture_output=True)
    (wheel,), (source,) = root.glob("*.whl"), root.glob("*.tar.gz")
    return {"wheel": wheel, "source": source}


def _leave(name: str) -> bool:
    return name in LEFT_OUT or name.endswith((".so", ".egg-info"))


def make_environment(python: str, place: Path, *requirements: str) -> Path:
    """Return the interpreter of a new environment that holds some libraries alone."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(place)], check=True)
    inner = place / "bin/python"
    done = install(inner, *requirements)
    if done.returncode != 0 and "No matching distribution" in done.stderr:
        pytest.skip(f"libraries cannot be had here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return inner


def install(python: Path, *what: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *what]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=False
    )


def test_the_wheel_is_for_every_python_and_holds_the_kernels(built: dict[str, Path]) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(built["wheel"])],
        check=True,
        capture_output=True,
        text=True,
    ).stdout

    assert re.fullmatch(r"streammerge-[\d.]+-py3-none-(?!any)\w+\.whl", built["wheel"].name)
    assert "streammerge/native/_kernels.so" in listed
    assert "licenses/LICENSE" in listed
    assert "licenses/NOTICE" in listed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("age", ["oldest", "newest"])
def test_it_merges_where_nothing_else_is_installed(
    age: str, way: str, pythons: list[str], built: dict[str, Path], tmp_path: Path
) -> None:
    oldest, newest = pythons
    if age == "newest" and newest == oldest:
        pytest.skip("there is one supported Python here")
    python = {"oldest": oldest, "newest": newest}[age]
    builds = way != "wheel"
    needed = [*LIBRARIES, *(["setuptools>=77", "wheel"] if builds else [])]
    inner = make_environment(python, tmp_path / "inner", *needed)
    what = str(built[way.split(maxsplit=1)[0]])
    compiler = {"CC": "false"} if way.endswith("without a compiler") else {}

    done = install(inner, "--no-deps", "--no-build-isolation", what, **compiler)

    assert done.returncode == 0, done.stderr
    kernels = "--no-kernels" if compiler else "--kernels"
    try_it(inner, kernels, "--without-torch")
    if compiler and borrow_torch(inner):
        try_it(inner, kernels)


def try_it(python: Path, *options: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), str(TRIAL), *options],
        env=environment,
        cwd=python.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "site-packages/streammerge" in done.stdout


def borrow_torch(python: Path) -> bool:
    """Let an environment use this one's libraries behind its own, if the versions agree."""
    asked = [str(python), "-c", "import sys, sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = Path(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip())
    if purelib.parent.name != f"python{sys.version_info.major}.{sys.version_info.minor}":
        return False
    import torch

    (purelib / "borrowed.pth").write_text(str(Path(torch.__file__).parents[1]))
    return True
