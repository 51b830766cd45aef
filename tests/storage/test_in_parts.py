"""Results that several processes send to a store are those of a disk, whoever ends in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from clusters import (
    SLOW,
    DaskCluster,
    RayCluster,
    needs_dask,
    needs_ray,
    start_merge,
    units,
    wait_until,
)
from engines import BUDGET
from models import MEMORY
from results import OUT, fetch, leftovers, names_in, shards_of
from safetensors.torch import load_file, save_file
from stored_models import recipe_at

import streammerge
from streammerge import parting
from streammerge.checkpoint import atwork
from streammerge.checkpoint.atwork import sign_of_life
from streammerge.checkpoint.journal import JOURNAL_NAME
from streammerge.checkpoint.locking import FileLock
from streammerge.checkpoint.places import MARKER_NAME
from streammerge.checkpoint.scratch import SCRATCH_VARIABLE
from streammerge.cli.arguments import main
from streammerge.errors import BusyError, OutputError, OutputExistsError
from streammerge.executors import driving
from streammerge.parting import merge_part
from streammerge.plan.dividing import divide
from streammerge.plan.dividing import shards_of as files_of
from streammerge.plan.types import MergePlan
from streammerge.storage.s3target import S3Target
from streammerge.storage.stores import open_store
from streammerge.storing import working
from streammerge.storing.working import AtWork

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")


def in_shards(models: Path, size: str = "4MB", **parameters: Any) -> dict[str, Any]:
    return recipe_at(str(models)) | {
        "parameters": {"density": 0.3} | parameters,
        "output": {"max_shard_size": size},
    }


def merge_parts(recipe: Any, parts: int, **options: Any) -> list[Any]:
    return [
        merge_part(recipe, OUT, part=part, parts=parts, memory=MEMORY, **options)
        for part in range(1, parts + 1)
    ]


def check_result(bucket: Any, tmp_path: Path, recipe: dict[str, Any]) -> None:
    """What is there is what one process writes to a disk, and nothing else."""
    streammerge.merge(recipe, tmp_path / "alone", memory=MEMORY)
    found = fetch(bucket, tmp_path / "fetched")

    assert shards_of(found) == shards_of(tmp_path / "alone")
    assert sorted(p.name for p in found.iterdir()) == sorted(
        p.name for p in (tmp_path / "alone").iterdir()
    )
    assert not streammerge.verify_files(found).damages
    assert not leftovers(bucket)
    assert not list(scratch().iterdir())


def versions_in(bucket: Any) -> dict[str, str]:
    found = bucket.list_objects_v2(Bucket="results").get("Contents", ())
    return {each["Key"]: each["ETag"] for each in found}


def scratch() -> Path:
    return Path(os.environ[SCRATCH_VARIABLE])


def partial() -> Path:
    (found,) = scratch().glob("*/merged.partial")
    return found


# -- the same bytes


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_any_number_of_parts_has_the_bytes_of_a_disk(
    parts: int, bucket: Any, large: Path, tmp_path: Path
) -> None:
    recipe = in_shards(large)

    *others, last = merge_parts(recipe, parts)

    assert others == [None] * (parts - 1)
    assert last is not None
    assert len(last.run.parts) == parts
    assert not last.run.damaged
    assert sum(part.bytes_by_stage["write"] for part in last.run.parts) == 21_600_000
    check_result(bucket, tmp_path, recipe)


@pytest.mark.parametrize(
    "document",
    [
        {"parameters": {"density": 0.4, "scope": "model"}},
        {"output": {"max_shard_size": "4MB", "quantization": "as base"}},
        {"mismatch": "common"},
    ],
    ids=["over the model", "quantised", "tensors in parts"],
)
def test_what_needs_more_than_its_own_bytes_has_them_too(
    document: dict[str, Any], bucket: Any, large: Path, tmp_path: Path
) -> None:
    if "mismatch" in document:
        change(large / "a", narrow)
    if "output" in document:
        change(large / "base", encode)
    recipe = in_shards(large) | document

    assert merge_parts(recipe, 3)[-1] is not None

    check_result(bucket, tmp_path, recipe)


def change(model: Path, how: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Make a model of one file of another one."""
    tensors = {}
    for path in [*model.glob("*.safetensors"), *model.glob("*.index.json")]:
        tensors |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    save_file(how(tensors), model / "model.safetensors")


def narrow(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take columns of one tensor away, so that what its source gives is of some columns only."""
    return {n: t[:, :700].contiguous() if n == "layers.2.w" else t for n, t in tensors.items()}


def encode(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Store tensors as float8 codes with scales for their blocks."""
    codes = {n: t.mul(20).to(torch.float8_e4m3fn) for n, t in tensors.items()}
    return codes | {f"{n}_scale_inv": torch.full((8, 8), 0.05) for n in tensors}


def test_no_two_parts_write_to_one_file(large: Path) -> None:
    planned = streammerge.plan(in_shards(large), memory=MEMORY)
    assert isinstance(planned, MergePlan)

    for parts in range(1, 9):
        divided = divide(planned, parts, whole_shards=True)
        written = [files_of(planned, own) for own in divided]
        assert len(divided) == parts
        assert sorted(index for own in divided for index in own) == list(range(len(planned.tasks)))
        assert sum(map(len, written)) == len(planned.layout.shards)


# -- going on


def stop_after(monkeypatch: pytest.MonkeyPatch, requests: int, name: str = "put_part") -> None:
    """Let the store refuse everything of a kind after so many."""
    done = getattr(S3Target, name)
    counted = iter(range(requests))

    def refuse(self: S3Target, *arguments: Any) -> Any:
        if next(counted, None) is None:
            raise OutputError("the store is full")
        return done(self, *arguments)

    monkeypatch.setattr(S3Target, name, refuse)


@pytest.mark.parametrize("name", ["put_part", "complete"])
def test_a_part_that_was_cut_off_goes_on_with_what_the_store_has(
    name: str, bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = in_shards(large, "12MB")
    with monkeypatch.context() as patch:
        stop_after(patch, 2 if name == "put_part" else 0, name)
        with pytest.raises(OutputError, match="full") as ended:
            merge_part(recipe, OUT, part=1, parts=2, memory=MEMORY)
    assert "the same command goes on with part 1/2" in "".join(ended.value.__notes__)
    sent: list[str] = []
    put = S3Target.put_part

    def count(self: S3Target, shard: str, *arguments: Any) -> str:
        sent.append(shard)
        return put(self, shard, *arguments)

    monkeypatch.setattr(S3Target, "put_part", count)
    manifest = merge_parts(recipe, 2)[-1]

    assert manifest is not None
    assert manifest.run.parts[0].attempts == 2
    # Of the first shard, of 3 parts, two are there already; or all of them.
    first = min(name for name in sent + list(manifest.files) if name.endswith(".safetensors"))
    assert sent.count(first) == (1 if name == "put_part" else 0)
    check_result(bucket, tmp_path, recipe)


def test_a_part_that_is_done_is_done_by_nothing(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = in_shards(large)
    assert merge_part(recipe, OUT, part=2, parts=2, memory=MEMORY) is None
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        assert merge_part(recipe, OUT, part=2, parts=2, memory=MEMORY) is None
    first = merge_part(recipe, OUT, part=1, parts=2, memory=MEMORY)
    assert first is not None

    assert merge_part(recipe, OUT, part=1, parts=2, memory=MEMORY) == first

    check_result(bucket, tmp_path, recipe)


def test_one_process_finishes_what_parts_began(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = in_shards(large, "12MB")
    merge_part(recipe, OUT, part=2, parts=2, memory=MEMORY)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(OutputError, match="full"):
            merge_part(recipe, OUT, part=1, parts=2, memory=MEMORY)

    manifest = streammerge.merge(recipe, OUT, memory=MEMORY, resume=True)

    assert manifest.run.bytes_by_stage["write"] < 21_600_000
    check_result(bucket, tmp_path, recipe)


def test_killed_at_any_instant_parts_go_on(bucket: Any, large: Path, tmp_path: Path) -> None:
    recipe, path = in_shards(large), tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    chance = random.Random(3)  # noqa: S311 - it only chooses when to kill
    command = [sys.executable, "-m", "streammerge", "merge", str(path), OUT, "--memory", "1GiB"]
    seconds, kills = 0.3, 0
    for part in (1, 2):
        while True:
            process = subprocess.Popen(
                [*command, "--quiet", "--part", f"{part}/2"], stderr=subprocess.PIPE, text=True
            )
            try:
                _, said = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
                _, said = process.communicate()
                kills += 1
            if process.returncode == 0:
                break
            assert process.returncode in {-signal.SIGKILL, -signal.SIGTERM, 130}, said
            seconds += chance.uniform(0.2, 0.5)
        seconds = 0.8

    assert kills
    check_result(bucket, tmp_path, recipe)


# -- what is there already


def test_another_merge_is_kept_out_while_a_part_is_at_work(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = in_shards(large)
    put = S3Target.put_part
    refused: list[str] = []

    def intrude(self: S3Target, *arguments: Any) -> str:
        if not refused:
            refused.append("")
            with pytest.MonkeyPatch.context() as patch:
                # Another machine, which does not see what the parts share.
                patch.setenv(SCRATCH_VARIABLE, str(tmp_path / "elsewhere"))
                with pytest.raises(OutputExistsError, match="another merge is at work") as error:
                    streammerge.merge(recipe, OUT, memory=MEMORY, overwrite=True)
                refused[0] = str(error.value)
                with pytest.raises(OutputExistsError, match="another merge is at work"):
                    merge_part(recipe, OUT, part=2, parts=2, memory=MEMORY)
        return put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(S3Target, "put_part", intrude)
        merge_part(recipe, OUT, part=1, parts=2, memory=MEMORY)
    assert refused[0]
    assert atwork.LOCK_NAME not in names_in(bucket)

    assert merge_part(recipe, OUT, part=2, parts=2, memory=MEMORY) is not None
    assert not list((tmp_path / "elsewhere").glob("*/*"))
    check_result(bucket, tmp_path, recipe)


def test_parts_give_one_sign_together(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that another part has renewed, or taken away as it left, is no other merge's."""
    monkeypatch.setattr(working, "_BEAT_SECONDS", 0.0)
    target = S3Target(open_store(OUT), OUT)

    with (
        AtWork(target, OUT, "epoch", shared=True, leaves=lambda: False) as one,
        AtWork(target, OUT, "epoch", shared=True) as other,
    ):
        for each in (one, other, one, one):
            each.beat()
        with (
            pytest.raises(OutputExistsError, match="another merge is at work"),
            AtWork(target, OUT, "another epoch", shared=True),
        ):
            pass
        target.delete(atwork.LOCK_NAME)
        for each in (one, other):
            each.beat()
        found = target.get(atwork.LOCK_NAME)
        assert found is not None
        said = sign_of_life("of another machine")
        target.put(atwork.LOCK_NAME, said, instead_of=found.version)
        for each in (one, other):
            with pytest.raises(OutputError, match="another merge has begun to write there"):
                each.beat()
        target.delete(atwork.LOCK_NAME)
        one.beat()
    assert target.get(atwork.LOCK_NAME) is None


def test_who_cannot_put_the_result_in_place_takes_no_sign_away(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of parts that end together one sends the rest; the others find it at work."""
    recipe = in_shards(large)
    merge_part(recipe, OUT, part=1, parts=2, memory=MEMORY)
    publish = parting.publish_parts

    def at_the_same_time(*arguments: Any) -> Any:
        lock = FileLock(partial() / MARKER_NAME)
        assert lock.acquire()
        try:
            with pytest.raises(BusyError):
                publish(*arguments)
            assert atwork.LOCK_NAME in names_in(bucket)
        finally:
            lock.close()
        return publish(*arguments)

    monkeypatch.setattr(parting, "publish_parts", at_the_same_time)
    assert merge_part(recipe, OUT, part=2, parts=2, memory=MEMORY) is not None

    check_result(bucket, tmp_path, recipe)


def test_an_earlier_result_is_replaced_on_request_alone(
    bucket: Any, large: Path, tmp_path: Path
) -> None:
    streammerge.merge(recipe_at(str(large)), OUT, memory=MEMORY)
    before = versions_in(bucket)
    recipe = in_shards(large, density=0.7)

    with pytest.raises(OutputExistsError, match="already holds a result"):
        merge_part(recipe, OUT, part=1, parts=2, memory=MEMORY)
    assert versions_in(bucket) == before
    assert merge_parts(recipe, 2, overwrite=True)[-1] is not None

    check_result(bucket, tmp_path, recipe)


def test_what_nobody_knows_is_left_alone(bucket: Any, large: Path) -> None:
    bucket.put_object(Bucket="results", Key="folder/merged/notes.txt", Body=b"mine")

    with pytest.raises(OutputExistsError, match=r"no merge lists \(notes.txt\)"):
        merge_part(recipe_at(str(large)), OUT, part=1, parts=2, memory=MEMORY)

    assert names_in(bucket) == ["notes.txt"]
    assert not list(scratch().glob("*/*"))


def test_a_store_that_marks_nothing_is_refused_before_anything_is_sent(
    bucket: Any, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = S3Target.put

    def forget(self: S3Target, name: str, content: bytes, **options: Any) -> str | None:
        return put(self, name, content, **options | {"token": ""})

    monkeypatch.setattr(S3Target, "put", forget)

    with pytest.raises(OutputError, match="keeps no metadata"):
        merge_part(in_shards(large), OUT, part=1, parts=2, memory=MEMORY)

    assert not names_in(bucket)
    assert not leftovers(bucket)


def test_what_one_process_began_is_not_gone_on_with_in_parts(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = in_shards(large)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(OutputError, match="full"):
            streammerge.merge(recipe, OUT, memory=MEMORY)

    with pytest.raises(OutputExistsError, match="unfinished merge by one process"):
        merge_part(recipe, OUT, part=1, parts=2, memory=MEMORY, resume=True)

    streammerge.merge(recipe, OUT, memory=MEMORY, resume=True)
    check_result(bucket, tmp_path, recipe)


def test_a_merge_that_was_given_up_touches_nothing_of_the_next(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process lives on, and has sent everything, when another recipe begins in its place."""
    first, second = (in_shards(large, density=each) for each in (0.3, 0.6))
    put = S3Target.put_part

    def replace_it(self: S3Target, *arguments: Any) -> str:
        journal = partial() / JOURNAL_NAME
        # As on a machine that has lost its locks.
        journal.write_bytes(journal.read_bytes().replace(b"epoch", b"wrong"))
        return put(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(S3Target, "put_part", replace_it)
        with pytest.raises(OutputError, match="given up"):
            merge_part(first, OUT, part=1, parts=2, memory=MEMORY)
    assert not names_in(bucket)

    assert merge_parts(second, 2, overwrite=True)[-1] is not None
    check_result(bucket, tmp_path, second)


# -- commands


def test_the_state_of_parts_is_told(
    bucket: Any, large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(in_shards(large)))
    assert main(["merge", str(recipe), OUT, "--part", "2/2", "--quiet"]) == 0
    capsys.readouterr()

    assert main(["status", OUT]) == 0
    told = capsys.readouterr().out
    assert main(["status", OUT, "--json"]) == 0
    status = json.loads(capsys.readouterr().out)

    assert told.startswith(f"{OUT}: 1 of 2 parts are done\n")
    assert [part["state"] for part in status["parts"]] == ["not begun", "done"]
    assert not status["complete"]
    assert main(["merge", str(recipe), OUT, "--part", "1/2", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["status", OUT]) == 0
    assert capsys.readouterr().out == f"{OUT}: is complete\n"


@needs_dask
def test_workers_of_an_engine_send_the_same_bytes(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "_LEAST_WORK", 2**20)
    recipe = in_shards(large, scope="model")
    with DaskCluster(tmp_path) as cluster:
        for _ in range(2):
            cluster.start_worker()
        manifest = driving.merge_on(recipe, OUT, on=cluster.on, memory=MEMORY)

    assert 4 <= len(manifest.run.parts) <= 6
    check_result(bucket, tmp_path, recipe)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nodes_of_a_cluster_send_the_same_bytes(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driving, "_LEAST_WORK", 2**20)
    recipe = in_shards(large)
    with RayCluster() as cluster:
        for _ in range(2):
            cluster.start_node()
        manifest = driving.merge_on(recipe, OUT, on=cluster.on, memory=MEMORY)

    assert len(manifest.run.parts) >= 4
    check_result(bucket, tmp_path, recipe)


@needs_dask
@pytest.mark.parametrize("whose", ["a part", "the driver"])
def test_what_is_killed_on_an_engine_goes_on(
    whose: str, bucket: Any, large: Path, tmp_path: Path
) -> None:
    recipe = in_shards(large)
    options = {"to": OUT}
    with DaskCluster(tmp_path) as cluster:
        for _ in range(2):
            cluster.start_worker(SLOW)
        on = ("--on", cluster.on, "--memory", BUDGET)
        driver = start_merge(recipe, tmp_path / "recipe", *on, **options)
        wait_until(lambda: leftovers(bucket) or names_in(bucket)[1:])
        for each in units()[:1] if whose == "a part" else [driver]:
            each.kill()
        _, said = driver.communicate(timeout=120)
        if whose == "the driver":
            assert driver.returncode == -signal.SIGKILL
            driver = start_merge(recipe, tmp_path / "recipe", *on, "--resume", **options)
            _, said = driver.communicate(timeout=120)
        assert driver.returncode == 0, said

    check_result(bucket, tmp_path, recipe)
