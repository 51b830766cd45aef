"""Commands that look at models and write none: options in, exit code out."""

from __future__ import annotations

import argparse

from streammerge.commands import read_one_recipe, resources_of
from streammerge.signals import stopping_signals
from streammerge.streams import print_result


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
