"""Files are data: nothing in them is run, no name in them leads elsewhere, no size is taken on trust."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import MEMORY, Models, recipe_of

import streammerge
from streammerge.checkpoint import manifest, torchfile
from streammerge.checkpoint.inputs import MAX_JSON_DEPTH, _json_depth, parse_json
from streammerge.checkpoint.inspecting import describe
from streammerge.checkpoint.manifest import read_manifest_files
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.checkpoint.reading import read_checkpoint
from streammerge.checkpoint.sidecars import plan_sidecars, read_companions, write_sidecars
from streammerge.checkpoint.torchfile import read_torch_header
from streammerge.cli.arguments import main
from streammerge.errors import (
    MAX_LINE_CHARACTERS,
    CheckpointError,
    HeaderError,
    PlanError,
    RecipeError,
    StreamMergeError,
)
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.layout import _natural
from streammerge.recipe.parsing import parse_recipe
from streammerge.recipe.text import MAX_TEXT_BYTES

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.arange(5.0)}


# --- nothing is run

_AUDITED = """
import sys
import streammerge

forbidden = ("pickle.", "marshal.", "subprocess.", "socket.", "os.system", "os.exec", "os.fork",
             "os.posix_spawn", "os.spawn", "urllib.", "http.", "exec", "ctypes.dlopen")
recipe = {"method": "linear", "sources": [{"path": path, "weight": 0.5} for path in sys.argv[2:]]}
streammerge.merge(recipe, sys.argv[1] + "-first", memory="2GiB")  # whatever is imported late
seen = []
sys.addaudithook(lambda event, _: seen.append(event))
streammerge.merge(recipe, sys.argv[1], memory="2GiB")
print(sorted({event for event in seen if event.startswith(forbidden)}), "open" in seen)
"""


def test_a_merge_runs_no_pickle_no_program_and_opens_no_connection(
    tmp_path: Path, models: Models
) -> None:
    """The interpreter reports each such event to a hook, wherever it comes from."""
    sound = models.write(TENSORS)
    (sound / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    (sound / "code.py").write_text(f"open({str(tmp_path / 'victim')!r}, 'w')")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(TENSORS, pickled / "pytorch_model.bin")
    command = [sys.executable, "-c", _AUDITED, str(tmp_path / "out"), str(sound), str(pickled)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path.cwd())

    assert done.stdout == "[] True\n"
    assert not (tmp_path / "victim").exists()


def test_no_module_names_what_could_run_a_file() -> None:
    calls = {"eval", "exec", "compile", "__import__"}
    attributes = {"system", "popen", "full_load", "unsafe_load", "torch.load", "numpy.load"}
    # Kernels for devices: their source is written from a method's steps, of numbers and names of its own.
    allowed = {("kernels.py", "exec"), ("kernels.py", "compile")}
    found = []
    for path in sorted(Path(streammerge.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).replace("np.", "numpy.")
                if path.parent.name == "fused" and (path.name, name) in allowed:
                    continue
                if name in calls or name in attributes or name.rpartition(".")[2] in attributes:
                    found.append(f"{path.name}:{node.lineno} {name}")

    assert found == []


# --- depth and size of JSON


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("1", 0),
        ("[]", 1),
        ('{"a": [1, {"b": []}], "c": {}}', 4),
        ('["[[[["]', 1),
        (r'["\"[[[["]', 1),
        (r'["\\", [[]]]', 3),
        (r'["\\\"[", "]", [["\\\\"]]]', 3),
        ('["", "[", "", "[[", [""]]', 2),
        ("[" * 100, 100),
        ('[["', 2),
        ("]]]][[", 0),
    ],
)
def test_depth_of_json_is_that_of_its_brackets_outside_texts(text: str, depth: int) -> None:
    assert _json_depth(text.encode()) == depth


def test_depth_is_refused_above_the_limit_whatever_the_interpreter_could_do() -> None:
    def parse(depth: int) -> object:
        raw = b"[" * depth + b"]" * depth
        return parse_json(raw, where="here", parse_constant=float, object_pairs_hook=dict)

    assert parse(MAX_JSON_DEPTH) is not None
    with pytest.raises(HeaderError, match=f"here: .*: {MAX_JSON_DEPTH + 1} levels, the limit is"):
        parse(MAX_JSON_DEPTH + 1)


def test_texts_nested_in_an_auto_map_are_refused_not_followed(models: Models) -> None:
    """Each level would take a frame of the interpreter's thousand."""
    model = models.write(TENSORS)
    auto_map = "[" * 900 + '"code.Model"' + "]" * 900
    (model / "tokenizer_config.json").write_text(f'{{"auto_map": {auto_map}}}')
    with pytest.raises(HeaderError, match="nested too deeply: 901 levels"):
        plan_sidecars(model)


def test_empty_lines_of_custom_code_are_looked_at_once(models: Models) -> None:
    """A megabyte of them took hours."""
    model = models.write(TENSORS)
    (model / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    (model / "code.py").write_bytes(b"\n" * 2**20 + b"  from\t.other import x\n")
    (model / "other.py").touch()

    assert [path.name for path in plan_sidecars(model)] == ["code.py", "config.json", "other.py"]


# --- manifests and plans


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"files": "abc"}', "expected an object"),
        ('{"files": [1]}', "expected an object"),
        ('{"files": {"a": 1}}', "expected nbytes, digest and tree"),
        ('{"files": {"a": {"nbytes": 1, "digest": 2, "tree": true}}}', "expected nbytes"),
        ('{"files": {}, "files": {"notes.txt": {}}}', "occurs twice"),
        ("{}", "expected an object"),
        ('{"files": ["\xff"]}', "expected UTF-8"),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content.encode("latin-1"))
    with pytest.raises(HeaderError, match=f"not a manifest of streammerge.*{says}"):
        read_manifest_files(tmp_path)


def test_a_manifest_beyond_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 10)
    (tmp_path / MANIFEST_NAME).write_text('{"files":[]}')
    with pytest.raises(HeaderError, match="has 12 bytes, the limit is 10"):
        read_manifest_files(tmp_path)


def test_a_manifest_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / MANIFEST_NAME)
    with pytest.raises(CheckpointError, match="expected a regular file"):
        read_manifest_files(tmp_path)


@pytest.mark.parametrize("name", ["../a", "/a", "a/b", "", "..", ".", "a\\b", "C:a", "a\0", "a\n"])
@pytest.mark.parametrize("key", ["shards", "index_name", "part_indexes", "companions"])
def test_a_plan_writes_nowhere_but_in_its_output(key: str, name: str, models: Models) -> None:
    model = models.write(TENSORS)
    (model / "config.json").write_text("{}")
    planned = streammerge.plan(recipe_of("linear", None, [model]), memory=MEMORY)
    document = json.loads(dump_plan(planned))
    if key == "shards":
        document["layout"]["shards"][0]["name"] = name
    elif key == "part_indexes":
        document["layout"]["part_indexes"] = [[name, "index.json"]]
    elif key == "companions":
        # A companion may lie in a folder.
        document["companions"][0]["name"] = name.replace("a/b", "a//b")
    else:
        document["layout"]["index_name"] = name
    with pytest.raises(PlanError, match="not a plain name; plan again"):
        parse_plan(json.dumps(document))


# --- links


def put(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("LICENSE", "id_rsa"),
        ("vocab.txt", "blobs/credentials"),
        ("tokenizer.json", "model-other/tokenizer.json"),
        ("config.json", "config.json"),
    ],
)
def test_a_link_beside_the_shards_that_leads_out_is_refused(
    name: str, target: str, tmp_path: Path, models: Models
) -> None:
    """What it leads to would be copied into a directory that people publish."""
    model = models.write(TENSORS, "model")
    secret = put(tmp_path / target, "{}")
    (model / name).symlink_to(secret)
    with pytest.raises(
        CheckpointError, match=f"{name}: a link leads out of the directory, to"
    ) as caught:
        write_sidecars(model, read_companions(model), tmp_path / "out", dtype=None)

    assert str(secret) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_beside_the_shards_that_leads_out_is_refused(
    tmp_path: Path, models: Models
) -> None:
    model = models.write(TENSORS, "model")
    put(tmp_path / "elsewhere" / "secret.jinja", "secret")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        plan_sidecars(model)


def test_links_inside_the_directory_and_into_the_hub_cache_are_copied_as_files(
    tmp_path: Path, models: Models
) -> None:
    """A repository's folder in the cache, reached by a link, and a folder linked into the cache."""
    hub = tmp_path / "models--org--name"
    snapshot = hub / "snapshots" / "0123abcd"
    put(hub / "blobs" / ("a1" * 20), '{"x": 1}')
    put(hub / "blobs" / ("b2" * 32), "terms")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").symlink_to(f"../../blobs/{'a1' * 20}")
    (snapshot / "LICENSE").symlink_to(f"../../blobs/{'b2' * 32}")
    put(snapshot / "legal" / "notice", "also")
    (snapshot / "NOTICE").symlink_to("legal/notice")
    (tmp_path / "reached").symlink_to(snapshot)

    written = write_sidecars(
        tmp_path / "reached",
        read_companions(tmp_path / "reached"),
        tmp_path / "out",
        dtype="float16",
    )

    assert tuple(written) == ("LICENSE", "NOTICE", "config.json")
    assert not any((tmp_path / "out" / name).is_symlink() for name in written)
    assert (tmp_path / "out" / "LICENSE").read_text() == "terms"
    assert put(hub / "blobs" / ("a1" * 20), '{"x": 1}').read_text() == '{"x": 1}'


# --- PyTorch files


def test_a_zip_directory_beyond_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.bin"
    torch.save({f"{index}": torch.ones(1) for index in range(2_000)}, path)
    monkeypatch.setattr(torchfile, "MAX_ZIP_DIRECTORY_BYTES", 100_000)
    with pytest.raises(
        HeaderError, match=r"its zip directory has \d{6} bytes, the limit is 100000"
    ):
        read_torch_header(path, file_index=0)


def test_a_shape_of_many_dimensions_is_refused_in_a_pickle(tmp_path: Path) -> None:
    torch.save({"a": torch.ones([1] * 65)}, tmp_path / "model.bin")
    with pytest.raises(HeaderError, match="'a': its shape has 65 dimensions, the limit is 64"):
        read_torch_header(tmp_path / "model.bin", file_index=0)


# --- recipes


@pytest.mark.parametrize(
    "text",
    ['a: "\\UFFFFFFFF"', 'a: "\\U00110000"', f"%YAML {'1' * 4400}.1\n---\na: 1"],
)
def test_numbers_that_the_yaml_parser_cannot_hold_are_refused_by_line(text: str) -> None:
    with pytest.raises(RecipeError, match=r"here: line [12]: a number in the text is too large"):
        parse_recipe(text, origin="here", methods={})


def test_no_more_of_a_recipe_is_read_than_a_recipe_may_have(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "/dev/zero"]) == 2
    assert f"/dev/zero: has more than {MAX_TEXT_BYTES} bytes" in capsys.readouterr().err


def test_a_recipe_may_come_through_a_pipe(tmp_path: Path, models: Models) -> None:
    """As ``streammerge plan <(command)``."""
    recipe = json.dumps(recipe_of("linear", None, [models.write(TENSORS)]))
    reading, writing = os.pipe()
    try:
        os.write(writing, recipe.encode())
        os.close(writing)
        assert streammerge.plan(f"/dev/fd/{reading}", memory=MEMORY).method == "linear"
    finally:
        os.close(reading)


# --- what is said and written of hostile names


def test_a_message_is_printable_and_ends_with_what_to_do() -> None:
    name = "\x1b[2J" + "n" * 2_000_000
    message = str(CheckpointError(f"tensor {name}: is bad; copy it again"))

    assert message.isprintable()
    assert message.startswith("tensor \\x1b[2Jnnn")
    assert message.endswith("n: is bad; copy it again")
    assert len(message) < MAX_LINE_CHARACTERS + 50
    assert "characters)" in message


def test_lines_of_a_message_stay_lines() -> None:
    assert str(RecipeError("a: 1\nb: 2")) == "a: 1\nb: 2"


def test_inspect_prints_no_control_characters(models: Models, tmp_path: Path) -> None:
    model = models.write({"a\x1b[2J\nb": torch.ones(3)})
    config = {"architectures": ["X\x1b[2J\ud800", [[]], None]}
    (model / "config.json").write_text(json.dumps(config))
    printed = describe(read_checkpoint(model))

    assert all(line.isprintable() for line in printed.split("\n"))
    assert r"X\x1b[2J\ud800" in printed
    printed.encode()


def test_names_in_refusals_of_a_plan_stay_on_their_lines(models: Models) -> None:
    one = models.write({"a\nb": torch.ones(3)})
    other = models.write({"a\nb": torch.ones(4)})
    with pytest.raises(StreamMergeError, match=r"\n  a\\nb: shape \[3\]") as caught:
        streammerge.plan(recipe_of("linear", None, [one, other]), memory=MEMORY)

    assert all(line.isprintable() for line in str(caught.value).split("\n"))


def test_a_name_of_many_digits_has_a_place_in_the_order() -> None:
    names = ["layers.10.w", "layers.2.w", f"layers.{'1' * 5000}.w"]

    ranks = dict(zip(names, _natural(names), strict=True))

    assert sorted(names, key=ranks.__getitem__) == ["layers.2.w", "layers.10.w", names[2]]


def test_a_file_name_that_is_not_unicode_reaches_the_manifest(
    tmp_path: Path, models: Models
) -> None:
    model = models.write(TENSORS)
    strange = Path(os.fsdecode(os.fsencode(model) + b"/\xff.safetensors"))
    (model / "model.safetensors").rename(strange)

    streammerge.merge(recipe_of("linear", None, [model]), tmp_path / "out", memory=MEMORY)

    written = json.loads((tmp_path / "out" / MANIFEST_NAME).read_bytes())
    assert [file["path"] for file in written["inputs"]] == [str(strange)]
