"""What README and the documentation tell people to type works as it is written there."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import pytest
import yaml
from clusters import free_port, ray_processes
from documented import ROOT, SHAPES, command_on_path, write_documented_models

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME

OWN_TESTS = {"adding-a-method.md", "design.md", "contributing.md", "changelog.md"}
"""Pages that tests of their own read, or that are other files; the parts of the design are none to try."""
PAGES = [
    ROOT / "README.md",
    *(
        path
        for path in sorted((ROOT / "docs").rglob("*.md"))
        if path.name not in OWN_TESTS and path.parent.name != "design"
    ),
]
NOT_RUN = {
    "streammerge merge --method ties --base s3://models/base hf://org/tuned@main:0.5 s3://models/other "
    "-p density=0.2 -o merged": "needs stores: tests/storage/test_as_written.py has them",
    "streammerge merge --method linear s3://models/base s3://models/other:0.5 -o s3://results/merged": (
        "needs stores: tests/storage/test_as_written.py has them"
    ),
    "streammerge merge recipe.yaml s3://results/in-parts --part 1/2": (
        "needs stores: tests/storage/test_as_written.py has them"
    ),
    "scripts/quickstart": "installs packages and trains for minutes",
    "pip install .": "changes the environment",
    "pip install --no-deps streammerge-0.1.0-py3-none-PLATFORM.whl": (
        "changes the environment: tests/test_installing.py does it in an empty one"
    ),
    "docker build -t streammerge -f examples/container/Dockerfile .": (
        "needs docker: tests/test_examples.py runs what it would"
    ),
    "streammerge merge recipe.yaml merged --memory 4GiB --device cuda:0 --device-memory 2GiB": (
        "needs two GPUs"
    ),
}
"""Blocks that no test runs, by their first command."""
BEFORE = {"streammerge verify merged": "streammerge merge recipe.yaml merged"}
"""What the reader of a block has done before, by the block's first command."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    """The page's name."""
    language: str
    """What stands behind the fence."""
    line: int
    """Of the fence, from 1."""
    text: str
    """What stands between the fences."""
    recipe: str
    """The YAML block that the page has shown last; of pages without one, that of the examples."""

    @property
    def commands(self) -> list[str]:
        """The lines without comments and what is aligned by spaces."""
        lines = (shlex.split(line, comments=True) for line in self.text.splitlines())
        return [shlex.join(line) for line in lines if line]

    @property
    def name(self) -> str:
        """The first command, or the language."""
        return self.language or self.commands[0]


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT)).removeprefix("docs/")
    blocks: list[Block] = []
    recipe = (ROOT / "examples/recipe.yaml").read_text(encoding="utf-8")
    for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        language, block = found.groups()
        # Directives of the site, and what is only shown.
        if language.startswith("{") or language == "text":
            continue
        recipe = block if language == "yaml" else recipe
        line = text.count("\n", 0, found.start()) + 1
        blocks.append(Block(name, language, line, block, recipe))
    return blocks


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def every(language: str) -> pytest.MarkDecorator:
    chosen = [block for block in BLOCKS if block.language == language]
    chosen = [block for block in chosen if language or block.name not in NOT_RUN]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: f"{block.page} {block.line}")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a directory with what the pages' recipes name."""
    return write_documented_models(tmp_path)


def run(place: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env=command_on_path(place),
        check=False,
        capture_output=True,
        text=True,
    )
    # What differs, as the models there do, is told by the exit code.
    expected = 1 if "diff" in arguments else 0
    assert done.returncode == expected, f"{shlex.join(arguments)}: {done.stderr}"
    return done.stdout


def run_command(place: Path, command: str) -> str:
    program, *arguments = shlex.split(command)
    assert program == "streammerge"
    return run(place, "-m", program, *arguments)


def test_every_block_is_run_or_named_here() -> None:
    known = {"", "yaml", "python", "bash"}
    assert {block.language for block in BLOCKS} == known
    commands = {block.name for block in BLOCKS if block.language == ""}
    assert {*NOT_RUN, *BEFORE} <= commands


@every("")
def test_the_commands_of_a_block_work_one_after_the_other(block: Block, place: Path) -> None:
    if "--on dask" in block.text:
        pytest.importorskip("distributed")
    if "--report" in block.text:
        pytest.importorskip("vl_convert", reason="pages are drawn by streammerge[report]")
    (place / "recipe.yaml").write_text(block.recipe)
    if block.name in BEFORE:
        run_command(place, BEFORE[block.name])

    said = {command: run_command(place, command) for command in block.commands}

    for command, text in said.items():
        _, verb, *rest = shlex.split(command)
        if verb in {"merge", "bake"}:
            method, out = _what_is_made(verb, rest, block.recipe)
            manifests = [each.read_text() for each in (place / out).rglob(MANIFEST_NAME)]
            assert manifests
            assert all(f'"method": "{method}"' in each for each in manifests)
        elif verb == "extract":
            assert (place / rest[2] / MANIFEST_NAME).exists()
        elif verb == "verify":
            assert "all as they were written" in text
            assert ("equal, bit by bit" in text) == ("--against" in rest)
        else:
            assert text.strip()


def _what_is_made(verb: str, arguments: Sequence[str], recipe: str) -> tuple[str, str]:
    """Return the method and the output of a command."""
    if verb == "bake":
        return "task_arithmetic", arguments[-1]
    if "--method" in arguments:
        method, out = (arguments[arguments.index(name) + 1] for name in ("--method", "-o"))
        return method, out
    document = yaml.safe_load(recipe)
    return document.get("method", document.get("merge_method")), arguments[1]


@pytest.fixture
def shell(place: Path) -> Callable[..., None]:
    """Return a function that runs a script beside the models, with variables."""
    programs = {"streammerge": "streammerge", "dask": "dask", "ray": "ray.scripts.scripts"}
    for program, module in programs.items():
        path = place / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m {module} "$@"\n')
        path.chmod(0o755)

    def run_script(text: str, **variables: str) -> None:
        (place / "script").write_text(text)
        search = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
        with (place / "said").open("w+") as said:
            process = subprocess.Popen(
                ["bash", "-e", "script"],
                cwd=place,
                env={**os.environ, **variables, "PATH": search},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=120)
            finally:
                # What it started in the background, too.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        assert code == 0, (place / "said").read_text()

    return run_script


SCRIPTS = [block for block in BLOCKS if block.language == "bash"]


def scripts(mark: str) -> pytest.MarkDecorator:
    chosen = [block for block in SCRIPTS if mark in block.text]
    return pytest.mark.parametrize("block", chosen, ids=lambda block: f"{block.page} {block.line}")


def test_every_script_is_run() -> None:
    kinds = [
        [mark for mark in ("#SBATCH", "dask scheduler", "ray start") if mark in b.text]
        for b in SCRIPTS
    ]
    assert sorted(kinds) == [["#SBATCH"], ["dask scheduler"], ["ray start"]]


@scripts("#SBATCH")
def test_a_script_for_an_array_of_jobs_runs(
    block: Block, place: Path, shell: Callable[..., None]
) -> None:
    (place / "recipe.yaml").write_text(block.recipe)
    count = int(re.findall(r"^#SBATCH --array=1-(\d+)$", block.text, re.MULTILINE)[0])

    for index in range(1, count + 1):
        shell(block.text, SLURM_ARRAY_TASK_ID=str(index), SLURM_ARRAY_TASK_COUNT=str(count))

    assert streammerge.verify_files(place / "merged").damages == ()


@scripts("dask scheduler")
def test_a_script_for_an_engine_runs(block: Block, place: Path, shell: Callable[..., None]) -> None:
    pytest.importorskip("distributed")
    (place / "recipe.yaml").write_text(block.recipe)

    shell(block.text, HOST="127.0.0.1", PORT=str(free_port()))

    assert streammerge.verify_files(place / "merged").damages == ()


@pytest.mark.slow
@scripts("ray start")
def test_a_script_for_nodes_runs(block: Block, place: Path, shell: Callable[..., None]) -> None:
    """Its head takes four seconds to start, its node three."""
    pytest.importorskip("ray")
    (place / "recipe.yaml").write_text(block.recipe)
    with ray_processes() as variables:
        host = socket.gethostbyname(socket.gethostname())
        shell(block.text, HOST=host, PORT=str(free_port()), **variables)

    assert streammerge.verify_files(place / "merged").damages == ()


@every("python")
def test_a_python_block_runs(block: Block, place: Path) -> None:
    (place / "recipe.yaml").write_text(block.recipe)

    run(place, "-c", block.text)

    for out in re.findall(r'sm\.merge\(.*"([\w/]+)"', block.text):
        assert streammerge.verify_files(place / out).damages == ()


@every("yaml")
def test_a_recipe_merges(block: Block, place: Path) -> None:
    (place / "recipe.yaml").write_text(block.text)

    run_command(place, "streammerge merge recipe.yaml merged")

    recipe = yaml.safe_load(block.text)
    combines = all(each["path"].startswith("adapters/") for each in recipe.get("sources", ()))
    makes_a_model = "base" in recipe or "merge_method" in recipe or not combines
    name = "model.safetensors" if makes_a_model else "adapter_model.safetensors"
    made = [each.parent for each in (place / "merged").rglob(MANIFEST_NAME)]
    assert len(made) == prod(map(len, recipe.get("grid", {}).values()))
    for each in made:
        merged = streammerge.read_checkpoint(each / name)
        same = _kinds(merged.tensors) == _kinds(SHAPES)
        assert same == (makes_a_model and "mixture" not in recipe)
        assert any(".experts.1." in tensor for tensor in merged.tensors) == ("mixture" in recipe)
        assert streammerge.verify_files(each).damages == ()


def _kinds(names: Iterable[str]) -> set[str]:
    """Return names without the numbers of layers, of which a recipe may make more."""
    return {re.sub(r"\d+", "N", name) for name in names}
