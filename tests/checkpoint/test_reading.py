"""A checkpoint is found by its usual names, agrees with its index, and is not quantised."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file

from streammerge.checkpoint import reading
from streammerge.checkpoint.reading import check_gathered, read_checkpoint
from streammerge.errors import (
    CheckpointError,
    HeaderError,
    StreamMergeError,
    TruncatedShardError,
)

A = torch.arange(6.0).reshape(2, 3)
B = torch.arange(5).to(torch.bfloat16)
TENSORS = {"a.weight": A, "b.weight": B}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHT_MAP = {"a.weight": FIRST, "b.weight": SECOND}


def refusal(path: Path, error_type: type[StreamMergeError] = CheckpointError) -> str:
    with pytest.raises(error_type) as caught:
        read_checkpoint(path)
    assert type(caught.value) is error_type
    assert str(path) in str(caught.value)
    return str(caught.value)


def check_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    checkpoint = read_checkpoint(path)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        entry = checkpoint.tensors[name]
        content = checkpoint.files[entry.file].path.read_bytes()
        expected = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        assert content[entry.offset : entry.offset + entry.nbytes] == expected


def write_index(directory: Path, content: object, name: str = INDEX) -> None:
    raw = content if isinstance(content, str) else json.dumps(content)
    (directory / name).write_text(raw)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A directory with two shards and an index."""
    save_file({"a.weight": A}, tmp_path / FIRST)
    save_file({"b.weight": B}, tmp_path / SECOND)
    write_index(tmp_path, {"metadata": {"total_size": 34}, "weight_map": WEIGHT_MAP})
    return tmp_path


# --- what is found


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "anything.safetensors",
        "model-00001-of-00001.safetensors",
    ],
)
def test_directory_with_one_safetensors_file_is_read(name: str, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / name)
    torch.save({"training": 1}, tmp_path / "training_args.bin")

    check_holds(tmp_path, TENSORS)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "diffusion_pytorch_model.bin"])
def test_directory_with_one_torch_file_is_read(name: str, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / name)

    check_holds(tmp_path, TENSORS)


def test_single_safetensors_file_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")

    check_holds(tmp_path / "x.safetensors", TENSORS)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_single_torch_file_is_read(suffix: str, tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / f"x{suffix}")

    check_holds(tmp_path / f"x{suffix}", TENSORS)


def test_shards_are_read_in_order_of_their_names(sharded: Path) -> None:
    check_holds(sharded, TENSORS)
    checkpoint = read_checkpoint(sharded)

    assert [file.path.name for file in checkpoint.files] == [FIRST, SECOND]
    assert list(checkpoint.tensors) == ["a.weight", "b.weight"]
    assert checkpoint.nbytes == 34


def test_index_itself_may_be_named(sharded: Path) -> None:
    check_holds(sharded / INDEX, TENSORS)


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ],
)
def test_diffusers_index_is_read(index: str, sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / index)

    check_holds(sharded, TENSORS)


def test_torch_shards_are_read(tmp_path: Path) -> None:
    torch.save({"a.weight": A}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b.weight": B}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {
        "a.weight": "pytorch_model-00001-of-00002.bin",
        "b.weight": "pytorch_model-00002-of-00002.bin",
    }
    write_index(tmp_path, {"weight_map": weight_map}, "pytorch_model.bin.index.json")

    check_holds(tmp_path, TENSORS)


def test_safetensors_win_over_torch_files(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save({"other": A}, tmp_path / "pytorch_model.bin")

    check_holds(tmp_path, TENSORS)


def test_shards_may_be_links_to_elsewhere(tmp_path: Path) -> None:
    """The Hugging Face cache keeps files as ``../../blobs/<digest>``."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a.weight": A}, blobs / "0a")
    save_file({"b.weight": B}, blobs / "0b")
    (snapshot / FIRST).symlink_to("../../blobs/0a")
    (snapshot / SECOND).symlink_to("../../blobs/0b")
    write_index(snapshot, {"weight_map": WEIGHT_MAP})

    check_holds(snapshot, TENSORS)


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)

    checkpoint = read_checkpoint(Path("model.safetensors"))

    assert checkpoint.path == tmp_path / "model.safetensors"
    assert checkpoint.directory == tmp_path
    assert checkpoint.files[0].path == tmp_path / "model.safetensors"


# --- what is not found, or found twice


def test_empty_directory_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"")
    message = refusal(tmp_path)

    assert "no checkpoint among 1 files" in message
    for name in ("model.safetensors", INDEX, "*.safetensors", "pytorch_model.bin"):
        assert name in message


def test_absent_path_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none")


def test_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")

    assert "'.onnx'" in refusal(tmp_path / "model.onnx")


def test_adapter_is_refused(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")

    assert "which is no model by itself" in refusal(tmp_path)


def test_two_files_without_an_index_are_refused_by_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    save_file(TENSORS, tmp_path / "y.safetensors")

    assert "found 2: x.safetensors, y.safetensors" in refusal(tmp_path)


def test_one_file_and_an_index_of_others_are_refused(sharded: Path) -> None:
    save_file(TENSORS, sharded / "model.safetensors")

    assert f"found 2: model.safetensors, {INDEX}" in refusal(sharded)


def test_lone_shard_without_its_index_is_refused(sharded: Path) -> None:
    """One shard of two must not pass for the only file of a checkpoint."""
    (sharded / INDEX).unlink()
    (sharded / FIRST).unlink()

    assert f"{SECOND} is one shard of several" in refusal(sharded)


def test_link_to_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")

    assert "link to a file that is gone" in refusal(tmp_path)


# --- what disagrees with the index


def test_absent_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    message = refusal(sharded, HeaderError)

    assert f"index names 2 shards, 1 are not there: {SECOND}; copy them again" in message


def test_truncated_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:-1])

    assert SECOND in refusal(sharded, TruncatedShardError)


def test_tensors_that_no_shard_has_are_noted_up_to_ten(sharded: Path) -> None:
    more = {f"c.{index:02}": SECOND for index in range(12)}
    write_index(sharded, {"weight_map": WEIGHT_MAP | more})

    check_holds(sharded, TENSORS)
    (note,) = read_checkpoint(sharded).notes
    assert "12 tensor(s) are in the index and in none of its shards: c.00, c.01" in note
    assert "c.09 and 2 more" in note


def test_an_index_of_other_shards_is_refused(sharded: Path) -> None:
    write_index(sharded, {"weight_map": {"c": FIRST, "d": SECOND}})

    assert "2 tensors, none of which is in the 2 shards" in refusal(sharded, HeaderError)


def test_tensor_that_the_index_does_not_name_is_left_out(sharded: Path) -> None:
    save_file({"b.weight": B, "extra": A}, sharded / SECOND)

    check_holds(sharded, TENSORS)
    (note,) = read_checkpoint(sharded).notes
    assert "1 tensor(s) are in the shards and not in the index, and left out: extra" in note


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_tensor_in_two_shards_is_the_one_that_the_index_names(named: str, sharded: Path) -> None:
    """In transformers the last one wins, whatever the index says; a note tells where that differs."""
    here, there = A + 1, A + 2
    save_file({"a.weight": here, "c.weight": B}, sharded / FIRST)
    save_file({"a.weight": there, "b.weight": B}, sharded / SECOND)
    write_index(sharded, {"weight_map": WEIGHT_MAP | {"a.weight": named, "c.weight": FIRST}})

    expected = here if named == FIRST else there
    check_holds(sharded, {"a.weight": expected, "b.weight": B, "c.weight": B})
    first, *others = read_checkpoint(sharded).notes
    assert "1 tensor(s) are in several shards" in first
    assert first.endswith(": a.weight")
    assert len(others) == (named == FIRST)
    assert all("by transformers from another" in note for note in others)


def test_tensor_in_another_shard_than_the_index_says_is_read_from_there(sharded: Path) -> None:
    write_index(sharded, {"weight_map": {"a.weight": SECOND, "b.weight": FIRST}})

    check_holds(sharded, TENSORS)
    (note,) = read_checkpoint(sharded).notes
    assert f"a.weight is in {FIRST}, b.weight is in {SECOND}" in note


def test_what_agrees_has_no_notes(sharded: Path) -> None:
    assert read_checkpoint(sharded).notes == ()


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "x/../../model.safetensors",
        "/etc/passwd",
        "./model.safetensors",
        "x//model.safetensors",
        "..",
        "",
        "C:model.safetensors",
        "..\\model.safetensors",
        "a\0.safetensors",
        # not printable: a manifest and a terminal could not show them
        "a\x1b[2J.safetensors",
        "a\n.safetensors",
        "\udcff.safetensors",
    ],
)
def test_shard_name_that_leaves_the_directory_is_refused(name: str, sharded: Path) -> None:
    write_index(sharded, {"weight_map": {"a.weight": name}})

    assert repr(name) in refusal(sharded, HeaderError)


def test_shard_name_that_no_file_can_have_is_absent(sharded: Path) -> None:
    write_index(sharded, {"weight_map": {"a.weight": "n" * 5000}})

    assert "1 are not there" in refusal(sharded, HeaderError)


def test_folder_in_the_index_that_is_a_link_to_elsewhere_is_refused(sharded: Path) -> None:
    (sharded.parent / "elsewhere").mkdir()
    (sharded / FIRST).rename(sharded.parent / "elsewhere" / FIRST)
    (sharded / "shards").symlink_to(sharded.parent / "elsewhere")
    write_index(sharded, {"weight_map": WEIGHT_MAP | {"a.weight": f"shards/{FIRST}"}})
    message = refusal(sharded, CheckpointError)

    assert "shards: a folder in the index leads out of the directory" in message
    assert str(sharded.parent / "elsewhere") in message


def test_directory_may_be_reached_by_a_link(sharded: Path) -> None:
    (sharded / "shards").mkdir()
    (sharded / FIRST).rename(sharded / "shards" / FIRST)
    write_index(sharded, {"weight_map": WEIGHT_MAP | {"a.weight": f"shards/{FIRST}"}})
    link = sharded.parent / "link"
    link.symlink_to(sharded)

    check_holds(link, TENSORS)


def test_shard_in_a_folder_below_is_read(sharded: Path) -> None:
    (sharded / "shards").mkdir()
    (sharded / FIRST).rename(sharded / "shards" / FIRST)
    write_index(sharded, {"weight_map": WEIGHT_MAP | {"a.weight": f"shards/{FIRST}"}})

    check_holds(sharded, TENSORS)


@pytest.mark.parametrize(
    ("content", "essential"),
    [
        ({}, "weight_map: expected an object with at least 1 tensor, got nothing"),
        ({"weight_map": []}, "got list"),
        ({"weight_map": {}}, "got an empty one"),
        ({"weight_map": {"a.weight": 3}}, "'a.weight': expected a file name, got int"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' occurs twice"),
        ('{"weight_map": NaN}', "NaN"),
        ("[]", "expected a JSON object, got list"),
        ("{", "not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_index_that_is_not_one_is_refused(content: object, essential: str, sharded: Path) -> None:
    write_index(sharded, content)
    message = refusal(sharded, HeaderError)

    assert INDEX in message
    assert essential in message


# --- config.json


def test_config_is_parsed(sharded: Path) -> None:
    (sharded / "config.json").write_text('{"hidden_size": 3, "limit": [0.0, Infinity]}')

    expected = {"hidden_size": 3, "limit": [0.0, float("inf")]}
    assert read_checkpoint(sharded).config == expected


def test_config_beside_a_single_file_is_parsed(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')

    assert read_checkpoint(tmp_path / "model.safetensors").config == {"hidden_size": 3}


def test_of_a_key_that_the_config_has_twice_the_last_is_taken(sharded: Path) -> None:
    """As transformers reads it."""
    text = '{"hidden_size": 3, "inner": {"tie": true, "tie": false}, "hidden_size": 4}'
    (sharded / "config.json").write_text(text)

    checkpoint = read_checkpoint(sharded)

    assert checkpoint.config == json.loads(text) == {"hidden_size": 4, "inner": {"tie": False}}
    (note,) = checkpoint.notes
    assert note == "config.json: of equal keys the last one is taken: tie, hidden_size"


def test_config_is_none_when_absent(sharded: Path) -> None:
    assert read_checkpoint(sharded).config is None


@pytest.mark.parametrize(
    ("raw", "error_type", "essential"),
    [
        (b"[]", HeaderError, "expected a JSON object, got list"),
        (b"{\xff}", HeaderError, "0xff at 1"),
        (b"{", HeaderError, "not valid JSON"),
        (b"", TruncatedShardError, "0 bytes"),
    ],
)
def test_config_that_is_not_one_is_refused(
    raw: bytes, error_type: type[StreamMergeError], essential: str, sharded: Path
) -> None:
    (sharded / "config.json").write_bytes(raw)
    message = refusal(sharded, error_type)

    assert "config.json" in message
    assert essential in message


def test_config_beyond_the_limit_is_not_read(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MAX_CONFIG_BYTES", 10)
    (sharded / "config.json").write_text('{"a": 123456789}')

    assert "has 16 bytes, the limit is 10" in refusal(sharded, HeaderError)


def test_config_that_is_a_dead_link_is_refused(sharded: Path) -> None:
    (sharded / "config.json").symlink_to("gone")

    assert "config.json" in refusal(sharded)


def test_directory_that_cannot_be_listed_is_refused(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)

    assert "cannot be listed: Permission denied" in refusal(sharded)


# --- directories that people name by mistake


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"")
    return directory


@pytest.mark.parametrize(
    ("names", "essentials"),
    [
        (
            [
                "model_index.json",
                "unet/diffusion_pytorch_model.safetensors",
                "text_encoder/model.safetensors.index.json",
                "vae/diffusion_pytorch_model.bin",
                "scheduler/scheduler_config.json",
            ],
            ["diffusers pipeline", "{}/text_encoder, {}/unet, {}/vae"],
        ),
        (
            ["modules.json", "0_Transformer/pytorch_model.bin", "1_Pooling/config.json"],
            ["sentence-transformers", "name one: {}/0_Transformer"],
        ),
        (["consolidated.00.pth", "params.json"], ["name the file: {}/consolidated.00.pth"]),
        (
            ["consolidated.00.pth", "consolidated.01.pth"],
            ["2 files", "convert_llama_weights_to_hf --input_dir {} --output_dir {}-hf"],
        ),
        (
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
            ["2 shard(s) and no index pytorch_model.bin.index.json", "copy the index"],
        ),
        (["x.Q4_K_M.gguf"], ["x.Q4_K_M.gguf is a GGUF file", "python -c"]),
        (["sd.ckpt", "optimizer.pt"], ["name the file that holds the model: {}/sd.ckpt"]),
        (
            ["model_world_size_8_rank_0.pt", "huggingface/config.json"],
            ["verl.model_merger merge --backend fsdp --local_dir {} --target_dir {}-whole"],
        ),
        (["actor/model_world_size_8_rank_0.pt"], ["--local_dir {}/actor "]),
        (["zero_to_fp32.py", "latest"], ["cd {} && python zero_to_fp32.py . {}-whole"]),
        (["mp_rank_00_model_states.pt"], ["DeepSpeed", "in the directory above"]),
        (
            ["__0_0.distcp", ".metadata"],
            ["torch.distributed.checkpoint.format_utils dcp_to_torch {} {}-whole.pt"],
        ),
        (
            ["pytorch_model_fsdp_0/__0_0.distcp", "trainer_state.json"],
            ["dcp_to_torch {}/pytorch_model_fsdp_0 {}-whole.pt"],
        ),
        (
            ["checkpoint-500/model.safetensors", "runs/events", "trainer_state.json"],
            ["name a folder in it: {}/checkpoint-500"],
        ),
    ],
)
def test_a_directory_of_another_kind_says_the_next_step(
    names: list[str], essentials: list[str], tmp_path: Path
) -> None:
    message = refusal(touch(tmp_path, *names))

    for essential in essentials:
        assert essential.replace("{}", str(tmp_path)) in message


def test_the_command_for_a_distributed_checkpoint_gives_what_is_read(tmp_path: Path) -> None:
    """What it makes has the state dict in a wrapper, as trainers save it."""
    from torch.distributed.checkpoint import FileSystemWriter, save_state_dict
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    save_state_dict({"model": {"a.weight": A}}, FileSystemWriter(tmp_path / "dcp"), no_dist=True)
    assert "dcp_to_torch" in refusal(tmp_path / "dcp")

    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "whole.pt")

    check_holds(tmp_path / "whole.pt", {"a.weight": A})


def test_weights_that_were_not_gathered_are_refused(tmp_path: Path) -> None:
    empty = torch.empty(0)
    save_file(
        {"a.weight": empty, "b.bias": empty, "c": empty, "d.weight": A}, tmp_path / "x.safetensors"
    )

    checkpoint = read_checkpoint(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_gathered(checkpoint)

    assert "2 weights have shape [0]: a.weight, b.bias" in str(caught.value)
    assert "zero_to_fp32.py" in str(caught.value)


def test_empty_tensors_that_are_no_weights_pass(tmp_path: Path) -> None:
    save_file({"c": torch.empty(0), "e.weight": torch.empty(0, 3)}, tmp_path / "x.safetensors")

    check_gathered(read_checkpoint(tmp_path / "x.safetensors"))
