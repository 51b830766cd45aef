"""A merge that was cut off goes on where it stopped, and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge import merging
from streammerge.checkpoint import journal, outputdir, outputfile
from streammerge.checkpoint.bytesource import PreadSource
from streammerge.checkpoint.journal import (
    JOURNAL_NAME,
    Entry,
    Journal,
    PieceDone,
    ScopeFound,
    iter_records,
    read_journal,
)
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.recorded import Recorded
from streammerge.checkpoint.snapshot import SNAPSHOT_NAME, load_snapshot, save_snapshot
from streammerge.checkpoint.verifying import verify_files
from streammerge.cli.arguments import main
from streammerge.engine import scheduling
from streammerge.engine.pipeline import run_pipeline
from streammerge.engine.progress import ProgressEvent
from streammerge.engine.resuming import Recovered
from streammerge.engine.scopes import ScopeStatistics
from streammerge.errors import CheckpointError, OutputError, OutputExistsError, ResumeError
from streammerge.plan.chunking import Piece
from streammerge.plan.types import MergePlan
from streammerge.statistics import BLOCK

pytestmark = pytest.mark.timeout(120)

METHODS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"density": 0.3},
    "ties over the model": {"density": 0.3, "scope": "model"},
    "dare_ties": {"density": 0.4},
}
PIECE = PieceDone(0, 0, 8, "ab" * 32, (3,), 0, (), (), ())


@pytest.fixture
def inputs(models: Models) -> tuple[Path, list[Path]]:
    """Two shards' worth of large tensors and a crowd of small ones."""
    generator = torch.Generator().manual_seed(7)

    def draw() -> dict[str, torch.Tensor]:
        large = {f"large.{i}": torch.randn(5 * BLOCK + i, generator=generator) for i in range(2)}
        small = {f"small.{i}": torch.randn(40, 10, generator=generator) for i in range(30)}
        return {k: v.bfloat16() for k, v in (large | small).items()} | {"ids": torch.arange(9)}

    return models.write(draw(), "base"), [models.write(draw(), f"source-{i}") for i in range(2)]


@pytest.fixture(params=METHODS)
def recipe(request: pytest.FixtureRequest, inputs: tuple[Path, list[Path]]) -> dict[str, Any]:
    base, sources = inputs
    parameters = METHODS[request.param]
    method = request.param.split()[0]
    return recipe_of(method, base, sources, parameters=parameters, output={"max_shard_size": "3MB"})


@pytest.fixture
def plan(recipe: dict[str, Any]) -> MergePlan:
    return in_small_pieces(streammerge.plan(recipe, memory=MEMORY, workers=2))


def in_small_pieces(plan: MergePlan, slots: int = 40) -> MergePlan:
    resources = replace(
        plan.resources,
        slot_bytes=2 * BLOCK,
        slots=slots,
        output_slot_bytes=2 * BLOCK,
        output_slots=3,
    )
    return replace(plan, resources=resources)


@pytest.fixture(autouse=True)
def _sync_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is durable is known after every few writes, as it is in a job of hours."""
    monkeypatch.setattr(outputfile, "SYNC_BYTES", 2 * BLOCK)


class Stop(Exception):  # noqa: N818 - it is no error
    """Ends a merge from outside."""


def interrupt_after(plan: MergePlan, out: Path, writes: int, **options: Any) -> None:
    """Begin a merge and end it once so many pieces were written."""
    done = 0
    write_at = outputfile.OutputFile.write_at

    def count(self: outputfile.OutputFile, *arguments: Any, **keywords: Any) -> None:
        nonlocal done
        write_at(self, *arguments, **keywords)
        done += 1
        if done > len(plan.layout.shards) + writes:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputfile.OutputFile, "write_at", count)
        with pytest.raises(streammerge.StreamMergeError, match="Stop"):
            streammerge.merge(plan, out, **options)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


@pytest.fixture
def whole(plan: MergePlan, tmp_path: Path) -> dict[str, bytes]:
    """The shards of a merge that nothing disturbed."""
    streammerge.merge(plan, tmp_path / "whole")
    return bytes_of(tmp_path / "whole")


@pytest.mark.parametrize("writes", [0, 2, 7])
def test_a_resumed_merge_has_the_same_bytes(
    writes: int, plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt_after(plan, tmp_path / "out", writes)

    manifest = streammerge.merge(plan, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == whole
    assert manifest.run.resumed
    assert not verify_files(tmp_path / "out").damages


def test_a_resumed_merge_reports_what_an_undisturbed_one_does(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt_after(plan, tmp_path / "out", 6)

    resumed = streammerge.merge(plan, tmp_path / "out", resume=True)

    expected = streammerge.merge(plan, tmp_path / "third")
    assert resumed.tensors == expected.tensors
    shards = {shard.name for shard in plan.layout.shards}
    assert {n: resumed.files[n] for n in shards} == {n: expected.files[n] for n in shards}
    assert whole


def test_only_what_is_not_in_the_journal_is_read_again(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt_after(plan, tmp_path / "out", 8)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    done = [entry for _, entry in iter_records(journal) if isinstance(entry, PieceDone)]
    assert done

    manifest = streammerge.merge(plan, tmp_path / "out", resume=True)

    written = plan.layout.data_nbytes - sum(
        piece.numel * plan.tasks[piece.task].dtype.itemsize for piece in done
    )
    assert manifest.run.bytes_by_stage["write"] == written
    assert bytes_of(tmp_path / "out") == whole


def test_a_merge_can_be_resumed_many_times(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for writes in (1, 2, 3, 1):
        interrupt_after(plan, tmp_path / "out", writes, resume=True)

    streammerge.merge(plan, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == whole


def test_another_cut_of_the_work_changes_no_byte(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Another budget: what was done of a tensor in part is done again, the rest is not."""
    interrupt_after(plan, tmp_path / "out", 8)
    other = replace(plan, resources=replace(plan.resources, slot_bytes=4 * BLOCK, workers=1))
    other = replace(other, resources=replace(other.resources, output_slot_bytes=4 * BLOCK))

    streammerge.merge(other, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == whole


def test_resume_without_anything_to_resume_starts(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    manifest = streammerge.merge(plan, tmp_path / "out", resume=True)

    assert not manifest.run.resumed
    assert bytes_of(tmp_path / "out") == whole


def test_a_torn_last_line_is_cut_off(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt_after(plan, tmp_path / "out", 8)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:-9] + b"\0" * 30)

    streammerge.merge(plan, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == whole


def test_a_shard_that_is_gone_is_made_again(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt_after(plan, tmp_path / "out", 8)
    (tmp_path / "out.partial" / plan.layout.shards[0].name).unlink()

    streammerge.merge(plan, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == whole


# -- a sweep over the model


@pytest.fixture
def swept(inputs: tuple[Path, list[Path]]) -> MergePlan:
    base, sources = inputs
    parameters = {"density": 0.3, "scope": "model"}
    recipe = recipe_of("ties", base, sources, parameters=parameters)
    return in_small_pieces(streammerge.plan(recipe, memory=MEMORY, workers=2))


@pytest.mark.parametrize("measured", [1, 5, 9])
def test_a_sweep_over_the_model_goes_on_from_its_last_snapshot(
    measured: int, swept: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = streammerge.merge(swept, tmp_path / "whole")
    monkeypatch.setattr(scheduling, "SNAPSHOT_SECONDS", 0.0)
    save = ScopeStatistics.save
    saves = iter(range(1000))

    def save_and_stop(self: ScopeStatistics, path: Path) -> None:
        # What is in flight is counted later; waiting for it makes the test see some of it.
        time.sleep(0.05)
        save(self, path)
        if next(saves) == measured:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(ScopeStatistics, "save", save_and_stop)
        with pytest.raises(streammerge.StreamMergeError, match="Stop"):
            streammerge.merge(swept, tmp_path / "out")
    assert list((tmp_path / "out.partial").glob(f"{SNAPSHOT_NAME}-*"))
    with pytest.raises(OutputExistsError, match="--resume"):
        streammerge.merge(swept, tmp_path / "out")

    manifest = streammerge.merge(swept, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert manifest.tensors == undisturbed.tensors
    read = manifest.run.bytes_by_stage["read"]
    assert read < undisturbed.run.bytes_by_stage["read"]
    assert not list((tmp_path / "out").glob(".streammerge*"))


def test_a_snapshot_that_is_damaged_is_not_used(
    swept: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streammerge.merge(swept, tmp_path / "whole")
    monkeypatch.setattr(scheduling, "SNAPSHOT_SECONDS", 0.0)
    save = ScopeStatistics.save

    def save_half(self: ScopeStatistics, path: Path) -> None:
        save(self, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(ScopeStatistics, "save", save_half)
        with pytest.raises(streammerge.StreamMergeError, match="Stop"):
            streammerge.merge(swept, tmp_path / "out")

    streammerge.merge(swept, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


# -- what is refused


@pytest.fixture
def unfinished(inputs: tuple[Path, list[Path]], tmp_path: Path) -> dict[str, Any]:
    """A recipe, and a merge of it that was cut off."""
    base, sources = inputs
    recipe = recipe_of("task_arithmetic", base, sources)
    planned = in_small_pieces(streammerge.plan(recipe, memory=MEMORY, workers=2))
    interrupt_after(planned, tmp_path / "out", 6)
    return recipe


def test_an_unfinished_merge_is_not_discarded_unasked(
    unfinished: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(OutputExistsError, match="--resume to continue it, or --overwrite"):
        streammerge.merge(unfinished, tmp_path / "out", memory=MEMORY)

    streammerge.merge(unfinished, tmp_path / "out", memory=MEMORY, overwrite=True)
    assert not (tmp_path / "out.partial").exists()


def test_another_recipe_is_refused(unfinished: dict[str, Any], tmp_path: Path) -> None:
    other = unfinished | {"seed": 5, "parameters": {"lambda": 0.5}}
    other["sources"] = [each | {"weight": 0.25} for each in other["sources"]]

    with pytest.raises(ResumeError) as refused:
        streammerge.merge(other, tmp_path / "out", memory=MEMORY, resume=True)

    said = str(refused.value)
    assert (
        "another one: parameters was {}; " in said or "parameters.lambda was None, is 0.5" in said
    )
    assert "; seed was 0, is 5; sources[0].weight was None, is 0.25; " in said
    # Nobody can do anything with these.
    assert not re.search(r"\b(recipe|work) was", said)


def test_another_recipe_of_many_values_is_refused(
    unfinished: dict[str, Any], tmp_path: Path
) -> None:
    rules = [{"tensors": "ids", "copy": "base"}] * 1000

    with pytest.raises(ResumeError, match=r"recipe was \w+, is \w+"):
        streammerge.merge(
            unfinished | {"rules": rules}, tmp_path / "out", memory=MEMORY, resume=True
        )


def test_a_changed_input_is_refused(
    unfinished: dict[str, Any], inputs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    shard = next(inputs[1][0].glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))

    with pytest.raises(ResumeError, match=re.escape(str(shard)) + " was .* of 1 ns") as caught:
        streammerge.merge(unfinished, tmp_path / "out", memory=MEMORY, resume=True)

    assert "torch" not in str(caught.value)


def test_resume_and_overwrite_exclude_each_other(
    unfinished: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="choose one"):
        streammerge.merge(unfinished, tmp_path / "out", resume=True, overwrite=True)
    with pytest.raises(SystemExit) as caught:
        main(["merge", "recipe.yaml", "out", "--resume", "--overwrite"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


# -- replacing an earlier merge


def test_a_replacement_that_was_cut_off_between_its_renames_is_finished(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    rename = Path.rename

    def die_on_partial(self: Path, target: Path) -> Path:
        if self.name == "out.partial":
            raise Stop
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", die_on_partial)
        with pytest.raises(Stop):
            streammerge.merge(plan, out, overwrite=True)
    assert {path.name for path in tmp_path.glob("out*")} == {"out.partial", "out.replaced"}

    with pytest.raises(OutputExistsError, match="--resume"):
        streammerge.merge(plan, out)
    streammerge.merge(plan, out, resume=True)

    assert bytes_of(out) == whole
    assert {path.name for path in tmp_path.glob("out*")} == {"out"}


def test_an_earlier_merge_that_was_set_aside_is_never_lost_sight_of(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "whole").rename(tmp_path / "out.replaced")

    with pytest.raises(OutputExistsError, match="rename it to out to have it back"):
        streammerge.merge(plan, tmp_path / "out")
    assert bytes_of(tmp_path / "out.replaced") == whole


def test_what_a_cut_off_merge_left_beside_a_complete_model_is_ours(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "whole" / JOURNAL_NAME).touch()

    streammerge.merge(plan, tmp_path / "whole", overwrite=True)

    assert bytes_of(tmp_path / "whole") == whole
    assert (tmp_path / "whole" / MANIFEST_NAME).exists()


# -- the journal by itself


def test_a_journal_gives_back_what_was_written(tmp_path: Path) -> None:
    tops = ((0.25, 10, 3, 2, 1, 0, 1), (float("inf"), 10, 0, 0, 0, -1, 0))
    scope = ScopeFound(-1, tops, numbers=(0.1, -1e300, float("-inf")))
    journal = Journal(tmp_path / "j")
    journal.begin({"recipe": "x"})
    journal.append([PIECE, scope])
    journal.append([])
    journal.close()

    found = read_journal(tmp_path / "j")

    assert found is not None
    assert found.identity == {"recipe": "x"}
    assert found.lines == 2
    assert [entry for _, entry in iter_records(tmp_path / "j")] == [PIECE, scope]
    assert [entry for _, entry in iter_records(tmp_path / "j", pieces=False)] == [scope]
    assert found.nbytes == (tmp_path / "j").stat().st_size


@pytest.mark.parametrize("cut", range(0, 400, 7))
def test_a_journal_that_ends_anywhere_holds_its_whole_lines(cut: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.begin({"recipe": "x"})
    journal.append([PIECE, replace(PIECE, start=8), replace(PIECE, start=16)])
    journal.close()
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[:cut])

    found = read_journal(tmp_path / "j")

    lines = data[:cut].count(b"\n")
    assert (found is None) == (lines == 0)
    if found is not None:
        assert found.lines == lines - 1
        assert data[: found.nbytes].endswith(b"\n")


def test_an_altered_line_ends_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.begin({"recipe": "x"})
    journal.append([PIECE, replace(PIECE, start=8)])
    journal.close()
    data = bytearray((tmp_path / "j").read_bytes())
    data[data.index(b"\n") + 40] ^= 1
    (tmp_path / "j").write_bytes(data)

    found = read_journal(tmp_path / "j")

    assert found is not None
    assert found.lines == 0


def test_there_is_no_journal_in_an_empty_place(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "j") is None


def recorded(tmp_path: Path, entries: Sequence[Entry]) -> Recorded:
    """Return what a journal with these entries holds."""
    journal = Journal(tmp_path / "j")
    journal.begin({})
    journal.append(entries)
    journal.close()
    found = Recorded()
    found.add(tmp_path / "j")
    return found


def test_a_tensor_counts_as_done_piece_by_piece_or_when_it_is_covered(
    plan: MergePlan, tmp_path: Path
) -> None:
    index, numel = max(enumerate(task.numel for task in plan.tasks), key=lambda each: each[1])
    half = BLOCK
    assert numel > half
    first = replace(PIECE, task=index, start=0, numel=half)
    rest = replace(PIECE, task=index, start=half, numel=numel - half)

    part = Recovered(plan, recorded(tmp_path, [first]), wanted=None)
    assert part.has(Piece(index, 0, half))
    assert not part.has(Piece(index, 0, 2 * half))
    assert not part.has(Piece(index, half, half))
    assert not part.has(Piece(index + 1, 0, half))
    assert list(part.take_pieces([])) == []
    # Once they are given away, they still count.
    assert part.has(Piece(index, 0, half))
    both = Recovered(plan, recorded(tmp_path, [rest, first]), wanted=None)
    assert both.has(Piece(index, 0, 2 * half))
    assert list(both.take_pieces([])) == [first, rest]
    assert both.has(Piece(index, 0, 2 * half))


def test_of_two_records_of_a_place_the_later_one_counts(plan: MergePlan, tmp_path: Path) -> None:
    entries = [
        replace(PIECE, start=start, numel=numel, not_finite=number)
        for number, (start, numel) in enumerate([(0, 8), (16, 8), (0, 4), (8, 8), (16, 8)])
    ]

    found = recorded(tmp_path, entries)

    assert list(found.read()) == [entries[2], entries[3], entries[4]]
    assert found.starts.tolist() == [0, 8, 16]
    assert list(found.read(np.array([2, 0]))) == [entries[4], entries[2]]
    assert list(found.only(found.numels == 8).read()) == entries[3:]


@pytest.mark.parametrize("least", [1, 7, 1 << 16])
def test_records_of_several_journals_are_read_again_as_they_were(
    least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are sorted at once."""
    monkeypatch.setattr("streammerge.checkpoint.recorded._LEAST_SORTED", least)
    chance = random.Random(1)  # noqa: S311 - it only chooses what is recorded
    expected: dict[tuple[int, int], PieceDone] = {}
    found = Recorded()
    for number in range(20):
        journal = Journal(tmp_path / f"{number}")
        journal.begin({})
        for _ in range(30):
            piece = replace(
                PIECE,
                task=chance.randrange(5),
                start=chance.randrange(9) * BLOCK,
                numel=chance.randrange(1, 100),
                leaves="0f" * 32 * chance.randrange(3),
            )
            expected[piece.task, piece.start] = piece
            journal.append([piece])
        journal.close()
        found.add(tmp_path / f"{number}")

    assert list(found.read()) == [expected[place] for place in sorted(expected)]


def test_a_journal_that_is_changed_between_two_looks_is_refused(tmp_path: Path) -> None:
    found = recorded(tmp_path, [PIECE, replace(PIECE, start=8)])
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data.replace(b'"numel":8', b'"numel":7'))

    with pytest.raises(ResumeError, match=r"is not what it was a moment ago; give --overwrite"):
        list(found.read())


@pytest.mark.parametrize("change", [{"task": 1 << 31}, {"start": 1 << 62}, {"numel": 1 << 70}])
def test_places_that_no_merge_has_are_refused(change: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"which no merge has; give --overwrite"):
        recorded(tmp_path, [replace(PIECE, **change)])


# -- real processes, killed at random


DRIVER = """
import sys
from streammerge.checkpoint import outputfile
outputfile.SYNC_BYTES = 256 * 1024
from streammerge.__main__ import run
sys.argv[0] = "streammerge"
run()
"""


@pytest.fixture
def job(inputs: tuple[Path, list[Path]], tmp_path: Path) -> list[str]:
    """A command line whose work takes a second or so."""
    base, sources = inputs
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("ties", base, sources, parameters={"density": 0.3})))
    return [
        *(sys.executable, "-c", DRIVER, "merge", str(recipe)),
        *(str(tmp_path / "out"), "--memory", MEMORY, "--resume", "--quiet"),
    ]


def reference(job: list[str], tmp_path: Path) -> tuple[dict[str, bytes], float]:
    """Run a job undisturbed; return its shards and how long its process lived."""
    command = [*job[:5], str(tmp_path / "reference"), *job[6:]]
    began = time.monotonic()
    subprocess.run(command, check=True)
    return bytes_of(tmp_path / "reference"), time.monotonic() - began


def kill_and_resume(job: list[str], tmp_path: Path, rounds: int, number: int) -> None:
    expected, seconds = reference(job, tmp_path)
    chance = random.Random(11)  # noqa: S311 - it only chooses when to kill
    out = tmp_path / "out"
    killed = resumable = 0
    # On a busy machine the reference may have been slow, and every kill come too late.
    for done in range(10 * rounds):
        if killed and done >= rounds:
            break
        # Sometimes the run that resumes is killed too.
        while True:
            process = subprocess.Popen(job, stderr=subprocess.PIPE, text=True)
            # Most of a short job is importing torch; the interesting part is the end.
            time.sleep(chance.uniform(0.3, 1.0) * seconds)
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
            assert out.exists() or process.returncode != 0, said
            if out.exists():
                # What has its final name is complete, even if the end came right after the rename.
                subprocess.run(job, check=True)
                break
            assert process.returncode in {-number, 130}, said
            killed += 1
            found = read_journal(tmp_path / "out.partial" / JOURNAL_NAME)
            resumable += found is not None and bool(found.lines)
            if chance.random() < 0.5:
                subprocess.run(job, check=True)
                break
        assert bytes_of(out) == expected
        assert not verify_files(out).damages
        assert not out.with_name("out.partial").exists()
        shutil.rmtree(out)
    assert killed
    # Some at least were in the middle of their work.
    assert resumable or rounds < 10


@pytest.mark.skipif(os.name != "posix", reason="processes are killed as POSIX does")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_merge_ends_with_the_right_bytes(
    number: int, job: list[str], tmp_path: Path
) -> None:
    kill_and_resume(job, tmp_path, 3, number)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(os.name != "posix", reason="processes are killed as POSIX does")
def test_a_merge_killed_thirty_times_ends_with_the_right_bytes(
    job: list[str], tmp_path: Path
) -> None:
    kill_and_resume(job, tmp_path, 30, signal.SIGKILL)


def test_a_merge_killed_right_after_its_last_rename_is_complete(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        # Nothing is cleared away, as if the process had ended there.
        patch.setattr(outputdir, "clear_away", lambda *_, **__: None)
        streammerge.merge(plan, tmp_path / "out")

    assert (tmp_path / "out" / JOURNAL_NAME).exists()
    assert bytes_of(tmp_path / "out") == whole
    assert not verify_files(tmp_path / "out").damages
    streammerge.merge(plan, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / JOURNAL_NAME).exists()


def test_a_merge_that_was_given_up_puts_nothing_in_place(plan: MergePlan, tmp_path: Path) -> None:
    """Its machine lost the lock, another merge began in its directory, and it lives on."""
    partial = tmp_path / "out.partial"
    with pytest.MonkeyPatch.context() as patch:
        check_shards = merging.check_shards

        def begin_another(*arguments: Any) -> None:
            check_shards(*arguments)
            path = partial / JOURNAL_NAME
            path.unlink()
            other = Journal(path)
            other.begin({"recipe": "another", "epoch": "0123456789abcdef"})
            other.close()

        patch.setattr(merging, "check_shards", begin_another)
        with pytest.raises(OutputError, match="was given up, and another one has begun there"):
            streammerge.merge(plan, tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_a_sweep_saved_by_another_merge_is_not_used(
    swept: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a process that was given up still saves bears the name of its own time."""
    restored = []
    restore = ScopeStatistics.restore
    monkeypatch.setattr(
        ScopeStatistics,
        "restore",
        lambda self, path: restored.append(restore(self, path)) or restored[-1],
    )
    interrupt_after(swept, tmp_path / "out", 2)
    partial = tmp_path / "out.partial"
    (partial / JOURNAL_NAME).write_bytes(
        (partial / JOURNAL_NAME).read_bytes().splitlines(keepends=True)[0]
    )
    (partial / f"{SNAPSHOT_NAME}-{'0' * 16}").write_bytes(b"of another merge")

    streammerge.merge(swept, tmp_path / "out", resume=True)

    assert restored == [False, False]
    assert not list((tmp_path / "out").glob(".streammerge*"))


@pytest.mark.parametrize("tidied", [False, True])
def test_a_complete_merge_needs_no_more_than_to_be_found(
    tidied: bool,  # noqa: FBT001
    plan: MergePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For scripts that give ``--resume`` until a merge is done; whenever it was killed."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if not tidied:
            patch.setattr(outputdir, "clear_away", lambda *_, **__: None)
        expected = streammerge.merge(plan, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}

    manifest = streammerge.merge(plan, out, resume=True)

    assert manifest == expected
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert after.items() <= before.items()
    assert set(after) == {*expected.files, MANIFEST_NAME}
    assert not (tmp_path / "out.partial").exists()


def _edit_recipe(out: Path, plan: MergePlan) -> MergePlan:
    return replace(plan, recipe=f"{plan.recipe}# other\n")


def _touch_an_input(out: Path, plan: MergePlan) -> MergePlan:
    os.utime(plan.files[1].path, ns=(0, plan.files[1].mtime_ns + 1))
    return plan


def _write_a_companion(out: Path, plan: MergePlan) -> MergePlan:
    config = Path(plan.models[0].path) / "config.json"
    config.write_text("{}")
    # As old as can be: what counts is what it holds.
    os.utime(config, ns=(0, 0))
    planned = streammerge.plan(yaml.safe_load(plan.recipe), memory=MEMORY)
    assert isinstance(planned, MergePlan)
    return planned


def _shorten_a_shard(out: Path, plan: MergePlan) -> MergePlan:
    os.truncate(out / plan.layout.shards[0].name, 100)
    return plan


def _remove_a_file(out: Path, plan: MergePlan) -> MergePlan:
    (out / "README.md").unlink()
    return plan


def _spoil_the_manifest(out: Path, plan: MergePlan) -> MergePlan:
    text = (out / MANIFEST_NAME).read_text()
    (out / MANIFEST_NAME).write_text(text.replace('"method"', '"methud"', 1))
    return plan


def _list_no_file(out: Path, plan: MergePlan) -> MergePlan:
    document = json.loads((out / MANIFEST_NAME).read_text())
    (out / MANIFEST_NAME).write_text(json.dumps(document | {"files": {}}))
    return plan


def _list_a_file_of_no_name(out: Path, plan: MergePlan) -> MergePlan:
    document = json.loads((out / MANIFEST_NAME).read_text())
    document["files"]["\0"] = document["files"]["README.md"]
    (out / MANIFEST_NAME).write_text(json.dumps(document))
    return plan


CHANGES = [
    _edit_recipe,
    _touch_an_input,
    _write_a_companion,
    _shorten_a_shard,
    _remove_a_file,
    _spoil_the_manifest,
    _list_no_file,
    _list_a_file_of_no_name,
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_merge_in_the_same_place_is_not_taken_for_this_one(
    change: Callable[[Path, MergePlan], MergePlan], inputs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, sources = inputs
    plan = streammerge.plan(recipe_of("task_arithmetic", base, sources), memory=MEMORY)
    assert isinstance(plan, MergePlan)
    out = tmp_path / "out"
    streammerge.merge(plan, out)
    changed = change(out, plan)

    with pytest.raises(OutputExistsError, match="give --overwrite"):
        streammerge.merge(changed, out, resume=True)


def test_what_a_complete_merge_replaced_is_cleared_away(
    plan: MergePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after its last rename, and before the earlier merge was gone."""
    out, replaced = tmp_path / "out", tmp_path / "out.replaced"
    streammerge.merge(plan, out)
    with monkeypatch.context() as patch:
        patch.setattr(outputdir, "clear_away", lambda *_, **__: None)
        streammerge.merge(plan, out, overwrite=True)
    assert replaced.exists()

    streammerge.merge(plan, out, resume=True)

    assert not replaced.exists()
    assert not (out / JOURNAL_NAME).exists()


@pytest.mark.parametrize("place", ["", ".", "/", "..", "x" * 255])
def test_places_that_no_merge_can_be_in_are_refused_by_resume_as_well(
    place: str, inputs: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, sources = inputs
    plan = streammerge.plan(recipe_of("linear", base, sources), memory=MEMORY)
    (tmp_path / "here" / "inner").mkdir(parents=True)
    (tmp_path / "here" / "file").touch()
    monkeypatch.chdir(tmp_path / "here" / ("inner" if place == ".." else ""))

    with pytest.raises(OutputError):
        streammerge.merge(plan, place, resume=True)
    assert (tmp_path / "here" / "file").exists()


@pytest.mark.skipif(os.name != "posix", reason="links need no rights there")
def test_a_link_to_a_complete_merge_is_not_followed(plan: MergePlan, tmp_path: Path) -> None:
    streammerge.merge(plan, tmp_path / "out")
    (tmp_path / "link").symlink_to("out")

    with pytest.raises(OutputExistsError, match="is a link"):
        streammerge.merge(plan, tmp_path / "link", resume=True)


@pytest.mark.parametrize("options", [[], ["--json"], ["--quiet"]])
def test_the_command_line_says_that_a_merge_is_complete(
    options: list[str],
    recipe: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(recipe))
    command = ["merge", str(path), str(out), "--resume", *options]
    assert main(command) == 0
    capsys.readouterr()

    assert main(command) == 0

    said = capsys.readouterr()
    if "--json" in options:
        event = {"event": "complete", "out": str(out), "tensors": 33}
        assert json.loads(said.out) == event
    else:
        assert said.err == ("" if options else f"{out}: is complete already, with 33 tensors\n")


def test_progress_of_a_resumed_merge_counts_what_is_left(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    interrupt_after(plan, tmp_path / "out", 8)
    events: list[ProgressEvent] = []

    manifest = streammerge.merge(plan, tmp_path / "out", resume=True, on_progress=events.append)

    assert events[-1].bytes_done == sum(manifest.run.bytes_by_stage.values())
    assert whole


# -- what happens to an unfinished merge between its end and the resume


def begun_lines(plan: MergePlan, out: Path) -> list[bytes]:
    """Interrupt a merge and return its journal's lines without their checksums."""
    interrupt_after(plan, out, 8)
    lines = (out.with_name("out.partial") / JOURNAL_NAME).read_bytes().splitlines()
    return [line.partition(b" ")[2] for line in lines[1:]]


def rewrite(out: Path, identity: dict[str, Any], lines: list[bytes]) -> None:
    """Write a journal whose checksums all agree."""
    path = out.with_name("out.partial") / JOURNAL_NAME
    path.unlink()
    texts = [json.dumps(identity).encode(), *lines]
    path.write_bytes(b"".join(b"%b %b\n" % (journal._checksum(text), text) for text in texts))


@pytest.mark.parametrize("recipe", ["ties"], indirect=True)
def test_bytes_that_were_damaged_meanwhile_are_made_again(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    lines = begun_lines(plan, tmp_path / "out")
    piece = next(json.loads(each) for each in lines if b"PieceDone" in each)
    task = plan.tasks[piece["task"]]
    shard = tmp_path / "out.partial" / plan.layout.shards[task.shard].name
    with shard.open("r+b") as stream:
        stream.seek(task.offset + piece["start"] * task.dtype.itemsize)
        stream.write(b"\x00\x01")
    events: list[ProgressEvent] = []

    manifest = streammerge.merge(plan, tmp_path / "out", resume=True, on_progress=events.append)

    assert bytes_of(tmp_path / "out") == whole
    assert manifest.run.damaged == 1
    assert manifest.run.resumed
    assert events[0].activity == "check"


@pytest.mark.parametrize("recipe", ["ties"], indirect=True)
@pytest.mark.parametrize("change", ["longer", "shorter", "gone", "empty"])
def test_shards_of_another_length_are_made_whole(
    change: str, plan: MergePlan, whole: dict[str, bytes], tmp_path: Path
) -> None:
    begun_lines(plan, tmp_path / "out")
    shard = tmp_path / "out.partial" / plan.layout.shards[0].name
    if change == "gone":
        shard.unlink()
    else:
        size = {"longer": shard.stat().st_size + 999, "shorter": 100_000, "empty": 0}[change]
        os.truncate(shard, size)

    streammerge.merge(plan, tmp_path / "out", resume=True)

    assert bytes_of(tmp_path / "out") == whole


ODD_LINES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no object": lambda _: [1, 2],
    "a number": lambda _: 7,
    "deep": lambda _: None,
    "no kind": lambda piece: piece | {"entry": "Other"},
    "a kind of another type": lambda piece: piece | {"entry": ["PieceDone"]},
    "a field more": lambda piece: piece | {"rank": 8},
    "a field less": lambda piece: {k: v for k, v in piece.items() if k != "kept"},
    "a task that is text": lambda piece: piece | {"task": "0"},
    "a task that is true": lambda piece: piece | {"task": True},
    "a task beyond the plan": lambda piece: piece | {"task": 10_000},
    "a piece of no task": lambda piece: piece | {"task": -1},
    "a start inside a leaf": lambda piece: piece | {"start": 5},
    "a negative start": lambda piece: piece | {"start": -BLOCK},
    "a range beyond the tensor": lambda piece: piece | {"numel": 1 << 40},
    "a count that is no number": lambda piece: piece | {"numel": None},
    "short leaves": lambda piece: piece | {"leaves": piece["leaves"][:-64]},
    "leaves cut inside": lambda piece: piece | {"leaves": piece["leaves"][:-1]},
    "leaves that are not hex": lambda piece: piece | {"leaves": "x" * len(piece["leaves"])},
    "counts of too few sources": lambda piece: piece | {"tensor_kept": [1]},
    "thresholds that are text": lambda piece: piece | {"thresholds": ["a", "b"]},
}


@pytest.mark.parametrize("recipe", ["ties"], indirect=True)
@pytest.mark.parametrize("case", ODD_LINES)
def test_a_line_that_no_version_like_this_writes_is_refused_by_name(
    case: str, plan: MergePlan, tmp_path: Path
) -> None:
    lines = begun_lines(plan, tmp_path / "out")
    found = read_journal(tmp_path / "out.partial" / JOURNAL_NAME)
    assert found is not None
    piece = next(json.loads(each) for each in lines if b"PieceDone" in each)
    odd = b"[" * 100_000 if case == "deep" else json.dumps(ODD_LINES[case](piece)).encode()
    rewrite(tmp_path / "out", found.identity, [odd, *lines])

    with pytest.raises(ResumeError, match=r"journal.*--overwrite"):
        streammerge.merge(plan, tmp_path / "out", resume=True)

    assert (tmp_path / "out.partial").is_dir()
    streammerge.merge(plan, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("recipe", ["ties"], indirect=True)
def test_versions_are_compared_before_entries_are_read(plan: MergePlan, tmp_path: Path) -> None:
    begun_lines(plan, tmp_path / "out")
    found = read_journal(tmp_path / "out.partial" / JOURNAL_NAME)
    assert found is not None
    versions = found.identity["versions"] | {"streammerge": "99.0"}
    rewrite(tmp_path / "out", found.identity | {"versions": versions}, [b'{"entry": "Later"}'])

    with pytest.raises(ResumeError, match=r"versions streammerge was 99\.0"):
        streammerge.merge(plan, tmp_path / "out", resume=True)


def test_a_snapshot_with_a_flipped_bit_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / SNAPSHOT_NAME
    save_snapshot(path, {"a": 1}, {"counts": np.arange(100)})
    assert load_snapshot(path) is not None
    whole = path.read_bytes()

    for byte in range(0, len(whole), 5):
        flipped = bytearray(whole)
        flipped[byte] ^= 1
        path.write_bytes(flipped)
        assert load_snapshot(path) is None, byte


@pytest.mark.parametrize("recipe", ["ties"], indirect=True)
def test_an_interrupt_before_the_first_byte_keeps_the_leave_to_overwrite(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop of `--resume` after an interrupted `--overwrite` comes to its end."""
    (tmp_path / "whole").rename(tmp_path / "out")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for options in ({"overwrite": True}, {"resume": True}, {"resume": True}):
        with monkeypatch.context() as patch:
            patch.setattr("streammerge.merging.run_pipeline", interrupt)
            with pytest.raises(KeyboardInterrupt):
                streammerge.merge(plan, tmp_path / "out", **options)
        assert bytes_of(tmp_path / "out") == whole

    before = (tmp_path / "out" / MANIFEST_NAME).stat().st_ino
    manifest = streammerge.merge(plan, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / MANIFEST_NAME).stat().st_ino != before
    assert manifest.method == "ties"
    assert bytes_of(tmp_path / "out") == whole


@pytest.mark.parametrize("recipe", ["ties"], indirect=True)
def test_a_resume_whose_input_is_rewritten_says_that_nothing_is_kept(
    plan: MergePlan, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun_lines(plan, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(PreadSource, "was_rewritten", lambda _: bool(opened))
        opened: list[bool] = []
        patch.setattr("streammerge.merging.run_pipeline", _marking(opened))
        with pytest.raises(CheckpointError, match="changed while it was read") as caught:
            streammerge.merge(plan, tmp_path / "out", resume=True)

    assert not getattr(caught.value, "__notes__", ())
    assert not (tmp_path / "out.partial").exists()
    streammerge.merge(plan, tmp_path / "out", resume=True)
    assert bytes_of(tmp_path / "out") == whole


def _marking(opened: list[bool]) -> Callable[..., Any]:
    def run(*arguments: Any, **options: Any) -> Any:
        report = run_pipeline(*arguments, **options)
        opened.append(True)
        return report

    return run
