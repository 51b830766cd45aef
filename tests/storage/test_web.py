"""Models on a web server merge to the bytes that they have on a disk, whatever the server does meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
from models import Models, assert_same_model, load_model
from servers import Server
from stored_models import draw, recipe_at

import streammerge
from streammerge.cli.arguments import main
from streammerge.errors import CheckpointError
from streammerge.storage import copies, retrying
from streammerge.storage.web import WebStore


def test_bytes_are_those_of_a_disk(root: Path, server: Server, tmp_path: Path) -> None:
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")

    manifest = streammerge.merge(recipe_at(server.address), tmp_path / "out")

    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))
    assert not streammerge.verify_files(tmp_path / "out").damages
    found = [each.origin for each in manifest.inputs]
    assert found[0] == f"{server.address}/base/model.safetensors"
    config = tmp_path / "out" / "config.json"
    assert config.read_bytes() == (root / "base" / "config.json").read_bytes()
    for name in ("streammerge_manifest.json", "streammerge_recipe.yaml", "README.md"):
        assert "streammerge-copies-" not in (tmp_path / "out" / name).read_text()
    assert f"{server.address}/base" in (tmp_path / "out" / "streammerge_recipe.yaml").read_text()


def test_no_tensor_is_read_to_plan(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: linear\nsources: [{{path: {server.address}/a}}, {{path: {server.address}/b}}]\n"
    )

    assert main(["plan", str(recipe)]) == 0

    said = capsys.readouterr().out
    assert f"sources[0]   {server.address}/a\n" in said
    ranges = [asked for path, asked in server.requests if path.endswith(".safetensors")]
    # One byte to see whether there is such a file, and the header.
    assert all(int(each.removeprefix("bytes=").split("-")[1]) < 2**16 for each in ranges)


FAULTS = ("500", "503", "429", "short", "reset")


def test_each_request_may_fail_in_turn(root: Path, server: Server, tmp_path: Path) -> None:
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")
    streammerge.merge(recipe_at(server.address), tmp_path / "undisturbed")
    requests = server.counts.total()

    for number in range(requests):
        copies.forget_places()
        first, second = FAULTS[number % 5], FAULTS[(number + number // 5) % 5]
        server.faults[:] = [*[""] * number, first, second]
        streammerge.merge(recipe_at(server.address), tmp_path / f"out{number}")
        assert not server.faults
        assert_same_model(load_model(tmp_path / f"out{number}"), load_model(tmp_path / "local"))
    assert sum(server.counts[fault] for fault in FAULTS) == 2 * requests
    assert all(server.counts[fault] for fault in FAULTS)


def test_what_fails_again_and_again_ends_resumable(
    root: Path, server: Server, tmp_path: Path
) -> None:
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")
    planned = streammerge.plan(recipe_at(server.address))
    server.faults[:] = [""] * 3 + ["503"] * 100

    with pytest.raises(
        CheckpointError, match="6 attempts failed, the last one: the server answers 503"
    ):
        streammerge.merge(planned, tmp_path / "out")

    assert not (tmp_path / "out").exists()
    server.faults.clear()
    copies.forget_places()
    manifest = streammerge.merge(recipe_at(server.address), tmp_path / "out", resume=True)
    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))
    assert manifest.run.bytes_by_stage["read"] > 0


def test_a_complete_result_is_found_to_be(server: Server, tmp_path: Path) -> None:
    streammerge.merge(recipe_at(server.address), tmp_path / "out")
    copies.forget_places()
    before = len([1 for path, _ in server.requests if path.endswith(".safetensors")])

    streammerge.merge(recipe_at(server.address), tmp_path / "out", resume=True)

    after = [asked for path, asked in server.requests if path.endswith(".safetensors")][before:]
    assert all(int(each.removeprefix("bytes=").split("-")[1]) < 2**16 for each in after)


def test_a_file_that_changes_meanwhile_is_refused(
    root: Path, server: Server, tmp_path: Path
) -> None:
    planned = streammerge.plan(recipe_at(server.address))
    Models(root).write(draw(9), "a")

    with pytest.raises(
        CheckpointError, match=r"/a/model.safetensors: changed since it was planned"
    ):
        streammerge.merge(planned, tmp_path / "out")

    # Who plans again, as the message says, gets what is there now.
    streammerge.merge(recipe_at(server.address), tmp_path / "out")
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")
    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))


def test_a_file_that_is_gone_is_refused(root: Path, server: Server, tmp_path: Path) -> None:
    planned = streammerge.plan(recipe_at(server.address))
    (root / "a" / "model.safetensors").unlink()

    with pytest.raises(CheckpointError, match="is gone since it was planned"):
        streammerge.merge(planned, tmp_path / "out")


def test_files_may_have_moved(root: Path, server: Server, tmp_path: Path) -> None:
    server.moved = True
    streammerge.merge(recipe_at(str(root)), tmp_path / "local")

    streammerge.merge(recipe_at(server.address), tmp_path / "out")

    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))


def test_one_file_is_a_model_too(root: Path, server: Server, tmp_path: Path) -> None:
    def recipe(place: str) -> dict[str, object]:
        paths = [f"{place}/{name}/model.safetensors" for name in ("base", "a")]
        return {"method": "linear", "sources": [{"path": path} for path in paths]}

    streammerge.merge(recipe(str(root)), tmp_path / "local")
    streammerge.merge(recipe(server.address), tmp_path / "out")

    assert_same_model(load_model(tmp_path / "out"), load_model(tmp_path / "local"))


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda s: setattr(s, "etags", False), "says neither ETag nor Last-Modified"),
        (lambda s: s.faults.extend(["whole"] * 9), "gives the whole file where a range"),
    ],
)
def test_a_server_that_cannot_serve_is_refused(prepare, said: str, server: Server) -> None:
    prepare(server)

    with pytest.raises(CheckpointError, match=said):
        streammerge.plan(recipe_at(server.address))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://user:secret@host/model", "has a name or a password in it"),
        ("https://host/model?X-Amz-Signature=secret", "has a query behind it"),
        ("s3://", "expected s3://bucket/key"),
        ("hf://org", r"expected hf://org/model\[@revision\]"),
    ],
)
def test_an_address_with_secrets_or_without_a_name_is_refused(address: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        streammerge.plan({"method": "linear", "sources": [{"path": address}]})

    assert "secret" not in str(caught.value)


def test_what_is_not_there_is_said(server: Server) -> None:
    with pytest.raises(CheckpointError, match="/nothing: there is nothing there"):
        streammerge.plan({"method": "linear", "sources": [{"path": f"{server.address}/nothing"}]})


def test_a_server_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CheckpointError, match="6 attempts failed, the last one: NewConnectionError"
    ):
        streammerge.plan({"method": "linear", "sources": [{"path": "http://127.0.0.1:9/a"}]})


def test_messages_about_copies_name_the_address(root: Path, server: Server) -> None:
    (root / "a" / "config.json").write_text("{")
    header = (root / "b" / "model.safetensors.index.json").read_text()
    (root / "b" / "model.safetensors.index.json").write_text(header[:-5])

    for name in "ab":
        with pytest.raises(CheckpointError) as caught:
            streammerge.plan(
                {"method": "linear", "sources": [{"path": f"{server.address}/{name}"}]}
            )
        assert f"{server.address}/{name}/" in str(caught.value)
        assert "copies" not in str(caught.value)


def test_a_copy_of_a_header_never_passes_for_a_model(server: Server) -> None:
    planned = streammerge.plan(recipe_at(server.address))

    for file in planned.files:
        assert file.remote is not None
        assert file.path.stat().st_size < file.nbytes


def test_inspect_shows_what_is_there(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{server.address}/b"]) == 0

    said = capsys.readouterr().out
    assert f"{server.address}/b" in said
    assert "copies" not in said


def test_a_pause_that_a_server_asks_for_is_kept_and_bounded() -> None:
    assert retrying._pause(1, 3.0) == 3.0
    assert retrying._pause(1, 3600.0) == retrying._LONGEST_PAUSE_SECONDS
    assert 0 < retrying._pause(2, None) < 1


def test_ranges_are_read_as_they_lie(root: Path, server: Server) -> None:
    path = root / "base" / "model.safetensors"
    content = path.read_bytes()
    store = WebStore()
    what = store.look(f"{server.address}/base/model.safetensors")
    assert what is not None
    assert what.nbytes == len(content)

    for begin, end in ((0, 1), (5, 70), (len(content) - 3, len(content))):
        buffer = bytearray(end - begin)
        store.read_into(what, begin, memoryview(buffer))
        assert buffer == content[begin:end]
