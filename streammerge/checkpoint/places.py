"""Where an output grows, and how it takes its place: beside it, or inside where it cannot be renamed.

Usually ``OUT.partial`` becomes ``OUT`` by one rename. A mount point cannot be renamed, and beside it
is another disk; neither can a directory whose parent may not be written. There the work lies in
``OUT/OUT.partial``, and its entries are renamed one by one, the manifest last: such a directory is
complete exactly if it has a manifest. A note of what is being moved makes that undone by whoever
finds it half done.

    earlier merge, its manifest first ──▶ OUT/OUT.replaced
    note of the names in OUT/OUT.partial
    entries of OUT/OUT.partial, the manifest last ──▶ OUT
    OUT/OUT.replaced, OUT/OUT.partial are removed

An output of one file, ``OUT.safetensors``, is put in place in the same way from the directory
``OUT.safetensors.partial`` beside it. Its last entry is the file with tensors, so that whatever has that
name is complete, and has its manifest and recipe beside it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from streammerge.checkpoint.folders import is_folder
from streammerge.checkpoint.journal import JOURNAL_NAME
from streammerge.checkpoint.manifest import read_manifest_files
from streammerge.checkpoint.outputfile import sync_directory, write_durably
from streammerge.checkpoint.outputform import OutputForm, form_of
from streammerge.checkpoint.ownfiles import read_own
from streammerge.checkpoint.snapshot import SNAPSHOT_NAME
from streammerge.errors import OutputError

MARKER_NAME = ".streammerge-partial"
"""Lies in a directory that an interrupted merge may have left, and that may be thrown away."""
_MOVING_NAME = ".streammerge-moving"
"""The note: a JSON list of the names that are moved out of the partial directory."""
UPLOADS_NAME = ".streammerge-uploads"
"""Beside the journal: what was begun in a store."""
_WAITING_NAME = ".streammerge-waiting"
"""What waits to be sent to a store, of each of several processes."""
OWN_FILES = (
    *(SNAPSHOT_NAME, f"{SNAPSHOT_NAME}.new", MARKER_NAME, JOURNAL_NAME, _MOVING_NAME),
    UPLOADS_NAME,
)
"""What a merge that was cut off right after it was renamed leaves beside the model."""
_OWN_OF_ATTEMPT = re.compile(
    rf"({'|'.join(map(re.escape, (JOURNAL_NAME, SNAPSHOT_NAME, UPLOADS_NAME, _WAITING_NAME)))})-[0-9a-z]+(-[0-9a-z]+)*(\.new)?"
)
"""Names that hold what a merge, or an attempt at a part of one, is known by."""
_NO_ENTRIES = frozenset({"lost+found"})
"""What file systems put into their roots."""
_MOUNTS = Path("/proc/self/mountinfo")


@dataclass(frozen=True, slots=True)
class Place:
    """The directories of one output."""

    out: Path
    """What it is called in the end; absolute."""
    partial: Path
    """Where it grows."""
    replaced: Path
    """Where an earlier merge is put while another one takes its place."""
    inside: bool
    """Whether those two lie in ``out``."""
    form: OutputForm
    """What the output consists of, and where that lies in the end."""

    @property
    def moves(self) -> bool:
        """Whether entries are moved one by one, instead of the directory at once."""
        return self.inside or self.form.file is not None

    @property
    def folder(self) -> Path:
        """The directory whose entries are the output's in the end."""
        return self.form.folder

    @property
    def leftovers(self) -> Path:
        """The directory that a merge's own files lie in once it is in place."""
        return self.partial if self.moves else self.out

    def iter_entries(self) -> Iterator[Path]:
        """Yield what lies in ``out`` and belongs to a merge, or to nobody known."""
        if self.form.entries is not None:
            for name in sorted(self.form.entries):
                if os.path.lexists(self.folder / name):
                    yield self.folder / name
            return
        for path in sorted(self.out.iterdir()):
            if path in {self.partial, self.replaced}:
                continue
            if self.inside and path.name in _NO_ENTRIES:
                continue
            yield path

    def is_half_moved(self) -> bool:
        """Return whether entries are on their way between ``out`` and the other two."""
        return self.moves and (
            os.path.lexists(self.partial / _MOVING_NAME) or os.path.lexists(self.replaced)
        )

    def is_moved(self) -> bool:
        """Return whether all entries have reached ``out``, and only the rest is to be removed."""
        return (
            self.moves
            and (self.partial / _MOVING_NAME).is_file()
            and not os.path.lexists(self.partial / self.form.last)
            and (self.folder / self.form.last).is_file()
        )


def is_own(name: str) -> bool:
    """Return whether a file of that name is a merge's own, and no part of the model."""
    return name in OWN_FILES or _OWN_OF_ATTEMPT.fullmatch(name) is not None


def waiting_name(epoch: str, attempt: str, shard: int) -> str:
    """Return the name of the file for what waits of a shard, by index, of one of several processes."""
    return f"{_WAITING_NAME}-{epoch}-{attempt}-{shard}"


def choose_place(out: Path) -> Place:
    """Return where an output grows; ``out`` need not exist.

    Args:
        out: The directory, or the one file, to make; absolute.
    """
    form = form_of(out)
    inside = (
        form.file is None and out.is_dir() and not out.is_symlink() and not _can_be_renamed(out)
    )
    parent = out if inside else out.parent
    return Place(
        out,
        partial=parent / f"{out.name}.partial",
        replaced=parent / f"{out.name}.replaced",
        inside=inside,
        form=form,
    )


def put_in_place(place: Place) -> None:
    """Make what grew in the partial directory the output; it holds a whole merge.

    Raises:
        OSError: The system refuses; an earlier merge is there again, where that is possible.
        OutputError: The note cannot be written.
    """
    for path in (place.partial, *place.partial.iterdir()):
        if is_folder(path):
            sync_directory(path)
    if not place.moves:
        _rename(place)
        return
    try:
        _move_entries(place)
    except OSError:
        with contextlib.suppress(OSError, OutputError):
            undo_moves(place)
        raise


def undo_moves(place: Place) -> None:
    """Put everything back that a crash left half moved; the partial directory must be locked.

    Raises:
        OSError: The system refuses.
        OutputError: The note is not what it should be.
    """
    if not place.moves:
        return
    note = place.partial / _MOVING_NAME
    if os.path.lexists(note):
        names = _read_note(note, place.form.entries)
        _move(_in_order(names, first=place.form.last), place.folder, place.partial)
        sync_directory(place.partial)
        note.unlink()
        sync_directory(place.partial)
    if os.path.lexists(place.replaced):
        _restore(place)


def clear_away(place: Place, *, replaced: bool) -> None:
    """Remove what a merge that is complete and in place has left; what cannot be does no harm.

    Its journal goes last, but for the note: while one is there, a merge that is found complete clears
    away the rest.

    Args:
        place: The directories.
        replaced: Whether an earlier merge was put aside.
    """
    with contextlib.suppress(OSError):
        # A rename that a power cut undoes leaves the complete merge under its other name, to be
        # resumed, which needs the journal.
        sync_directory(place.folder if place.moves else place.out.parent)
    if replaced:
        shutil.rmtree(place.replaced, ignore_errors=True)
    for name in (*_attempts_left(place.leftovers), *OWN_FILES):
        with contextlib.suppress(OSError):
            (place.leftovers / name).unlink()
    if place.moves:
        with contextlib.suppress(OSError):
            place.partial.rmdir()


def _attempts_left(directory: Path) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if _OWN_OF_ATTEMPT.fullmatch(name)]  # noqa: PTH208
    except OSError:
        return []


def _rename(place: Place) -> None:
    replaced = os.path.lexists(place.replaced)
    try:
        if place.out.exists():
            place.out.rename(place.replaced)
            replaced = True
        place.partial.rename(place.out)
    except OSError:
        if replaced:
            with contextlib.suppress(OSError):
                place.replaced.rename(place.out)
        raise


def _move_entries(place: Place) -> None:
    earlier = _earlier_entries(place)
    if earlier:
        place.replaced.mkdir(exist_ok=True)
        _move(_in_order(earlier, first=place.form.last), place.folder, place.replaced)
        sync_directory(place.replaced)
        sync_directory(place.folder)
    names = [path.name for path in place.partial.iterdir() if not is_own(path.name)]
    write_durably(place.partial / _MOVING_NAME, [json.dumps(sorted(names)).encode()])
    sync_directory(place.partial)
    last = place.form.last
    _move((name for name in names if name != last), place.partial, place.folder)
    sync_directory(place.folder)
    _move([last], place.partial, place.folder)


def _earlier_entries(place: Place) -> list[str]:
    """Return what an earlier merge wrote; anything else that lies there is in the way."""
    written = read_manifest_files(place.out) or ()
    ours = {name.partition("/")[0] for name in written} | {place.form.manifest}
    names = [path.name for path in place.iter_entries()]
    for name in names:
        if not written or not (name in ours or is_own(name)):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place.folder / name))
    return names


def _restore(place: Place) -> None:
    names = [path.name for path in place.replaced.iterdir()]
    _move(_in_order(names, last=place.form.last), place.replaced, place.folder)
    sync_directory(place.folder)
    place.replaced.rmdir()


def _move(names: Iterable[str], origin: Path, target: Path) -> None:
    for name in names:
        if not os.path.lexists(origin / name):
            # A move that is undone, or done again, may have come to any of them.
            continue
        if os.path.lexists(target / name):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target / name))
        (origin / name).rename(target / name)


def _in_order(
    names: Iterable[str], *, first: str | None = None, last: str | None = None
) -> list[str]:
    return sorted(names, key=lambda name: (name != first, name == last, name))


def _read_note(note: Path, allowed: tuple[str, ...] | None) -> list[str]:
    """Return the names in the note; none but those allowed, where the folder has other files."""
    try:
        names = json.loads(read_own(note))
    except (ValueError, RecursionError) as error:
        raise _odd_note(note) from error
    if not isinstance(names, list) or not all(map(_is_entry_name, names)):
        raise _odd_note(note)
    if allowed is not None and not set(names) <= set(allowed):
        raise _odd_note(note)
    return names


def _is_entry_name(name: object) -> bool:
    return isinstance(name, str) and name not in {"", ".", ".."} and os.path.basename(name) == name  # noqa: PTH119 - any text


def _odd_note(note: Path) -> OutputError:
    return OutputError(
        f"{note}: is not the list of names that a merge writes; move the files of the merge back "
        f"into {note.parent} and remove it"
    )


def _can_be_renamed(directory: Path) -> bool:
    if os.path.ismount(directory):
        return False
    if not os.access(directory.parent, os.W_OK | os.X_OK):
        return False
    return str(directory.resolve()) not in _mount_points()


def _mount_points() -> set[str]:
    """Return where something is mounted, directories of the same disk (bind mounts) included."""
    try:
        text = _MOUNTS.read_text(errors="surrogateescape")
    except OSError:
        return set()
    # The fifth field, in which blanks and line ends are octal escapes.
    fields = (line.split(" ")[4] for line in text.splitlines() if line.count(" ") > 4)
    return {_unescaped(field) for field in fields}


def _unescaped(field: str) -> str:
    for code in ("040", "011", "012", "134"):
        field = field.replace(f"\\{code}", chr(int(code, 8)))
    return field
