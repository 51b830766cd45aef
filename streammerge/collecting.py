"""When the interpreter looks for unreachable cycles of objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Do not look for unreachable cycles meanwhile, in any thread.

    A plan of 50,000 tensors is a million objects and no cycle, and looking through all that there are each
    time when there are a quarter more takes as long as planning does.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
