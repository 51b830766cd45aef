"""A bar on a terminal."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from streammerge.engine.progress import ProgressEvent


class Tqdm(tqdm):  # type: ignore[type-arg]  # no generic class when it runs
    """A bar that starts no thread: events come all the time, and drawing it is left to them."""

    monitor_interval = 0


def open_bar() -> Tqdm:
    """Return a bar in bytes; it is to be closed."""
    return Tqdm(unit="B", unit_scale=True, unit_divisor=1024, dynamic_ncols=True, miniters=1)


class Bar:
    """Shows events on a bar, with the pass in front."""

    def __init__(self, bar: tqdm[Any]) -> None:
        """Show them on ``bar``."""
        self._bar = bar

    def __call__(self, event: ProgressEvent) -> None:
        """Show an event."""
        self._bar.total = event.bytes_total
        self._bar.set_description(event.activity, refresh=False)
        self._bar.update(event.bytes_done - self._bar.n)
