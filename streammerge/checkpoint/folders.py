"""What lies in an output's directory, at any depth; links are named and never followed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def iter_names(directory: Path) -> Iterator[str]:
    """Yield the names of all that is no folder, relative to ``directory``, with ``/`` between parts."""
    for path in sorted(directory.rglob("*")):
        if not is_folder(path):
            yield path.relative_to(directory).as_posix()


def iter_empty_folders(directory: Path) -> Iterator[Path]:
    """Yield folders that hold nothing, the deepest first; one that cannot be looked into is among them."""
    for path in sorted(directory.rglob("*"), reverse=True):
        if is_folder(path) and _is_empty(path):
            yield path


def is_folder(path: Path) -> bool:
    """Return whether a directory itself is there, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:
        return True
