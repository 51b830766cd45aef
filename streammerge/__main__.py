"""``streammerge`` and ``python -m streammerge``: a process that does one command and is gone."""

from __future__ import annotations

import gc
import os
import sys
from typing import NoReturn

from streammerge.cli import main

_COLLECT_AFTER = 50_000
"""New objects between two searches for unreachable cycles; importing torch makes far more, and with
the interpreter's 700 a tenth of its time goes into searching."""


def run() -> NoReturn:
    """Run the command line and end the process.

    What the interpreter does at its end takes as long as half the import of torch, and the system
    takes back files, threads and memory anyway; so nothing is taken apart here.
    """
    gc.set_threshold(_COLLECT_AFTER, 50, 50)
    # No product of matrices is left to more than one thread, and where the system allows few, BLAS
    # ends the process with SIGINT as it starts its own, one per core, while numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            # Its reader has gone, or it was closed for that reason.
            code = code or 1
    os._exit(code)


if __name__ == "__main__":
    run()
