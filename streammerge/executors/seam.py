"""What is asked of an engine that runs parts of a merge: to submit and to gather.

    driver ── Request ──▶ engine ──▶ worker ──▶ a process of its own ──▶ Outcome ──▶ driver

A new engine is a file beside this one with a class that has these methods, and a line in
:data:`streammerge.executors.apart.ENGINES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from streammerge import errors
from streammerge.errors import StageError, StreamMergeError

Request = dict[str, Any]
"""What a process needs to do a part: plain data, whose keys :mod:`streammerge.executors.unit` reads."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a part."""

    part: int
    """Which, from 1."""
    host: str
    """Where; empty where that is not known."""
    lost: str | None = None
    """How the process ended that did it, or its worker; None if it ended by itself."""
    error: dict[str, Any] | None = None
    """The error that ended it, as :func:`describe_error` has it; None if the part is done."""


class Executor(Protocol):
    """An engine, connected."""

    def workers(self) -> int:
        """Return how many workers there are now; 0 too while the engine cannot be reached."""
        ...

    def idle(self) -> int:
        """Return how many parts may be submitted now."""
        ...

    def running(self) -> int:
        """Return how many parts were submitted and are not gathered."""
        ...

    def submit(self, request: Request) -> None:
        """Have one part done, by a worker that has nothing else to do."""
        ...

    def gather(self, seconds: float) -> Sequence[Outcome]:
        """Return what has ended, of what was submitted and not returned yet; wait a while for the first.

        Raises:
            ClusterError: The engine failed.
        """
        ...

    def close(self) -> None:
        """Let go of the engine; what was submitted and has not begun is forgotten."""
        ...


def describe_error(error: StreamMergeError) -> dict[str, Any]:
    """Return an error as plain data, for another process."""
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "notes": list(getattr(error, "__notes__", ())),
    }


def restore_error(found: dict[str, Any]) -> StreamMergeError:
    """Return the error that another process described, as if it had been raised here."""
    kind = getattr(errors, str(found.get("kind")), StageError)
    if not (isinstance(kind, type) and issubclass(kind, StreamMergeError)):
        kind = StageError
    error = kind(str(found.get("message")))
    notes: Sequence[str] = found.get("notes") or ()
    for note in notes:
        error.add_note(note)
    return error
