"""SIGINT and SIGTERM: the first one stops the work in good order, the second one at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_INTERRUPTED = 130


@contextmanager
def stopping_signals() -> Iterator[None]:
    """Turn both signals into :class:`KeyboardInterrupt`, once, while the block runs.

    After the first one threads end, files are synced, and the journal says what is done. A second
    one does not wait for that; what the journal has by then is what a later run goes on from.
    Does nothing outside the main thread, where signals cannot be handled.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        if came:
            os._exit(_INTERRUPTED)
        came = True
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
