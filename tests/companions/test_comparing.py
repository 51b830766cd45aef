"""Equal shapes do not make equal models: the plan says what differs beside the tensors, and whose is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import tiny
from models import MEMORY, recipe_of, write_adapter, write_model

import streammerge
from streammerge.errors import CheckpointError, RecipeError
from streammerge.plan.codec import dump_plan, parse_plan
from streammerge.plan.types import MergePlan

TENSORS = {"a.weight": torch.ones(4, 4)}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 4,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
    "transformers_version": "4.40.0",
    "torch_dtype": "float32",
    "_name_or_path": "here",
}
VOCABULARY = {"a": 0, "b": 1, "c": 2}


def write(directory: Path, **files: Any) -> Path:
    """Write a model with files beside it, given by names whose dots are spelled __."""
    write_model(directory, TENSORS)
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def plan(base: Path, *sources: Path, **document: Any) -> MergePlan:
    planned = streammerge.plan(
        recipe_of("task_arithmetic", base, sources, **document), memory=MEMORY
    )
    assert isinstance(planned, MergePlan)
    return planned


def lines(planned: MergePlan) -> list[str]:
    return [str(each) for each in planned.differences]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model_type": "qwen2"}, 'config.model_type: "llama" of base is taken; sources[0] "qwen2"'),
        ({"num_attention_heads": 8}, "config.num_attention_heads: 4 of base is taken; sources[0] 8"),
        ({"head_dim": 64}, "config.head_dim: none of base is taken; sources[0] 64"),
        ({"rope_theta": 500000}, "config.rope_theta: 10000 of base is taken; sources[0] 500000"),
        ({"rms_norm_eps": 1e-5}, "config.rms_norm_eps: 1e-06 of base is taken; sources[0] 1e-05"),
        ({"eos_token_id": [2, 7]}, "config.eos_token_id: 2 of base is taken; sources[0] [2, 7]"),
        ({"tie_word_embeddings": True}, "config.tie_word_embeddings: none of base is taken; sources[0] true"),
        ({"text_config": {"layers": 1}}, "config.text_config.layers: none of base is taken; sources[0] 1"),
    ],
)  # fmt: skip
def test_settings_that_change_what_a_model_computes_are_told(
    change: dict[str, Any], line: str, tmp_path: Path
) -> None:
    base = write(tmp_path / "base", config__json=CONFIG)
    source = write(tmp_path / "source", config__json=CONFIG | change)

    planned = plan(base, source)

    assert lines(planned) == [line]
    assert line in str(planned)


@pytest.mark.parametrize(
    "other",
    [
        CONFIG | {"transformers_version": "5.0", "torch_dtype": "bfloat16", "_name_or_path": "x"},
        {k: v for k, v in CONFIG.items() if k != "rope_theta"}
        | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "float16"},
        CONFIG | {"rope_theta": 10000, "rope_scaling": None},
    ],
)
def test_versions_and_spellings_are_no_difference(other: dict[str, Any], tmp_path: Path) -> None:
    base = write(tmp_path / "base", config__json=CONFIG)

    assert not plan(base, write(tmp_path / "source", config__json=other)).differences


def test_the_most_decisive_come_first_and_the_rest_is_counted(tmp_path: Path) -> None:
    more = {f"setting_{number:02}": number for number in range(30)}
    base = write(tmp_path / "base", config__json=CONFIG)
    source = write(tmp_path / "source", config__json=CONFIG | more | {"model_type": "other"})

    planned = plan(base, source)

    assert len(planned.differences) == 31
    assert planned.differences[0].key == "model_type"
    assert "and 19 more differences; --json has all" in str(planned)
    assert parse_plan(dump_plan(planned)) == planned


def test_every_source_that_differs_is_named_and_no_other(tmp_path: Path) -> None:
    base = write(tmp_path / "base", config__json=CONFIG)
    same = write(tmp_path / "same", config__json=CONFIG)
    others = [
        write(tmp_path / f"other-{eos}", config__json=CONFIG | {"eos_token_id": eos})
        for eos in (5, 6)
    ]

    assert lines(plan(base, others[0], same, others[1])) == [
        "config.eos_token_id: 2 of base is taken; sources[0] 5, sources[2] 6"
    ]


def test_adapters_and_models_without_files_say_nothing(tmp_path: Path) -> None:
    base = write(tmp_path / "base", config__json=CONFIG)
    bare = write(tmp_path / "bare")
    adapter = write_adapter(tmp_path / "adapter", {"a.weight": (4, 4)}, seed=1)

    assert not plan(base, bare, adapter).differences


def test_files_that_only_others_have_are_told(tmp_path: Path) -> None:
    base = write(tmp_path / "base", config__json=CONFIG)
    source = write(
        tmp_path / "source",
        config__json=CONFIG,
        generation_config__json={"eos_token_id": 5},
        tokenizer__json={"model": {"vocab": VOCABULARY}},
        chat_template__jinja="{{ messages }}",
    )

    assert lines(plan(base, source)) == [
        "generation_config: none of base is taken; sources[0] has one",
        "tokenizer.vocabulary: none of base is taken; sources[0] has one",
        "chat_template: none of base is taken; sources[0] has one",
    ]


def test_special_tokens_and_templates_are_compared_wherever_they_lie(tmp_path: Path) -> None:
    base = write(
        tmp_path / "base",
        tokenizer_config__json={"eos_token": "</s>", "chat_template": "A"},
        special_tokens_map__json={"bos_token": {"content": "<s>"}},
    )
    same = write(
        tmp_path / "same",
        tokenizer_config__json={"eos_token": {"content": "</s>"}, "bos_token": "<s>"},
        chat_template__jinja="A",
    )
    other = write(
        tmp_path / "other",
        tokenizer_config__json={"eos_token": "<|im_end|>", "bos_token": "<s>"},
        chat_template__json={"chat_template": "B"},
    )

    assert lines(plan(base, same, other)) == [
        'tokenizer.eos_token: "</s>" of base is taken; sources[1] "<|im_end|>"',
        'chat_template.default: "A" of base is taken; sources[1] "B"',
    ]


def tokenizer(**changes: int) -> dict[str, Any]:
    return {"model": {"vocab": {**VOCABULARY, **changes}}}


def test_a_number_with_two_tokens_is_refused_unless_the_recipe_says(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tokenizer__json=tokenizer())
    source = write(
        tmp_path / "source", tokenizer__json={"model": {"vocab": {"a": 0, "c": 1, "b": 2}}}
    )

    with pytest.raises(CheckpointError) as caught:
        plan(base, source)
    said = str(caught.value)
    assert "2 numbers stand for other tokens, the first are 1, 2" in said
    assert "sources[0] and base" in said
    assert "vocabulary: ignore" in said

    planned = plan(base, source, vocabulary="ignore")
    line = "tokenizer.vocabulary: 3 tokens of base is taken; sources[0] 2 numbers stand for other "
    assert lines(planned) == [line + "tokens, the first are 1, 2"]
    manifest = streammerge.merge(planned, tmp_path / "out")
    assert manifest.differences == planned.differences
    written = json.loads((tmp_path / "out" / "streammerge_manifest.json").read_text())
    assert written["differences"][0]["key"] == "vocabulary"


def test_vocabularies_that_differ_at_all_are_refused_where_the_recipe_asks(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tokenizer__json=tokenizer())
    same = write(tmp_path / "same", tokenizer__json={"other": 1, **tokenizer()})
    longer = write(tmp_path / "longer", tokenizer__json=tokenizer(d=3))
    none = write(tmp_path / "none")

    assert lines(plan(base, same, vocabulary="same")) == []
    assert lines(plan(base, none, vocabulary="same")) == []
    with pytest.raises(CheckpointError, match=r"has 4 tokens, and the other 3, of base"):
        plan(base, longer, vocabulary="same")
    with pytest.raises(CheckpointError, match=r"has a vocabulary, and the other has none"):
        plan(none, base, vocabulary="same")


def test_tokens_that_come_after_the_others_are_told_and_accepted(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tokenizer__json=tokenizer())
    source = write(tmp_path / "source", tokenizer__json=tokenizer(d=3))

    assert lines(plan(base, source)) == [
        "tokenizer.vocabulary: 3 tokens of base is taken; sources[0] 4 tokens"
    ]


def test_vocabularies_in_unlike_files_cannot_be_compared(tmp_path: Path) -> None:
    base = write(tmp_path / "base", tokenizer__json=tokenizer())
    source = write(tmp_path / "source", vocab__json=VOCABULARY)

    assert lines(plan(base, source)) == [
        "tokenizer.vocabulary: in another file of base is taken; sources[0] cannot be compared"
    ]


# Whose files go to the output.


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """A raw base, and a chat tune with a tokenizer, a template and other ends of texts."""
    return [
        write(
            tmp_path / "base",
            config__json=CONFIG,
            tokenizer__json=tokenizer(),
            tokenizer_config__json={"eos_token": "</s>"},
            LICENSE="of the base",
        ),
        write(
            tmp_path / "chat",
            config__json=CONFIG | {"eos_token_id": 7},
            generation_config__json={"eos_token_id": 7},
            tokenizer__json=tokenizer(d=3),
            tokenizer_config__json={"eos_token": "d", "chat_template": "T"},
            LICENSE="of the chat model",
        ),
    ]


def merged(tmp_path: Path, two: list[Path], companions: Any) -> dict[str, str]:
    recipe = recipe_of("task_arithmetic", two[0], two[1:], output={"companions": companions})
    streammerge.merge(recipe, tmp_path / "out", memory=MEMORY)
    assert not streammerge.verify_files(tmp_path / "out").damages
    return {
        path.name: path.read_text()
        for path in (tmp_path / "out").iterdir()
        if path.suffix in {"", ".json", ".jinja"}
    }


def test_by_default_all_is_of_the_base(tmp_path: Path, two: list[Path]) -> None:
    assert merged(tmp_path, two, "base")["tokenizer_config.json"] == json.dumps(
        {"eos_token": "</s>"}
    )
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("by", ["index", "path"])
def test_all_can_be_taken_from_a_source(by: str, tmp_path: Path, two: list[Path]) -> None:
    found = merged(tmp_path, two, 0 if by == "index" else str(two[1]))

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert found[name] == (two[1] / name).read_text(), name
    assert json.loads(found["config.json"])["eos_token_id"] == 7


def test_each_kind_can_be_taken_from_elsewhere(tmp_path: Path, two: list[Path]) -> None:
    found = merged(tmp_path, two, {"tokenizer": 0})

    assert json.loads(found["config.json"])["eos_token_id"] == 2
    assert "generation_config.json" not in found
    # The template comes with the tokenizer.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert found[name] == (two[1] / name).read_text(), name


def test_a_template_moves_into_another_tokenizer(tmp_path: Path, two: list[Path]) -> None:
    found = merged(tmp_path, two, {"chat_template": 0})

    assert found["tokenizer.json"] == (two[0] / "tokenizer.json").read_text()
    assert json.loads(found["tokenizer_config.json"]) == {"eos_token": "</s>", "chat_template": "T"}


def test_a_template_in_a_file_takes_the_place_of_one_in_the_tokenizer(
    tmp_path: Path, two: list[Path]
) -> None:
    (two[0] / "chat_template.jinja").write_text("of the base")

    found = merged(tmp_path, two, {"tokenizer": 0, "chat_template": "base"})

    assert found["chat_template.jinja"] == "of the base"
    assert json.loads(found["tokenizer_config.json"]) == {"eos_token": "d"}


def test_a_directory_that_takes_no_part_can_lend_its_files(tmp_path: Path, two: list[Path]) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tokenizer.json").write_text(json.dumps(tokenizer(e=4)))

    found = merged(tmp_path, two, {"tokenizer": str(elsewhere)})

    assert json.loads(found["tokenizer.json"]) == tokenizer(e=4)
    assert "tokenizer_config.json" not in found


def test_the_plan_says_from_where_and_what_is_left_behind(tmp_path: Path, two: list[Path]) -> None:
    (two[0] / "spk_dict.pt").touch()
    (two[0] / "assets").mkdir()
    planned = plan(*two, output={"companions": {"tokenizer": 0, "config": "base"}})

    assert planned.left_behind == (
        "assets/",
        "spk_dict.pt",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    text = str(planned)
    assert "left behind  assets/, spk_dict.pt, tokenizer.json, tokenizer_config.json" in text
    assert "LICENSE, config.json (" in text
    nbytes = sum(
        (two[1] / name).stat().st_size for name in ("tokenizer.json", "tokenizer_config.json")
    )
    assert f"tokenizer.json, tokenizer_config.json ({nbytes} B), from {two[1]}" in text
    assert "config.eos_token_id: 2 of base is taken; sources[0] 7" in text
    assert 'tokenizer.eos_token: "d" of sources[0] is taken; base "</s>"' in text
    assert parse_plan(dump_plan(planned)) == planned
    assert streammerge.merge(planned, tmp_path / "out").left_behind == planned.left_behind


@pytest.mark.parametrize(
    ("companions", "says"),
    [
        ({"generation_config": "base"}, "output.companions.generation_config: "),
        ({"chat_template": "base"}, "output.companions.chat_template: "),
        (1, "output.companions: expected the index of one of 1 sources, 0 to 0, got 1"),
        ({"config": 3}, "output.companions.config: expected the index of one of 1 sources"),
        ({"tokeniser": 0}, 'unknown key; did you mean "tokenizer"'),
        (-1, "expected base, the index of a source counted from 0, or a directory, got -1"),
        (None, "or a directory, got null"),
        (True, "or a directory, got true"),
        ("", 'or a directory, got ""'),
        ("nowhere", "nowhere: cannot be listed"),
    ],
)
def test_what_is_not_there_cannot_be_taken(companions: Any, says: str, two: list[Path]) -> None:
    with pytest.raises(streammerge.StreamMergeError) as caught:
        plan(*two, output={"companions": companions})

    assert says in str(caught.value)


def test_base_needs_a_base(two: list[Path]) -> None:
    recipe = recipe_of("linear", None, two, output={"companions": {"config": "base"}})

    with pytest.raises(RecipeError, match="the recipe has no base to take files from"):
        streammerge.plan(recipe, memory=MEMORY)


def test_the_recipe_of_the_output_says_the_same_again(tmp_path: Path, two: list[Path]) -> None:
    merged(tmp_path, two, {"tokenizer": 0, "config": "base", "chat_template": str(two[1])})

    recipe = tmp_path / "out" / "streammerge_recipe.yaml"
    again = streammerge.merge(recipe, tmp_path / "again", memory=MEMORY)

    first = json.loads((tmp_path / "out" / "streammerge_manifest.json").read_text())
    assert {n: f.digest for n, f in again.files.items() if n != "README.md"} == {
        n: f["digest"] for n, f in first["files"].items() if n != "README.md"
    }


def test_a_merge_with_other_companions_is_another_merge(tmp_path: Path, two: list[Path]) -> None:
    streammerge.merge(plan(*two), tmp_path / "out")

    with pytest.raises(streammerge.StreamMergeError):
        streammerge.merge(
            plan(*two, output={"companions": {"chat_template": 0}}), tmp_path / "out", resume=True
        )


def test_what_transformers_loads_is_what_was_chosen(tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    base, source = tiny.llama(), tiny.llama(rope_theta=77.0)
    base.save_pretrained(tmp_path / "base")
    source.generation_config.eos_token_id = 9
    source.save_pretrained(tmp_path / "source")
    recipe = recipe_of(
        "linear",
        None,
        [tmp_path / "base", tmp_path / "source"],
        output={"companions": {"config": 0, "generation_config": 1}},
    )

    planned = streammerge.plan(recipe, memory=MEMORY)
    streammerge.merge(planned, tmp_path / "out")

    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 10000.0
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 9
    assert "config.rope_theta: 10000 of sources[0] is taken; sources[1] 77" in str(planned)


def test_what_the_base_has_is_not_lost_to_a_source_without(tmp_path: Path, two: list[Path]) -> None:
    adapter = write_adapter(tmp_path / "adapter", {"a.weight": (4, 4)}, seed=1)
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer()))

    with pytest.raises(RecipeError, match=r"output\.companions\.config: .*adapter has no files"):
        plan(two[0], adapter, output={"companions": 0})
    planned = plan(two[0], adapter, output={"companions": {"tokenizer": 0}})
    origins = {each.name: each.directory for each in planned.companions}
    assert (origins["tokenizer.json"], origins["config.json"]) == (str(adapter), None)
