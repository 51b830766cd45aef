"""What a file holds beside its tensors is left out, and the plan, the manifest and inspect tell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from models import assert_same_model, load_model, recipe_of
from safetensors.torch import save_file

import streammerge
from streammerge.checkpoint.outputform import MANIFEST_NAME
from streammerge.cli.arguments import main

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
LEFT_OUT = "'epoch' (int), 'optimizer_states' (list)"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    beside = {"epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}]}
    torch.save({"state_dict": TENSORS} | beside, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_a_training_checkpoint_merges_as_its_state_dict(checkpoint: Path, tmp_path: Path) -> None:
    planned = streammerge.plan(recipe_of("linear", None, [checkpoint, checkpoint]))
    streammerge.merge(planned, tmp_path / "out")

    assert_same_model(load_model(tmp_path / "out"), TENSORS)
    rows = [line for line in str(planned).splitlines() if line.startswith("left out")]
    assert rows == [f"left out     {LEFT_OUT} of {checkpoint}"]
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert manifest["inputs"][0]["left_out"] == LEFT_OUT.split(", ")


def test_inspect_tells_what_is_left_out(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoint)]) == 0
    assert f"{LEFT_OUT} of last.ckpt" in capsys.readouterr().out

    assert main(["inspect", str(checkpoint), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"][0]["left_out"] == LEFT_OUT.split(", ")
    assert document["notes"] == []


def test_a_plan_of_plain_files_has_no_such_row(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "x.bin")

    planned = streammerge.plan(recipe_of("linear", None, [tmp_path / "x.bin"]))

    assert "left out" not in str(planned)


def test_inspect_tells_what_an_index_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    index = {"weight_map": {"b": "one.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    assert main(["inspect", str(tmp_path)]) == 0

    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert row.endswith(
        "1 tensor(s) are in the shards and not in the index, and left out: a.weight"
    )
