"""What commands do that merge nothing and read no models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from streammerge.streams import print_result


def run_doctor(options: argparse.Namespace) -> int:
    """Show what the machine and the installation have for merges."""
    from streammerge.doctor import as_json, examine, render

    found = examine(None if options.no_probe else Path(options.directory))
    print_result(json.dumps(as_json(found)) if options.json else render(found))
    return 0


def run_completion(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print what lets a shell complete commands."""
    from streammerge.completing import render_completion

    print_result(render_completion(parser, options.shell))
    return 0
