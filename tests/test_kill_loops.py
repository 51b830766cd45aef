"""Real processes, killed at random instants, and the resumes killed too: every job ends with the right bytes.

Each resume has another memory budget, another number of workers and another way to read than the run
before it; SIGKILL leaves no time for anything, SIGTERM and SIGINT end in good order.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from adapters import tiny
from models import recipe_of, write_model

from streammerge.checkpoint.journal import JOURNAL_NAME, read_journal
from streammerge.checkpoint.verifying import verify_files
from streammerge.statistics import BLOCK

pytestmark = [
    pytest.mark.timeout(7200),
    pytest.mark.skipif(os.name != "posix", reason="processes are killed as POSIX does"),
]

SLOW = """
import os, sys, time
from streammerge.checkpoint import bytesource, outputfile
from streammerge.__main__ import run

# Durable every few writes, and slow enough to be killed in the middle.
outputfile.SYNC_BYTES = 1 << 19
for source in (bytesource.PreadSource, bytesource.MmapSource):
    def slow(self, offset, buffer, read=source._read_some):
        time.sleep(0.03)
        return read(self, offset, buffer)
    source._read_some = slow
sys.argv[0] = "streammerge"
run()
"""
NUMBERS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def full_models(directory: Path) -> tuple[Path, list[Path]]:
    generator = torch.Generator().manual_seed(5)

    def draw(name: str) -> Path:
        tensors = {f"large.{i}": torch.randn(3 * BLOCK + i, generator=generator) for i in range(3)}
        tensors |= {f"small.{i}": torch.randn(50, 7, generator=generator) for i in range(20)}
        return write_model(directory / name, {k: v.bfloat16() for k, v in tensors.items()})

    return draw("base"), [draw(f"source-{i}") for i in range(2)]


def adapted_models(directory: Path) -> tuple[Path, list[Path]]:
    options = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3}
    model = tiny.llama(**options)
    model.save_pretrained(directory / "base")
    targets = ["q_proj", "down_proj", "up_proj"]
    return directory / "base", [
        tiny.make_lora(directory / f"lora-{i}", model, seed=i, r=8, target_modules=targets)
        for i in range(2)
    ]


def wider_models(directory: Path) -> dict[str, Any]:
    """Columns that one source lacks: each of these tensors is two, and lies in runs."""
    generator = torch.Generator().manual_seed(6)
    paths = []
    for name, columns in (("base", 9_000), ("one", 9_000), ("two", 7_000)):
        tensors = {f"wide.{i}": torch.randn(20, columns, generator=generator) for i in range(2)}
        paths.append(write_model(directory / name, {k: v.bfloat16() for k, v in tensors.items()}))
    base, *sources = paths
    return recipe_of("ties", base, sources, parameters={"density": 0.3}, mismatch="common")


def coded_models(directory: Path) -> dict[str, Any]:
    """float8 codes with scales, in the base and again in the result."""
    generator = torch.Generator().manual_seed(7)

    def draw(name: str) -> Path:
        tensors = {}
        for index in range(2):
            values = torch.randn(128, 2_048, generator=generator).mul_(20)
            tensors[f"{index}.weight"] = values.to(torch.float8_e4m3fn)
            tensors[f"{index}.weight_scale_inv"] = torch.rand(1, 16, generator=generator)
        return write_model(directory / name, tensors)

    base, *sources = (draw(name) for name in ("base", "one", "two"))
    output = {"quantization": "as base"}
    return recipe_of("ties", base, sources, parameters={"density": 0.3}, output=output)


def ties(directory: Path, **parameters: Any) -> dict[str, Any]:
    return recipe_of("ties", *full_models(directory), parameters={"density": 0.3} | parameters)


def chain(directory: Path) -> list[dict[str, Any]]:
    """Three recipes: the first result is written, the second is computed where it is read."""
    base, (one, two) = full_models(directory)
    first, mean = Path("first"), Path("mean")
    return [
        recipe_of("ties", base, [one, two], parameters={"density": 0.3}) | {"name": "first"},
        recipe_of("linear", None, [first, two]) | {"name": "mean"},
        recipe_of("dare_ties", base, [mean, one], parameters={"density": 0.4}),
    ]


JOBS: dict[str, Callable[[Path], dict[str, Any] | list[dict[str, Any]]]] = {
    "ties": ties,
    "ties over the model": lambda directory: ties(directory, scope="model"),
    "dare_ties": lambda directory: recipe_of(
        "dare_ties", *full_models(directory), parameters={"density": 0.4}
    ),
    "linear": lambda directory: recipe_of("linear", None, full_models(directory)[1]),
    "tensors in parts": wider_models,
    "float8 codes": coded_models,
    "baked adapters": lambda directory: recipe_of("task_arithmetic", *adapted_models(directory)),
    "adapters as task vectors": lambda directory: recipe_of(
        "ties", *adapted_models(directory), parameters={"density": 0.3}
    ),
    "a chain": chain,
}


def command(recipe: Path, out: Path, chance: random.Random) -> list[str]:
    return [
        *(sys.executable, "-c", SLOW, "merge", str(recipe), str(out), "--quiet"),
        *("--memory", chance.choice(["700MiB", "1GiB", "3GiB"])),
        *("--workers", chance.choice(["1", "2", "3"])),
        *("--byte-source", chance.choice(["pread", "mmap"])),
    ]


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


def shake(
    recipe: Path,
    out: Path,
    first: str,
    expected: dict[str, bytes],
    chance: random.Random,
    *,
    seconds: float,
) -> tuple[int, int]:
    """Start a merge, kill it and its resumes until one is through; return kills and useful ones.

    ``seconds`` is how long the first run has.
    """
    kills = useful = 0
    journal = out.with_name(f"{out.name}.partial") / JOURNAL_NAME
    options = [first]
    while True:
        process = subprocess.Popen(
            [*command(recipe, out, chance), *options], stderr=subprocess.PIPE, text=True
        )
        number = chance.choice(NUMBERS)
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
            _, said = process.communicate(timeout=120)
            kills += process.returncode != 0
        assert process.returncode in {0, 130, -number}, said
        if process.returncode == 0:
            break
        found = read_journal(journal)
        useful += found is not None and found.lines > 0
        if out.exists():
            assert not [d for d in verify_files(out).damages if d.kind != "extra"]
        if found is not None:
            # Before there is a journal, an earlier merge is not being replaced yet.
            options = ["--resume"]
        # Every job comes to its end: each run has more time than the one before.
        seconds += chance.uniform(0.4, 0.9)
    assert bytes_of(out) == expected
    assert not verify_files(out).damages
    left = [path.name for path in out.parent.iterdir() if path.name.startswith(f"{out.name}.")]
    assert not left
    return kills, useful


REPLACED = {"ties over the model", "a chain"}
"""Jobs that also start where there is another result: one output with statistics, and several outputs.
What lies there is put aside by the same code for every job; the others do so with ``--runslow``."""


@pytest.mark.parametrize(
    ("job", "start"),
    [
        *((job, "--resume") for job in JOBS),
        *(
            pytest.param(job, "--overwrite", marks=() if job in REPLACED else pytest.mark.slow)
            for job in JOBS
        ),
    ],
)
def test_a_job_that_is_killed_again_and_again_ends_with_the_right_bytes(
    job: str,
    start: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    rounds = 40 if request.config.getoption("--runslow") else 1
    tries = rounds + 10
    chance = random.Random(f"{job} {start}")  # noqa: S311 - it only chooses when to kill
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    made = JOBS[job](tmp_path)
    recipe.write_text(yaml.safe_dump_all(made if isinstance(made, list) else [made]))
    began = time.monotonic()
    subprocess.run([*command(recipe, tmp_path / "reference", chance)], check=True)
    # On a fast machine a merge is through in half a second: first instants are parts of what it takes.
    taken = min(time.monotonic() - began, 1.0)
    expected = bytes_of(tmp_path / "reference")
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(recipe_of("linear", None, [tmp_path / "base"])))

    kills = useful = 0
    for done in range(tries):
        if start == "--overwrite":
            subprocess.run([*command(other, out, chance)], check=True)
        seconds = taken * chance.uniform(0.3, 0.9)
        killed, worth = shake(recipe, out, start, expected, chance, seconds=seconds)
        kills, useful = kills + killed, useful + worth
        shutil.rmtree(out)
        # With more memory or workers a merge may be through before its instant: then once more.
        if kills and done + 1 >= rounds:
            break

    assert kills
    # Some at least were in the middle of their work.
    assert useful or rounds == 1
    record_property("kills", kills)
    record_property("kills with work to keep", useful)
