"""A report beside what a merge has made, written and read again."""

from __future__ import annotations

import os
from pathlib import Path

from streammerge.checkpoint.digests import FileDigest, digest_file
from streammerge.checkpoint.inputs import (
    open_input,
    parse_json_object,
    parse_path,
    read_exactly,
    refuse_constant,
)
from streammerge.checkpoint.outputfile import write_durably
from streammerge.checkpoint.outputform import found_form
from streammerge.errors import HeaderError
from streammerge.plan.types import MergePlan
from streammerge.report.document import FORMAT, REPORT_VERSION, Report
from streammerge.report.page import render_page
from streammerge.units import MIB, format_size

_MAX_REPORT_BYTES = 2048 * MIB
"""Some hundred numbers of 20 bytes for each of a million tensors."""
_CELL_NBYTES = 24
"""A number with its digits in JSON."""


def write_report(report: Report, directory: Path, names: tuple[str, str]) -> dict[str, FileDigest]:
    """Write a report as data and as a page; return what was written.

    Args:
        report: The report.
        directory: Where to.
        names: What the two files are called.

    Raises:
        DiskSpaceError: The disk is full.
        OutputError: A file cannot be written.
        RecipeError: The library that draws pages is not installed.
    """
    data, page = names
    write_durably(directory / data, [report.as_json().encode()])
    write_durably(directory / page, [render_page(report).encode()])
    return {name: digest_file(directory / name) for name in names}


def read_report(out: str | os.PathLike[str]) -> Report:
    """Return the report that lies beside what a merge has made.

    Args:
        out: The merged model, a directory or a file; or the report's own ``.json``.

    Raises:
        HeaderError: It is not there, or is no report of this version.
        CheckpointError: It cannot be read.
    """
    given = parse_path(out, "out")
    path = given
    if given.suffix != ".json":
        form = found_form(given)
        path = form.folder / form.reports[0]
    if not path.is_file():
        raise HeaderError(
            f"{path}: there is no report; merge with --report, or run `streammerge analyze`"
        )
    with open_input(path) as (stream, status):
        if status.st_size > _MAX_REPORT_BYTES:
            raise HeaderError(
                f"{path}: is {format_size(status.st_size)}, and a report at most "
                f"{format_size(_MAX_REPORT_BYTES)}; make it again with --report"
            )
        raw = read_exactly(stream, status.st_size, path=path)
    document = parse_json_object(raw, where=str(path), parse_constant=refuse_constant)
    if document.get("format") != FORMAT or document.get("version") != REPORT_VERSION:
        raise HeaderError(
            f"{path}: is no report of version {REPORT_VERSION}; make it again with --report"
        )
    return Report(document)


def room_for_report(planned: MergePlan) -> int:
    """Return the most bytes of disk that the files of a report take, and its lines in the journal."""
    names = sum(len(task.name) for task in planned.tasks)
    sources = len(planned.models) - planned.has_base
    columns = 8 + 12 * sources + 2 * sources * sources
    # By tensor, and by layer and kind of module, which are no more; the page has both packed. And a
    # line of the journal for every piece.
    tables = 12 * names + 5 * columns * _CELL_NBYTES * len(planned.tasks) + 4 * MIB
    pieces = planned.bytes_to_write // planned.resources.slot_bytes + len(planned.tasks)
    return tables + columns * _CELL_NBYTES * pieces
