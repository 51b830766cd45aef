"""What people and their tools read first about the project is whole, and says the same everywhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from streammerge.version import VERSION

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GITHUB = ROOT / ".github"
SCHEMAS = {
    "CITATION.cff": "citation-file-format",
    ".github/dependabot.yml": "dependabot",
    **{
        f".github/workflows/{name}.yml": "github-workflows"
        for name in ("docs", "slow", "test", "wheels")
    },
    ".github/ISSUE_TEMPLATE/config.yml": "github-issue-config",
    **{
        f".github/ISSUE_TEMPLATE/{name}.yml": "github-issue-forms"
        for name in ("bug", "method", "model")
    },
}
"""The public schema of each file."""
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_every_file_for_the_forge_has_its_schema_here() -> None:
    found = {str(path.relative_to(ROOT)) for path in GITHUB.rglob("*.yml")}

    assert {*found, "CITATION.cff"} == set(SCHEMAS)


@pytest.mark.parametrize("path", SCHEMAS)
def test_a_file_follows_its_public_schema(path: str) -> None:
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema"]

    done = subprocess.run(
        [*command, f"vendor.{SCHEMAS[path]}", str(ROOT / path)],
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["bug", "method", "model"])
def test_every_form_asks_for_the_plan(name: str) -> None:
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    asked = " ".join(json.dumps(each) for each in form["body"])

    assert "streammerge plan recipe.yaml --json" in asked


def test_hooks_run_before_a_commit_what_the_script_runs_before_the_tests() -> None:
    script = (ROOT / "scripts/test").read_text()
    before = script[: script.index('heading "pytest"')]
    run = re.findall(r'^"\$(?:python"|\(dirname "\$python"\)/)(.*)$', before, re.MULTILINE)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]

    entries = [re.sub(r"^\.venv/bin/(python )?", "", hook["entry"]) for hook in hooks]
    assert len(run) == 5
    assert [line.replace('"', "").strip() for line in run] == entries


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()

    assert citation["version"] == VERSION
    assert re.search(r"^## (\S+)", changelog, re.MULTILINE)[1] == VERSION  # type: ignore[index]


def test_the_licence_is_the_one_that_is_declared() -> None:
    licence = (ROOT / "LICENSE").read_text()

    assert PROJECT["license"] == "Apache-2.0"
    assert licence.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in licence


def test_the_notice_names_every_library_that_is_installed_beside() -> None:
    notice = (ROOT / "NOTICE").read_text()
    needed = {re.match(r"[\w-]+", each)[0] for each in PROJECT["dependencies"]}  # type: ignore[index]

    assert {name for name in needed if name not in notice} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)", text)
    local = [link for link in links if not link.startswith(("https:", "http:"))]

    assert [link for link in local if not (path.parent / link).exists()] == []
