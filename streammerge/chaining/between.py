"""The directory of results in between, and what a resume has to know of the run that made it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from streammerge.chaining.stages import Chain
from streammerge.errors import OutputError, OutputExistsError

_MARK = "streammerge_chain.yaml"
"""The file in the directory of results in between that says what they are of."""


@dataclass(frozen=True, slots=True)
class Begun:
    """What a run decided that a resume keeps to."""

    fused: tuple[str, ...]
    """The stages that are fused."""
    overwrite: bool
    """Whether an earlier merge may be replaced."""

    def mark(self, chain: Chain) -> bytes:
        """Return what the mark holds: the recipes, and this in a comment behind them."""
        return f"{chain.text}{_BEGUN}{json.dumps(asdict(self))}\n".encode()


_BEGUN = "\n# begun with: "


def find_begun(chain: Chain, between: Path, *, resume: bool, overwrite: bool) -> Begun | None:
    """Return how an earlier run began that is to be gone on with; None to begin anew.

    Raises:
        OutputExistsError: There is one of other recipes, or something else, or nobody said what is to
            become of it.
    """
    if os.path.lexists(between) and not _is_ours(between):
        raise OutputExistsError(
            f"{between}: is there and holds no results of recipes; remove it, or name another output"
        )
    mark = between / _MARK
    if overwrite or not mark.is_file():
        return None
    if not resume:
        raise OutputExistsError(
            f"{between}: holds results of an earlier run; --resume goes on with it, --overwrite "
            "begins anew"
        )
    text, _, said = mark.read_bytes().decode(errors="replace").rpartition(_BEGUN)
    try:
        begun = TypeAdapter(Begun).validate_json(said)
    except ValidationError:
        begun = None
    if text != chain.text or begun is None:
        raise OutputExistsError(
            f"{between}: holds results of other recipes than {chain.origin} has now; --overwrite "
            "begins anew"
        )
    return begun


def begin(chain: Chain, between: Path, begun: Begun) -> None:
    """Make the directory of results in between, without any."""
    clear(between)
    try:
        between.mkdir(exist_ok=True)
        (between / _MARK).write_bytes(begun.mark(chain))
    except OSError as error:
        raise OutputError(f"{between}: cannot be made: {error.strerror}") from error


def _is_ours(between: Path) -> bool:
    """Return whether a directory has our mark, or is empty: the mark is made first and goes last."""
    if between.is_symlink() or not between.is_dir():
        return False
    return (between / _MARK).is_file() or not any(between.iterdir())


def clear(between: Path) -> None:
    """Remove results in between, the mark last, so that what is left is known for what it is."""
    if not between.is_dir() or not _is_ours(between):
        return
    for entry in between.iterdir():
        if entry.name == _MARK:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    (between / _MARK).unlink(missing_ok=True)
    between.rmdir()
