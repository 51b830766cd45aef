"""Commands that look at models and write none: options in, exit code out."""

from __future__ import annotations

import argparse

from streammerge.commands import read_one_recipe, resources_of
from streammerge.signals import stopping_signals
from streammerge.streams import print_result


def run_diff(options: argparse.Namespace) -> int:
    """Tell what models differ in; the exit code is 1 where they do."""
    from streammerge.differing import diff, differs
    from streammerge.display import show_progress
    from streammerge.report.rendering import render_comparison

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
    print_result(report.as_json() if options.json else render_comparison(report))
    return 1 if differs(report) else 0


def run_analyze(options: argparse.Namespace) -> int:
    """Tell what a merge would make of its sources, without merging."""
    from streammerge.analysing import analyze
    from streammerge.display import show_progress
    from streammerge.report.rendering import render_report

    recipe = read_one_recipe(options)
    with (
        stopping_signals(),
        show_progress(quiet=options.quiet or options.json, as_json=False) as on_progress,
    ):
        report = analyze(recipe, **resources_of(options), on_progress=on_progress)
    print_result(report.as_json() if options.json else render_report(report))
    return 0
