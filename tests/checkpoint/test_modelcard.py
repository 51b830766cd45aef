"""The model card is valid for the hub, says what was merged, and shows hostile text as text."""

from __future__ import annotations

import re

import pytest
import yaml

from streammerge.checkpoint.modelcard import render_model_card

RECIPE = "method: ties\nbase: org/base\nparameters: {density: 0.2}\n"
MODELS = (("base", "org/base"), ("sources[0]", "./models/math"), ("sources[1]", "lab/code-7B.v2"))


def card(**changes: object) -> str:
    arguments = {
        "title": "merged-7B",
        "method": "ties",
        "summary": "Trims task vectors and elects a sign.",
        "reference": "Yadav et al. 2023, arXiv:2306.01708",
        "recipe_yaml": RECIPE,
        "models": MODELS,
        "version": "0.1.0",
        "library_name": "transformers",
    }
    return render_model_card(**(arguments | changes))


def front_matter(text: str) -> object:
    start, block, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def fenced(text: str) -> str:
    """Return the content of the one fenced block, as CommonMark finds it."""
    opening = re.search(r"^(`{3,})yaml\n", text, flags=re.MULTILINE)
    assert opening is not None
    closing = re.compile(rf"^ {{0,3}}`{{{len(opening[1])},}}[ \t]*$", flags=re.MULTILINE)
    rest = text[opening.end() :]
    end = closing.search(rest)
    assert end is not None
    assert rest[end.end() :] == "\n"
    return rest[: end.start()]


def test_the_whole_card() -> None:
    assert card() == (
        "---\n"
        "tags:\n"
        "- merge\n"
        "- streammerge\n"
        "library_name: transformers\n"
        "base_model:\n"
        "- org/base\n"
        "- lab/code-7B.v2\n"
        "---\n"
        "\n"
        "# merged-7B\n"
        "\n"
        "This model was merged with streammerge 0.1.0.\n"
        "\n"
        "## What was merged\n"
        "\n"
        "| Role | Model |\n"
        "| --- | --- |\n"
        "| base | `org/base` |\n"
        "| sources\\[0\\] | `./models/math` |\n"
        "| sources\\[1\\] | `lab/code-7B.v2` |\n"
        "\n"
        "## How\n"
        "\n"
        "Method: `ties`. Trims task vectors and elects a sign. Reference: Yadav et al. 2023, "
        "[arXiv:2306.01708](https://arxiv.org/abs/2306.01708).\n"
        "\n"
        "The recipe:\n"
        "\n"
        "```yaml\n"
        "method: ties\n"
        "base: org/base\n"
        "parameters: {density: 0.2}\n"
        "```\n"
    )


def test_front_matter_names_no_library_and_no_base_that_is_not_known() -> None:
    text = card(library_name=None, models=[("base", "/data/base")])

    assert front_matter(text) == {"tags": ["merge", "streammerge"]}


@pytest.mark.parametrize(
    "name",
    [
        "base",  # no organisation: old hub ids look so, and so do folders
        "models/base",  # the usual folder
        "Checkpoints/base",
        "/models/base",
        "./org/base",
        "../base",
        "~/base",
        "org/base/",
        "org/sub/base",
        "org\\base",
        "org/model.safetensors",
        "org/base\n- evil/model",
        "org/base: x",
        "órg/base",
        "",
    ],
)
def test_a_local_path_is_no_base_model(name: str) -> None:
    assert "base_model" not in front_matter(card(models=[("base", name)]))


def test_a_path_into_the_hub_cache_is_shown_as_the_model_it_holds() -> None:
    path = "/home/someone/.cache/huggingface/hub/models--org--my--base/snapshots/4c1f/"
    text = card(models=[("base", path), ("sources[0]", "org/my--base")])

    assert front_matter(text)["base_model"] == ["org/my--base"]
    assert "| base | `org/my--base` |" in text
    assert "someone" not in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/someone/models/base", "base"),
        ("/home/someone/models/base/", "base"),
        ("~/models/base.safetensors", "base.safetensors"),
        ("C:\\Users\\someone\\base", "base"),
        ("/home/someone/.cache/huggingface/hub/models--org--m/snapshots/4c1f", "org/m"),
        ("models/base", "models/base"),
        ("org/base", "org/base"),
        ("/", "/"),
    ],
)
def test_no_folder_of_the_machine_is_published(name: str, shown: str) -> None:
    recipe = yaml.safe_dump(
        {"method": "ties", "base": name, "sources": [{"path": name, "weight": 1.0}]},
        sort_keys=False,
    )

    text = card(models=[("base", name)], recipe_yaml=recipe)

    assert "someone" not in text
    assert f"| base | `{shown}` |" in text
    expected = {"method": "ties", "base": shown, "sources": [{"path": shown, "weight": 1.0}]}
    assert yaml.safe_load(fenced(text)) == expected


@pytest.mark.parametrize("name", ["yes/no", "1.0/2", "null/null"])
def test_ids_that_yaml_could_misread_stay_text(name: str) -> None:
    assert front_matter(card(models=[("base", name)]))["base_model"] == [name]


def test_a_library_name_cannot_add_keys() -> None:
    name = "x\nlicense: mit\n---\n"

    assert yaml.safe_load(card(library_name=name).split("\n---\n\n# ")[0][4:]) == {
        "tags": ["merge", "streammerge"],
        "library_name": name,
        "base_model": ["org/base", "lab/code-7B.v2"],
    }


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        RECIPE.rstrip("\n"),  # no newline at the end
        "a: |\n  ```\n  b\n  ```\n",
        "```\n# Not the recipe\n",
        "`````\n",
        "   ``````````   \n````\n",
        "---\na: 1\n",
        "",
    ],
)
def test_the_recipe_stands_whole_in_one_block(recipe: str) -> None:
    block = fenced(card(recipe_yaml=recipe))

    assert block.removesuffix("\n") == recipe.removesuffix("\n")


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("a|b", "`a\\|b`"),
        ("a`b", "``a`b``"),
        ("`a``", "``` `a`` ```"),
        ("a\n\n# b", "`a\\n\\n# b`"),
        ("a\r\u2028b", "`a\\r\\u2028b`"),
        ("a\udcff", "`a\\udcff`"),  # a byte in a path that is not UTF-8
        ("<script>", "`<script>`"),
        ("models/größe", "`models/größe`"),
    ],
)
def test_a_hostile_name_stays_in_its_cell(name: str, cell: str) -> None:
    text = card(models=[("base", name)])

    assert f"\n| base | {cell} |\n\n## How\n" in text
    text.encode("utf-8")


def test_a_hostile_title_is_one_line_of_plain_text() -> None:
    text = card(title="a\n---\n<b>[x](y)`*")

    assert r"# a\\n---\\n\<b\>\[x\](y)\`\*" in text.splitlines()
    assert front_matter(text) == front_matter(card())


def test_a_method_without_reference_has_no_reference() -> None:
    text = card(reference="")

    assert "Reference" not in text
    assert "Trims task vectors and elects a sign.\n" in text


def test_equal_arguments_give_equal_text() -> None:
    assert card() == card()


def test_no_folder_of_an_adapter_or_of_a_tokenizer_is_published() -> None:
    recipe = (
        "sources:\n- path: /home/me/a\n  adapter: /home/me/lora\noutput:\n  companions:\n"
        "    config: 1\n    tokenizer: /home/me/tokens\n    chat_template: base\n"
    )

    text = card(recipe_yaml=recipe)

    assert "/home/me" not in text
    assert '  adapter: "lora"' in text
    assert '    tokenizer: "tokens"' in text
    assert "    config: 1\n" in text
    assert "    chat_template: base\n" in text
