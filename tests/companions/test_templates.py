"""Chat templates by name are the formats that they are called after, and are written where they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import Environment
from models import recipe_of, write_model

import streammerge
from streammerge.companions.templates import AUTO, TEMPLATES, find_template
from streammerge.errors import RecipeError
from streammerge.recipe.accepting import CHAT_TEMPLATES

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ho."},
    {"role": "user", "content": "And?"},
]
RENDERED = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?<|im_end|>\n"
        "<|im_start|>assistant\nHo.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHo.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi? [/INST] Ho.</s>[INST] And? [/INST]",
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi?\n\n### Response:\nHo.</s>\n\n### Instruction:\nAnd?\n\n"
        "### Response:\n"
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi?\n[|assistant|]Ho.[|endofturn|]\n"
        "[|user|]And?\n[|assistant|]"
    ),
}


def test_every_name_has_a_template() -> None:
    assert set(CHAT_TEMPLATES) == {AUTO, *TEMPLATES} == {AUTO, *RENDERED}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_the_formats(name: str) -> None:
    # As transformers sets it up.
    environment = Environment(trim_blocks=True, lstrip_blocks=True)  # noqa: S701 - no HTML
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered = environment.from_string(TEMPLATES[name]).render(
        messages=MESSAGES, add_generation_prompt=True, **tokens
    )

    assert rendered == RENDERED[name]


def write(path: Path, *, template: str | None, in_file: bool = False, config: bool = True) -> Path:
    write_model(path, {"weight": torch.ones(3)})
    if config:
        own = {} if template is None or in_file else {"chat_template": template}
        (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"} | own))
    if in_file and template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


def merged(tmp_path: Path, paths: list[Path], wanted: str) -> dict[str, Any]:
    out = tmp_path / "out"
    streammerge.merge(recipe_of("linear", None, paths, output={"chat_template": wanted}), out)
    assert not (out / "chat_template.jinja").exists()
    found: dict[str, Any] = json.loads((out / "tokenizer_config.json").read_text())
    return found


@pytest.mark.parametrize("in_file", [True, False])
def test_a_template_takes_the_place_of_every_other(in_file: bool, tmp_path: Path) -> None:  # noqa: FBT001
    first = write(tmp_path / "a", template="old {{ x }}", in_file=in_file)

    config = merged(tmp_path, [first], "chatml")

    assert config == {"bos_token": "<s>", "chat_template": TEMPLATES["chatml"]}


def test_a_text_is_taken_as_it_is(tmp_path: Path) -> None:
    text = "{% for m in messages %}“{{ m.content }}”\n{% endfor %}"

    assert merged(tmp_path, [write(tmp_path / "a", template=None)], text)["chat_template"] == text


def test_auto_is_what_most_inputs_have(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / "a", template="one {{ x }}"),
        write(tmp_path / "b", template="two {{ x }}", in_file=True),
        write(tmp_path / "c", template=None),
        write(tmp_path / "d", template="two {{ x }}"),
    ]

    assert merged(tmp_path, paths, "auto")["chat_template"] == "two {{ x }}"
    assert find_template("auto", paths[:2]) == "one {{ x }}"
    assert find_template("auto", paths[2:3]) is None


def test_a_template_without_a_home_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a", template=None, config=False)

    with pytest.raises(RecipeError, match=r"output\.chat_template: is written to tokenizer_config"):
        streammerge.plan(recipe_of("linear", None, [path], output={"chat_template": "llama3"}))


def test_mergekits_key_is_this_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a", template="old {{ x }}")
    config = {
        "merge_method": "linear",
        "models": [{"model": str(path), "parameters": {"weight": 1}}],
        "chat_template": "exaone",
    }
    out = tmp_path / "out"

    streammerge.merge(config, out)

    text = (out / "tokenizer_config.json").read_text()
    assert json.loads(text)["chat_template"] == TEMPLATES["exaone"]
