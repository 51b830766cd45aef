"""What docs/adding-a-method.md shows works as it stands there: files, twins, tests, commands."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from models import load_model, write_model

from streammerge.methods import discover_methods

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
PACKAGE = "streammerge/methods/"
SHAPES = {"model.up.weight": (40, 32), "model.down.weight": (32, 40)}
OTHERS = ("norm_matched_rows", "clipped", "low_rank")
"""The methods that are shown beside the first."""


def read_blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", DOCUMENT, re.DOTALL | re.MULTILINE)
    return [text for of, text in found if of == language]


def read_files() -> dict[str, str]:
    """Return the files that the document shows, by the paths in their first lines."""
    files: dict[str, str] = {}
    for text in read_blocks("python"):
        named = re.match(r"# (\S+\.py)(, continued)?\n", text)
        if named is not None:
            path, continued = named.groups()
            assert (path in files) == (continued is not None), path
            before = f"{files[path]}\n\n" if continued else ""
            files[path] = before + text[named.end() :]
    return files


FILES = read_files()
(EXTENDING,) = [text for text in read_blocks("python") if not text.startswith("# ")]
"""How the document lets Python find methods outside of the tree, in a folder called my_methods."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory with the document's methods in ``my_methods``, twins, and models."""
    for name, text in FILES.items():
        path = tmp_path / name.replace(PACKAGE, "my_methods/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for seed, name in enumerate(("base", "math", "code")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            tensor: torch.randn(shape, generator=generator, dtype=torch.float64)
            for tensor, shape in SHAPES.items()
        }
        write_model(tmp_path / "models" / name, tensors)
    return tmp_path


def run(place: Path, code: str, *arguments: str) -> str:
    """Run code in a process that finds the document's methods, and return what it prints."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", f"{EXTENDING}\n{code}", *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout


def run_command(place: Path, command: str) -> str:
    program, *arguments = shlex.split(command)
    assert program == "streammerge"
    return run(place, "from streammerge.__main__ import run; run()", *arguments)


def run_tests(place: Path, module: str, chosen: str) -> None:
    """Run those tests of a module that are about some of the document's methods."""
    code = 'import sys, pytest, twins; twins.__path__.append("tests/twins")\n'
    code += "from twins import norms\nfrom twins.calling import TWINS, WEIGHTS, Twin, _plain\n"
    code += f"{FILES['tests/twins/calling.py']}\nsys.exit(pytest.main(sys.argv[1:]))"
    of_project = [f"--config-file={ROOT / 'pyproject.toml'}", f"--rootdir={ROOT}"]
    of_project += [f"--basetemp={place / 'inner'}", "-p", "no:cacheprovider", "-q"]
    run(place, code, *of_project, str(ROOT / "tests" / "methods" / module), "-k", chosen)


def load_twins(place: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("norms", place / "tests" / "twins" / "norms.py")
    assert spec is not None
    assert spec.loader is not None
    norms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(norms)
    return norms


def read_models(place: Path, *names: str) -> list[dict[str, np.ndarray]]:
    return [
        {name: tensor.numpy() for name, tensor in load_model(place / "models" / model).items()}
        for model in names
    ]


def test_the_document_shows_these_files_and_no_tree_has_them() -> None:
    assert list(FILES) == [
        f"{PACKAGE}norm_matched.py",
        f"{PACKAGE}sketches.py",
        "tests/twins/norms.py",
        "tests/twins/calling.py",
    ]
    assert [path for path in FILES if (ROOT / path).exists()] == ["tests/twins/calling.py"]
    assert not {"norm_matched", *OTHERS} & set(discover_methods())


def test_the_commands_merge_what_the_twin_merges(place: Path) -> None:
    (recipe,) = read_blocks("yaml")
    (place / "recipe.yaml").write_text(f"{recipe}compute_dtype: float64\n")
    *tests, commands = read_blocks("")
    assert [test.split()[:4] for test in tests] == [
        ["python", "-m", "pytest", f"tests/methods/test_{name}.py"]
        for name in ("laws", "merged_values")
    ]

    said = [run_command(place, command) for command in commands.splitlines()]

    assert "Task arithmetic whose change is as long" in said[0]
    assert "equal, bit by bit" in said[-1]
    base, *sources = read_models(place, "base", "math", "code")
    merged = load_model(place / "merged")
    assert merged.keys() == SHAPES.keys()
    for name, tensor in merged.items():
        expected = load_twins(place).norm_matched(
            base[name], [each[name] for each in sources], weight=[0.6, 0.4], norm="largest"
        )
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_merged_files_hold_what_the_twins_compute(place: Path) -> None:
    names = " or ".join(["norm_matched", *OTHERS])
    run_tests(place, "test_merged_values.py", f"({names}) and not mergekit")


def test_the_laws_hold(place: Path) -> None:
    run_tests(place, "test_laws.py", " or ".join(["norm_matched", *OTHERS]))
