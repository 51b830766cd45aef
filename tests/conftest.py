"""Options and fixtures that all tests share; the helpers behind them lie in ``models.py``.

    pytest                  everything but tests marked ``slow``
    pytest --runslow        everything

Fixtures: ``models`` makes checkpoints below ``tmp_path`` and merges them (see ``models.Models``);
``devices`` makes the engine believe that there are accelerators (see ``fake_backend``);
``old_transformers`` is an older version of that library (see ``old_transformers``).
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from covering import try_all_pairs
from fake_backend import (
    FakeBackend,
    MakeDevices,
    add_up_blocks,
    rank_rows_at_once,
)
from fast import choose_fast
from models import Models
from numpy.typing import NDArray
from old_transformers import install_old_transformers

from streammerge.engine.accelerator import driver, opening, sharing
from streammerge.engine.accelerator.proving import prove

if not torch.cuda.is_available():
    # Read when Triton is imported: kernels run in its interpreter, on tensors of the CPU.
    os.environ["TRITON_INTERPRET"] = "1"


collect_ignore = [] if importlib.util.find_spec("triton") else ["accelerator"]
"""Devices are tested where their kernels can be interpreted."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run tests marked slow too")
    parser.addoption(
        "--fast",
        action="store_true",
        help="run one case of each test, and leave out what takes long",
    )


def pytest_collection_finish() -> None:
    """Let no search for cycles look at what is imported, which stays until the end."""
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    try_all_pairs(all_pairs=config.getoption("--runslow"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--fast"):
        kept = choose_fast(items)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
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


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Hear interrupts, which a shell has the commands ignore that it runs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _no_driver() -> Iterator[None]:
    """Let no device be taken that a test does not name, whatever this machine has."""
    # For all tests at once: what a test changes itself is undone before its fixtures end.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "count_driver_devices", lambda: 0)
        yield


@pytest.fixture
def models(tmp_path: Path) -> Models:
    """Make and merge small models below this test's ``tmp_path``."""
    return Models(tmp_path)


def _multiply_high(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the high halves of products, which Triton's interpreter computes one by one."""
    half, low = np.uint64(32), np.uint64(2**32 - 1)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = a_high * b_low + (a_low * b_low >> half)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> MakeDevices:
    """Return a function that makes two fake devices, with options of :class:`FakeBackend`."""

    def make(*, proves: bool = False, **options: Any) -> dict[str, FakeBackend]:
        # There on Linux alone; it reads its environment when it is imported.
        pytest.importorskip("triton")
        from triton.runtime import interpreter

        from streammerge.engine.accelerator.fused import ranking
        from streammerge.engine.accelerator.fused.running import FusedSteps

        monkeypatch.setattr(interpreter, "np_umulhi_u64", _multiply_high)
        # Trials have tests of their own; before each merge here they would take as long as it.
        monkeypatch.setattr(sharing, "prove", prove if proves else lambda *_: None)
        made = {name: FakeBackend(name, **options) for name in ("cuda:0", "cuda:1")}

        def open_devices(names: Sequence[str]) -> list[FakeBackend]:
            return [made[name] for name in names]

        monkeypatch.setattr(opening, "open_devices", open_devices)
        monkeypatch.setattr(FusedSteps, "total", staticmethod(add_up_blocks))
        monkeypatch.setattr(ranking, "rank_short_rows", rank_rows_at_once)
        monkeypatch.setattr(opening, "count_devices", lambda: len(made))
        return made

    return make


@pytest.fixture(scope="session")
def old_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of packages that shadows the installed transformers with an older one."""
    return install_old_transformers(tmp_path_factory.mktemp("old") / "packages")
