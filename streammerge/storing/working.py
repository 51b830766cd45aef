"""The sign that a merge is at work on a result in a store, which keeps all others from writing there.

It is written only where there is none, renewed every minute, and looked at before that, since not all stores
know conditions. After :data:`~streammerge.checkpoint.atwork.STALE_SECONDS` without a new one a merge counts as
over; so does one by a process of this machine that is gone. Processes that do a part each give one sign
together, which goes when the last of them leaves.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from streammerge.checkpoint.atwork import (
    LOCK_NAME,
    STALE_SECONDS,
    is_busy,
    sign_in,
    sign_of_life,
    signs,
)
from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.errors import OutputError, OutputExistsError, StreamMergeError
from streammerge.storage.targets import Small, Target

_BEAT_SECONDS = 60.0
"""How often a merge says that it is still at work."""


class AtWork:
    """Lets no other merge write to a place, as a context manager."""

    def __init__(
        self,
        target: Target,
        url: str,
        sign: str,
        *,
        shared: bool = False,
        leaves: Callable[[], bool] = lambda: True,
    ) -> None:
        """Say who is at work; nothing is written yet.

        Args:
            target: The folder.
            url: What messages call it.
            sign: Told apart by; of parts of one merge the same.
            shared: Whether other processes may give the same sign, also when this one is gone.
            leaves: Asked at the end whether nobody else is at work who gives this sign.
        """
        self._target, self._url = target, url
        self._sign, self._shared, self._leaves = sign, shared, leaves
        self._said = sign_of_life(sign, of_process=not shared)
        self._state = threading.Lock()
        self._version = ""
        self._last = 0.0

    def __enter__(self) -> Self:
        self._version = self._take()
        signs.add(self._sign)
        self._last = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signs.discard(self._sign)
        # Whoever comes next sees that it is over.
        with contextlib.suppress(StreamMergeError):
            if self._leaves():
                self._target.delete(LOCK_NAME)

    def hearing(self, on_progress: OnProgress) -> OnProgress:
        """Return what is told how far the work is, and says now and then that there is work."""

        def hear(event: ProgressEvent) -> None:
            self.beat()
            on_progress(event)

        return hear

    def beat(self) -> None:
        """Say that the merge is still at work, if that was not said for a minute.

        Raises:
            OutputError: Another merge has begun.
        """
        with self._state:
            if time.monotonic() - self._last < _BEAT_SECONDS:
                return
            self._last = time.monotonic()
            self._version = self._renew()

    def _renew(self) -> str:
        # Looked at as well: not all stores know the condition.
        found = self._target.get(LOCK_NAME)
        new = None
        if found is not None and found.version == self._version:
            new = self._target.put(
                LOCK_NAME, self._said, token=self._sign, instead_of=self._version
            )
            # An answer that was lost is followed by one that the version is gone.
            found = self._target.get(LOCK_NAME) if new is None else None
        elif found is None and self._shared:
            # Another part has left, and did not see this one.
            new = self._target.put(LOCK_NAME, self._said, token=self._sign, new=True)
            found = self._target.get(LOCK_NAME) if new is None else None
        if found is not None and self._is_ours(found):
            new = found.version
        if new is None:
            raise OutputError(
                f"{self._url}: another merge has begun to write there, because this one gave no sign for "
                f"{STALE_SECONDS:.0f} s; this one ends here"
            )
        return new

    def _take(self) -> str:
        version = self._target.put(LOCK_NAME, self._said, token=self._sign, new=True)
        if version is not None:
            return version
        found = self._target.get(LOCK_NAME)
        if found is not None and self._shared and self._is_ours(found):
            return found.version
        refuse_busy(found, self._url)
        version = self._target.put(
            LOCK_NAME,
            self._said,
            token=self._sign,
            instead_of=None if found is None else found.version,
        )
        if version is None:
            raise OutputExistsError(f"{self._url}: another merge has begun there at this moment")
        return version

    def _is_ours(self, found: Small) -> bool:
        return sign_in(found.content) == self._sign


def refuse_busy(found: Small | None, url: str) -> None:
    """Raise if a sign of life is that of a merge at work."""
    if found is not None and is_busy(found):
        raise OutputExistsError(
            f"{url}: another merge is at work there, by a sign of {found.age:.0f} s ago; wait for it, or if "
            f"it was killed for {STALE_SECONDS - found.age:.0f} s"
        )
