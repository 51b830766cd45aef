"""Looking costs little: no torch for help and headers, and plans of many tensors at once."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import Models, recipe_of

import streammerge
from streammerge import lazily
from streammerge.cli.arguments import main
from streammerge.plan.chunking import iter_units

MANY = 20_000


def modules_after(arguments: list[str]) -> set[str]:
    """Run a command in a fresh interpreter and return what it has imported."""
    code = (
        "import sys\n"
        "from streammerge.cli.arguments import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as ended:\n"
        "    code = ended.code\n"
        "assert not code, code\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["merge", "--help"]])
def test_help_does_not_wait_for_torch(command: list[str]) -> None:
    modules = modules_after(command)

    assert "streammerge.cli.arguments" in modules
    assert modules.isdisjoint({"torch", "numpy", "pydantic", "yaml"})


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("binary", [False, True])
def test_inspect_does_not_wait_for_torch(
    options: list[str],
    binary: bool,  # noqa: FBT001
    models: Models,
) -> None:
    model = models.write({"a": torch.ones(3)}, binary=binary)

    assert "torch" not in modules_after(["inspect", str(model), *options])


def test_a_plan_does_not_wait_for_what_only_others_need(models: Models, tmp_path: Path) -> None:
    """torch, other tools' recipes, and bars on terminals."""
    base, source = (models.write({"a": torch.ones(3) * number}) for number in (1, 2))
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of("ties", base, [source], parameters={"density": 0.5})))

    modules = modules_after(["plan", str(recipe)])

    assert "streammerge.plan.planning" in modules
    mergekit = "streammerge.recipe.dialects.mergekit"
    assert modules.isdisjoint({"torch", "tqdm", mergekit})


def test_python_m_does_not_wait_for_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "streammerge", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )

    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "streammerge.cli.arguments" in imported
    assert "torch" not in imported


def test_importing_the_package_does_not_wait_for_torch() -> None:
    code = "import sys, streammerge; streammerge.__version__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"


def test_the_version_of_torch_is_found_without_a_record_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = lazily.torch_version()
    assert recorded.partition("+")[0] == torch.__version__.partition("+")[0]

    def find_nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", find_nothing)
    assert lazily.torch_version.__wrapped__() == torch.__version__


def write_header_only(directory: Path, count: int) -> Path:
    """Write a model of two-megabyte tensors, whose file is as large and takes no room on disk."""
    directory.mkdir()
    nbytes = 2 * 1000 * 1000
    header = {
        f"model.layers.{index // 100}.experts.{index % 100}.weight": {
            "dtype": "BF16",
            "shape": [1000, 1000],
            "data_offsets": [index * nbytes, (index + 1) * nbytes],
        }
        for index in range(count)
    }
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + count * nbytes)
    return directory


def test_a_model_of_many_tensors_is_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Forty gigabytes per model, of which only headers are read."""
    base, source = (write_header_only(tmp_path / name, MANY) for name in ("base", "source"))
    rules = [{"tensors": f"*.{index}.weight", "density": index / 200} for index in range(20)]
    asked = recipe_of("ties", base, [source], parameters={"density": 0.5}, rules=rules)

    planned = streammerge.plan(asked, memory="4GiB")
    units = iter_units(planned, must_look=lambda _: True)
    chunks = sum(len(unit.chunks) for unit in units)
    assert main(["inspect", str(base)]) == 0

    assert f"{MANY:,}" in capsys.readouterr().out
    assert len(planned.tasks) == MANY
    assert len(planned.settings) == 21
    # 8 MiB slots hold four tensors of two megabytes.
    assert chunks == MANY // 4
    assert planned.bytes_to_read == 2 * MANY * 2_000_000
