"""Every command does what its help says, with the exit code and on the stream that scripts expect."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from models import MEMORY, Models, load_model, recipe_of

import streammerge
from streammerge import merging, run
from streammerge.adapters.combining.combinations import COMBINATIONS
from streammerge.checkpoint.manifest import read_manifest_files
from streammerge.checkpoint.outputform import MANIFEST_NAME, RECIPE_NAME
from streammerge.cli import display
from streammerge.cli.arguments import main
from streammerge.cli.display import show_progress
from streammerge.engine.progress import ProgressEvent
from streammerge.methods import discover_methods
from streammerge.plan.codec import parse_plan
from streammerge.version import VERSION

A = torch.arange(6.0).reshape(2, 3)
B = torch.ones(2, 3)
METHODS = sorted(discover_methods())


@pytest.fixture
def sources(models: Models) -> list[Path]:
    return [models.write({"a": A}, "first"), models.write({"a": B}, "second")]


@pytest.fixture
def recipe(tmp_path: Path, sources: list[Path]) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of("linear", None, sources)))
    return str(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def merge(recipe: str, out: Path, *options: str) -> int:
    return main(["merge", recipe, str(out), "--memory", MEMORY, *options])


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# -- merge


def test_merge_writes_a_model_and_says_so_on_stderr(
    recipe: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(recipe, out) == 0

    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"{out}: 1 tensors in ")
    assert len(printed.err.splitlines()) == 1
    assert torch.equal(load_model(out)["a"], (A + B) / 2)


def test_the_output_is_complete_and_the_manifest_lists_it(recipe: str, out: Path) -> None:
    merge(recipe, out)

    present = {path.name for path in out.iterdir()}
    assert present == {"README.md", "model.safetensors", MANIFEST_NAME, RECIPE_NAME}
    assert read_manifest_files(out) == tuple(sorted(present - {MANIFEST_NAME}))


def test_the_recipe_in_the_output_makes_the_same_model(
    recipe: str, out: Path, tmp_path: Path
) -> None:
    merge(recipe, out)

    assert merge(str(out / RECIPE_NAME), tmp_path / "again") == 0
    first, second = files_of(out), files_of(tmp_path / "again")
    # The card and the run name and time the output.
    for name in ("model.safetensors", RECIPE_NAME):
        assert first[name] == second[name]


def test_two_merges_differ_in_the_run_only(recipe: str, out: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "out"
    other.parent.mkdir()
    merge(recipe, out)
    merge(recipe, other, "--workers", "1", "--byte-source", "mmap")

    first, second = files_of(out), files_of(other)
    records = [json.loads(files.pop(MANIFEST_NAME)) for files in (first, second)]
    assert first == second
    for record in records:
        # The digest of a manifest covers its run too.
        assert record.pop("run")
        assert record.pop("digest")
    assert records == [records[0]] * 2


def test_paths_are_relative_to_the_working_directory(
    recipe: str,
    sources: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    del recipe
    below = tmp_path / "recipes"
    below.mkdir()
    (below / "recipe.yaml").write_text(
        yaml.safe_dump(recipe_of("linear", None, [Path(path.name) for path in sources]))
    )
    monkeypatch.chdir(tmp_path)

    assert merge("recipes/recipe.yaml", Path("out")) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_quiet_prints_nothing_when_all_is_well(
    recipe: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(recipe, out, "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_quiet_still_says_what_is_wrong(
    recipe: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.write_text("mine")

    assert merge(recipe, out, "--quiet") == 4
    assert "OutputExistsError" in capsys.readouterr().err


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_json_prints_one_object_per_line_and_ends_with_done(
    quiet: list[str], recipe: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(recipe, out, "--json", *quiet) == 0

    printed = capsys.readouterr()
    assert printed.err == ""
    events = [json.loads(line) for line in printed.out.splitlines()]
    assert {event["event"] for event in events[:-1]} <= {"progress"}
    done = events[-1]
    assert (done["event"], done["out"], done["tensors"]) == ("done", str(out), 1)
    assert done["bytes_by_stage"] == {"read": 48, "write": 24}
    assert done["projected_memory"] > 0


def test_json_prints_progress_up_to_the_last_byte(
    recipe: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """However short the merge: whoever waits for the end of the bar sees it."""
    merge(recipe, out, "--json")

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    progress = [event for event in events if event["event"] == "progress"]
    assert progress[-1]["bytes_done"] == progress[-1]["bytes_total"]


def test_json_prints_no_event_when_a_merge_fails(
    recipe: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.write_text("mine")

    assert merge(recipe, out, "--json") == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("option", ["--memory=0", "--memory=lots", "--workers=0", "--workers=1.5"])
def test_a_senseless_resource_is_a_usage_error(
    option: str, recipe: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["merge", recipe, str(out), option])

    assert caught.value.code == 2
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["murge"], ["merge"], ["inspect"], ["methods", "a", "b"]]
)
def test_a_command_that_is_none_is_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)

    assert caught.value.code == 2
    assert "usage: " in capsys.readouterr().err


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_cpu_is_a_device(device: str, recipe: str, out: Path) -> None:
    assert merge(recipe, out, "--device", device) == 0


def test_overwrite_replaces_an_earlier_merge(
    recipe: str, sources: list[Path], out: Path, tmp_path: Path
) -> None:
    merge(recipe, out)
    Path(recipe).write_text(yaml.safe_dump(recipe_of("linear", None, sources[:1])))

    assert merge(recipe, out) == 4
    assert torch.equal(load_model(out)["a"], (A + B) / 2)
    assert merge(recipe, out, "--overwrite") == 0
    assert torch.equal(load_model(out)["a"], A)
    assert not list(tmp_path.glob("out.*"))


def test_overwrite_without_anything_to_replace_is_fine(recipe: str, out: Path) -> None:
    assert merge(recipe, out, "--overwrite") == 0


def test_the_earlier_merge_is_there_until_the_new_one_is_whole(
    recipe: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(recipe, out)
    before = files_of(out)
    seen: list[dict[str, bytes]] = []
    check = merging.check_shards

    def look(*arguments: Any) -> None:
        seen.append(files_of(out))
        check(*arguments)

    monkeypatch.setattr(merging, "check_shards", look)

    assert merge(recipe, out, "--overwrite") == 0
    assert seen == [before]


def test_a_merge_that_fails_leaves_the_earlier_one(
    recipe: str, out: Path, tmp_path: Path, sources: list[Path], models: Models
) -> None:
    merge(recipe, out)
    before = files_of(out)
    bad = models.write({"a": A / 0}, "bad")
    Path(recipe).write_text(yaml.safe_dump(recipe_of("linear", None, [bad, *sources])))

    assert merge(recipe, out, "--overwrite") == 1
    assert files_of(out) == before
    assert not list(tmp_path.glob("out.*"))


def interrupting(_event: ProgressEvent) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "step",
    ["run_pipeline", "check_shards", "write_companions", "open_sources"],
)
def test_an_interrupt_at_any_step_can_be_resumed(
    step: str,
    recipe: str,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, step, interrupt)

    assert merge(recipe, out) == 130
    done = step in {"check_shards", "write_companions"}
    said = capsys.readouterr().err
    assert said.startswith("interrupted")
    assert ("--resume" in said) == done
    left = {path.name for path in out.parent.iterdir()}
    assert left == {"first", "recipe.yaml", "second"} | ({"out.partial"} if done else set())
    monkeypatch.undo()
    assert merge(recipe, out, "--resume") == 0
    assert not out.with_name("out.partial").exists()


def test_an_interrupt_while_bytes_flow_leaves_no_output(
    recipe: str, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(display, "_Lines", lambda _: interrupting)

    assert merge(recipe, out) == 130
    assert [path.name for path in tmp_path.glob("out*")] in ([], ["out.partial"])


# -- progress


def event(seconds: float, done: int = 50, total: int = 200) -> ProgressEvent:
    return ProgressEvent("merge", done, total, seconds, 5.0, 30.0)


class Terminal(io.StringIO):
    """Pretends that somebody watches."""

    def isatty(self) -> bool:
        return True


def replace_stderr(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> io.StringIO:
    """Give what is written to stderr from now on; a fixture would be too early for pytest."""
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_log_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = replace_stderr(monkeypatch, io.StringIO())

    with show_progress(quiet=False, as_json=False) as on_progress:
        for tenths in range(250):
            on_progress(event(tenths / 10))

    assert stderr.getvalue() == "merge: 25 %, 50 B of 200 B, 5 B/s, 30 s left\n" * 2


def test_a_log_has_no_line_for_a_short_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = replace_stderr(monkeypatch, io.StringIO())

    with show_progress(quiet=False, as_json=False) as on_progress:
        on_progress(event(9.9))

    assert stderr.getvalue() == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = replace_stderr(monkeypatch, Terminal())

    with show_progress(quiet=False, as_json=False) as on_progress:
        on_progress(event(1.0, done=50))
        on_progress(event(2.0, done=200))

    assert "merge: 100%" in stderr.getvalue()
    assert "200/200" in stderr.getvalue()


def test_a_bar_follows_a_total_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess that missed costs another sweep over the inputs."""
    stderr = replace_stderr(monkeypatch, Terminal())

    with show_progress(quiet=False, as_json=False) as on_progress:
        on_progress(event(1.0, done=50))
        on_progress(event(2.0, done=300, total=300))

    assert "300/300" in stderr.getvalue()


def test_json_spells_an_unknown_time_as_null(capsys: pytest.CaptureFixture[str]) -> None:
    """Infinity is not JSON."""
    with show_progress(quiet=False, as_json=True) as on_progress:
        on_progress(ProgressEvent("statistics", 0, 200, 0.0, 0.0, float("inf")))

    assert json.loads(capsys.readouterr().out) == {
        "event": "progress",
        "activity": "statistics",
        "bytes_done": 0,
        "bytes_total": 200,
        "seconds": 0.0,
        "rate": 0.0,
        "seconds_left": None,
    }


def test_json_is_written_about_once_a_second_and_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with show_progress(quiet=False, as_json=True) as on_progress:
        for tenths in range(25):
            on_progress(event(tenths / 10))
        on_progress(event(2.5, done=200))

    seconds = [json.loads(line)["seconds"] for line in capsys.readouterr().out.splitlines()]
    assert seconds == [0.0, 1.0, 2.0, 2.5]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_progress_ends_at_its_total(scope: str, models: Models) -> None:
    base = models.write({"a": torch.zeros(300_000)})
    source = models.write({"a": torch.arange(300_000.0)})
    events: list[ProgressEvent] = []
    asked = recipe_of("ties", base, [source], parameters={"density": 0.3, "scope": scope})

    models.merge(asked, on_progress=events.append)

    done = [each.bytes_done for each in events]
    assert done == sorted(done)
    assert events[-1].bytes_done == events[-1].bytes_total


# -- plan


def test_plan_prints_a_table_and_writes_nothing(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))

    assert main(["plan", recipe, "--memory", MEMORY]) == 0

    printed = capsys.readouterr()
    assert printed.err == ""
    assert "linear (peft semantics)" in printed.out
    assert "of 4.0 GiB" in printed.out
    assert sorted(tmp_path.rglob("*")) == before


def test_plan_as_json_is_a_plan_that_can_be_merged(
    recipe: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", recipe, "--json", "--memory", MEMORY, "--workers", "3"]) == 0

    text = capsys.readouterr().out
    assert json.loads(text)["resources"]["workers"] == 3
    planned = parse_plan(text)
    streammerge.merge(planned, out)
    assert torch.equal(load_model(out)["a"], (A + B) / 2)


def test_plan_refuses_what_merge_refuses(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", recipe, "--memory", "1MiB"]) == 3
    assert capsys.readouterr().err.startswith("MemoryBudgetError: ")


# -- inspect


def test_inspect_prints_what_a_checkpoint_holds(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.write({"a": A, "b": B.to(torch.bfloat16)}, shards=2)
    (model / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')

    assert main(["inspect", str(model)]) == 0

    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["tensors", "2"] in rows
    assert ["parameters", "12"] in rows
    assert ["F32", "24 B"] in rows
    assert ["BF16", "12 B"] in rows
    assert ["architecture", "LlamaForCausalLM"] in rows
    assert ["largest", "a [2, 3] F32 24 B"] in rows


def test_inspect_as_json_places_every_tensor(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models.write({"a": A, "ü": B}, shards=2)

    assert main(["inspect", str(model), "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert set(found["tensors"]) == {"a", "ü"}
    for name, tensor in (("a", A), ("ü", B)):
        entry = found["tensors"][name]
        assert (entry["dtype"], entry["shape"], entry["nbytes"]) == ("F32", [2, 3], 24)
        content = Path(found["files"][entry["file"]]["path"]).read_bytes()
        stored = content[entry["offset"] : entry["offset"] + entry["nbytes"]]
        assert stored == tensor.numpy().tobytes()


def test_inspect_of_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 1
    assert "no checkpoint among 0 files" in capsys.readouterr().err


def test_inspect_shows_what_merge_would_refuse(
    models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looking at a quantised model is how one finds out that it is one."""
    model = models.write({"a.qweight": torch.zeros(2, dtype=torch.int32)})

    assert main(["inspect", str(model)]) == 0
    assert "a.qweight" in capsys.readouterr().out


# -- methods


def test_methods_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0

    of_models, of_adapters = capsys.readouterr().out.split("\n\n")
    assert [line.split()[0] for line in of_models.splitlines()] == METHODS
    assert [line.split()[0] for line in of_adapters.splitlines()[1:]] == list(COMBINATIONS)


@pytest.mark.parametrize("name", COMBINATIONS)
def test_methods_explains_each_combination(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", name]) == 0

    printed = capsys.readouterr().out
    assert f"{name}, for adapters without a base: {COMBINATIONS[name].summary}" in printed
    for spec in COMBINATIONS[name].parameters:
        assert f"  {spec.name} (" in printed


@pytest.mark.parametrize("name", METHODS)
def test_methods_explains_each(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", name]) == 0

    printed = capsys.readouterr().out
    method = discover_methods()[name]
    assert printed.startswith(f"{name}: {method.summary}")
    assert method.reference in printed
    for spec in method.parameters:
        assert f"  {spec.name} (" in printed
        assert spec.doc in printed


def explained(name: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["methods", name]) == 0
    return capsys.readouterr().out.splitlines()


def test_methods_says_whose_definitions_there_are_and_what_they_mean(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = explained("ties", capsys)

    assert "semantics: peft (default), mergekit, paper" in lines
    assert "sources: one or more" in lines
    assert "locality: element by element" in lines
    assert "rounds: 1 before the merge (ranks); up to 3 with other parameters" in lines
    assert "scope: tensor or model" in lines
    assert any(line.endswith("default count, weights under mergekit)") for line in lines)
    of_nuslerp = explained("nuslerp", capsys)
    assert "semantics: mergekit" in of_nuslerp
    assert "sources: exactly two" in of_nuslerp
    assert "rounds: 1 before the merge (inner products)" in of_nuslerp
    assert "scope: tensor" in of_nuslerp
    assert "rounds: none" in explained("linear", capsys)
    # mergekit's definition is the default of what has no other first.
    assert "  t (number, at least 0; shared; required)" in explained("nearswap", capsys)


def test_methods_as_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert [method["name"] for method in found] == [*METHODS, *COMBINATIONS]
    assert {"svd_rank", "svd_clamp"} <= {p["name"] for p in found[-1]["parameters"]}
    ties = next(method for method in found if method["name"] == "ties")
    assert ties["semantics"] == ["peft", "mergekit", "paper"]
    assert ties["sources"] == {"least": 1, "most": None}
    assert (ties["rounds"], ties["scopes"]) == (["ranks"], ["tensor", "model"])
    assert ties["locality"] == "element by element"
    of_ties = {parameter["name"]: parameter for parameter in ties["parameters"]}
    defaults = {"peft": "floor", "mergekit": "at least one", "paper": "one more"}
    assert of_ties["kept_count"]["defaults"] == defaults
    density = of_ties["density"]
    assert (density["required"], density["minimum"], density["maximum"]) == (True, 0.0, 1.0)


def test_an_unknown_method_is_refused_with_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "tise"]) == 2
    assert 'did you mean "ties"?' in capsys.readouterr().err


def test_the_schema_is_one_and_accepts_a_recipe(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["methods", "--schema"]) == 0

    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    document = yaml.safe_load(Path(recipe).read_text())
    assert validator.is_valid(document)
    assert not validator.is_valid(document | {"method": "tise"})


# -- as a program


def program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "streammerge", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def test_version_is_printed() -> None:
    done = program("--version")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"{VERSION}\n", "")
    assert streammerge.__version__ == VERSION


def test_the_program_returns_the_exit_code(tmp_path: Path) -> None:
    done = program("merge", str(tmp_path / "absent.yaml"), str(tmp_path / "out"))

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("RecipeError: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_traceback(models: Models) -> None:
    """As with ``streammerge inspect --json MODEL | head -c 1``."""
    model = models.write({f"tensor-{index}": torch.zeros(1) for index in range(3000)})
    process = subprocess.Popen(
        [sys.executable, "-m", "streammerge", "inspect", "--json", str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    process.wait(30)

    assert said == ""


def test_a_reader_that_is_gone_before_anything_is_printed_is_no_traceback(
    models: Models,
) -> None:
    """Little output is only written when the program ends, after everything else."""
    model = models.write({"a": A})
    script = 'exec 3>&1; ("$0" -m streammerge inspect "$1"; echo "code $?" >&2) | true'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, str(model)],
        capture_output=True,
        text=True,
        check=False,
    )

    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith("code ")] == []


def test_the_public_names_are_what_they_are_called() -> None:
    # A function, though a package of that name lies beside it.
    assert streammerge.plan is run.plan
    assert streammerge.merge is run.merge
    for name in streammerge.__all__:
        assert getattr(streammerge, name) is not None


def test_a_plan_brings_its_own_resources(recipe: str, out: Path) -> None:
    planned = streammerge.plan(recipe, memory=MEMORY)

    with pytest.raises(ValueError, match="a plan already says"):
        streammerge.merge(planned, out, memory="3GiB")
    with pytest.raises(ValueError, match="at least 1"):
        streammerge.plan(recipe, workers=0)
