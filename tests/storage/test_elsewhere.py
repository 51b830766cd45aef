"""An unfinished result in a store goes on on a machine that has nothing but the recipe."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import Models, recipe_of, recut
from results import OUT, fetch, leftovers, names_in, shards_of, with_shards
from stored_models import recipe_at
from test_kill_loops import adapted_models, coded_models, wider_models

import streammerge
from streammerge.checkpoint import atwork, bytesource, storedjournal, uploading
from streammerge.checkpoint.journal import PieceDone
from streammerge.checkpoint.scratch import SCRATCH_VARIABLE
from streammerge.errors import CheckpointError, OutputExistsError, ResumeError
from streammerge.storage.s3target import S3Target

pytest.importorskip("boto3")
pytest.importorskip("moto.server")

FOLDER = ".streammerge-journal/"

ELSEWHERE = """
import os, sys, time
from streammerge.checkpoint import atwork, bytesource, storedjournal
from streammerge.checkpoint import uploading
from streammerge.storage.s3target import S3Target
from streammerge.__main__ import run

storedjournal._LEAST_PAUSE_SECONDS = 0.05
uploading.part_nbytes = lambda _: 2**17
log = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def read(self, offset, buffer, read=bytesource.PreadSource._read_some):
    count = read(self, offset, buffer)
    os.write(log, f"read {count}\\n".encode())
    time.sleep(0.02)
    return count

def put_part(self, name, upload, number, part, put=S3Target.put_part):
    version = put(self, name, upload, number, part)
    os.write(log, f"sent {part.nbytes}\\n".encode())
    return version

bytesource.PreadSource._read_some = read
S3Target.put_part = put_part
sys.argv[0] = "streammerge"
run()
"""


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the journal in the store up with every report."""
    monkeypatch.setattr(storedjournal, "_LEAST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(storedjournal, "_SHARE", 0.0)


class Counted:
    """Bytes that were read of inputs, and sent in parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, sends: float = float("inf")) -> None:
        self.read = 0
        self.sent: list[tuple[str, int]] = []
        look, put = bytesource.PreadSource._read_some, S3Target.put_part

        def read(source: Any, offset: int, buffer: memoryview) -> int:
            count = look(source, offset, buffer)
            self.read += count
            return count

        lock = threading.Lock()

        def send(target: S3Target, name: str, upload: str, number: int, part: Any) -> str:
            with lock:
                if len(self.sent) >= sends:
                    raise CheckpointError("the power is gone")
                self.sent.append((name, number))
            return put(target, name, upload, number, part)

        monkeypatch.setattr(bytesource.PreadSource, "_read_some", read)
        monkeypatch.setattr(S3Target, "put_part", send)


def cut_off(recipe: dict[str, Any], sends: int, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Merge to the store until so many parts were sent."""
    with monkeypatch.context() as patch:
        counted = Counted(patch, sends=sends)
        with pytest.raises(CheckpointError, match="the power is gone"):
            streammerge.merge(recipe, OUT, workers=1)
    return counted


def move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go to another machine, which has another name and an empty directory."""
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path / f"machine-{time.monotonic_ns()}"))
    monkeypatch.setattr(atwork.platform, "node", lambda: "another")


def journal_in(client: Any) -> list[str]:
    return [name for name in names_in(client) if name.startswith(FOLDER)]


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_another_machine_makes_what_is_missing_and_nothing_else(
    scope: str, bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_shards(recipe_at(str(large)))
    recipe["parameters"] = {"density": 0.3, "scope": scope}
    streammerge.merge(recipe, tmp_path / "local")
    before = cut_off(recipe, 4, monkeypatch)
    assert journal_in(bucket)

    move(tmp_path, monkeypatch)
    with pytest.raises(OutputExistsError, match="holds an unfinished merge; give --resume"):
        streammerge.merge(recipe, OUT)
    counted = Counted(monkeypatch)
    manifest = streammerge.merge(recipe, OUT, resume=True, workers=1)

    assert not set(counted.sent) & set(before.sent)
    whole = sum(path.stat().st_size for path in large.rglob("*.safetensors"))
    assert counted.read < whole if scope == "tensor" else counted.read < 2 * whole
    assert manifest.run.damaged == 0
    found = fetch(bucket, tmp_path / "fetched")
    assert not streammerge.verify_files(found).damages
    assert shards_of(found) == shards_of(tmp_path / "local")
    assert sorted(p.name for p in found.iterdir()) == sorted(
        p.name for p in (tmp_path / "local").iterdir()
    )
    assert not leftovers(bucket)


def adapted(directory: Path) -> dict[str, Any]:
    base, sources = adapted_models(directory)
    return recipe_of("task_arithmetic", base, sources)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("made", [wider_models, coded_models, adapted])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_every_kind_of_tensor_goes_on_elsewhere(
    made: Any, share: float, bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors in parts, codes with scales, and what adapters change; some are made again whole."""
    have_shorter_parts(monkeypatch)
    monkeypatch.setattr(uploading, "part_nbytes", lambda _: 2**17)
    recipe = made(tmp_path)
    streammerge.merge(recipe, tmp_path / "local")
    parts = sum(-(-len(each) // 2**17) for each in shards_of(tmp_path / "local").values())
    cut_off(recipe, max(1, int(parts * share)), monkeypatch)

    move(tmp_path, monkeypatch)
    counted = Counted(monkeypatch)
    manifest = streammerge.merge(recipe, OUT, resume=True)

    assert 0 < len(counted.sent) < parts or not journal_in(bucket)
    assert manifest.run.damaged == 0
    found = fetch(bucket, tmp_path / "fetched")
    assert not streammerge.verify_files(found).damages
    assert shards_of(found) == shards_of(tmp_path / "local")
    assert not leftovers(bucket)
    assert not journal_in(bucket)


@pytest.mark.usefixtures("eager")
def test_what_two_machines_did_adds_up(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_shards(recipe_at(str(large)))
    streammerge.merge(recipe, tmp_path / "local")
    first = SCRATCH_VARIABLE, str(tmp_path / "scratch")
    sent = cut_off(recipe, 3, monkeypatch).sent
    with monkeypatch.context() as patch:
        move(tmp_path, patch)
        counted = Counted(patch, sends=2)
        with pytest.raises(CheckpointError, match="the power is gone"):
            streammerge.merge(recipe, OUT, resume=True, workers=1)
        sent += counted.sent
    monkeypatch.setenv(*first)

    # What lies here is older than what lies there.
    counted = Counted(monkeypatch)
    streammerge.merge(recipe, OUT, resume=True, workers=1)

    assert len(sent) == 5
    assert not set(counted.sent) & set(sent)
    assert shards_of(fetch(bucket, tmp_path / "fetched")) == shards_of(tmp_path / "local")
    assert not journal_in(bucket)


@pytest.mark.usefixtures("eager")
def test_a_sweep_over_the_model_goes_on_elsewhere(
    bucket: Any, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammerge.engine import scheduling

    monkeypatch.setattr(scheduling, "SNAPSHOT_SECONDS", 0.0)
    generator = torch.Generator().manual_seed(3)
    for name in ("base", "a", "b"):
        tensors = {f"{i}.w": torch.randn((900, 1000), generator=generator) for i in range(8)}
        models.write(tensors, name)
    recipe = recipe_at(str(models.root))
    recipe["parameters"] = {"density": 0.3, "scope": "model"}
    planned = recut(streammerge.plan(recipe, memory="3GiB"), slots=4, workers=1)
    streammerge.merge(planned, tmp_path / "local")
    saved: list[int] = []
    put_file = S3Target.put_file

    def cut(self: S3Target, name: str, path: Path, token: str) -> None:
        put_file(self, name, path, token)
        saved.append(path.stat().st_size)
        if len(saved) == 3:
            raise CheckpointError("the power is gone")

    look = bytesource.PreadSource._read_some

    def slowly(self: Any, offset: int, buffer: memoryview) -> int:
        time.sleep(0.05)
        return look(self, offset, buffer)

    with monkeypatch.context() as patch:
        patch.setattr(S3Target, "put_file", cut)
        patch.setattr(bytesource.PreadSource, "_read_some", slowly)
        with pytest.raises(CheckpointError, match="the power is gone"):
            streammerge.merge(planned, OUT)
    assert f"{FOLDER}statistics" in names_in(bucket)

    with monkeypatch.context() as patch:
        fresh = Counted(patch)
        streammerge.merge(planned, tmp_path / "again")
    move(tmp_path, monkeypatch)
    counted = Counted(monkeypatch)
    streammerge.merge(planned, OUT, resume=True)

    assert counted.read < fresh.read
    assert shards_of(fetch(bucket, tmp_path / "fetched")) == shards_of(tmp_path / "local")
    assert not journal_in(bucket)


def damage(client: Any, name: str) -> None:
    key = f"folder/merged/{name}"
    found = client.get_object(Bucket="results", Key=key)
    content = bytearray(found["Body"].read())
    content[len(content) // 2] ^= 1
    client.put_object(Bucket="results", Key=key, Body=bytes(content), Metadata=found["Metadata"])


def of_another_merge(client: Any, name: str) -> None:
    key = f"folder/merged/{name}"
    content = client.get_object(Bucket="results", Key=key)["Body"].read()
    client.put_object(
        Bucket="results", Key=key, Body=content, Metadata={"streammerge-attempt": "0" * 16}
    )


def drop(client: Any, name: str) -> None:
    client.delete_object(Bucket="results", Key=f"folder/merged/{name}")


def claim_more(client: Any, name: str) -> None:
    """Say of a tensor that there is not that it is done."""
    metadata = client.head_object(Bucket="results", Key=f"folder/merged/{name}")["Metadata"]
    piece = PieceDone(10**6, 0, 7, "00" * 32, (), 0, (), (), ())
    document = {"entry": "PieceDone", **dataclasses.asdict(piece)}
    text = json.dumps(document, separators=(",", ":")).encode()
    line = hashlib.blake2b(text, digest_size=8).hexdigest().encode() + b" " + text + b"\n"
    key = f"folder/merged/{FOLDER}999999-{'0' * 16}"
    client.put_object(Bucket="results", Key=key, Body=line, Metadata=metadata)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "spoiled",
    [
        ("0", claim_more),
        *((what, spoil) for what in "u0" for spoil in (damage, of_another_merge, drop)),
    ],
)
def test_what_the_journal_does_not_tell_is_made_again(
    spoiled: Any, bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, spoil = spoiled
    recipe = with_shards(recipe_at(str(large)))
    streammerge.merge(recipe, tmp_path / "local")
    cut_off(recipe, 4, monkeypatch)
    for name in journal_in(bucket):
        if name.startswith(FOLDER + what):
            spoil(bucket, name)

    move(tmp_path, monkeypatch)
    streammerge.merge(recipe, OUT, resume=True)

    found = fetch(bucket, tmp_path / "fetched")
    assert not streammerge.verify_files(found).damages
    assert shards_of(found) == shards_of(tmp_path / "local")
    assert not leftovers(bucket)
    assert not journal_in(bucket)


def test_a_damaged_head_is_refused_by_name(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_shards(recipe_at(str(large)))
    cut_off(recipe, 4, monkeypatch)
    damage(bucket, f"{FOLDER}head")
    move(tmp_path, monkeypatch)

    with pytest.raises(ResumeError, match=r"s3://results/folder/merged/\S+/head: is damaged"):
        streammerge.merge(recipe, OUT, resume=True)
    streammerge.merge(recipe, OUT, overwrite=True)

    streammerge.merge(recipe, tmp_path / "local")
    assert shards_of(fetch(bucket, tmp_path / "fetched")) == shards_of(tmp_path / "local")
    assert not journal_in(bucket)


def test_another_merge_is_refused_by_name(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_shards(recipe_at(str(large)))
    cut_off(recipe, 4, monkeypatch)
    before = names_in(bucket)
    move(tmp_path, monkeypatch)

    with pytest.raises(
        ResumeError,
        match="s3://results/folder/merged: the unfinished merge is another one: seed was 0, is 7",
    ):
        streammerge.merge(recipe | {"seed": 7}, OUT, resume=True)
    assert names_in(bucket) == before


def test_what_was_given_up_here_is_not_gone_on_with(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_shards(recipe_at(str(large)))
    streammerge.merge(recipe, tmp_path / "local")
    cut_off(recipe, 4, monkeypatch)
    with monkeypatch.context() as patch:
        move(tmp_path, patch)
        counted = Counted(patch, sends=3)
        with pytest.raises(CheckpointError, match="the power is gone"):
            streammerge.merge(recipe, OUT, overwrite=True, workers=1)

    # Here lies the journal of a merge whose uploads are gone.
    later = Counted(monkeypatch)
    streammerge.merge(recipe, OUT, resume=True, workers=1)

    assert not set(later.sent) & set(counted.sent)
    assert shards_of(fetch(bucket, tmp_path / "fetched")) == shards_of(tmp_path / "local")


@pytest.mark.usefixtures("eager")
def test_what_was_killed_behind_its_last_step_leaves_nothing(
    bucket: Any, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_shards(recipe_at(str(large)))
    put = S3Target.put

    def cut(self: S3Target, name: str, *arguments: Any, **options: Any) -> str | None:
        version = put(self, name, *arguments, **options)
        if name == "streammerge_manifest.json":
            raise CheckpointError("the power is gone")
        return version

    with monkeypatch.context() as patch:
        patch.setattr(S3Target, "put", cut)
        with pytest.raises(CheckpointError, match="the power is gone"):
            streammerge.merge(recipe, OUT, workers=1)
    assert journal_in(bucket)
    move(tmp_path, monkeypatch)

    streammerge.merge(recipe, OUT, resume=True)

    assert not journal_in(bucket)
    assert not streammerge.verify_files(fetch(bucket, tmp_path / "fetched")).damages


def test_a_short_merge_makes_seven_requests_for_it(
    bucket: Any, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def watch(what: str) -> Any:
        ask = getattr(S3Target, what)

        def watched(self: S3Target, *names: Any, **options: Any) -> Any:
            if not names or names[0].startswith(FOLDER):
                asked.append(what)
            return ask(self, *names, **options)

        return watched

    for what in ("put", "put_file", "get", "delete", "list"):
        monkeypatch.setattr(S3Target, what, watch(what))
    monkeypatch.setattr(storedjournal, "_LEAST_PAUSE_SECONDS", 60.0)
    streammerge.merge(recipe_at(str(root)), OUT)

    # One list is there without a journal, too.
    assert Counter(asked) == {"put": 2, "put_file": 1, "list": 2, "delete": 3}


def test_rounds_are_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The pause grows with the time so far, so a day has some 390 rounds and not 43,000."""
    now = [0.0]
    monkeypatch.setattr(storedjournal.time, "monotonic", lambda: now[0])
    rounds: list[float] = []
    monkeypatch.setattr(storedjournal.StoredJournal, "save", lambda _: rounds.append(now[0]))
    journal = storedjournal.StoredJournal(None, tmp_path, "")  # type: ignore[arg-type] - never asked
    while now[0] < 86_400:
        now[0] += 1.0
        journal.keep_up()

    counts = Counter(each < 3_600 for each in rounds)
    assert 200 < counts[True] <= 230
    assert len(rounds) <= 390


def draw_for_kills(seed: int, models: Models, scope: str) -> dict[str, Any]:
    """Return a recipe of models of some MiB, with large tensors and small ones."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("base", "a", "b"):
        tensors = {f"{i}.w": torch.randn(700, 1_000, generator=generator) for i in range(6)}
        tensors |= {f"{i}.b": torch.randn(90, generator=generator) for i in range(30)}
        models.write({key: value.bfloat16() for key, value in tensors.items()}, name)
    recipe = recipe_at(str(models.root)) | {"output": {"max_shard_size": "3MB"}}
    return recipe | {"parameters": {"density": 0.3, "scope": scope}}


class Machine:
    """A process that merges, with an empty directory of its own; counts what it reads and sends."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
        directory = root / f"machine-{time.monotonic_ns()}"
        monkeypatch.setenv(SCRATCH_VARIABLE, str(directory))
        self._log = directory.with_suffix(".log")
        command = ["merge", "--quiet", "--workers", "1", str(root / "recipe.yaml"), OUT, *options]
        self._process = subprocess.Popen(
            [sys.executable, "-c", ELSEWHERE, str(self._log), *command], stderr=subprocess.PIPE
        )
        while self._process.poll() is None and not (
            self._log.exists() and self._log.stat().st_size
        ):
            time.sleep(0.01)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> bool:
        """Return whether it came to its end; False if it was killed."""
        said = self._process.communicate()[1]
        assert self._process.returncode in {0, -signal.SIGKILL}, said
        return self._process.returncode == 0

    @property
    def counts(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in self._log.read_text().splitlines():
            what, nbytes = line.split()
            found[what] += int(nbytes)
        return found


def have_shorter_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 256)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "seed", [*range(4), *[pytest.param(i, marks=pytest.mark.slow) for i in range(4, 20)]]
)
def test_killed_at_any_instant_it_goes_on_from_nothing(
    seed: int, bucket: Any, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_shorter_parts(monkeypatch)
    chance = random.Random(seed)  # noqa: S311 - it only chooses when to kill
    recipe = draw_for_kills(seed, models, chance.choice(["tensor", "model"]))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    streammerge.merge(recipe, tmp_path / "local")
    machine = Machine(tmp_path, monkeypatch)
    began = time.monotonic()
    assert machine.wait()
    takes, fresh = time.monotonic() - began, machine.counts
    for name in names_in(bucket):
        drop(bucket, name)

    told, options = False, ()
    for kill in range(4):
        machine, options = Machine(tmp_path, monkeypatch, *options), ("--resume",)
        if kill < 3:
            time.sleep(chance.uniform(0, takes))
            machine.kill()
        if machine.wait():
            break
        told = any(name[len(FOLDER)].isdigit() for name in journal_in(bucket))
        # Another machine cannot see that the process is gone; five minutes pass.
        drop(bucket, atwork.LOCK_NAME)

    found = fetch(bucket, tmp_path / "fetched")
    assert shards_of(found) == shards_of(tmp_path / "local")
    assert not streammerge.verify_files(found).damages
    assert not [name for name in names_in(bucket) if name.startswith(".streammerge-")]
    assert not leftovers(bucket)
    last = machine.counts
    assert last["sent"] <= fresh["sent"]
    assert last["read"] <= fresh["read"]
    # What was told before the last start was spared.
    assert not told or last != fresh
