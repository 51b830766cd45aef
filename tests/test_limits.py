"""Limits of the system are named, with a remedy and exit code 3; odd paths with 1 or 2.

Merges run in processes of their own, under limits that are really set.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from models import MEMORY, recipe_of, write_model

import streammerge
from streammerge import limits
from streammerge.cli.arguments import main
from streammerge.engine import memory
from streammerge.errors import CheckpointError, OutOfMemoryError, OutputError, SystemLimitError
from streammerge.limits import LEAST_ADDRESS_SPACE, allow_open_files
from streammerge.units import MIB

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the limits are those of POSIX")

DOES_NOT_FIT = 3
SHARDS = 20
OUTPUTS = 1
ROOT = Path(__file__).resolve().parent.parent
KEEPS_ITS_RIGHTS = "+dac_override,+dac_read_search"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of twenty shards."""
    root = tmp_path_factory.mktemp("models")
    # Another user must be able to make the output beside it.
    for each in (root, *root.parents):
        if each.name.startswith(("pytest-", "popen-", "models")):
            each.chmod(0o777)
    torch.manual_seed(0)
    paths = [
        write_model(
            root / name,
            {f"layers.{i:02d}": torch.randn(300, 500).bfloat16() for i in range(SHARDS)},
            shards=SHARDS,
        )
        for name in ("base", "one", "other")
    ]
    document = recipe_of("ties", paths[0], paths[1:], parameters={"density": 0.5})
    (root / "recipe.yaml").write_text(yaml.safe_dump(document))
    return root / "recipe.yaml"


def limit(kind: int, number: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (number, number))


def run(
    recipe: Path,
    *prefix: str,
    preexec: Callable[[], None] | None = None,
    memory: str = "1GiB",
) -> subprocess.CompletedProcess[str]:
    """Merge in a process of its own; nothing may be left of what fails."""
    out = recipe.parent / "out"
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "streammerge", "merge", recipe, out, "--memory", memory],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=preexec,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    shutil.rmtree(out, ignore_errors=True)
    left = {path.name for path in recipe.parent.iterdir()}
    shutil.rmtree(recipe.parent / "out.partial", ignore_errors=True)
    assert left == {"base", "one", "other", "recipe.yaml"}
    return done


# -- open files


@pytest.mark.parametrize("number", [30, 60])
def test_too_few_open_files_are_refused_with_both_numbers(number: int, recipe: Path) -> None:
    done = run(recipe, preexec=limit(resource.RLIMIT_NOFILE, number))

    assert (done.returncode, done.stdout) == (DOES_NOT_FIT, "")
    assert done.stderr.startswith(
        f"SystemLimitError: the merge has {3 * SHARDS + OUTPUTS} input and output files open"
    )
    assert f"it is {number}: raise it with `ulimit -Hn " in done.stderr


def test_the_number_that_the_refusal_names_is_enough(recipe: Path) -> None:
    refused = run(recipe, preexec=limit(resource.RLIMIT_NOFILE, 60))
    named = int(refused.stderr.split("ulimit -Hn ")[1].split("`")[0])

    assert run(recipe, preexec=limit(resource.RLIMIT_NOFILE, named)).returncode == 0
    assert run(recipe, preexec=limit(resource.RLIMIT_NOFILE, named - 1)).returncode == DOES_NOT_FIT


def test_a_soft_limit_is_raised_as_far_as_it_takes(recipe: Path) -> None:
    done = run(recipe, preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (20, 90)))

    assert done.returncode == 0, done.stderr


def test_a_limit_that_is_met_while_headers_are_read_is_named(recipe: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    asked = recipe_of("linear", None, [recipe.parent / "base"])
    # What it imports are files too.
    streammerge.plan(asked, memory=MEMORY)
    lowest = os.open(recipe, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(SystemLimitError, match="Too many open files; the process may have"):
            streammerge.plan(asked, memory=MEMORY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_no_limit_is_lowered_or_touched_where_it_is_enough() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_open_files(1)

    assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


# -- address space


def test_address_space_for_less_than_the_libraries_is_refused(recipe: Path) -> None:
    """Numpy's BLAS would end the process with a message of its own."""
    done = run(recipe, preexec=limit(resource.RLIMIT_AS, LEAST_ADDRESS_SPACE - MIB))

    assert (done.returncode, done.stdout) == (DOES_NOT_FIT, "")
    assert done.stderr == (
        "OutOfMemoryError: the process may have 127.0 MiB of address space, and the libraries alone "
        "take 128.0 MiB; raise the limit: `ulimit -v unlimited`\n"
    )


@pytest.mark.parametrize("mib", [128, 136, 144, 152, 160])
def test_whatever_too_little_address_space_refuses_is_named(mib: int, recipe: Path) -> None:
    """Imports, buffers and stacks of threads, at whatever place it runs out."""
    done = run(recipe, preexec=limit(resource.RLIMIT_AS, mib * MIB))

    assert (done.returncode, done.stdout) == (DOES_NOT_FIT, ""), done.stderr
    assert done.stderr.startswith(("OutOfMemoryError: ", "SystemLimitError: ")), done.stderr
    assert "Traceback" not in done.stderr
    assert "ulimit -v" in done.stderr
    assert f"{mib}.0 MiB" in done.stderr


@pytest.mark.parametrize(
    "said", ["can't allocate lock", "DefaultCPUAllocator: can't allocate memory: 64 bytes"]
)
def test_memory_that_is_refused_by_words_alone_is_named(said: str) -> None:
    with pytest.raises(OutOfMemoryError, match="the system refused memory"), limits.naming_limits():
        raise RuntimeError(said)


def test_torch_that_does_not_fit_the_address_space_is_named() -> None:
    code = "from streammerge.cli.arguments import main; from streammerge.lazily import load_torch\n"
    code += "import streammerge.cli as cli; cli.answering.run_methods = lambda _: load_torch()\n"
    code += "import sys; sys.exit(main(['methods']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=limit(resource.RLIMIT_AS, 256 * MIB),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == DOES_NOT_FIT, done.stderr
    assert done.stderr.startswith("OutOfMemoryError: the system refused memory (")
    assert "256.0 MiB of address space" in done.stderr


# -- threads


@pytest.mark.parametrize("number", [1, 4])
def test_too_few_threads_are_named(number: int, recipe: Path) -> None:
    """The interpreter is one, so that some of the merge's start or none does."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("needs the right to become a user whose limit counts nothing else")
    # Nobody's limit would count what other tests run as nobody.
    prefix = ["setpriv", "--reuid", str(70_000 + os.getpid()), "--clear-groups"]
    prefix += ["--inh-caps", KEEPS_ITS_RIGHTS, "--ambient-caps", KEEPS_ITS_RIGHTS]
    done = run(recipe, *prefix, preexec=limit(resource.RLIMIT_NPROC, number))

    assert (done.returncode, done.stdout) == (DOES_NOT_FIT, ""), done.stderr
    assert done.stderr.startswith("SystemLimitError: the system starts no more threads")
    assert f"ulimit -u: {number}" in done.stderr
    assert "smaller --workers" in done.stderr


@pytest.mark.parametrize("count", range(7))
def test_threads_that_did_start_end_with_the_one_that_did_not(
    count: int, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the four readers, two workers and two writers it is."""
    plan = streammerge.plan(recipe, memory=MEMORY, workers=2)
    start = threading.Thread.start
    started: list[threading.Thread] = []

    def refuse(thread: threading.Thread) -> None:
        if len(started) == count:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(SystemLimitError, match="the system starts no more threads"):
            streammerge.merge(plan, recipe.parent / "out")

    assert [thread.name for thread in started if thread.is_alive()] == []
    streammerge.merge(plan, recipe.parent / "out", resume=True)
    shutil.rmtree(recipe.parent / "out")


def test_the_limit_of_tasks_is_found_in_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 2 has one line without a name, version 1 one per controller."""
    monkeypatch.setattr(limits, "_CGROUP_LIST", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "_CGROUP_ROOT", tmp_path)
    for line, group in (("0::/job", "job"), ("8:pids:/job", "pids/job")):
        (tmp_path / "cgroup").write_text(f"9:name=systemd:/\n{line}\n")
        (tmp_path / group).mkdir(parents=True)
        for text, number in (("17\n", 17), ("max\n", None)):
            (tmp_path / group / "pids.max").write_text(text)
            assert limits._cgroup_tasks() == number


# -- a system without /proc


def test_memory_is_known_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = memory.resident_memory(), memory.available_memory(), memory.total_memory()
    monkeypatch.setattr(psutil, "PROCFS_PATH", "/absent")

    assert memory.resident_memory() >= expected[0]
    assert 0 < memory.available_memory() <= memory.total_memory()
    assert memory.total_memory() == pytest.approx(expected[2], rel=0.1)


def test_a_merge_needs_no_proc(recipe: Path) -> None:
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if subprocess.run([*hide, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to make mount namespaces")
    # The peak, which is what the system tells then, begins with that of this process.
    done = run(recipe, *hide, memory="64GiB")

    assert done.returncode == 0, done.stderr


# -- paths

BAD_PATHS = {
    "circle": ("circle", "Too many levels of symbolic links"),
    "below a circle": ("circle/model", "Too many levels of symbolic links"),
    "too long": ("x" * 300, "File name too long"),
    "long part": ("x" * 300 + "/model.safetensors", "File name too long"),
    "closed": ("closed/model", "Permission denied"),
    "in closed": ("closed/model/model.safetensors", "Permission denied"),
}


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a circle of links, and one that lets nobody in."""
    (tmp_path / "circle").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "circle")
    write_model(tmp_path / "good", {"a": torch.ones(3)})
    stat = os.stat

    def refuse(path: object, **options: object) -> os.stat_result:
        # The rights of root open every directory.
        if isinstance(path, str | Path) and Path(path).parts[-2:-1] in {("closed",), ("model",)}:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(os, "stat", refuse)
    return tmp_path


@pytest.mark.parametrize("role", ["base", "source"])
@pytest.mark.parametrize("case", BAD_PATHS)
def test_a_path_that_the_system_refuses_is_named_with_its_place(
    case: str, role: str, odd: Path
) -> None:
    path, says = BAD_PATHS[case]
    good, bad = odd / "good", odd / path
    base, source = (bad, good) if role == "base" else (good, bad)

    with pytest.raises(CheckpointError, match=says) as caught:
        streammerge.plan(recipe_of("task_arithmetic", base, [source]), memory=MEMORY)

    place = "base" if role == "base" else "sources[0]"
    assert caught.value.__notes__ == [f"while reading {place} of the recipe"]


@pytest.mark.parametrize("case", BAD_PATHS)
def test_inspect_names_a_path_that_the_system_refuses(
    case: str, odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, says = BAD_PATHS[case]

    assert main(["inspect", str(odd / path)]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("path", ["circle", "circle/out", "x" * 300, "closed/out"])
def test_an_output_that_the_system_refuses_is_named(path: str, odd: Path) -> None:
    asked = recipe_of("linear", None, [odd / "good"])

    with pytest.raises(OutputError, match=path.split("/", maxsplit=1)[0]):
        streammerge.merge(asked, odd / path, memory=MEMORY)
