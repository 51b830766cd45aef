"""``--memory`` bounds planning as well: headers are counted before they are parsed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Models, recipe_of

import streammerge
from streammerge import machine
from streammerge.checkpoint.foreseeing import foresee_headers
from streammerge.errors import MemoryBudgetError
from streammerge.units import MIB

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc"),
]

COUNT = 40_000


def write_many(path: Path, count: int, name: str = "model.layers.7.mlp.experts.{}.weight") -> Path:
    """Write a checkpoint of many tensors of four elements."""
    path.mkdir()
    header: dict[str, Any] = {
        name.format(index): {
            "dtype": "BF16",
            "shape": [2, 2],
            "data_offsets": [8 * index, 8 * index + 8],
        }
        for index in range(count)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + bytes(8 * count)
    (path / "model.safetensors").write_bytes(data)
    return path


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("crowd")
    base, *sources = (write_many(root / f"in-{index}", COUNT) for index in range(3))
    (root / "recipe.json").write_text(json.dumps(recipe_of("task_arithmetic", base, sources)))
    return root


def run(*arguments: str) -> tuple[int, int, str]:
    """Run a command in a fresh process; return its exit code, its peak memory and its errors."""
    # Not getrusage, which remembers what the process was before it was this one.
    script = (
        "import re, sys; from streammerge.cli.arguments import main; code = main(sys.argv[1:]); "
        "status = open('/proc/self/status').read(); "
        "print(int(re.search(r'VmHWM:\\s*(\\d+) kB', status).group(1)) * 1024); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, int(done.stdout.split()[-1]), done.stderr


def test_headers_are_counted_exactly_without_being_parsed(crowd: Path, tmp_path: Path) -> None:
    found = foresee_headers(crowd / "in-0")

    assert found.tensors == COUNT
    header = int.from_bytes((crowd / "in-0" / "model.safetensors").read_bytes()[:8], "little")
    assert found.nbytes == header
    assert foresee_headers(tmp_path / "missing").tensors == 0


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_too_many_tensors_are_refused_at_once_and_the_number_named_is_enough(
    command: str, crowd: Path, tmp_path: Path
) -> None:
    rest = [str(tmp_path / "out")] if command == "merge" else []
    code, peak, said = run(command, str(crowd / "recipe.json"), *rest, "--memory", "90MiB")

    assert code == 3
    assert f"describe up to {3 * COUNT} tensors" in said
    # Nothing was parsed.
    assert peak < 90 * MIB
    while code == 3:
        enough = int(re.search(r"give --memory (\d+)MiB", said).group(1))
        code, peak, said = run(
            command, str(crowd / "recipe.json"), *rest, "--memory", f"{enough}MiB"
        )
        assert peak <= enough * MIB
    assert code == 0, said


@pytest.mark.parametrize("name", ["{}", "a.name.that.is.about.as.long.as.names.of.experts.are.{}"])
def test_what_planning_takes_is_never_more_than_was_foreseen(name: str, tmp_path: Path) -> None:
    sources = [write_many(tmp_path / f"in-{index}", COUNT, name) for index in range(2)]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of("linear", None, sources)))
    few = [write_many(tmp_path / f"few-{index}", 1, name) for index in range(2)]
    small = tmp_path / "small.json"
    small.write_text(json.dumps(recipe_of("linear", None, few)))

    _, without, _ = run("plan", str(small), "--memory", "2GiB")
    _, peak, _ = run("plan", str(recipe), "--memory", "2GiB")

    sizes = [foresee_headers(path) for path in sources]
    foreseen = sum(each.kept_bytes for each in sizes) + max(
        machine._TASK_BYTES * COUNT, sizes[0].parsing_bytes
    )
    assert foreseen / 3 < peak - without < foreseen


def test_the_same_holds_from_python(crowd: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="describe up to"):
        streammerge.plan(crowd / "recipe.json", memory="90MiB")


REPEATED = """
import sys
import streammerge
first = streammerge.plan(sys.argv[1], memory="1GiB")
for number in range(4):
    streammerge.merge(sys.argv[1], f"{sys.argv[2]}-{number}", memory="1GiB")
again = streammerge.plan(sys.argv[1], memory="1GiB")
print(again.memory.baseline - first.memory.baseline, again.resources.slots, first.resources.slots)
"""


def test_what_earlier_merges_left_free_is_free(tmp_path: Path, models: Models) -> None:
    """A process that merges many times gives each merge the buffers that the first one had."""
    tensors = {f"{index}": torch.ones(700_000) for index in range(30)}
    inputs = [models.write(tensors, f"in-{index}") for index in range(3)]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of("ties", inputs[0], inputs, parameters={"density": 0.3})))

    done = subprocess.run(
        [sys.executable, "-c", REPEATED, str(recipe), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )

    grown, slots_again, slots_first = map(int, done.stdout.split())
    # Libraries that the first merge brought into memory stay.
    assert grown < 32 * MIB
    assert slots_again >= slots_first - 4


def write_sharded(path: Path, count: int) -> Path:
    """Write half of the tensors to each of two shards, with an index that is compact."""
    for index in range(2):
        part = write_many(path / f"part-{index}", count // 2, f"shard.{index}.{{}}")
        (part / "model.safetensors").rename(path / f"model-{index}.safetensors")
        part.rmdir()
    names = {
        f"shard.{i}.{k}": f"model-{i}.safetensors" for i in range(2) for k in range(count // 2)
    }
    text = json.dumps({"metadata": {}, "weight_map": names}, separators=(",", ":"))
    (path / "model.safetensors.index.json").write_text(text)
    return path


def test_tensors_of_shards_are_counted_once_however_the_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "sharded").mkdir()
    path = write_sharded(tmp_path / "sharded", 1000)

    of_directory = foresee_headers(path)

    assert of_directory.tensors == 1000
    assert foresee_headers(path / "model.safetensors.index.json") == of_directory


def test_no_spelling_of_a_header_hides_its_tensors(tmp_path: Path) -> None:
    """In JSON a key may be written with escapes, and braces may not."""
    path = write_many(tmp_path / "plain", 1000)
    plain = foresee_headers(path)
    raw = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"data_offsets"', b'"data\\u005foffsets"')
    (path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + raw[8 + length :]
    )

    assert len(streammerge.read_checkpoint(path).tensors) == 1000
    assert foresee_headers(path).tensors == plain.tensors == 1000
