"""What becomes of standard streams, signals and the working directory never harms a merge."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import MEMORY, Models, assert_same_bits, load_model, recipe_of

import streammerge
from streammerge.cli.arguments import main
from streammerge.plan.codec import parse_plan


@pytest.fixture(autouse=True)
def _hears_hangups() -> Iterator[None]:
    """Hear hangups, which `nohup` has its command and all that it starts ignore."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="streams and signals are those of POSIX"),
    pytest.mark.timeout(120),
]

A = torch.arange(300_000.0)
PROGRAM = [sys.executable, "-m", "streammerge"]
OFTEN = """
import os, sys
from streammerge.cli import display
from streammerge.__main__ import run
display._SECONDS_BETWEEN_LINES = 0.0
sys.argv[0] = "streammerge"
run()
"""
"""The program, with a line of progress at every look."""


@pytest.fixture
def model(models: Models) -> Path:
    return models.write({"a": A}, "model")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of("linear", None, [model, model])))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def shell(command: list[str], redirections: str, **options: Any) -> subprocess.CompletedProcess:
    """Run a command with its standard streams as a shell's redirections say."""
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirections}', "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def merge_of(recipe: Path, out: Path, *options: str) -> list[str]:
    return ["merge", str(recipe), str(out), "--memory", MEMORY, *options]


# -- streams


BROKEN = {
    "closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
    "input closed": "<&-",
    "full": ">/dev/full 2>/dev/full",
    "read by nobody": "2>&1 | true",
}


@pytest.mark.parametrize(
    ("options", "often"),
    # Lines for machines do not wait for the time between two looks.
    [([], False), ([], True), (["--json"], True)],
    ids=["seldom", "often", "events"],
)
@pytest.mark.parametrize("broken", BROKEN)
def test_a_merge_ends_well_whatever_becomes_of_its_streams(
    broken: str,
    options: list[str],
    often: bool,  # noqa: FBT001
    recipe: Path,
    out: Path,
) -> None:
    program = [sys.executable, "-c", OFTEN] if often else PROGRAM
    redirections, _, reader = BROKEN[broken].partition("|")
    # A pipe has the exit code of its end.
    script = f'{{ "$@" {redirections}; echo $? >"$CODE"; }} {reader and "|" + reader}'
    code = out.with_name("code")
    subprocess.run(
        ["sh", "-c", script, "sh", *program, *merge_of(recipe, out, *options)],
        env=os.environ | {"CODE": str(code)},
        capture_output=True,
        check=False,
    )

    assert code.read_text() == "0\n"
    assert main(["verify", str(out)]) == 0
    assert_same_bits(load_model(out)["a"], A)
    assert (out / "model.safetensors").stat().st_size < A.nbytes + 1000


def test_an_exit_code_does_not_depend_on_whether_it_can_be_explained(
    recipe: Path, out: Path
) -> None:
    out.write_text("mine")

    for broken in ("2>&-", "2>/dev/full", ">&- 2>&- <&-"):
        assert shell([*PROGRAM, *merge_of(recipe, out)], broken).returncode == 4
        assert shell([*PROGRAM, "murge"], broken).returncode == 2


@pytest.fixture(
    params=["plan", "inspect", "verify", "methods", "--help", "--version", "plan --help"]
)
def printing(request: pytest.FixtureRequest, recipe: Path, model: Path, out: Path) -> list[str]:
    """A command whose job is to print."""
    name = request.param
    if name == "verify":
        assert main(merge_of(recipe, out, "--quiet")) == 0
    paths = {"plan": [str(recipe)], "inspect": [str(model)], "verify": [str(out)]}
    return [*PROGRAM, *name.split(), *paths.get(name, [])]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("broken", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_what_cannot_be_printed_is_an_error(
    broken: str, why: str, unbuffered: str, printing: list[str]
) -> None:
    done = shell(printing, broken, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})

    assert done.returncode == 1
    assert done.stderr == (
        f"OutputError: standard output: cannot be written: {why}; give it a file, a pipe or a "
        "terminal that takes it\n"
    )
    assert shell(printing, f"{broken} 2>/dev/full").returncode == 1


def test_a_reader_that_has_gone_is_exit_code_1_and_no_word(printing: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(printing, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)

    assert (done.returncode, done.stderr) == (1, b"")


NARROW = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"},
]


@pytest.mark.parametrize("environment", NARROW)
def test_what_an_encoding_lacks_is_escaped(
    environment: dict[str, str], models: Models, tmp_path: Path
) -> None:
    model = models.write({"ü": A, "\U0001f600": A.clone()}, "model")
    recipe = tmp_path / "récipe.json"
    recipe.write_text(json.dumps(recipe_of("linear", None, [model])))
    commands = {
        "inspect": ["inspect", str(model)],
        "inspect as json": ["inspect", str(model), "--json"],
        "plan": ["plan", str(recipe)],
        "plan as json": ["plan", str(recipe), "--json"],
        "merge": merge_of(recipe, tmp_path / "öut"),
        "verify": ["verify", str(tmp_path / "öut")],
        "absent": ["inspect", str(tmp_path / "å")],
    }
    done = {
        name: subprocess.run(
            [*PROGRAM, *command],
            capture_output=True,
            check=False,
            env=os.environ | environment,
            encoding="ascii",
        )
        for name, command in commands.items()
    }

    assert {name: each.returncode for name, each in done.items()} == dict.fromkeys(commands, 0) | {
        "absent": 1
    }
    assert "ö" not in done["merge"].stderr
    assert set(json.loads(done["inspect as json"].stdout)["tensors"]) == {"ü", "\U0001f600"}
    assert [Path(each.path) for each in parse_plan(done["plan as json"].stdout).models] == [model]


def test_a_name_that_is_no_text_can_be_printed(models: Models, tmp_path: Path) -> None:
    """The file system takes any bytes."""
    models.write({"a": A}, "model")
    model = tmp_path / os.fsdecode(b"mod\xffel")
    (tmp_path / "model").rename(model)
    done = [
        subprocess.run([*PROGRAM, "inspect", model, *json_], capture_output=True, check=False)
        for json_ in ([], ["--json"])
    ]

    assert [each.returncode for each in done] == [0, 0]
    assert json.loads(done[1].stdout)["path"] == str(model)


# -- signals


SLOW_IMPORT = """
import os, time
os.write(1, b"importing\\n")
try:
    time.sleep(60)
except BaseException:
    raise ImportError("an interrupt is taken for something else")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("module", "command"), [("argparse", "--help"), ("yaml", "plan"), ("psutil", "merge")]
)
def test_a_signal_during_an_import_is_one_line_and_130(  # noqa: PLR0917
    module: str, command: str, number: int, recipe: Path, out: Path, tmp_path: Path
) -> None:
    """Whoever imports may swallow an exception, or report another one."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    (fakes / f"{module}.py").write_text(SLOW_IMPORT)
    arguments = {"--help": [], "plan": [str(recipe)], "merge": [str(recipe), str(out)]}[command]
    process = subprocess.Popen(
        [*PROGRAM, command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(fakes), os.environ.get("PYTHONPATH", "")])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)

    assert (process.returncode, said) == (130, "interrupted\n")
    assert not list(tmp_path.glob("out*"))


STARTED = """
import os, sys
from streammerge import __main__
from streammerge.cli import signals
leave = signals.leave_on_signals
def leave_on_signals():
    leave()
    os.write(1, b".")
__main__.leave_on_signals = leave_on_signals
sys.argv[0] = "streammerge"
__main__.run()
"""


@pytest.mark.parametrize("command", ["plan", "merge", "--help"])
def test_a_signal_at_any_moment_is_one_line_and_130(command: str, recipe: Path, out: Path) -> None:
    arguments = {"--help": [], "plan": [str(recipe)], "merge": [str(recipe), str(out), "--quiet"]}
    seen = set()
    for tenths in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", STARTED, command, *arguments[command]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.read(1) == "."
        time.sleep(tenths * (0.01 if command == "--help" else 0.06))
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        seen.add((process.returncode, said.partition(";")[0].strip()))
        for path in out.parent.glob("out*"):
            assert path.name == "out" or process.returncode == 130
            subprocess.run(["rm", "-rf", path], check=True)

    assert (130, "interrupted") in seen
    assert seen <= {(130, "interrupted"), (0, "")}


SLOW_READS = """
import os, sys, time
from streammerge import run
from streammerge.__main__ import run as run_program
from streammerge.checkpoint.bytesource import PreadSource

class Slow(PreadSource):
    def read_into(self, offset, buffer):
        os.write(int(os.environ["READING"]), b".")
        time.sleep(0.5)
        super().read_into(offset, buffer)

run.choose_byte_source = lambda _: Slow
sys.argv[0] = "streammerge"
run_program()
"""
OnTerminal = Callable[[list[str], Callable[[], None]], int]


@pytest.fixture
def close_terminal() -> Iterator[OnTerminal]:
    """Run a command on a terminal of its own, close that once it reads, return the exit code."""
    pty = pytest.importorskip("pty")
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    opened: list[int] = []

    def run(command: list[str], prepare: Callable[[], None]) -> int:
        ours, theirs = pty.openpty()
        reading, writing = os.pipe()
        opened.extend([ours, theirs, reading, writing])

        def become_foreground() -> None:
            os.setsid()
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
            prepare()

        process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            pass_fds=[writing],
            preexec_fn=become_foreground,  # noqa: PLW1509 - no thread is alive here
            env=os.environ | {"READING": str(writing)},
        )
        assert select.select([reading], [], [], 60)[0]
        os.close(theirs)
        os.close(ours)
        del opened[-4:-2]
        return process.wait(60)

    yield run
    for each in opened:
        os.close(each)


def test_a_merge_stops_in_good_order_when_its_terminal_closes(
    close_terminal: OnTerminal, recipe: Path, out: Path
) -> None:
    command = [sys.executable, "-c", SLOW_READS, *merge_of(recipe, out)]

    assert close_terminal(command, lambda: None) == 130
    assert not out.exists()
    assert main(merge_of(recipe, out, "--resume", "--quiet")) == 0
    assert_same_bits(load_model(out)["a"], A)


def test_a_merge_under_nohup_goes_on_when_its_terminal_closes(
    close_terminal: OnTerminal, recipe: Path, out: Path
) -> None:
    """Its bar cannot be drawn any more, then."""
    command = [sys.executable, "-c", SLOW_READS, *merge_of(recipe, out)]

    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    assert close_terminal(command, ignore) == 0
    assert main(["verify", str(out)]) == 0


# -- the working directory, and paths


def in_removed_directory(arguments: list[str], tmp_path: Path) -> subprocess.CompletedProcess[str]:
    script = 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"'
    return subprocess.run(
        ["sh", "-c", script, str(tmp_path / "gone"), *PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_working_directory_that_is_gone_matters_to_no_absolute_path(
    recipe: Path, model: Path, out: Path, tmp_path: Path
) -> None:
    for arguments in (
        ["plan", str(recipe)],
        ["inspect", str(model)],
        merge_of(recipe, out, "--quiet"),
        merge_of(recipe, out, "--quiet", "--resume"),
        ["verify", str(out), "--against", str(recipe)],
    ):
        done = in_removed_directory(arguments, tmp_path)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "{relative}"], 1, "which has been removed"),
        (["plan", "absent"], 2, "No such file or directory"),
        (["inspect", "absent"], 1, "which has been removed"),
        (["inspect", "absent.safetensors"], 1, "which has been removed"),
        (["verify", "absent"], 1, "absent"),
        (["merge", "{recipe}", "absent"], 1, "which has been removed"),
        (["merge", "{recipe}", "absent", "--resume"], 1, "which has been removed"),
    ],
)
def test_a_working_directory_that_is_gone_is_named(
    arguments: list[str], code: int, said: str, recipe: Path, tmp_path: Path
) -> None:
    relative = tmp_path / "relative.yaml"
    relative.write_text(yaml.safe_dump(recipe_of("linear", None, [Path("model")])))
    filled = [each.format(relative=relative, recipe=recipe) for each in arguments]
    done = in_removed_directory(filled, tmp_path)

    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


LONG = "x" * 5000
LONG_PART = "x" * 300


@pytest.mark.parametrize(
    ("path", "code", "said"),
    [
        (LONG, 2, "expected a path of at most 4095 characters, got 5000"),
        (LONG_PART, 1, "File name too long"),
        (f"{LONG_PART}.safetensors", 1, "File name too long"),
        ("a\0b", 2, "NUL"),
        ("a\ud800b", 2, "surrogate"),
    ],
)
@pytest.mark.parametrize("where", ["base", "source"])
def test_a_path_in_a_recipe_that_can_be_none_is_named(  # noqa: PLR0917
    path: str,
    code: int,
    said: str,
    where: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    document: dict[str, Any] = {"method": "linear", "sources": [{"path": path}]}
    if where == "base":
        document = {"method": "task_arithmetic", "base": path, "sources": [{"path": str(model)}]}
    recipe = tmp_path / "odd.json"
    recipe.write_text(json.dumps(document))

    assert main(["plan", str(recipe)]) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("path", [LONG, LONG_PART, os.fsdecode(b"\xff"), "/dev/null/x"])
def test_an_argument_that_can_be_no_path_is_named(
    path: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "plan": (["plan", path], 2),
        "merge": (["merge", path, "out"], 2),
        "inspect": (["inspect", path], 1),
        "inspect a file": (["inspect", f"{path}.safetensors"], 1),
        "verify": (["verify", path], 1),
    }
    codes = {name: main(command) for name, (command, _) in commands.items()}

    assert codes == {name: code for name, (_, code) in commands.items()}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(commands)
    assert all("Error: " in line for line in said)


@pytest.mark.parametrize("path", [LONG, LONG_PART, "/dev/null/x"])
@pytest.mark.parametrize("options", [[], ["--resume"], ["--overwrite"]])
def test_an_output_that_can_be_no_path_is_named(
    path: str, options: list[str], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(merge_of(recipe, Path(path), *options)) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_nobody_foresaw_is_exit_code_1_with_all_that_is_known(recipe: Path) -> None:
    script = (
        "import streammerge.run, sys\n"
        "def fail(*_, **__): raise RuntimeError('unforeseen')\n"
        "streammerge.run.plan = fail\n"
        "from streammerge.__main__ import run\n"
        "run()\n"
    )
    for broken, lines in itertools.product(("", ">&-", ">/dev/full"), ("Traceback", "unforeseen")):
        done = shell([sys.executable, "-c", script, "plan", str(recipe)], broken)
        assert done.returncode == 1
        assert lines in done.stderr


def test_an_error_of_a_receiver_of_progress_is_the_callers(recipe: Path, tmp_path: Path) -> None:
    def fail(_event: streammerge.ProgressEvent) -> None:
        raise OSError(28, "the caller's own disk is full")

    with pytest.raises(OSError, match="the caller's own disk") as caught:
        streammerge.merge(recipe, tmp_path / "out", memory="4GiB", on_progress=fail)
    assert type(caught.value) is OSError
