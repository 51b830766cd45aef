"""Progress for people and for scripts: a bar on a terminal, sparse lines elsewhere, JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TextIO

from streammerge.cli.streams import as_courtesy
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.units import format_size

_SECONDS_BETWEEN_LINES = 10.0
"""A log that grows by a line every ten seconds stays readable for a job of hours."""
_SECONDS_BETWEEN_EVENTS = 1.0


@contextmanager
def show_progress(*, quiet: bool, as_json: bool) -> Iterator[OnProgress]:
    """Give a receiver of progress events that shows them as is fit.

    Args:
        quiet: Show nothing on standard error.
        as_json: Write events to standard output, one JSON object per line.
    """
    if as_json:
        yield _JsonLines(as_courtesy(sys.stdout))
    elif quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        # Nothing else needs tqdm, which takes as long to import as numpy does by half.
        from streammerge.cli.bar import Bar, open_bar

        with open_bar() as bar:
            yield Bar(bar)
    else:
        yield _Lines(sys.stderr)


class _Lines:
    """A line now and then."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next = _SECONDS_BETWEEN_LINES

    def __call__(self, event: ProgressEvent) -> None:
        if event.seconds < self._next:
            return
        self._next = event.seconds + _SECONDS_BETWEEN_LINES
        percent = 100 * event.bytes_done / max(event.bytes_total, 1)
        self._stream.write(
            f"{event.activity}: {percent:.0f} %, {format_size(event.bytes_done)} of "
            f"{format_size(event.bytes_total)}, {format_size(int(event.rate))}/s, "
            f"{event.seconds_left:.0f} s left\n"
        )
        self._stream.flush()


class _JsonLines:
    """One object per line, about one per second."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._next = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        finished = event.bytes_done >= event.bytes_total
        if event.seconds < self._next and not finished:
            return
        self._next = event.seconds + _SECONDS_BETWEEN_EVENTS
        fields = {**asdict(event), "event": "progress"}
        if event.seconds_left == float("inf"):
            fields["seconds_left"] = None
        self._stream.write(json.dumps(fields) + "\n")
        self._stream.flush()
