"""The models of every architecture, made once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import write_models


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """Return a function from an architecture to its models."""
    known: dict[str, dict[str, Path]] = {}

    def make(architecture: str) -> dict[str, Path]:
        if architecture not in known:
            directory = tmp_path_factory.mktemp(architecture)
            known[architecture] = write_models(directory, architecture)
        return known[architecture]

    return make
