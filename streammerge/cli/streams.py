"""Standard input, output and error of a process: nothing that becomes of them ends the work.

A stream may be closed, its disk full, its reader dead, its terminal gone. What a command was asked
to print then fails by name; what is only nice to know is dropped.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO, cast

from streammerge.errors import OutputError


def prepare_streams() -> None:
    """Make the standard streams of this process ones that anything may be written to.

    Every closed one is taken, characters that an encoding lacks are escaped, and standard error
    drops what cannot be written.
    """
    _take_closed()
    sys.stdout = sys.stdout or open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stderr = as_courtesy(sys.stderr)


def _take_closed() -> None:
    """Put something in the place of each standard stream that is closed.

    Otherwise the next file that is opened gets its number, and whatever prints there writes into a
    model. Opened the wrong way round, so that using it fails as using a closed one does.
    """
    for number, wrong_way in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one: those below are taken.
            os.open(os.devnull, wrong_way)


def print_result(text: str) -> None:
    """Print what a command was asked for on standard output, all of it.

    Raises:
        BrokenPipeError: Its reader has gone, as ``| head`` does.
        OutputError: It cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            f"standard output: cannot be written: {error.strerror}; give it a file, a pipe or a "
            "terminal that takes it"
        ) from error


def as_courtesy(stream: TextIO) -> TextIO:
    """Return the stream for what is nice to know: what it cannot take is dropped."""
    return cast("TextIO", _Courtesy(stream))


class _Courtesy:
    """A text stream whose writes never fail; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # Full, closed, or read by nobody: progress that nobody sees is no reason to end a merge.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        # As above; what was not written lies in a buffer until now.
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
