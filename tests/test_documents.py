"""What the documentation takes from the code is up to date."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("update_docs", ROOT / "scripts" / "update_docs.py")


def test_generated_documents_are_current():
    assert SPEC is not None
    assert SPEC.loader is not None
    update_docs = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(update_docs)

    for path, text in update_docs.render_documents().items():
        assert text == path.read_text(encoding="utf-8"), f"run scripts/update_docs.py for {path}"


@pytest.mark.parametrize("path", sorted((ROOT / "streammerge").rglob("*.py")), ids=lambda p: p.name)
def test_modules_stay_under_five_hundred_lines(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())

    assert lines < 500, f"{path} has {lines} lines; split it"
