"""Each request to a store fails in turn, on the wire: a merge goes on, or ends so that a resume does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from proxy import PASSING, Proxy, proxying
from results import OUT, fetch, leftovers, names_in, shards_of
from stored_models import recipe_at

import streammerge
from streammerge.checkpoint import storedjournal
from streammerge.checkpoint.scratch import SCRATCH_VARIABLE
from streammerge.cli.arguments import main
from streammerge.errors import CheckpointError
from streammerge.storage import copies, s3, stores

pytest.importorskip("boto3")
pytest.importorskip("moto.server")

KEY, SECRET, SESSION = "AKIASECRETEXAMPLE", "wJalrXUtnFEMIsecretEXAMPLEKEY", "FwoGZXIvYXdzSESSION"


@pytest.fixture
def proxy(address: str, bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Let the store be asked through a proxy, with credentials that can be told in a text."""
    with proxying(address) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.address)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION)
        # The proxy says nothing for longer.
        monkeypatch.setattr(s3, "_READ_SECONDS", 2)
        # The journal is part of it.
        monkeypatch.setattr(storedjournal, "_LEAST_PAUSE_SECONDS", 0.0)
        stores.close_stores()
        yield made
    stores.close_stores()


@dataclass(frozen=True)
class Case:
    """A merge from the store to the store."""

    client: Any
    recipe: dict[str, object]
    expected: dict[str, bytes]
    """The shards of the result."""
    place: Path

    def clear(self) -> None:
        """Begin anew: remove the result, and look at what is planned."""
        for name in names_in(self.client):
            self.client.delete_object(Bucket="results", Key=f"folder/merged/{name}")
        copies.forget_places()

    def check(self) -> None:
        """The result is complete, and nothing else is there."""
        found = fetch(self.client, self.place / f"fetched{len(list(self.place.iterdir()))}")
        assert shards_of(found) == self.expected
        assert not streammerge.verify_files(found).damages
        assert not leftovers(self.client)
        assert not [n for n in names_in(self.client) if n.startswith(".streammerge-")]


@pytest.fixture
def case(bucket: Any, root: Path, tmp_path: Path) -> Case:
    """Put the models into the store, and merge them on the disk."""
    for path in root.rglob("*"):
        if path.is_file():
            key = f"inputs/{path.relative_to(root).as_posix()}"
            bucket.upload_file(str(path), "results", key)
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")
    expected = shards_of(tmp_path / "local")
    return Case(bucket, recipe_at("s3://results/inputs"), expected, tmp_path)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "shift", [0, *[pytest.param(i, marks=pytest.mark.slow) for i in range(1, 4 * len(PASSING))]]
)
def test_what_passes_is_gone_on_from(shift: int, proxy: Proxy, case: Case) -> None:
    proxy.restart()
    streammerge.merge(case.recipe, OUT)
    requests = proxy.count
    assert requests > 40

    for number in range(1 + shift % 4, requests + 1, 4):
        case.clear()
        kind = PASSING[(number // 4 + shift // 4) % len(PASSING)]
        proxy.restart(lambda n, _, number=number, kind=kind: kind if n == number else "")
        streammerge.merge(case.recipe, OUT)
        case.check()
    assert all(proxy.faults[kind] for kind in PASSING)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "shift", [0, *[pytest.param(i, marks=pytest.mark.slow) for i in range(1, 10)]]
)
@pytest.mark.parametrize("kind", ["expired", "503"])
def test_what_does_not_pass_ends_resumable(
    kind: str, shift: int, proxy: Proxy, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.restart()
    streammerge.merge(case.recipe, OUT)
    requests = proxy.count

    for number in range(1 + shift, requests + 1, 10):
        case.clear()
        monkeypatch.setenv(SCRATCH_VARIABLE, str(case.place / f"first{number}"))
        proxy.restart(lambda n, _, number=number: kind if n >= number else "")
        error = merge_or_fail(case)
        said = "expired" if kind == "expired" else "6 attempts failed"
        assert error is None or said in str(error)
        published = "streammerge_manifest.json" in names_in(case.client)
        # The last requests may be such as do not matter.
        assert error is not None or published
        proxy.restart()
        # Not before all is there.
        assert not published or not streammerge.verify_files(OUT).damages
        # Nobody waits until the merge that could not say so is over.
        case.client.delete_object(Bucket="results", Key="folder/merged/.streammerge-at-work")
        if number // 10 % 2:
            # On a machine that knows nothing of it.
            monkeypatch.setenv(SCRATCH_VARIABLE, str(case.place / f"second{number}"))
        copies.forget_places()
        streammerge.merge(case.recipe, OUT, resume=True)
        case.check()


def merge_or_fail(case: Case) -> CheckpointError | None:
    try:
        streammerge.merge(case.recipe, OUT)
    except CheckpointError as error:
        return error
    return None


def test_credentials_appear_nowhere(
    proxy: Proxy,
    case: Case,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "streammerge")
    path = case.place / "recipe.yaml"
    path.write_text(yaml.safe_dump(case.recipe))
    merge = ["merge", str(path), OUT]
    said = []
    for faults, command in (
        (lambda *_: "", ["plan", str(path), "--json"]),
        (lambda *_: "expired", ["plan", str(path)]),
        (lambda n, _: "expired" if n > 30 else "", merge),
        (lambda *_: "denied", ["status", OUT]),
        (lambda *_: "", ["status", OUT]),
        (lambda *_: "", [*merge, "--resume", "--json"]),
        (lambda *_: "denied", ["verify", OUT]),
        (lambda *_: "", ["verify", OUT, "--against", str(path)]),
        (lambda *_: "", ["inspect", "s3://results/inputs/a", "--json"]),
        (lambda *_: "", ["doctor"]),
    ):
        proxy.restart(faults)
        copies.forget_places()
        main(command)
        captured = capsys.readouterr()
        said += [captured.out, captured.err]
    for name in names_in(case.client, ""):
        found = case.client.get_object(Bucket="results", Key=name)
        said += [found["Body"].read().decode(errors="replace"), str(found["Metadata"])]
    said += [each.getMessage() for each in caplog.records if each.name.startswith("streammerge")]
    said += [
        each.read_bytes().decode(errors="replace")
        for each in (case.place / "scratch").rglob("*")
        if each.is_file()
    ]

    text = "\n".join(said)
    assert OUT in text
    assert "ExpiredToken" in text
    for secret in (KEY, SECRET, SESSION):
        assert secret not in text
