"""Standard streams that are closed, full or read by nobody, and signals at any moment of a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.name != "posix", reason="streams are those of POSIX"),
]
FULL = Path("/dev/full")
COMMAND = f"{sys.executable} -m streammerge"


@pytest.fixture
def recipe(models: Models, tmp_path: Path) -> Path:
    inputs = [models.write({"a": torch.arange(400_000.0)}, f"in-{index}") for index in range(2)]
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_of("linear", None, inputs)))
    return path


def shell(line: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash whose exit code is that of its first command."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize("flags", ["", "--json", "--quiet"])
@pytest.mark.parametrize(
    "streams",
    [
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        ">/dev/full",
        "2>/dev/full",
        ">/dev/full 2>&1",
        "2> >(exit 0)",
        "> >(exit 0)",
    ],
)
def test_no_stream_ends_a_merge_or_changes_its_exit_code(
    streams: str, flags: str, recipe: Path, tmp_path: Path
) -> None:
    if "full" in streams and not FULL.exists():
        pytest.skip("there is no full device")
    line = f"{COMMAND} merge {recipe} out --memory {MEMORY} {flags} {streams}"

    done = shell(line, tmp_path)

    assert done.returncode == 0, done.stderr
    assert not streammerge.verify_files(tmp_path / "out").damages
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize(
    "arguments", ["plan {recipe}", "inspect {model}", "methods", "methods ties"]
)
@pytest.mark.parametrize("streams", [">&-", ">/dev/full", "| true"])
def test_what_cannot_be_printed_is_an_error_with_a_name(
    arguments: str, streams: str, recipe: Path, tmp_path: Path
) -> None:
    if "full" in streams and not FULL.exists():
        pytest.skip("there is no full device")
    model = Path(json.loads(recipe.read_text())["sources"][0]["path"])
    command = arguments.format(recipe=recipe, model=model)
    # The reader is gone before anything is written.
    line = f"{{ sleep 0.5; {COMMAND} {command}; }} {streams}"

    done = shell(line, tmp_path)

    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    if streams != "| true":
        assert done.stderr.startswith("OutputError: standard output: cannot be written"), done


def test_names_that_the_encoding_lacks_are_escaped(models: Models, tmp_path: Path) -> None:
    inputs = [models.write({"a": torch.ones(3)}, f"größe-{index}") for index in range(2)]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe_of("linear", None, inputs)))

    done = shell(f"{COMMAND} plan recipe.json", tmp_path, PYTHONIOENCODING="ascii")

    assert (done.returncode, done.stderr) == (0, "")
    assert "gr\\xf6\\xdfe-0" in done.stdout
    assert done.stdout.isascii()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment_ends_with_130_and_no_traceback(number: int, recipe: Path) -> None:
    """From the first import to the last line; the interpreter's own start is not ours."""
    ends = set()
    for step in range(8):
        process = subprocess.Popen(
            [sys.executable, "-m", "streammerge", "plan", str(recipe)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(0.12 + 0.04 * step)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        ends.add(process.returncode)
        assert process.returncode in {0, 130, -number}, said
        assert "Traceback" not in said or process.returncode == -number
    assert ends


def test_a_terminal_that_closes_stops_a_merge_in_good_order_unless_nohup_ignores_it(
    recipe: Path, tmp_path: Path
) -> None:
    line = f"trap '' HUP; {COMMAND} merge {recipe} out --memory {MEMORY} --quiet & "
    done = shell(f"{line} sleep 0.4; kill -HUP $!; wait $!", tmp_path)

    assert done.returncode == 0, done.stderr
    assert not streammerge.verify_files(tmp_path / "out").damages


def test_an_error_of_a_receiver_of_progress_is_the_callers(recipe: Path, tmp_path: Path) -> None:
    def fail(_event: streammerge.ProgressEvent) -> None:
        raise OSError(28, "the caller's own disk is full")

    with pytest.raises(OSError, match="the caller's own disk") as caught:
        streammerge.merge(recipe, tmp_path / "out", memory=MEMORY, on_progress=fail)
    assert type(caught.value) is OSError


def test_a_working_directory_that_was_removed_is_named(recipe: Path, tmp_path: Path) -> None:
    line = f"mkdir gone && cd gone && rmdir ../gone && {COMMAND} merge {recipe} out"

    done = shell(line, tmp_path)

    assert done.returncode == 1
    assert "working directory, which has been removed" in done.stderr
    assert "Traceback" not in done.stderr
    planned = shell(line.replace(" merge", " plan").replace(" out", ""), tmp_path)
    assert (planned.returncode, planned.stderr) == (0, "")
