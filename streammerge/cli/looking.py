"""Commands that look at models and write none: options in, exit code out."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.cli.commands import read_one_recipe, resources_of
from streammerge.cli.signals import stopping_signals
from streammerge.cli.streams import print_result
from streammerge.errors import OutputExistsError, printable

if TYPE_CHECKING:
    from streammerge.report.document import Report


def run_diff(options: argparse.Namespace) -> int:
    """Tell what models differ in; the exit code is 1 where they do."""
    from streammerge.cli.display import show_progress
    from streammerge.differing import diff, differs
    from streammerge.report.rendering import render_comparison

    page = _check_page(options)
    with (
        stopping_signals(),
        show_progress(quiet=options.quiet or options.json, as_json=False) as on_progress,
    ):
        report = diff(
            [options.first, *options.others],
            memory=options.memory,
            workers=options.workers,
            download=options.download,
            on_progress=on_progress,
        )
    _write_page(page, report)
    print_result(report.as_json() if options.json else render_comparison(report))
    return 1 if differs(report) else 0


def run_analyze(options: argparse.Namespace) -> int:
    """Tell what a merge would make of its sources, without merging."""
    from streammerge.analysing import analyze
    from streammerge.cli.display import show_progress
    from streammerge.report.rendering import render_report

    recipe = read_one_recipe(options)
    page = _check_page(options)
    with (
        stopping_signals(),
        show_progress(quiet=options.quiet or options.json, as_json=False) as on_progress,
    ):
        report = analyze(recipe, **resources_of(options), on_progress=on_progress)
    _write_page(page, report)
    print_result(report.as_json() if options.json else render_report(report))
    return 0


def _check_page(options: argparse.Namespace) -> Path | None:
    """Return where a page is to be, before anything is read for it; None for nowhere.

    Raises:
        OutputExistsError: Something is there.
        DependencyError: The library that draws pages is not installed.
    """
    if options.page is None:
        return None
    from streammerge.report.drawing import check_drawing

    path = Path(options.page)
    if os.path.lexists(path):
        raise OutputExistsError(f"{path}: is already there; name another file, or remove it")
    check_drawing()
    return path


def _write_page(path: Path | None, report: Report) -> None:
    if path is None:
        return
    from streammerge.checkpoint.outputfile import write_durably
    from streammerge.report.page import render_page

    write_durably(path, [render_page(report).encode()])
    print(f"{printable(str(path))}: is the page", file=sys.stderr)
