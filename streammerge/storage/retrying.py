"""What is tried again: connections that end, servers that are busy. Not: what is refused."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from streammerge.errors import CheckpointError

ATTEMPTS = 6
"""Requests for the same bytes before it is given up: with the pauses, about a quarter of a minute."""
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 20.0
"""However long a server asks to be left alone: a resume goes on later."""

_T = TypeVar("_T")


class PassingError(Exception):
    """A failure that may pass."""

    def __init__(self, reason: str, *, pause: float | None = None) -> None:
        """Make the error.

        Args:
            reason: What happened, without addresses and credentials.
            pause: For how many seconds the server asks to be left alone; None where it does not.
        """
        super().__init__(reason)
        self.pause = pause


def persist(url: str, attempt: Callable[[], _T]) -> _T:
    """Return what an attempt returns, made again while it fails in ways that may pass.

    Args:
        url: What it is about, for messages.
        attempt: Asks the server once.

    Raises:
        CheckpointError: It failed every time.
    """
    failures: list[PassingError] = []
    while True:
        try:
            return attempt()
        except PassingError as error:
            failures.append(error)
        if len(failures) == ATTEMPTS:
            raise CheckpointError(
                f"{url}: {ATTEMPTS} attempts failed, the last one: {failures[-1]}; what is merged stays, "
                "--resume goes on"
            ) from failures[-1]
        time.sleep(_pause(len(failures), failures[-1].pause))


def _pause(failed: int, asked: float | None) -> float:
    """Return how long to wait: twice as long each time, and not all readers at the same moment."""
    usual = _FIRST_PAUSE_SECONDS * 2.0 ** (failed - 1) * random.uniform(0.5, 1.5)  # noqa: S311 - it only spreads requests
    return min(_LONGEST_PAUSE_SECONDS, max(usual, asked or 0.0))
