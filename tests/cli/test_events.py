"""Every line of ``--json`` is an event that the published schema describes, with all of its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from models import Models, write_adapter

from streammerge.cli.arguments import main

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "docs/reference/events.schema.json").read_text())
KINDS = SCHEMA["$defs"]
LINE = ["--method", "linear", "first", "second"]
COMMANDS: dict[str, tuple[list[str], set[str]]] = {
    "a merge": (["merge", *LINE, "-o", "out"], {"recipe", "progress", "done"}),
    "a complete merge": (["merge", *LINE, "-o", "made", "--resume"], {"recipe", "complete"}),
    "two merges": (
        ["merge", "--also", "recipe.yaml", "two", *LINE, "-o", "one"],
        {"recipe", "progress", "done"},
    ),
    "a chain": (["merge", "chain.yaml", "out"], {"progress", "done"}),
    "a part": (["merge", *LINE, "-o", "out", "--part=1/2"], {"recipe", "progress", "part_done"}),
    "a grid": (["merge", "grid.yaml", "out"], {"progress", "done"}),
    "an adapter baked": (["bake", "first", "adapter", "out"], {"recipe", "progress", "done"}),
    "adapters combined": (
        ["merge", "--method", "cat", "adapter", "adapter", "-o", "out"],
        {"recipe", "progress", "done"},
    ),
    "an extraction": (["extract", "first", "second", "out", "--rank=1"], {"progress", "done"}),
    "an estimate": (["plan", *LINE, "--estimate"], {"recipe", "estimate"}),
}
"""Commands that print events, and the kinds that they have to print."""
CODES: dict[str, tuple[list[str], int]] = {
    "done": (["merge", *LINE, "-o", "out"], 0),
    "a damaged result": (["verify", "damaged"], 1),
    "no such model": (["merge", "--method", "linear", "absent", "-o", "out"], 1),
    "no such method": (["merge", "--method", "none", "first", "-o", "out"], 2),
    "a wrong usage": (["merge"], 2),
    "too little memory": (["merge", *LINE, "-o", "out", "--memory", "1MiB"], 3),
    "something is there": (["merge", *LINE, "-o", "made"], 4),
}
"""Commands, and the exit codes that the documentation promises."""


@pytest.fixture(autouse=True)
def place(
    models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Go where what the commands name lies."""
    monkeypatch.chdir(models.root)
    torch.manual_seed(0)
    for name in ("first", "second"):
        models.write({"layer.weight": torch.randn(12, 8)}, name)
    write_adapter(models.root / "adapter", {"layer.weight": (12, 8)}, seed=0)
    sources = "sources: [{path: first}, {path: second}]"
    Path("recipe.yaml").write_text(f"{{method: linear, {sources}}}")
    Path("grid.yaml").write_text(
        f"{{method: linear, {sources}, grid: {{sources.0.weight: [1, 2]}}}}"
    )
    Path("chain.yaml").write_text(
        f"{{name: between, method: linear, {sources}}}\n---\n"
        "{method: linear, sources: [{path: between}, {path: first}]}\n"
    )
    for out in ("made", "damaged"):
        assert main(["merge", *LINE, "-o", out, "--quiet"]) == 0
    Path("damaged/model.safetensors").write_bytes(b"")
    capsys.readouterr()


def read_events(text: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if "event" in line]


@pytest.mark.parametrize("name", COMMANDS)
def test_events_are_what_the_schema_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, kinds = COMMANDS[name]

    assert main([*command, "--json"]) == 0

    events = read_events(capsys.readouterr().out)
    assert {event["event"] for event in events} == kinds
    for event in events:
        jsonschema.validate(event, SCHEMA)
        assert set(event) == set(KINDS[event["event"]]["properties"]), event


def test_every_kind_of_event_is_seen_and_described() -> None:
    seen = {kind for _, kinds in COMMANDS.values() for kind in kinds}

    assert set(KINDS) == seen
    assert [each["$ref"] for each in SCHEMA["oneOf"]] == [f"#/$defs/{kind}" for kind in KINDS]
    properties = [each for kind in KINDS.values() for each in kind["properties"].items()]
    assert all("description" in of or name == "event" for name, of in properties)


def test_the_schema_takes_keys_of_later_versions() -> None:
    jsonschema.validate({"event": "complete", "out": "o", "tensors": 1, "new": True}, SCHEMA)


@pytest.mark.parametrize("name", CODES)
def test_exit_codes_are_what_is_promised(name: str) -> None:
    command, code = CODES[name]

    try:
        assert main(command) == code
    except SystemExit as ended:
        assert ended.code == code  # noqa: PT017 - how argparse ends
