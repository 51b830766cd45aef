"""Results that go to a store are those of a disk, whatever happens on the way."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from models import Models, assert_same_model, load_model
from results import OUT, fetch, leftovers, names_in, with_shards
from stored_models import recipe_at

import streammerge
from streammerge.checkpoint import atwork, uploading
from streammerge.checkpoint.scratch import SCRATCH_VARIABLE
from streammerge.checkpoint.uploading import Uploads
from streammerge.cli.arguments import main
from streammerge.errors import CheckpointError, OutputError, OutputExistsError
from streammerge.storage import stores, targets
from streammerge.storage.retrying import PassingError
from streammerge.storage.s3 import S3Store
from streammerge.storage.s3target import S3Target
from streammerge.storing import working

boto3 = pytest.importorskip("boto3")
moto = pytest.importorskip("moto.server")


def test_what_is_there_is_what_would_be_on_a_disk(bucket: Any, large: Path, tmp_path: Path) -> None:
    recipe = with_shards(recipe_at(str(large)))
    streammerge.merge(recipe, tmp_path / "local")

    manifest = streammerge.merge(recipe, OUT)

    found = fetch(bucket, tmp_path / "fetched")
    assert_same_model(load_model(found), load_model(tmp_path / "local"))
    assert sorted(p.name for p in found.iterdir()) == sorted(
        p.name for p in (tmp_path / "local").iterdir()
    )
    assert not streammerge.verify_files(found).damages
    shards = [name for name in manifest.files if name.endswith(".safetensors")]
    assert len(shards) == 2
    for name in shards:
        assert (found / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert not leftovers(bucket)
    assert not list((tmp_path / "scratch").iterdir())


def test_what_was_sent_is_cut_out(
    bucket: Any, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    cut = uploading.cut_out

    def watch(descriptor: int, offset: int, nbytes: int) -> None:
        cut(descriptor, offset, nbytes)
        left.append(os.fstat(descriptor).st_blocks * 512)

    monkeypatch.setattr(uploading, "cut_out", watch)
    streammerge.merge(recipe_at(str(large)), OUT, memory="4GiB")

    # Of a file of 20 MiB the header stays.
    assert len(left) == 5
    assert min(left) < 2**20


def test_whoever_writes_waits_for_what_is_sent(
    bucket: Any, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "_AT_ONCE", 1)
    monkeypatch.setattr(uploading, "_WAITING", 1)
    waiting: list[int] = []
    taken: list[None] = []
    send, put = Uploads.send, S3Target.put_part

    def take(self: Uploads, *arguments: Any) -> Any:
        future = send(self, *arguments)
        taken.append(None)
        return future

    def watch(self: S3Target, name: str, upload: str, number: int, part: Any) -> str:
        # Long enough for all to come that do not wait.
        time.sleep(0.2)
        waiting.append(len(taken) - len(waiting))
        return put(self, name, upload, number, part)

    monkeypatch.setattr(Uploads, "send", take)
    monkeypatch.setattr(S3Target, "put_part", watch)
    streammerge.merge(recipe_at(str(large)), OUT, memory="4GiB")

    assert len(waiting) == 5
    assert max(waiting) <= 2


def test_objects_become_complete_side_by_side(
    bucket: Any, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = threading.Barrier(2)
    complete = S3Target.complete

    def wait(self: S3Target, *arguments: Any) -> bool:
        # Nobody comes through alone.
        both.wait(60)
        return complete(self, *arguments)

    monkeypatch.setattr(S3Target, "complete", wait)
    streammerge.merge(with_shards(recipe_at(str(large))), OUT)

    assert not streammerge.verify_files(OUT).damages


def test_answers_are_taken_in_small_steps(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of a library at once it holds, outside of any budget, for each reader."""
    from urllib3.response import HTTPResponse

    bucket.upload_file(str(next(large.rglob("a/*.safetensors"))), "results", "large.safetensors")
    most: list[int] = []
    take = HTTPResponse.readinto

    def watch(self: Any, buffer: memoryview) -> int:
        most.append(len(buffer))
        return take(self, buffer)

    monkeypatch.setattr(HTTPResponse, "readinto", watch)
    sources = [{"path": "s3://results/large.safetensors"}] * 2
    streammerge.merge({"method": "linear", "sources": sources}, tmp_path / "out")

    assert max(most) <= 2**18


def test_inputs_and_result_may_lie_in_the_same_bucket(
    bucket: Any, root: Path, tmp_path: Path
) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            bucket.upload_file(str(path), "results", path.relative_to(root).as_posix())
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")

    streammerge.merge(recipe_at("s3://results"), OUT)

    assert_same_model(
        load_model(fetch(bucket, tmp_path / "fetched")), load_model(tmp_path / "local")
    )


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_what_was_cut_off_goes_on_with_the_parts_that_are_there(
    cut: int, bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_shards(recipe_at(str(large)))
    streammerge.merge(recipe, tmp_path / "local")
    sent: list[tuple[str, int]] = []
    send, complete = S3Target.put_part, S3Target.complete

    def cut_part(self: S3Target, name: str, upload: str, number: int, part: Any) -> str:
        if len(sent) >= cut:
            raise CheckpointError("the power is gone")
        sent.append((name, number))
        return send(self, name, upload, number, part)

    def cut_complete(self: S3Target, name: str, upload: str, parts: Any) -> None:
        complete(self, name, upload, parts)
        if cut == 6:
            raise CheckpointError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(S3Target, "put_part", cut_part)
        patch.setattr(S3Target, "complete", cut_complete)
        with pytest.raises(CheckpointError, match="the power is gone"):
            streammerge.merge(recipe, OUT)
    assert "streammerge_manifest.json" not in names_in(bucket)
    before = set(sent)
    kept = list((tmp_path / "scratch").glob("*/*.partial"))
    assert kept or cut < 3
    if kept:
        with pytest.raises(OutputExistsError, match="holds an unfinished merge; give --resume"):
            streammerge.merge(recipe, OUT)
    else:
        # No piece was complete with the first parts: nothing is kept, and nothing is left.
        assert not leftovers(bucket)
        sent.clear()

    def watch(self: S3Target, name: str, upload: str, number: int, part: Any) -> str:
        sent.append((name, number))
        return send(self, name, upload, number, part)

    monkeypatch.setattr(S3Target, "put_part", watch)
    manifest = streammerge.merge(recipe, OUT, resume=True, memory="4GiB", workers=1)

    # Nothing is sent twice.
    assert len(sent) == len(set(sent))
    assert not kept or before <= set(sent)
    found = fetch(bucket, tmp_path / "fetched")
    assert not streammerge.verify_files(found).damages
    for name in manifest.files:
        if name.endswith(".safetensors"):
            assert (found / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert not leftovers(bucket)
    again = streammerge.merge(recipe, OUT, resume=True)
    assert again.run.identity == manifest.run.identity


def test_a_result_is_replaced_only_where_that_is_said(
    bucket: Any, root: Path, tmp_path: Path
) -> None:
    recipe = with_shards(recipe_at(str(root)))
    streammerge.merge(recipe, OUT)
    other = recipe_at(str(root)) | {"method": "linear", "base": None, "parameters": {}}
    del other["base"]

    with pytest.raises(OutputExistsError, match="already holds a result; give --overwrite"):
        streammerge.merge(other, OUT)
    streammerge.merge(other, OUT, overwrite=True)

    streammerge.merge(other, tmp_path / "local")
    found = fetch(bucket, tmp_path / "fetched")
    assert not streammerge.verify_files(found).damages
    assert_same_model(load_model(found), load_model(tmp_path / "local"))


def test_while_shards_are_replaced_there_is_no_complete_result(
    bucket: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streammerge.merge(recipe_at(str(root)), OUT)
    complete = S3Target.complete

    def look(self: S3Target, name: str, upload: str, parts: Any) -> None:
        assert "streammerge_manifest.json" not in names_in(bucket)
        complete(self, name, upload, parts)

    monkeypatch.setattr(S3Target, "complete", look)
    other = recipe_at(str(root)) | {"parameters": {"density": 0.9}}
    streammerge.merge(other, OUT, overwrite=True)
    assert "streammerge_manifest.json" in names_in(bucket)


def test_what_no_merge_lists_is_left_alone(bucket: Any, root: Path) -> None:
    bucket.upload_fileobj(io.BytesIO(b"precious"), "results", "folder/merged/mine.txt")

    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(
            OutputExistsError, match=r"1 object\(s\) that no merge lists \(mine.txt\)"
        ):
            streammerge.merge(recipe_at(str(root)), OUT, **options)
    assert names_in(bucket) == ["mine.txt"]


def test_a_file_is_closed_when_nobody_sends_of_it(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going_on = threading.Event()
    cut: list[str] = []
    send, cut_out = S3Target.put_part, uploading.cut_out

    def slow(self: S3Target, name: str, upload: str, number: int, part: Any) -> str:
        if number == 2:
            going_on.wait(10)
            raise CheckpointError("the power is gone")
        version = send(self, name, upload, number, part)
        going_on.set()
        time.sleep(0.3)
        return version

    def watch(descriptor: int, offset: int, nbytes: int) -> None:
        cut.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        cut_out(descriptor, offset, nbytes)

    monkeypatch.setattr(S3Target, "put_part", slow)
    monkeypatch.setattr(uploading, "cut_out", watch)
    with pytest.raises(CheckpointError, match="the power is gone"):
        streammerge.merge(recipe_at(str(large)), OUT)

    assert cut
    assert all(each.startswith(str(tmp_path / "scratch")) for each in cut)


def test_each_request_may_fail_in_turn(
    bucket: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_at(str(root))
    streammerge.merge(recipe, tmp_path / "local")
    expected = load_model(tmp_path / "local")
    whole = S3Store.attempt
    asked: list[int] = []
    failing: dict[int, Exception] = {}

    def attempt(self: S3Store, *arguments: Any, **options: Any) -> Any:
        asked.append(1)
        error = failing.pop(len(asked), None)
        if error is not None:
            raise error
        return whole(self, *arguments, **options)

    monkeypatch.setattr(S3Store, "attempt", attempt)
    streammerge.merge(recipe, OUT)
    requests = len(asked)
    assert requests > 10
    for number in range(1, requests + 1):
        for name in names_in(bucket):
            bucket.delete_object(Bucket="results", Key=f"folder/merged/{name}")
        # Once in passing: it goes on. Once for good: a resume goes on.
        asked.clear()
        failing[number] = PassingError("busy")
        streammerge.merge(recipe, OUT)
        for name in names_in(bucket):
            bucket.delete_object(Bucket="results", Key=f"folder/merged/{name}")
        asked.clear()
        failing[number] = CheckpointError("refused")
        with contextlib.suppress(CheckpointError):
            streammerge.merge(recipe, OUT)
            # Whatever fails in the end is what need not be done.
            assert number >= requests - 1
        failing.clear()
        streammerge.merge(recipe, OUT, resume=True)
        found = fetch(bucket, tmp_path / f"fetched{number}")
        assert not streammerge.verify_files(found).damages
        assert_same_model(load_model(found), expected)
        assert not leftovers(bucket)


def test_what_no_journal_tells_of_is_replaced_only_where_that_is_said(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = S3Target.complete

    def cut(self: S3Target, *arguments: Any) -> None:
        complete(self, *arguments)
        raise CheckpointError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(S3Target, "complete", cut)
        with pytest.raises(CheckpointError, match="the power is gone"):
            streammerge.merge(recipe_at(str(large)), OUT)
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path / "elsewhere"))
    for name in names_in(bucket):
        if name.startswith(".streammerge-journal/"):
            bucket.delete_object(Bucket="results", Key=f"folder/merged/{name}")

    for options in ({}, {"resume": True}):
        with pytest.raises(OutputExistsError, match="neither this machine nor the store has"):
            streammerge.merge(recipe_at(str(large)), OUT, **options)
    streammerge.merge(recipe_at(str(large)), OUT, overwrite=True)
    assert not streammerge.verify_files(fetch(bucket, tmp_path / "fetched")).damages


def test_two_merges_do_not_write_to_one_place(bucket: Any, root: Path) -> None:
    sign = {"host": "elsewhere", "process": 1, "sign": "a"}
    key = f"folder/merged/{atwork.LOCK_NAME}"
    bucket.put_object(Bucket="results", Key=key, Body=json.dumps(sign).encode())

    with pytest.raises(OutputExistsError, match="another merge is at work there"):
        streammerge.merge(recipe_at(str(root)), OUT)

    # One of this machine whose process is gone is over.
    gone = {"host": os.uname().nodename, "process": 2**22 + 12345, "sign": "a"}
    bucket.put_object(Bucket="results", Key=key, Body=json.dumps(gone).encode())
    streammerge.merge(recipe_at(str(root)), OUT)
    assert atwork.LOCK_NAME not in names_in(bucket)


def test_who_gave_no_sign_and_was_replaced_ends(
    bucket: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "_BEAT_SECONDS", 0.0)
    key = f"folder/merged/{atwork.LOCK_NAME}"
    begin = S3Target.begin

    def steal(self: S3Target, name: str, token: str) -> str:
        bucket.put_object(Bucket="results", Key=key, Body=b"{}")
        return begin(self, name, token)

    monkeypatch.setattr(S3Target, "begin", steal)
    with pytest.raises(OutputError, match="another merge has begun to write there"):
        streammerge.merge(recipe_at(str(root)), OUT)


def test_what_others_began_and_left_is_thrown_away(bucket: Any, root: Path) -> None:
    bucket.create_multipart_upload(Bucket="results", Key="folder/merged/model.safetensors")
    bucket.create_multipart_upload(Bucket="results", Key="folder/other/model.safetensors")

    streammerge.merge(recipe_at(str(root)), OUT)

    # Not of other places.
    assert leftovers(bucket) == ["folder/other/model.safetensors"]


def test_the_command_line_does_it(
    bucket: Any, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, a, b = (str(root / name) for name in ("base", "a", "b"))
    command = [
        "merge",
        "--method",
        "ties",
        "--base",
        base,
        a,
        f"{b}:0.5",
        "-p",
        "density=0.3",
        "-o",
        OUT,
    ]

    assert main(command) == 0
    said = capsys.readouterr()
    assert OUT in said.out + said.err
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")
    found = fetch(bucket, tmp_path / "fetched")
    assert_same_model(load_model(found), load_model(tmp_path / "local"))
    assert main([*command, "--resume"]) == 0
    assert main(command) == OutputExistsError.exit_code


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("s3://results", "is a bucket; name a folder"),
        ("s3://results/model.safetensors", "is one file; name a folder"),
        ("hf://org/model", "nothing is written to the hub"),
        ("https://host/model", "nothing is written to the hub or to web servers"),
    ],
)
def test_places_that_take_nothing_are_refused(out: str, said: str, bucket: Any, root: Path) -> None:
    with pytest.raises(OutputError, match=said):
        streammerge.merge(recipe_at(str(root)), out)


def test_what_works_on_a_disk_says_so(bucket: Any, root: Path, tmp_path: Path) -> None:
    base, a = str(root / "base"), str(root / "a")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: linear\nsources: [{{path: {base}}}, {{path: {a}}}]\n")
    several = tmp_path / "several.yaml"
    several.write_text(
        f"name: one\nmethod: linear\nsources: [{{path: {base}}}]\n---\n"
        "method: linear\nsources: [{path: one}]\n"
    )
    for command in (
        ["merge", str(several), OUT],
        ["merge", str(recipe), OUT, "--also", str(recipe), str(tmp_path / "other")],
        ["merge", str(recipe), str(tmp_path / "other"), "--also", str(recipe), OUT],
        ["extract", base, a, OUT, "--rank", "4"],
    ):
        assert main(command) != 0, command
    assert not names_in(bucket)


def test_tensors_made_in_parts_are_stored_too(bucket: Any, tmp_path: Path) -> None:
    models = Models(tmp_path)
    generator = torch.Generator().manual_seed(6)
    paths = []
    for name, columns in (("base", 9_000), ("one", 9_000), ("two", 7_000)):
        paths.append(models.write({"wide": torch.randn(200, columns, generator=generator)}, name))
    recipe = {
        "method": "ties",
        "base": str(paths[0]),
        "sources": [{"path": str(path)} for path in paths[1:]],
        "parameters": {"density": 0.3},
        "mismatch": "common",
    }
    streammerge.merge(recipe, tmp_path / "local")

    streammerge.merge(recipe, OUT)

    found = fetch(bucket, tmp_path / "fetched")
    assert not streammerge.verify_files(found).damages
    assert_same_model(load_model(found), load_model(tmp_path / "local"))


def test_a_part_is_cut_out_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 2**20)
    with path.open("r+b") as stream:
        uploading.cut_out(stream.fileno(), 2**18, 2**19)

    content = path.read_bytes()
    assert len(content) == 2**20
    assert content[: 2**18] == b"x" * 2**18
    assert content[2**18 : 2**18 + 2**19] in {bytes(2**19), b"x" * 2**19}


def test_parts_are_few_enough() -> None:
    assert targets.part_nbytes(1) == targets.SMALLEST_PART
    for nbytes in (10**9, 10**12, 5 * 10**12):
        size = targets.part_nbytes(nbytes)
        assert -(-nbytes // size) <= targets.MOST_PARTS
        assert size % 2**20 == 0


def test_stores_are_opened_anew_where_that_is_asked(bucket: Any) -> None:
    first = stores.open_store("s3://a/b")
    assert stores.open_store("s3://c/d") is first
    stores.close_stores()
    assert stores.open_store("s3://a/b") is not first
