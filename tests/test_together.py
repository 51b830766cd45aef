"""Outputs that are made together are byte for byte what each is alone, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from models import Models, recipe_of, write_adapter

import streammerge
from streammerge import together
from streammerge.checkpoint.bytesource import PreadSource
from streammerge.checkpoint.sharing import SharedFiles
from streammerge.cli.arguments import main
from streammerge.engine.monitor import StoppedError
from streammerge.engine.pacing import Pacer
from streammerge.engine.progress import ProgressEvent
from streammerge.errors import (
    DiskSpaceError,
    MemoryBudgetError,
    OutputExistsError,
    RecipeError,
    StreamMergeError,
)
from streammerge.plan.chunking import Chunk, Piece
from streammerge.plan.types import MergePlan
from streammerge.together import check_room, merge_together, plan_together
from streammerge.units import MIB

ROOT = Path(__file__).resolve().parent.parent
BLOCK = 262_144


@pytest.fixture
def paths(models: Models) -> list[Path]:
    """A base and two models: one tensor of many blocks, and small ones."""
    torch.manual_seed(0)
    base = {"big": torch.randn(9 * BLOCK // 512 + 3, 512)}
    base |= {f"layers.{index:02}": torch.randn(60, 40) for index in range(12)}
    made = [models.write(base, "base")]
    for name in ("one", "other"):
        tuned = {key: value + 0.1 * torch.randn_like(value) for key, value in base.items()}
        made.append(models.write(tuned, name))
    return made


def recipes_over(paths: list[Path]) -> list[dict[str, Any]]:
    """Recipes that ask different things: nothing, of tensors, of the model, at random."""
    base, *tuned = paths
    return [
        recipe_of("ties", base, tuned, parameters={"density": 0.2}),
        recipe_of("ties", base, tuned, parameters={"density": 0.5, "scope": "model"}),
        recipe_of("linear", None, tuned, parameters={"weight": [0.3, 0.7]}),
        recipe_of("dare_linear", base, tuned, parameters={"density": 0.5}, seed=3),
        recipe_of("slerp", base, tuned[:1], parameters={"t": 0.25}),
    ]


def content(directory: Path) -> dict[str, bytes]:
    """Return every file's bytes; of the manifest, what does not depend on the run."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    manifest = json.loads(found.pop("streammerge_manifest.json"))
    for key in ("run", "digest"):
        manifest.pop(key, None)
    return found | {"manifest": json.dumps(manifest, sort_keys=True).encode()}


@pytest.fixture
def alone(paths: list[Path], tmp_path: Path) -> list[dict[str, bytes]]:
    # Model cards are headed by the names of their directories.
    (tmp_path / "alone").mkdir()
    found = []
    for index, recipe in enumerate(recipes_over(paths)):
        streammerge.merge(recipe, tmp_path / "alone" / f"out-{index}")
        found.append(content(tmp_path / "alone" / f"out-{index}"))
    return found


# -- the same bytes


@pytest.mark.parametrize("options", [{}, {"memory": "8GiB", "workers": 1}])
def test_outputs_are_what_each_is_alone(
    options: dict[str, Any], paths: list[Path], alone: list[dict[str, bytes]], tmp_path: Path
) -> None:
    recipes = recipes_over(paths)
    outs = [tmp_path / f"out-{index}" for index in range(len(recipes))]

    manifests = merge_together(list(zip(recipes, outs, strict=True)), **options)

    assert [content(out) for out in outs] == alone
    assert [each.method for each in manifests] == [each["method"] for each in recipes]
    for each in manifests:
        assert each.run.measured_memory <= each.run.projected_memory


def test_what_does_not_fit_at_once_is_merged_in_groups(
    paths: list[Path], alone: list[dict[str, bytes]], tmp_path: Path
) -> None:
    recipes = recipes_over(paths)
    outs = [tmp_path / f"out-{index}" for index in range(len(recipes))]
    used = streammerge.plan(recipes[0]).memory.baseline
    for mib in range(used // MIB + 80, used // MIB + 400, 10):
        try:
            sizes = [len(each.plans) for each in plan_together(recipes, memory=mib * MIB)]
        except MemoryBudgetError:
            continue
        if 1 < len(sizes) < len(recipes):
            break
    else:
        pytest.fail("no budget takes two groups")

    merge_together(list(zip(recipes, outs, strict=True)), memory=mib * MIB)

    assert [content(out) for out in outs] == alone


def test_plans_of_a_group_fit_the_budget_together(paths: list[Path]) -> None:
    (group,) = plan_together(recipes_over(paths)[:3], memory="8GiB")
    plans = [each for each in group.plans if isinstance(each, MergePlan)]

    assert len(plans) == 3
    own = [each.memory.peak - each.memory.beside - each.memory.baseline for each in plans]
    assert max(each.memory.baseline for each in plans) + sum(own) <= 8192 * MIB
    assert all(each.memory.peak <= each.memory.budget == 8192 * MIB for each in plans)


# -- the command line


def test_a_grid_is_a_directory_of_its_outputs(
    paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = recipes_over(paths)[0] | {"grid": {"parameters.density": [0.2, 0.7]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))

    assert main(["plan", str(tmp_path / "grid.yaml")]) == 0
    planned = capsys.readouterr().out
    assert "== 2 of 2: density=0.7 ==" in planned
    assert "2 outputs, up to 2 at once; reads of the inputs: 1" in planned
    assert main(["plan", str(tmp_path / "grid.yaml"), "--json"]) == 0
    documents = map(json.loads, capsys.readouterr().out.splitlines())
    assert [yaml.safe_load(each["recipe"])["parameters"] for each in documents] == [
        {"density": 0.2},
        {"density": 0.7},
    ]
    assert main(["merge", str(tmp_path / "grid.yaml"), str(tmp_path / "made")]) == 0
    assert f"{tmp_path}/made/density=0.7: 13 tensors" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "grid.yaml"), str(tmp_path / "made"), "--resume"]) == 0
    assert capsys.readouterr().err.count("is complete already, with 13 tensors") == 2

    assert sorted(each.name for each in (tmp_path / "made").iterdir()) == [
        "density=0.2",
        "density=0.7",
    ]
    for density in (0.2, 0.7):
        recipe = recipes_over(paths)[0] | {"parameters": {"density": density}}
        made = tmp_path / "made" / f"density={density}"
        streammerge.merge(recipe, tmp_path / made.name)
        assert content(made) == content(tmp_path / made.name)
        own = next(made.glob("*recipe*"))
        assert main(["verify", str(made), "--against", str(own), "--quiet"]) == 0


def test_a_grid_is_not_one_file(
    paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = recipes_over(paths)[0] | {"grid": {"parameters.density": [0.2, 0.7]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))

    assert main(["merge", str(tmp_path / "grid.yaml"), str(tmp_path / "x.safetensors")]) == 2

    assert "makes 2 outputs, each in a directory of its own" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_adapters_are_combined_one_by_one(tmp_path: Path) -> None:
    paths = [
        write_adapter(tmp_path / name, {"layers.0.q": (16, 12)}, seed=seed)
        for seed, name in enumerate(("a", "b"))
    ]
    grid = recipe_of("linear", None, paths) | {"grid": {"parameters.weight": [[0.5, 0.5], [1, 2]]}}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))

    assert main(["merge", str(tmp_path / "grid.yaml"), str(tmp_path / "made"), "--quiet"]) == 0

    for name, weight in (("weight=0.5+0.5", [0.5, 0.5]), ("weight=1+2", [1, 2])):
        alone = recipe_of("linear", None, paths, parameters={"weight": weight})
        streammerge.merge(alone, tmp_path / name)
        made, expected = (
            (directory / name / "adapter_model.safetensors").read_bytes()
            for directory in (tmp_path / "made", tmp_path)
        )
        assert made == expected
    groups = plan_together([alone, alone])
    assert [len(group.plans) for group in groups] == [1, 1]


def test_mergekits_recipes_may_have_a_grid(paths: list[Path], tmp_path: Path) -> None:
    document = {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 1}} for path in paths[1:]],
        "dtype": "float32",
        "grid": {"models.0.parameters.weight": [1, 3]},
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(document))

    assert main(["merge", str(tmp_path / "config.yml"), str(tmp_path / "made"), "--quiet"]) == 0

    assert sorted(each.name for each in (tmp_path / "made").iterdir()) == ["weight=1", "weight=3"]


def test_also_merges_other_recipes(
    paths: list[Path],
    alone: list[dict[str, bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = []
    for index, recipe in enumerate(recipes_over(paths)):
        files.append(str(tmp_path / f"{index}.yaml"))
        Path(files[-1]).write_text(yaml.safe_dump(recipe))
    outs = [str(tmp_path / f"out-{index}") for index in range(len(files))]
    also = [each for pair in zip(files[1:], outs[1:], strict=True) for each in ("--also", *pair)]

    assert main(["merge", files[0], outs[0], *also, "--json"]) == 0

    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["out"] for each in events if each["event"] == "done"] == outs
    assert [content(Path(out)) for out in outs] == alone
    assert main(["plan", files[0], "--also", files[2]]) == 0
    assert "== 2 of 2: linear ==" in capsys.readouterr().out


# -- refusals


def test_a_chain_is_merged_by_itself(
    paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = recipes_over(paths)[2]
    chain = yaml.safe_dump_all([{"name": "a", **one}, one | {"sources": [{"path": "a"}] * 2}])
    (tmp_path / "chain.yaml").write_text(chain)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(one))
    also = ["--also", str(tmp_path / "chain.yaml"), str(tmp_path / "b")]

    assert main(["merge", str(tmp_path / "one.yaml"), str(tmp_path / "a"), *also]) == 2

    assert "by a command of their own" in capsys.readouterr().err
    assert not (tmp_path / "a.partial").exists()


def test_a_plan_states_what_the_others_take(paths: list[Path]) -> None:
    (group,) = plan_together(recipes_over(paths), memory="8GiB")
    memories = [each.memory for each in group.plans if isinstance(each, MergePlan)]

    own = sum(memory.own for memory in memories)
    for memory in memories:
        assert memory.peak == memory.baseline + own
        assert memory.beside < (memory.budget - memory.baseline) // 4


@pytest.mark.parametrize("second", ["out", "out/inside", ".", "out.partial", "out.partial/in"])
def test_outputs_lie_apart(second: str, paths: list[Path], tmp_path: Path) -> None:
    recipes = recipes_over(paths)

    with pytest.raises(OutputExistsError, match="overlaps the output"):
        merge_together([(recipes[0], tmp_path / "out"), (recipes[2], tmp_path / second)])

    assert not (tmp_path / "out.partial").exists()


def test_no_output_is_an_input_of_another(paths: list[Path], tmp_path: Path) -> None:
    base, one, other = paths
    recipes = [recipe_of("linear", None, [base, one]), recipe_of("linear", None, [base])]

    with pytest.raises(OutputExistsError, match="overlaps the input"):
        merge_together([(recipes[0], tmp_path / "out"), (recipes[1], one)], overwrite=True)

    assert other.exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_output_that_is_there_is_refused_before_any_is_begun(
    paths: list[Path], tmp_path: Path
) -> None:
    recipes = recipes_over(paths)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "mine.txt").write_text("mine")

    with pytest.raises(OutputExistsError):
        merge_together([(recipes[0], tmp_path / "first"), (recipes[2], tmp_path / "second")])

    assert (tmp_path / "second" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "first.partial").exists()


def test_a_grid_is_no_recipe_of_one_output(paths: list[Path], tmp_path: Path) -> None:
    grid = recipes_over(paths)[0] | {"grid": {"parameters.density": [0.2, 0.7]}}

    with pytest.raises(RecipeError, match="makes several outputs; `streammerge merge RECIPE OUT`"):
        streammerge.merge(grid, tmp_path / "out")


def test_room_is_needed_for_all(paths: list[Path], tmp_path: Path) -> None:
    plans = [streammerge.plan(each) for each in recipes_over(paths)[:2]]
    check_room(plans, [tmp_path / "a", tmp_path / "b"])
    huge: Any = [SimpleNamespace(bytes_to_write=1 << 50) for _ in plans]

    with pytest.raises(DiskSpaceError, match=r"2 outputs need .* more together"):
        check_room(huge, [tmp_path / "a", tmp_path / "b"])


def test_nothing_to_merge_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one recipe"):
        merge_together([])


# -- faults


def test_when_one_fails_all_end_and_resume(paths: list[Path], tmp_path: Path) -> None:
    base, *tuned = paths
    fine = recipe_of("linear", None, tuned)
    # The last tensor of the work overflows the output's type.
    bad = recipe_of("task_arithmetic", base, tuned, parameters={"weight": 1e6})
    bad["output"] = {"dtype": "float16"}

    with pytest.raises(StreamMergeError, match=r"float16|F16"):
        merge_together([(fine, tmp_path / "fine"), (bad, tmp_path / "bad")])

    assert not (tmp_path / "fine").exists() or content(tmp_path / "fine")
    assert not (tmp_path / "bad").exists()
    mild = recipe_of("task_arithmetic", base, tuned, parameters={"weight": 0.5})
    merge_together([(fine, tmp_path / "fine"), (mild, tmp_path / "mild")], resume=True)
    (tmp_path / "alone").mkdir()
    streammerge.merge(fine, tmp_path / "alone" / "fine")
    assert content(tmp_path / "fine") == content(tmp_path / "alone" / "fine")


def test_an_interrupt_ends_all_and_a_resume_finishes(
    paths: list[Path], alone: list[dict[str, bytes]], tmp_path: Path
) -> None:
    recipes = recipes_over(paths)
    merges = [(recipe, tmp_path / f"out-{index}") for index, recipe in enumerate(recipes)]

    def interrupt(_event: ProgressEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_together(merges, on_progress=interrupt)
    assert [each.name for each in threading.enumerate() if "streammerge" in each.name] == []
    merge_together(merges, resume=True)
    assert [content(out) for _, out in merges] == alone
    before = [(out / "streammerge_manifest.json").stat().st_mtime_ns for _, out in merges]
    # All is there: nothing is left to do.
    merge_together(merges, resume=True)
    assert [(out / "streammerge_manifest.json").stat().st_mtime_ns for _, out in merges] == before


def test_an_output_that_is_complete_stays_when_others_resume(
    paths: list[Path], alone: list[dict[str, bytes]], tmp_path: Path
) -> None:
    recipes = recipes_over(paths)
    merges = [(recipe, tmp_path / f"out-{index}") for index, recipe in enumerate(recipes)]
    streammerge.merge(*merges[1])

    merge_together(merges, resume=True)

    assert [content(out) for _, out in merges] == alone


def test_killed_again_and_again_all_outputs_have_the_right_bytes(
    paths: list[Path], alone: list[dict[str, bytes]], tmp_path: Path
) -> None:
    recipes = recipes_over(paths)
    names = [str(tmp_path / f"{index}.yaml") for index in range(len(recipes))]
    for name, recipe in zip(names, recipes, strict=True):
        Path(name).write_text(yaml.safe_dump(recipe))
    outs = [str(tmp_path / f"out-{index}") for index in range(len(recipes))]
    also = [each for pair in zip(names[1:], outs[1:], strict=True) for each in ("--also", *pair)]
    command = [sys.executable, "-m", "streammerge", "merge", names[0], outs[0], *also, "--quiet"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = 0
    for seconds in [0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5]:
        running = subprocess.Popen([*command, "--resume"], env=environment)
        try:
            running.wait(seconds)
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGKILL)
            killed += running.wait() == -signal.SIGKILL
    assert killed
    subprocess.run([*command, "--resume"], env=environment, check=True)

    assert [content(Path(out)) for out in outs] == alone


# -- pace and pages


def chunk_at(start: int) -> Chunk:
    return Chunk((Piece(0, start, 1),), (0,))


@pytest.fixture
def plans(paths: list[Path]) -> list[MergePlan]:
    found = [streammerge.plan(each, workers=1) for each in recipes_over(paths)[:2]]
    return [each for each in found if isinstance(each, MergePlan)]


def _in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_who_is_ahead_waits_for_the_slowest(plans: list[MergePlan]) -> None:
    pacer = Pacer(plans)
    fast, slow = (pacer.join(plan) for plan in plans)
    far = 5 * max(plan.resources.slot_bytes for plan in plans)
    waiting = _in_thread(lambda: fast.reach(chunk_at(far), lambda: False))
    waiting.join(0.1)
    assert waiting.is_alive()

    # The slowest never waits, and once it is near, neither does the other.
    slow.reach(chunk_at(far * 9 // 10), lambda: False)
    waiting.join(5)
    assert not waiting.is_alive()


def test_nobody_waits_for_who_has_left_or_when_stopped(plans: list[MergePlan]) -> None:
    pacer = Pacer(plans)
    fast, slow = (pacer.join(plan) for plan in plans)
    with pytest.raises(StoppedError):
        fast.reach(chunk_at(1 << 40), lambda: True)
    waiting = _in_thread(lambda: fast.reach(chunk_at(1 << 40), lambda: False))
    slow.leave()
    waiting.join(5)
    assert not waiting.is_alive()
    # Who has left may say more, and never waits.
    slow.reach(chunk_at(1 << 41), lambda: False)


def test_pages_are_let_go_when_all_have_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(3 * MIB))
    files = [[tmp_path / "file"], [tmp_path / "file"], []]
    shared = SharedFiles(files)
    one, other = (shared.opening(PreadSource)(tmp_path / "file") for _ in range(2))
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda _fd, begin, nbytes, _what: dropped.append((begin, nbytes))
    )

    one._forget_cached([(0, 3 * MIB)])
    assert dropped == []
    other._forget_cached([(10, MIB + 10)])
    assert dropped == []
    other._forget_cached([(0, 10)])
    assert dropped == [(0, MIB)]
    other._forget_cached([(2 * MIB, 3 * MIB)])
    assert dropped[1:] == [(2 * MIB, MIB)]
    one.close()
    other.close()


def test_a_file_of_one_merge_alone_is_let_go_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(100))
    source = SharedFiles([[tmp_path / "file"], []]).opening(PreadSource)(tmp_path / "file")
    dropped: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _fd, begin, _n, _what: dropped.append(begin))

    source._forget_cached([(7, 9)])

    assert dropped == [7]
    source.close()


def test_progress_is_that_of_all(paths: list[Path], tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    recipes = recipes_over(paths)[:2]
    manifests = merge_together(
        [(recipes[0], tmp_path / "a"), (recipes[1], tmp_path / "b")], on_progress=events.append
    )

    moved = sum(sum(each.run.bytes_by_stage.values()) for each in manifests)
    assert events[-1].bytes_done == moved
    assert all(event.bytes_done <= event.bytes_total for event in events)
    assert time.perf_counter() > events[-1].seconds >= 0
    assert together.Grid(()).recipes == ()
