"""The documentation builds without a warning, opens without a network, and leads to all of its pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import streammerge
from streammerge.cli.arguments import build_parser
from streammerge.methods import discover_methods

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(needed)
    root = tmp_path_factory.mktemp("site")
    # As scripts/docs does, which a test below compares.
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "-q"]
    places = ["-d", str(root / "trees"), "-b", "html", str(DOCS), str(root / "site")]
    done = subprocess.run([*command, *places], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return root / "site"


def test_every_page_is_built_and_can_be_found(site: Path) -> None:
    index = (site / "index.html").read_text()

    assert [page for page in PAGES if not (site / f"{page}.html").is_file()] == []
    assert [page for page in PAGES if f'href="{page}.html"' not in index and page != "index"] == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in PAGES:
        text = (site / f"{page}.html").read_text()
        fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)', text)
        assert fetched == [], page


def test_schemas_can_be_had_by_their_names(site: Path) -> None:
    for name in ("recipe.schema.json", "events.schema.json"):
        assert json.loads((site / name).read_text())["$schema"].startswith(
            "https://json-schema.org"
        )


def test_the_script_builds_in_the_same_way() -> None:
    script = (ROOT / "scripts/docs").read_text()

    assert "-m sphinx --fail-on-warning --keep-going" in script
    assert "update_docs.py --check" in script


def test_python_names_that_are_public_are_documented() -> None:
    text = (DOCS / "reference/python.md").read_text()
    public = set(streammerge.__all__) - {"__version__", "functional", "StreamMergeError"}

    assert {name for name in public if not re.search(rf"[ .]{name}$", text, re.MULTILINE)} == set()


def test_commands_keys_and_methods_are_documented() -> None:
    commands = (DOCS / "reference/cli.md").read_text()
    recipe = (DOCS / "reference/recipe.md").read_text()
    methods = (DOCS / "reference/methods.md").read_text()
    schema = json.loads((DOCS / "recipe.schema.json").read_text())
    names = next(
        each.choices for each in build_parser()._actions if each.dest != "help" and each.choices
    )

    assert {name for name in names if f"\n## {name}\n" not in commands} == set()
    assert {key for key in schema["properties"] if f"| `{key}` |" not in recipe} == set()
    output = schema["$defs"]["OutputDocument"]["properties"]
    assert {key for key in output if f"| `output.{key}` |" not in recipe} == set()
    assert {name for name in discover_methods() if f"\n### {name}\n" not in methods} == set()
