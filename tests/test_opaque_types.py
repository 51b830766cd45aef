"""Element types without arithmetic: copied byte by byte or dropped by rule, never merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors
import yaml
from rawfiles import write_shard

import streammerge
from streammerge.errors import UnsupportedDTypeError

OPAQUE = {"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8}


def stored(path: Path) -> dict[str, dict[str, object]]:
    """Return what the library finds in a file."""
    return dict(safetensors.deserialize(path.read_bytes()))


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, Path]:
    """Write two models whose opaque tensors differ; F4 has two elements in a byte."""
    paths = (tmp_path / "base", tmp_path / "tuned")
    for seed, path in enumerate(paths):
        path.mkdir()
        tensors: dict[str, tuple[str, list[int], bytes]] = {
            f"layers.{layer}.{code}": (
                code,
                [3, 7],
                bytes((7 * i + seed + layer) % 256 for i in range(21 * size)),
            )
            for code, size in OPAQUE.items()
            for layer in (0, 11)
        }
        tensors["layers.0.F4"] = ("F4", [3, 2, 11], bytes((5 * i + seed) % 256 for i in range(33)))
        tensors["layers.0.weight"] = ("F32", [5], bytes(4 * 5))
        write_shard(path / "model.safetensors", tensors)
    return paths


def recipe(inputs: tuple[Path, Path], rules: list[dict[str, object]]) -> dict[str, object]:
    base, tuned = inputs
    return {
        "method": "task_arithmetic",
        "base": str(base),
        "sources": [{"path": str(tuned), "weight": 0.5}],
        "rules": rules,
    }


@pytest.mark.parametrize("copied_from", ["base", 0])
def test_opaque_tensors_are_copied_to_the_byte(
    copied_from: str | int, inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    codes = [*OPAQUE, "F4"]
    rules = [{"tensors": f"*.{code}", "copy": copied_from} for code in codes]

    streammerge.merge(recipe(inputs, rules), tmp_path / "out")

    expected = stored(inputs[copied_from == 0] / "model.safetensors")
    merged = stored(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name in merged:
        assert merged[name] == expected[name]


def test_opaque_tensors_can_be_dropped(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    rules: list[dict[str, object]] = [{"tensors": f"*.{c}", "drop": True} for c in [*OPAQUE, "F4"]]

    streammerge.merge(recipe(inputs, rules), tmp_path / "out")

    assert stored(tmp_path / "out" / "model.safetensors").keys() == {"layers.0.weight"}


def test_the_refusal_lists_them_all_and_its_rules_settle_it(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedDTypeError) as caught:
        streammerge.plan(recipe(inputs, []))

    message = str(caught.value)
    assert "9 tensor(s)" in message
    assert all(f"layers.11.{code}: {code}" in message for code in OPAQUE)
    assert '{tensors: "layers.*.C64", copy: base}' in message
    pasted = yaml.safe_load(message[message.index("rules:") :])
    assert len(pasted["rules"]) == 5
    planned = streammerge.plan(recipe(inputs, pasted["rules"]))
    assert {task.action.value for task in planned.tasks} == {"copy", "merge"}


def test_a_glob_that_would_catch_more_is_not_proposed(tmp_path: Path) -> None:
    paths = (tmp_path / "base", tmp_path / "tuned")
    for path in paths:
        path.mkdir()
        write_shard(
            path / "model.safetensors",
            {
                "0.scale": ("F8_E8M0", [2], b"\1\2"),
                "1.scale": ("F32", [1], bytes(4)),
                'odd"[1]\\ü.scale': ("F8_E8M0", [2], b"\1\2"),
            },
        )

    with pytest.raises(UnsupportedDTypeError) as caught:
        streammerge.plan(recipe(paths, []))

    message = str(caught.value)
    assert '{tensors: "0.*", copy: base}' in message
    pasted = yaml.safe_load(message[message.index("rules:") :])
    planned = streammerge.plan(recipe(paths, pasted["rules"]))
    assert {task.name: task.action.value for task in planned.tasks} == {
        "0.scale": "copy",
        "1.scale": "merge",
        'odd"[1]\\ü.scale': "copy",
    }


def test_inspect_counts_packed_elements(inputs: tuple[Path, Path]) -> None:
    entry = streammerge.read_checkpoint(inputs[0]).tensors["layers.0.F4"]

    assert (entry.numel, entry.nbytes) == (66, 33)
    assert json.loads(json.dumps(entry.dtype)) == "F4"
