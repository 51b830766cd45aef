"""SIGINT, SIGTERM and SIGHUP: a merge is stopped in good order, everything else at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_INTERRUPTED = 130


def leave_on_signals() -> None:
    """End the process, with a line and without a traceback, when a signal comes from now on.

    Wherever it is: while modules are imported, an exception may be swallowed or reported by whoever
    imports them. What is to be left in good order is done within :func:`stopping_signals`.
    """
    for number in _stopping():
        signal.signal(number, _leave)


@contextmanager
def stopping_signals() -> Iterator[None]:
    """Turn the signals into :class:`KeyboardInterrupt`, once, while the block runs.

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

    before = {number: signal.signal(number, stop) for number in _stopping()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopping() -> list[signal.Signals]:
    """Return the signals that stop; a terminal that closes sends SIGHUP, which nohup ignores."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def _leave(_number: int, _frame: FrameType | None) -> None:
    # Not through sys.stderr, which may be in the middle of a write; nor need anybody read it.
    with contextlib.suppress(OSError):
        os.write(2, b"interrupted\n")
    os._exit(_INTERRUPTED)
