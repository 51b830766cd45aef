"""Steps with time limits, one after the other: what fails or takes too long ends itself alone.

A step has a limit of its own, and all of them together have one, too. A step that no longer fits is
left out, with the reason; so is one that needs what an earlier step did not bring about.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Self

from benchmarks.measuring import kill_group

Status = Literal["passed", "failed", "left out"]
LOG_NBYTES = 2**20
"""Of a whole log; what comes later is dropped, and the log says so."""
OUTPUT_NBYTES = 48 * 2**10
"""Of one command's output: its end, where failures are told."""
_SHORT = 400


@dataclass(frozen=True, slots=True)
class Limit:
    """A moment until which something has to be done."""

    at: float
    """Seconds on the clock of ``time.monotonic``."""

    def left(self) -> float:
        """Return the seconds that are left; never less than 0."""
        return max(0.0, self.at - time.monotonic())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step."""

    values: dict[str, Any] = field(default_factory=dict)
    """What it found, as JSON; a step that failed may have found a part."""
    failure: str | None = None
    """Why it failed; None when it passed."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of several."""

    name: str
    """What results call it."""
    run: Callable[[Limit], Outcome]
    """Does it within a limit; whatever it raises is its failure."""
    limit_seconds: float
    """How long it may take."""
    least_seconds: float = 5.0
    """With less time left it is not begun."""
    keep_seconds: float = 0.0
    """Time that is left to the steps after it."""
    needs: tuple[str, ...] = ()
    """Steps that have to have passed."""
    obstacle: Callable[[], str | None] = lambda: None
    """Says, when its turn comes, why it cannot be done here; None if it can."""


@dataclass(frozen=True, slots=True)
class Record:
    """What became of a step."""

    name: str
    """The step's name."""
    status: Status
    """Whether it passed."""
    seconds: float
    """What it took; 0 if it was left out."""
    limit_seconds: float
    """What it was given; 0 if it was left out."""
    why: str | None
    """Why it failed or was left out."""
    values: dict[str, Any]
    """What it found."""


def carry_out(steps: Iterable[Step], *, limit: Limit, tell: Callable[[Record], None]) -> bool:
    """Do steps in turn, and return whether none of them failed.

    Args:
        steps: In the order in which they are done; each is asked for when its turn comes.
        limit: Until when all of them have to be done.
        tell: Called after each step, before the next one begins.
    """
    passed: set[str] = set()
    failed = False
    for step in steps:
        given = allowance(step, left=limit.left(), passed=passed)
        reason = given if isinstance(given, str) else step.obstacle()
        if reason is not None:
            tell(Record(step.name, "left out", 0.0, 0.0, reason, {}))
            continue
        record = _do(step, float(given))
        tell(record)
        failed |= record.status == "failed"
        if record.status == "passed":
            passed.add(step.name)
    return not failed


def allowance(step: Step, *, left: float, passed: Collection[str]) -> float | str:
    """Return the seconds that a step may take, or why it is left out.

    Args:
        step: The next one.
        left: Seconds that are left to all steps.
        passed: Names of the steps that have passed.
    """
    unmet = [name for name in step.needs if name not in passed]
    if unmet:
        return f"needs what did not pass: {', '.join(unmet)}"
    free = left - step.keep_seconds
    if free < step.least_seconds:
        kept = (
            f" beside {step.keep_seconds:.0f} s kept for later steps" if step.keep_seconds else ""
        )
        return f"takes {step.least_seconds:.0f} s or more, {max(free, 0):.0f} s are left{kept}"
    return min(step.limit_seconds, free)


def _do(step: Step, seconds: float) -> Record:
    started = time.monotonic()
    try:
        outcome = step.run(Limit(started + seconds))
    # Whatever it is, the next step is another matter.
    except Exception as error:  # noqa: BLE001
        outcome = Outcome({}, describe_error(error))
    took = time.monotonic() - started
    status: Status = "passed" if outcome.failure is None else "failed"
    return Record(step.name, status, took, seconds, outcome.failure, outcome.values)


def describe_error(error: Exception) -> str:
    """Return an error in a line or two, with what a command said at its end."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"took longer than {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        lines = str(error.stderr or "").strip().splitlines() or ["it said nothing"]
        return f"exit code {error.returncode}: {lines[-1][-_SHORT:]}"
    return "".join(traceback.format_exception_only(error)).strip()[-_SHORT:]


class Log:
    """A file of text that stays small; lines are on the disk once they are written."""

    def __init__(self, path: Path) -> None:
        self._stream: IO[bytes] = path.open("wb", buffering=0)
        self._left = LOG_NBYTES

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, text: str) -> None:
        """Add a line or several."""
        data = text.rstrip("\n").encode(errors="replace") + b"\n"
        if self._left <= 0:
            return
        if len(data) > self._left:
            data = b"the log is full; what came later was dropped\n"
            self._left = 0
        self._left -= len(data)
        self._stream.write(data)


def call(
    command: Sequence[str],
    *,
    cwd: Path,
    limit: Limit,
    log: Log,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command, log the end of what it says, and return that.

    Raises:
        subprocess.TimeoutExpired: It took longer, and was killed with all that it had started.
        subprocess.CalledProcessError: It failed; ``stderr`` is what it said.
    """
    seconds = limit.left()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise subprocess.TimeoutExpired(list(command), seconds) from None
        finally:
            kill_group(process.pid)
            process.wait()
            output.seek(max(0, output.seek(0, os.SEEK_END) - OUTPUT_NBYTES))
            said = output.read().decode(errors="replace")
            log.write(f"$ {' '.join(map(str, command))}\n{said}")
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, list(command), stderr=said)
    return said


def replace_file(path: Path, text: str) -> None:
    """Write a file so that whoever reads it sees the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        # Gone already, unless it could not be put in place.
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
