"""Work that no interrupt can reach: it runs on a thread of its own, and its caller waits for its end.

Python raises KeyboardInterrupt, and whatever else a handler of a signal raises, between any two
instructions of the main thread: while threads are joined, while files are closed. Up to Python 3.12
an interrupted ``Thread.join`` even takes a thread that runs for one that has ended. So the main
thread owns nothing here. Files, locks and threads belong to the work; an interrupt is an answer to
its next report, and ends it as an error does. Should two interrupts within a microsecond end the wait
early, the work still ends at its next report, and closes its files itself.

    caller                                work
      │ ◀────────── event ─────────────── report(event)
    on_progress(event)                      │ waits
      │ ─────────── go on │ error ────────▶ │ returns │ raises

Memory: one thread's stack.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from streammerge.engine.progress import OnProgress, ProgressEvent

Result = TypeVar("Result")


def run_sheltered(work: Callable[[OnProgress], Result], on_progress: OnProgress) -> Result:
    """Run ``work`` where nothing interrupts it, and return what it returns once it has ended.

    Args:
        work: Given what it reports its progress to, at least several times per second while it
            takes long; a report may raise, and then it should end.
        on_progress: Receives these reports on the calling thread; what it raises ends the work.

    Raises:
        BaseException: What the work raised; or else what interrupted the wait for it.
    """
    return _Shelter(work, on_progress).run()


class _Shelter(Generic[Result]):
    """One piece of work and what it and its caller tell each other.

    Queues that are written in C: unlike a condition's, their state survives an interrupt.
    """

    def __init__(self, work: Callable[[OnProgress], Result], on_progress: OnProgress) -> None:
        self._work = work
        self._on_progress = on_progress
        self._reports: SimpleQueue[ProgressEvent | None] = SimpleQueue()
        self._answers: SimpleQueue[BaseException | None] = SimpleQueue()
        self._stop: BaseException | None = None
        self._ended = False
        self._results: list[Result] = []
        self._error: BaseException | None = None
        self._interrupt: BaseException | None = None

    def run(self) -> Result:
        thread = threading.Thread(target=self._run_work, name="streammerge-merge")
        try:
            thread.start()
            self._see_to_its_end()
        except BaseException as error:
            # Before anything has begun, as far as can be told: then it need not begin.
            self._answers.put(error)
            raise
        thread.join()
        if self._error is not None:
            raise self._own_error(self._error)
        if self._interrupt is not None:
            raise self._interrupt
        return self._results[0]

    def _own_error(self, error: BaseException) -> BaseException:
        """Return what the caller raised itself, if the work has only given it another name."""
        if self._stop is None or error.__cause__ is not self._stop:
            return error
        for note in getattr(error, "__notes__", ()):
            self._stop.add_note(note)
        return self._stop

    def _see_to_its_end(self) -> None:
        """Answer reports until the work has ended, whatever is raised meanwhile, and how often."""
        while not self._ended:
            # Twice, because an interrupt may come where the inner loop turns.
            try:
                self._answers.put(None)
                while not self._ended:
                    try:
                        self._serve()
                    except BaseException as error:  # noqa: BLE001 - anything may be raised here
                        self._interrupt_with(error)
            except BaseException as error:  # noqa: BLE001 - the same
                self._interrupt_with(error)

    def _serve(self) -> None:
        event = self._reports.get()
        if event is not None and self._interrupt is None:
            self._on_progress(event)
            self._answers.put(None)

    def _interrupt_with(self, error: BaseException) -> None:
        # Told first: if this is interrupted too, it may be told twice, but never not at all.
        self._answers.put(error)
        if self._interrupt is None:
            self._interrupt = error

    def _run_work(self) -> None:
        try:
            self._hear()
            self._results.append(self._work(self._report))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the caller must see it
            self._error = error
        self._ended = True
        self._reports.put(None)

    def _report(self, event: ProgressEvent) -> None:
        if self._stop is None:
            self._reports.put(event)
        self._hear()

    def _hear(self) -> None:
        """Wait for the caller's answer; raise if it is an error, and from then on."""
        if self._stop is None:
            self._stop = self._answers.get()
        if self._stop is not None:
            raise self._stop
