"""Every command explains itself with an example that it takes, and shells can complete it."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from shutil import which

import pytest

from streammerge.cli.arguments import _parse, build_parser, main
from streammerge.methods import discover_methods


def commands() -> dict[str, argparse.ArgumentParser]:
    (added,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(added.choices)


@pytest.mark.parametrize("name", commands())
def test_the_help_of_a_command_ends_with_an_example_that_parses(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])

    assert ended.value.code == 0
    *_, heading, example = capsys.readouterr().out.rstrip().splitlines()
    assert heading == "example:"
    program, *arguments = shlex.split(re.sub(r" > .*", "", example))
    assert (program, arguments[0]) == ("streammerge", name)
    assert _parse(arguments).command is not None


@pytest.mark.parametrize("name", commands())
def test_every_argument_says_what_it_is_for(name: str) -> None:
    actions = [each for each in commands()[name]._actions if each.dest != "help"]

    assert [each.dest for each in actions if not each.help] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_options_and_methods(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("shtab")

    assert main(["completion", shell]) == 0

    script = capsys.readouterr().out
    assert {name for name in commands() if name not in script} == set()
    assert {name for name in discover_methods() if name not in script} == set()
    assert "save-recipe" in script
    if which(shell) is not None:
        checked = subprocess.run([shell, "-n"], input=script, text=True, check=False)
        assert checked.returncode == 0


def test_bash_completes_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    main(["completion", "bash"])
    script = capsys.readouterr().out
    asked = "COMP_WORDS=(streammerge ba); COMP_CWORD=1; _shtab_streammerge; echo ${COMPREPLY[@]}"

    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asked}"], check=False, capture_output=True, text=True
    )

    assert done.stdout.split() == ["bake"]


def test_without_the_library_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)

    assert main(["completion", "bash"]) == 1
    assert "pip install 'streammerge[completion]'" in capsys.readouterr().err


def test_help_imports_no_large_library() -> None:
    code = "import sys; from streammerge.cli.arguments import build_parser; build_parser().format_help(); "
    code += "print(sorted({'torch', 'numpy', 'yaml', 'pydantic'} & set(sys.modules)))"

    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["merge", "r", "o", "--memry", "1GiB"], "--memry 1GiB; did you mean --memory?"),
        (
            ["merge", "r", "o", "--density", "0.2"],
            "density is a parameter of methods: -p density=VALUE",
        ),
        (["merge", "r", "o", "--lambda=0.2"], "lambda is a parameter of methods: -p lambda=0.2"),
        # Which takes none.
        (["verify", "o", "--density", "0.2"], "unrecognized arguments: --density 0.2\n"),
        (["verify", "o", "--agianst=r"], "did you mean --against?"),
        (["merge", "r", "o", "--zzzzzz"], "unrecognized arguments: --zzzzzz\n"),
    ],
)
def test_an_option_that_is_none_is_told_from_what_is_near(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith(f"usage: streammerge {arguments[0]} ")
