"""Whether an output may be written where it is asked for: asked before anything is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streammerge.checkpoint.folders import is_folder, iter_names
from streammerge.checkpoint.locking import FileLock
from streammerge.checkpoint.manifest import read_manifest_files
from streammerge.checkpoint.outputform import OutputForm
from streammerge.checkpoint.ownfiles import NEW_NAME
from streammerge.checkpoint.places import MARKER_NAME, Place, choose_place, is_own
from streammerge.errors import (
    BusyError,
    DiskSpaceError,
    OutputError,
    OutputExistsError,
    ResumeError,
)
from streammerge.units import format_size

_LISTED = 5
TOLD = "told"
"""Of an identity: the values of the recipe, which decide nothing that its digest does not."""
_DIGESTS = ("recipe", "work")
"""What differs with them."""


def absolute(out: Path) -> Path:
    """Return the place of an output as an absolute path, links and all.

    Raises:
        OutputExistsError: It is the root of the file system.
        OutputError: It is relative to a directory that is gone.
    """
    try:
        # resolve() would follow a link at OUT.
        place = Path(os.path.abspath(out))  # noqa: PTH100
    except FileNotFoundError as error:
        raise OutputError(
            f"{out}: is relative to the working directory, which has been removed; change to "
            "another one"
        ) from error
    if not place.name:
        raise OutputExistsError(f"{place}: is the root of the file system; choose a directory")
    return place


def allocated(directory: Path) -> int:
    """Return the bytes of disk that the files of an unfinished merge have."""
    return sum(map(_allocated, directory.rglob("*")))


def _allocated(path: Path) -> int:
    try:
        return getattr(path.stat(), "st_blocks", 0) * 512
    except OSError:
        # Another process that works there may have renamed it just now.
        return 0


def busy(partial: Path, by: Sequence[str] = ()) -> BusyError:
    """Return the error that says that others work in a directory, and who, where that is known."""
    who = f" ({', '.join(by[:_LISTED])})" if by else ""
    return BusyError(
        f"{partial}: another merge is writing there now{who}; wait for it, or choose another place"
    )


def check_foreign(partial: Path, names: frozenset[str]) -> None:
    """Return if an unfinished merge holds nothing but what merges write.

    Args:
        partial: Where it lies.
        names: The names of all that this merge writes, its own files left out.
    """
    foreign = sorted(
        name
        for name in iter_names(partial)
        if name not in names and name.rpartition("/")[2] != NEW_NAME and not is_own(name)
    )
    if foreign:
        raise ResumeError(
            f"{partial}: holds {len(foreign)} file(s) that the merge did not write "
            f"({', '.join(foreign[:_LISTED])}); move them away, then continue with --resume"
        )


def check_replaced(place: Place, *, overwrite: bool, continues: bool) -> None:
    """Return if no earlier merge lies where one is put aside, unless this merge has put it there.

    Args:
        place: The directories.
        overwrite: Whether an earlier merge may be replaced.
        continues: Whether an unfinished merge is continued.
    """
    replaced = place.replaced
    if not os.path.lexists(replaced):
        return
    if continues and overwrite and not place.out.exists():
        # The merge stopped between setting the earlier one aside and taking its place.
        return
    if place.moves:
        raise OutputExistsError(
            f"{replaced}: holds the merge that a later one was about to replace; give "
            "--resume to finish that, or --overwrite to start anew"
        )
    if not place.out.exists():
        raise OutputExistsError(
            f"{replaced}: holds the merge that a later one was about to replace; rename "
            f"it to {place.out.name} to have it back, or remove it"
        )
    if overwrite:
        raise OutputExistsError(
            f"{replaced}: is in the way; the earlier merge steps aside under this name, "
            "rename or remove what is there"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Say what differs between the identities of two merges, key by key.

    Of another recipe its values are told where both have them, in the place of digests.
    """
    told: list[str] = []
    if TOLD in before and TOLD in now and before.get("recipe") != now.get("recipe"):
        told = list(differences(before[TOLD], now[TOLD]))
        yield from told[:_LISTED]
        if len(told) > _LISTED:
            yield f"and {len(told) - _LISTED} more values of the recipe"
    for key in sorted({*before, *now} - {"overwrite", "epoch", TOLD, *(_DIGESTS if told else ())}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{key} {text}" for text in differences(old, new))
        elif old != new:
            yield f"{key} was {old}, is {new}"


def check_place(out: Path, inputs: Sequence[Path], *, overwrite: bool, look: bool = True) -> None:
    """Raise if a merge of these inputs may not write to a place, as it is now.

    Args:
        out: The place.
        inputs: What is read.
        overwrite: Whether an earlier merge there may be replaced.
        look: Whether what lies there matters.

    Raises:
        OutputExistsError: It is an input, or holds something that may not be replaced.
    """
    check_inputs(out, out, inputs)
    if look:
        check_existing(choose_place(out), overwrite=overwrite)


def check_inputs(out: Path, partial: Path, inputs: Sequence[Path]) -> None:
    """Return if neither place is an input, lies in one or holds one."""
    for given in inputs:
        path = _real(given)
        for place in (_real(out), _real(partial)):
            if place == path or place in path.parents or (path in place.parents and path.is_dir()):
                raise OutputExistsError(
                    f"{out}: overlaps the input {given}; inputs are never written to, choose "
                    "another place"
                )


def _real(path: Path) -> Path:
    # Path.resolve raises a RuntimeError for links in a circle, and these may lie anywhere.
    return Path(os.path.realpath(path))


def check_existing(place: Place, *, overwrite: bool) -> None:
    """Return if nothing lies where the output is to be, or an earlier merge that may be replaced."""
    out = place.out
    form = place.form
    if form.file is not None:
        _check_file_place(form)
    elif not os.path.lexists(out):
        return
    elif not out.is_dir() or out.is_symlink():
        what = "is a link" if out.is_symlink() else "is not a directory"
        raise OutputExistsError(f"{out}: {what}; choose another place, or name what it leads to")
    entries = list(place.iter_entries())
    if not entries:
        return
    present = [path.name for path in entries if not is_folder(path)]
    for folder in filter(is_folder, entries):
        present += [f"{folder.name}/{name}" for name in iter_names(folder)]
    present.sort()
    if not overwrite:
        raise OutputExistsError(
            f"{out}: already holds {len(present)} file(s); give --overwrite to replace an earlier "
            "merge, or choose another place"
            if form.file is None
            else f"{out}: {' and '.join(present)} already there; give --overwrite to replace an "
            "earlier merge, or choose another name"
        )
    present = [name for name in present if not is_own(name)]
    written = read_manifest_files(out)
    if written is None:
        holds = f"holds {len(present)} file(s) but"
        if form.file is not None:
            holds = f"{' and '.join(present)} already there, but"
        raise OutputExistsError(
            f"{out}: {holds} no {form.manifest}, so no merge of ours made "
            "it; --overwrite only replaces earlier merges, remove it yourself"
        )
    foreign = [name for name in present if name not in {form.manifest, *written}]
    if foreign:
        raise OutputExistsError(
            f"{out}: holds {len(foreign)} file(s) that the earlier merge did not write "
            f"({', '.join(foreign[:_LISTED])}); --overwrite would lose them, move them away"
        )


def _check_file_place(form: OutputForm) -> None:
    """Return if nothing but files lies where an output of one file is to be."""
    for name in form.entries or ():
        path = form.folder / name
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise OutputExistsError(
                f"{path}: is not a file; an output called {form.file} is one file with its manifest "
                "and recipe beside it; choose another name"
            )


def check_partial(partial: Path) -> None:
    """Return if nobody works where the output is to grow."""
    if not os.path.lexists(partial):
        return
    check_partial_contents(partial)
    if not (partial / MARKER_NAME).is_file():
        return
    lock = FileLock(partial / MARKER_NAME)
    try:
        if not lock.acquire():
            raise busy(partial)
    finally:
        lock.close()


def check_partial_contents(partial: Path) -> None:
    """Return if a directory was left by a merge, or is empty."""
    if partial.is_symlink() or not partial.is_dir():
        left_by_merge = False
    else:
        left_by_merge = (partial / MARKER_NAME).is_file() or not any(partial.iterdir())
    if not left_by_merge:
        raise OutputExistsError(
            f"{partial}: is in the way and was not left by a merge; rename or remove it"
        )


def check_room(parent: Path, nbytes: int, nbytes_beside: int, has: int) -> None:
    """Return if a directory can be written in and has room for a merge.

    Args:
        parent: The directory.
        nbytes: Bytes of all shards.
        nbytes_beside: Most bytes of all that comes beside them.
        has: Bytes that an unfinished merge has of them already.
    """
    if not parent.is_dir():
        raise OutputError(f"{parent}: no such directory; make it first")
    # Rights that the process has as it runs, which may be more than those of who started it.
    effective = os.access in os.supports_effective_ids
    if not os.access(parent, os.W_OK | os.X_OK, effective_ids=effective):
        raise OutputError(f"{parent}: not writable")
    free = shutil.disk_usage(parent).free
    if free < nbytes + nbytes_beside - has:
        raise DiskSpaceError(
            f"{parent}: the output takes {format_size(nbytes)}, and up to "
            f"{format_size(nbytes_beside)} for what lies beside it, but {format_size(free)} are "
            "free; free some or choose another disk"
        )
