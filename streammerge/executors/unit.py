"""One part in a process of its own: how a worker starts it, and what the process does.

    worker                                     process: python -m streammerge.executors.unit
      ── a line: Request as JSON ────────────▶   plans, joins the merge, does the part
      (standard input stays open: when it        watches its standard input, and its driver's lock
       ends, the worker has gone)
      ◀── a line: Outcome as JSON ─────────────  ends

A process of its own, because memory is counted from where a process begins, and an engine's worker has
seen other work.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from streammerge.checkpoint.attempts import is_held
from streammerge.checkpoint.bytesource import ByteSourceKind
from streammerge.checkpoint.partdir import PartDirectory
from streammerge.engine.context import SweepShare
from streammerge.engine.memory import default_budget
from streammerge.engine.shelter import run_sheltered
from streammerge.errors import ClusterError, OutputError, StageError, StreamMergeError
from streammerge.executors.apart import hear
from streammerge.executors.seam import Outcome, Request, describe_error
from streammerge.limits import naming_limits
from streammerge.parting import check_divisible, part_job
from streammerge.plan.dividing import divide
from streammerge.plan.types import MergePlan
from streammerge.recipe.text import load_document
from streammerge.run import as_output, parse_document, plan
from streammerge.storage.targets import open_target
from streammerge.storing.places import StoredPlace
from streammerge.units import MIB

_LEAST_SHARE = 512 * MIB
"""Of workers on one machine that share its memory: each has as much at least as a merge alone has."""
_TAIL_CHARACTERS = 2_000


def run_unit(request: Request) -> Outcome:
    """Start a process that does a part, or a share of a sweep, and return what became of it; runs on a worker."""
    part, host = int(request["part"]), socket.gethostname()
    directory = str(request["directory"])
    if not os.path.isdir(directory):  # noqa: PTH112 - a name of another machine
        message = (
            f"{directory}: no such directory on {host}; workers need the working directory, inputs and "
            "output of the merge under the same paths"
        )
        return Outcome(part, host, error=describe_error(ClusterError(message)))
    # Its own variables and interpreter: what is installed there is compared, not brought along.
    with subprocess.Popen(
        [sys.executable, "-m", "streammerge.executors.unit"],
        cwd=directory,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None  # noqa: S101 - a pipe
        assert process.stdout is not None  # noqa: S101 - a pipe
        said: list[str] = []
        hearing = threading.Thread(target=hear, args=(process.stderr, said), daemon=True)
        hearing.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            answer = process.stdout.read()
        except OSError:
            answer = ""
        code = process.wait()
        hearing.join()
    return _judge(part, host, code, answer, "".join(said))


def _judge(part: int, host: str, code: int, answer: str, said: str) -> Outcome:
    if code < 0:
        return Outcome(part, host, lost=f"its process was ended by signal {-code}")
    try:
        found = json.loads(answer)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        message = f"the process of part {part} ended with code {code} and said: {said[-_TAIL_CHARACTERS:]}"
        found = {"error": describe_error(StageError(message))}
    return Outcome(part, host, error=found.get("error"))


def main() -> int:
    """Do the part that standard input asks for, and say on standard output what became of it."""
    request = json.loads(sys.stdin.readline())
    worker_gone = threading.Event()
    threading.Thread(target=_await_end, args=(worker_gone,), daemon=True).start()
    error = None
    try:
        _do(request, worker_gone)
    except StreamMergeError as failure:
        error = describe_error(failure)
    sys.stdout.write(json.dumps({"error": error}) + "\n")
    sys.stdout.flush()
    return 0


def _await_end(worker_gone: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    worker_gone.set()


@naming_limits()
def _do(request: Request, worker_gone: threading.Event) -> None:
    memory = request["memory"]
    if memory is None and request["sharing"] > 1:
        memory = max(default_budget() // int(request["sharing"]), _LEAST_SHARE)
    stored = None
    if request["url"] is not None:
        # Before anything is planned: the library counts as what is in use then.
        stored = StoredPlace(request["url"], open_target(request["url"]), Path(request["scratch"]))
    recipe = parse_document(
        load_document(request["recipe"], origin="recipe"), "recipe", download=False
    )
    planned = check_divisible(
        plan(
            recipe,
            memory=memory,
            workers=request["workers"],
            device=request["device"],
            device_memory=request["device_memory"],
        )
    )
    out, driver = Path(request["out"]), Path(request["driver"])
    named = as_output(planned, out)
    assert isinstance(named, MergePlan)  # noqa: S101 - as it was

    def watch(directory: PartDirectory) -> None:
        directory.check_current()
        if worker_gone.is_set():
            raise OutputError(f"{directory.partial}: the worker that began this part has gone")
        if not is_held(driver):
            raise OutputError(
                f"{directory.partial}: the process that hands out the parts has gone; what is done is kept"
            )

    asked, sweep = request.get("sweep"), None
    if asked is not None:
        sweep = SweepShare(
            question=Path(asked["question"]),
            answers=Path(asked["answers"]),
            tasks=divide(named, request["parts"])[request["part"] - 1],
            samples=asked["samples"],
        )
    job = part_job(
        named,
        out,
        part=request["part"] if sweep is None else 0,
        parts=request["parts"],
        overwrite=request["overwrite"],
        resume=True,
        byte_source=ByteSourceKind(request["byte_source"]),
        watch=watch,
        epoch=request["epoch"],
        publishes=False,
        sweep=sweep,
        stored=stored,
    )
    run_sheltered(job.run, lambda _: None)


if __name__ == "__main__":
    sys.exit(main())
