"""``streammerge`` and ``python -m streammerge``: a process that does one command and is gone."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from streammerge.cli.signals import leave_on_signals

_COLLECT_AFTER = 150_000
"""New objects between two searches for unreachable cycles. To start a merge makes 100,000, which are all
kept, and torch far more: with the interpreter's 700 a tenth of its time goes into searching."""


def run() -> NoReturn:
    """Run the command line and end the process.

    What the interpreter does at its end takes as long as half the import of torch, and the system
    takes back files, threads and memory anyway; so nothing is taken apart here.
    """
    leave_on_signals()
    # Only now, so that a signal finds its handler as early as can be.
    from streammerge.cli.arguments import main  # noqa: PLC0415
    from streammerge.cli.streams import prepare_streams  # noqa: PLC0415

    prepare_streams()
    gc.set_threshold(_COLLECT_AFTER, 50, 50)
    # No product of matrices is left to more than one thread, and where the system allows few, BLAS
    # ends the process with SIGINT as it starts its own, one per core, while numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Else pydantic looks through the records of all packages for plugins, whose hooks on every validation
    # are no business of recipes.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        code = main()
    except SystemExit as end:
        # How argparse ends after --help, or a wrong usage.
        code = end.code if isinstance(end.code, int) else 0
    except Exception:  # noqa: BLE001 - nobody foresaw it: all that is known is shown
        sys.excepthook(*sys.exc_info())
        code = 1
    os._exit(code)


if __name__ == "__main__":
    run()
