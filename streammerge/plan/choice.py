"""Which device a plan took of its own accord, or left alone, and by which numbers."""

from __future__ import annotations

from dataclasses import dataclass

STAGES = {
    "reading": "reading",
    "writing": "writing",
    "bus": "the bus",
    "computing": "computing",
}
"""What goes on side by side, and what people call it."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long the stages of a merge take by an estimate; all but the start go on side by side."""

    reading: float
    """Every byte that is read, in seconds."""
    writing: float
    """Every byte of the output, in seconds."""
    bus: float
    """Copies to a device and back, in seconds; 0 on the CPU."""
    computing: float
    """The arithmetic, on the CPU or the device, whichever takes longer, in seconds."""
    start: float = 0.0
    """What comes before them and would not on the CPU, in seconds."""

    @property
    def limit(self) -> str:
        """The stage that takes longest, of :data:`STAGES`."""
        return max(STAGES, key=self._of)

    @property
    def total(self) -> float:
        """The longest stage, after the start."""
        return self.start + self._of(self.limit)

    def _of(self, stage: str) -> float:
        seconds: float = getattr(self, stage)
        return seconds

    def told(self) -> str:
        """Return every stage in a few words: ``"reading 36 s, writing 12 s, computing 61 s"``."""
        parts = {name: self._of(stage) for stage, name in STAGES.items()} | {"start": self.start}
        # What would print as nothing limits nothing.
        shown = [f"{name} {brief(each)}" for name, each in parts.items() if round(each, 1)]
        return ", ".join(shown)


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """What ``--device auto`` came to where a device is there."""

    device: str
    """The device that was looked at: ``"cuda:0"``."""
    taken: bool
    """Whether the merge runs there."""
    reason: str
    """Why, or why not, in one line."""
    on_cpu: Seconds | None = None
    """The estimate for the CPU; None where none was made."""
    on_device: Seconds | None = None
    """The estimate for the device; None where the other one alone, or something else, decided."""

    def __str__(self) -> str:
        """Return the choice as plans and manifests have it."""
        if self.taken:
            return f"{self.device}, of its own accord: {self.reason}"
        return f"cpu, though {self.device} is there: {self.reason}"


def brief(seconds: float) -> str:
    """Return seconds with as many digits as an estimate has."""
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:,.0f} s"
