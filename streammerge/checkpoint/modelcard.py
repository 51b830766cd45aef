"""The model card of a merged model: ``README.md`` as the Hugging Face hub reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from streammerge.checkpoint.inputs import open_input, parse_json_object, read_exactly
from streammerge.errors import printable

_ARXIV = re.compile(r"arXiv:([0-9]{4}\.[0-9]{4,5})")
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/([A-Za-z0-9][\w.-]*)", flags=re.ASCII)
_HUB_CACHE = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/")
# Lines of a canonical recipe that name a model.
_PATH_LINE = re.compile(
    r"^(base: |- path: |  adapter: |    (?:config|generation_config|tokenizer|chat_template): )(.+)$",
    flags=re.MULTILINE,
)
_ABSOLUTE = re.compile(r"[/~]|[A-Za-z]:[/\\]|\\\\")
_WEIGHT_FILE = re.compile(r".*\.(safetensors|json|bin|pt|pth)")
# "models/math" reads like a hub id and is a folder. The hub gives none of these names to anyone who
# publishes models; a false entry would show a made-up ancestor on the model's page.
_FOLDERS = frozenset(
    {"models", "model", "checkpoints", "checkpoint", "weights", "outputs", "output", "out"}
    | {"runs", "data", "datasets", "spaces", "tmp", "home", "mnt", "results", "experiments"}
)

# Files that only one library writes.
_LIBRARIES = (
    ("model_index.json", "diffusers"),
    ("modules.json", "sentence-transformers"),
    ("open_clip_config.json", "open_clip"),
)


def render_model_card(
    *,
    title: str,
    method: str,
    summary: str,
    reference: str,
    recipe_yaml: str,
    models: Sequence[tuple[str, str]],
    version: str,
    library_name: str | None,
) -> str:
    """Return a model card that says what was merged and how; equal arguments give equal text.

    Args:
        title: Heading; the name of the output.
        method: Name of the merge method.
        summary: What the method does, in one sentence of Markdown.
        reference: Where the method comes from; arXiv ids become links. May be empty.
        recipe_yaml: The recipe, shown as it is but for the models' paths from the root, of which
            only the last part is shown: a card is published.
        models: Role and name of each model, such as ``("base", "org/name")``. Names that are hub
            ids, or paths into the hub's cache, are listed as ``base_model``; other paths are not,
            and of those from the root the last part is shown.
        version: Version of streammerge.
        library_name: The library that loads the model, such as ``"transformers"``; None names none.

    Returns:
        Markdown with YAML front matter, ending in a newline.
    """
    front_matter: dict[str, object] = {"tags": ["merge", "streammerge"]}
    if library_name is not None:
        front_matter["library_name"] = library_name
    hub_ids = [hub_id for _, name in models if (hub_id := _hub_id(name)) is not None]
    if hub_ids:
        # The same model may take part twice, with two weights.
        front_matter["base_model"] = list(dict.fromkeys(hub_ids))
    rows = "\n".join(
        f"| {_table_cell(_plain(role))} | {_table_cell(_code(_public(name)))} |"
        for role, name in models
    )
    linked = _ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", reference)
    sentences = [f"Method: {_code(method)}.", summary, f"Reference: {linked}." if reference else ""]
    recipe_yaml = _PATH_LINE.sub(_public_line, recipe_yaml)
    fence = _fence(recipe_yaml, 3)
    ending = "" if recipe_yaml.endswith("\n") else "\n"
    return f"""\
---
{yaml.safe_dump(front_matter, sort_keys=False)}---

# {_plain(title)}

This model was merged with streammerge {_plain(version)}.

## What was merged

| Role | Model |
| --- | --- |
{rows}

## How

{" ".join(sentence for sentence in sentences if sentence)}

The recipe:

{fence}yaml
{recipe_yaml}{ending}{fence}
"""


def find_library(directory: Path) -> str | None:
    """Return the library that loads what is in a directory; None if no file there says.

    Args:
        directory: A merged model, its configuration written.

    Raises:
        CheckpointError: Its configuration cannot be read.
        HeaderError: It is not a JSON object.
    """
    for name, library in _LIBRARIES:
        if (directory / name).is_file():
            return library
    path = directory / "config.json"
    if not path.is_file():
        return None
    with open_input(path) as (stream, status):
        raw = read_exactly(stream, status.st_size, path=path)
    config = parse_json_object(raw, where=str(path), parse_constant=float)
    if "_diffusers_version" in config or "_class_name" in config:
        return "diffusers"
    return "timm" if "pretrained_cfg" in config else "transformers"


def _hub_id(name: str) -> str | None:
    """Return the ``org/name`` that a model's name or its path in the hub's cache spells."""
    cached = _HUB_CACHE.search(name.replace("\\", "/"))
    candidate = f"{cached[1]}/{cached[2]}" if cached else name
    parts = _HUB_ID.fullmatch(candidate)
    if parts is None or parts[1].lower() in _FOLDERS or _WEIGHT_FILE.fullmatch(candidate):
        return None
    return candidate


def _public(name: str) -> str:
    """Return a model's name without the folders of the machine that it lies on."""
    hub_id = _hub_id(name)
    if hub_id is not None:
        return hub_id
    if not _ABSOLUTE.match(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or name


def _public_line(line: re.Match[str]) -> str:
    """Return a line of a recipe with a path that may be published."""
    try:
        path = yaml.safe_load(line[2])
    except yaml.YAMLError:
        return line[0]
    if not isinstance(path, str) or _public(path) == path:
        return line[0]
    return f"{line[1]}{json.dumps(_public(path), ensure_ascii=False)}"


def _plain(text: str) -> str:
    """Return the text as one line that Markdown shows as it is."""
    return re.sub(r"([\\`*<>\[\]])", r"\\\1", printable(text))


def _code(text: str) -> str:
    """Return the text as one line of code."""
    line = printable(text)
    fence = _fence(line, 1)
    padding = " " if line[:1] in {"`", " "} or line[-1:] in {"`", " "} else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def _table_cell(markdown: str) -> str:
    # Tables are split before code is recognised, so a bar needs its backslash there too.
    return markdown.replace("|", "\\|")


def _fence(text: str, shortest: int) -> str:
    """Return more backticks than stand anywhere in a row in the text."""
    return "`" * max([shortest, *(len(run) + 1 for run in re.findall("`+", text))])
