"""Byte sizes between the strings that people write and the integers used inside."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*([0-9]{1,400}(?:\.[0-9]{1,400})?)\s*([A-Za-z]*)\s*\Z")

KIB = 2**10
MIB = 2**20
GIB = 2**30
BASELINE_NOISE = 16 * MIB
"""The same process starts with a few MiB more or less each time; a budget that is named covers that."""


def parse_size(text: str | int) -> int:
    """Return the number of bytes that ``text`` names: ``"2GiB"``, ``"5 GB"``, ``"1048576"``.

    ``GB`` is 10^9 bytes and ``GiB`` 2^30. Units ignore case.

    Raises:
        ValueError: The text is not a positive number with a known unit.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        nbytes = text
    else:
        match = _SIZE.match(text) if isinstance(text, str) else None
        if match is None or match[2].lower() not in _UNITS:
            msg = f'expected a size such as "512MiB", "2GiB" or "5GB", got {text!r}'
            raise ValueError(msg)
        nbytes = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if nbytes <= 0:
        msg = f"expected a size above zero, got {text!r}"
        raise ValueError(msg)
    return nbytes


def format_size(nbytes: int) -> str:
    """Return ``nbytes`` as a person reads it, in binary units: ``"1.6 GiB"``, ``"312 B"``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_budget(nbytes: int) -> str:
    """Return a string that :func:`parse_size` reads back as at least ``nbytes``: ``"612MiB"``."""
    return f"{-(-nbytes // MIB)}MiB"
