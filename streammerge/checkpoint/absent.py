"""What to say of a place that holds no finished result: nothing, something else, or one that is on its way."""

from __future__ import annotations

import os
from pathlib import Path

from streammerge.checkpoint.inputs import absolute, listed
from streammerge.checkpoint.journal import JOURNAL_NAME
from streammerge.checkpoint.outputform import MANIFEST_NAME, found_form
from streammerge.checkpoint.places import choose_place

_MOST_FOLDERS = 10_000
"""Of the folders in a directory as many are looked at."""


def explain_no_result(out: Path) -> str | None:
    """Return why there is no manifest for an output, and what to do; None if something is in its place.

    Args:
        out: The directory, or the one file.

    Raises:
        CheckpointError: It is relative to a working directory that has been removed.
    """
    form = found_form(out)
    if os.path.lexists(form.manifest_path):
        return None
    partial = choose_place(absolute(out)).partial
    if (partial / JOURNAL_NAME).is_file():
        return (
            f"{out}: is an unfinished merge, in {partial}; `streammerge status` tells how far it is, and "
            "`streammerge merge` with --resume continues it"
        )
    if not os.path.lexists(out):
        return f"{out}: no such file or directory; name a merged model"
    inside = results_in(out)
    if inside:
        return f"{out}: holds {len(inside)} merged model(s), {listed(inside)}; name one of them"
    return (
        f"{out}: has no {form.manifest}, so it is no result of streammerge, or that file was lost; name a "
        "merged model, or copy it again"
    )


def results_in(directory: Path) -> list[str]:
    """Return the folders in a directory that hold results, as those of a grid do, sorted."""
    found = []
    try:
        with os.scandir(directory) as entries:
            for _, entry in zip(range(_MOST_FOLDERS), entries, strict=False):
                if entry.is_dir() and os.path.isfile(os.path.join(entry.path, MANIFEST_NAME)):  # noqa: PTH113, PTH118
                    found.append(entry.path)
    except OSError:
        return []
    return sorted(found)
