"""Options and fixtures that all tests share; the helpers behind them lie in ``models.py``.

    pytest                  everything but tests marked ``slow``
    pytest --runslow        everything

Fixtures: ``models`` makes checkpoints below ``tmp_path`` and merges them (see ``models.Models``).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import Models


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--runslow"):
        return
    skip = pytest.mark.skip(reason="slow; run with --runslow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Compute what is expected on one thread.

    Two that wait for each other are several times slower on a busy machine. That results do not
    depend on it has a test of its own.
    """
    torch.set_num_threads(1)


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """Make and merge small models below this test's ``tmp_path``."""
    return Models(tmp_path)
