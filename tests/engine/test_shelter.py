"""Interrupts of a merge: however many, and whenever, they leave nothing alive that writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from models import recipe_of, write_model

from streammerge.engine.progress import OnProgress, ProgressEvent
from streammerge.engine.shelter import run_sheltered
from streammerge.statistics import BLOCK

pytestmark = pytest.mark.timeout(120)

EVENT = ProgressEvent("merge", 1, 2, 1.0, 1.0, 1.0)


def ignore(_event: ProgressEvent) -> None:
    """Take a report."""


def test_the_result_of_the_work_comes_back() -> None:
    assert run_sheltered(lambda _: 42, ignore) == 42


def test_reports_reach_the_calling_thread_in_order() -> None:
    seen: list[tuple[str, int]] = []

    def work(report: OnProgress) -> None:
        for count in range(5):
            report(ProgressEvent("merge", count, 5, 1.0, 1.0, 1.0))

    run_sheltered(work, lambda e: seen.append((threading.current_thread().name, e.bytes_done)))

    assert seen == [(threading.current_thread().name, count) for count in range(5)]


def test_an_error_of_the_work_is_raised() -> None:
    def work(_report: OnProgress) -> None:
        raise LookupError("in the work")

    with pytest.raises(LookupError, match="in the work"):
        run_sheltered(work, ignore)


def test_an_error_of_the_receiver_ends_the_work_and_keeps_its_name_and_the_notes() -> None:
    ended: list[str] = []

    def work(report: OnProgress) -> None:
        try:
            report(EVENT)
        except OSError as error:
            ended.append("work")
            renamed = RuntimeError("another name")
            renamed.add_note("what is done is kept")
            raise renamed from error

    def fail(_event: ProgressEvent) -> None:
        raise OSError("of the caller")

    with pytest.raises(OSError, match="of the caller") as caught:
        run_sheltered(work, fail)

    assert ended == ["work"]
    assert caught.value.__notes__ == ["what is done is kept"]


def test_work_that_completes_in_spite_of_an_interrupt_still_raises_it() -> None:
    def work(_report: OnProgress) -> int:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)
        return 1

    with pytest.raises(KeyboardInterrupt):
        run_sheltered(work, ignore)


FLOODED_WAIT = """
import signal, sys, time
from streammerge.engine.progress import ProgressEvent
from streammerge.engine.shelter import run_sheltered

class Interrupted(BaseException):
    pass

came = 0
ended = []

def interrupt(*_):
    global came
    if not ended:
        came += 1
        raise Interrupted

def work(report):
    try:
        # Not before: what is interrupted until then has not begun.
        signal.setitimer(signal.ITIMER_REAL, 0.05, float(sys.argv[1]))
        while True:
            report(ProgressEvent("merge", 1, 2, 1.0, 1.0, 1.0))
            time.sleep(0.01)
    finally:
        # Files are closed and threads are joined.
        time.sleep(0.3)
        ended.append(True)

signal.signal(signal.SIGALRM, interrupt)
for _ in range(5):
    ended.clear()
    try:
        run_sheltered(work, lambda _: None)
    except Interrupted:
        pass
    assert ended == [True], ended
    signal.setitimer(signal.ITIMER_REAL, 0)
assert came > 50, came
print("sound")
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="a timer sends the signals")
@pytest.mark.parametrize("seconds", [0.002, 0.01])
def test_interrupts_without_number_never_end_the_wait_before_the_work(seconds: float) -> None:
    """A timer interrupts the caller over and over, while it waits, answers, and turns its loops.

    In a process of its own, for pytest dislikes interrupts of what the interpreter does aside.
    """
    ran = subprocess.run(
        [sys.executable, "-c", FLOODED_WAIT, str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=100,
        check=False,
    )

    assert (ran.returncode, ran.stdout) == (0, "sound\n")


INTERRUPTED_MERGE = """
import os, signal, sys, threading, time
import streammerge
from streammerge import run
from streammerge.checkpoint import outputfile
from streammerge.checkpoint.bytesource import PreadSource
import _thread

class Slow(PreadSource):
    def read_into(self, offset, buffer):
        time.sleep(0.05)
        super().read_into(offset, buffer)

run.choose_byte_source = lambda _: Slow
recipe, out, mine = sys.argv[1:]
write_some = outputfile.OutputFile._write_some

def slow_write(self, offset, buffer):
    time.sleep(0.05)
    return write_some(self, offset, buffer)

outputfile.OutputFile._write_some = slow_write
main = threading.main_thread().ident

def interrupt():
    for _ in range(5):
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.01)

begun = []
def on_progress(event):
    if not begun:
        begun.append(threading.Thread(target=interrupt))
        begun[0].start()

try:
    streammerge.merge(recipe, out, workers=1, on_progress=on_progress)
except KeyboardInterrupt:
    pass
# Descriptors that the merge has closed are given to these files.
files = [open(f"{mine}{i}", "w+b", buffering=0) for i in range(20)]
for _ in range(50):
    try:
        begun[0].join()
        time.sleep(0.02)
    except KeyboardInterrupt:
        pass
alive = [each.name for each in threading.enumerate() if each.name.startswith("streammerge")]
sizes = [os.fstat(each.fileno()).st_size for each in files]
assert not alive, alive
assert not any(sizes), sizes
manifest = streammerge.merge(recipe, out, resume=True)
assert manifest.run.resumed in (True, False)
print("sound")
"""


@pytest.mark.skipif(os.name != "posix", reason="the signal is sent as POSIX does")
def test_five_interrupts_leave_no_thread_no_lock_and_no_byte_in_the_callers_files(
    tmp_path: Path,
) -> None:
    tensors = {f"large.{i}": torch.full((8 * BLOCK,), float(i)) for i in range(4)}
    base = write_model(tmp_path / "base", tensors)
    source = write_model(tmp_path / "source", tensors)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(recipe_of("linear", None, [base, source])))

    ran = subprocess.run(
        [
            *(sys.executable, "-c", INTERRUPTED_MERGE),
            *(str(recipe), str(tmp_path / "out"), str(tmp_path / "mine")),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "sound\n", "")
