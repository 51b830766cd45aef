"""An engine in a process of its own: what it says, and what becomes of it when it falls silent or ends."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from clusters import wait_until

from streammerge.errors import ClusterError, NonFiniteError, StreamMergeError
from streammerge.executors import apart
from streammerge.executors.apart import ExecutorApart
from streammerge.executors.driving import check_engine
from streammerge.executors.seam import Outcome, describe_error, restore_error

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes share locks as POSIX does")

ENGINE = """
import os, sys, time
from streammerge.errors import ClusterError, NonFiniteError
from streammerge.executors.seam import Outcome, describe_error

class Engine:
    def __init__(self, address, scratch):
        print("a library that talks")
        if address == "a:1":
            raise ClusterError("nobody answers there")
        (scratch / "file").write_text("as long as the engine is used")
        self.requests = []
        self.address = address

    def workers(self):
        return 2

    def idle(self):
        return 2 - len(self.requests)

    def running(self):
        return len(self.requests)

    def submit(self, request):
        if request["part"] == 7:
            time.sleep(600)
        if request["part"] == 8:
            print("it is too much", file=sys.stderr)
            os._exit(3)
        self.requests.append(request)

    def gather(self, seconds):
        time.sleep(seconds)
        ended, self.requests = self.requests, []
        error = describe_error(NonFiniteError("a tensor"))
        return [
            Outcome(each["part"], "there", lost="it was lost") if each["part"] % 2 else
            Outcome(each["part"], "there", error=error) for each in ended
        ]

    def close(self):
        if self.address == "b:1":
            time.sleep(600)
"""


@pytest.fixture(autouse=True)
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is called like one of ours."""
    (tmp_path / "dask_like.py").write_text(ENGINE)
    (tmp_path / "sitecustomize.py").write_text(
        "from streammerge.executors import apart\n"
        "import sys\n"
        "if 'streammerge.executors.apart' in sys.orig_argv:\n"
        "    import runpy\n"
        "    apart.ENGINES['dask'] = ('dask_like', 'Engine')\n"
        "    from pathlib import Path\n"
        "    apart._CLOSE_SECONDS = 2\n"
        "    sys.exit(apart.main(sys.orig_argv[-2], Path(sys.orig_argv[-1])))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@contextlib.contextmanager
def opened(on: str = "dask") -> Iterator[ExecutorApart]:
    with contextlib.closing(ExecutorApart(on)) as executor:
        # Until it is connected.
        executor.workers()
        yield executor


def test_what_an_engine_is_told_and_says_goes_through() -> None:
    with opened() as executor:
        assert (executor.workers(), executor.idle(), executor.running()) == (2, 2, 0)
        executor.submit({"part": 1})
        # Before the engine has even heard of it.
        assert (executor.idle(), executor.running()) == (1, 1)
        executor.submit({"part": 2})
        assert (executor.idle(), executor.running()) == (0, 2)
        ended: list[Outcome] = []
        wait_until(lambda: ended.extend(executor.gather(0.5)) or len(ended) == 2)
        wait_until(lambda: executor.idle() == 2)

    lost, failed = sorted(ended, key=lambda outcome: outcome.part)
    assert lost == Outcome(1, "there", lost="it was lost")
    assert failed.error is not None
    assert isinstance(restore_error(failed.error), NonFiniteError)


def test_nothing_is_left_of_an_engine_that_was_used() -> None:
    with opened() as executor:
        process, scratch = psutil.Process(executor._process.pid), executor._scratch
        assert (scratch / "file").exists()

    assert not process.is_running()
    assert not scratch.exists()


def test_an_error_of_connecting_is_raised_as_it_is() -> None:
    with (
        contextlib.closing(ExecutorApart("dask://a:1")) as executor,
        pytest.raises(ClusterError, match=r"^nobody answers there$"),
    ):
        executor.workers()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_that_is_gone_is_an_error(number: int) -> None:
    with opened() as executor:
        os.kill(executor._process.pid, number)

        with pytest.raises(ClusterError, match=f"dask: .* ended with code -{number:d} and said"):
            wait_until(lambda: executor.workers() != 2)
        with pytest.raises(ClusterError):
            executor.gather(1.0)


def test_an_engine_that_ends_the_process_is_an_error_with_its_last_words() -> None:
    with opened() as executor:
        executor.submit({"part": 8})

        with pytest.raises(ClusterError, match="ended with code 3 and said: it is too much; look"):
            wait_until(lambda: executor.gather(0.5))


def test_an_engine_that_does_not_answer_is_an_error_in_a_stated_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(apart, "SILENT_SECONDS", 3.0)
    monkeypatch.setattr(apart, "_CLOSE_SECONDS", 0.5)
    with opened() as executor:
        executor.submit({"part": 7})

        with pytest.raises(ClusterError, match=r"has not answered for 3 s.*goes on with what is"):
            wait_until(lambda: executor.gather(0.5))

    assert executor._process.returncode == -signal.SIGKILL


def test_a_process_that_is_stopped_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "SILENT_SECONDS", 2.0)
    monkeypatch.setattr(apart, "_CLOSE_SECONDS", 0.5)
    with opened() as executor:
        os.kill(executor._process.pid, signal.SIGSTOP)

        with pytest.raises(ClusterError, match="has not answered for 2 s"):
            wait_until(lambda: executor.idle() != 2)


def test_an_engine_that_does_not_let_go_ends_without_its_driver() -> None:
    """The driver may have been killed."""
    executor = ExecutorApart("dask://b:1")
    assert executor.workers() == 2
    assert executor._process.stdin is not None

    executor._process.stdin.close()
    executor._process.wait(30)

    assert executor._process.returncode == 1
    executor.close()


def test_an_engine_does_not_keep_a_driver_from_answering() -> None:
    """What is asked is answered from what was said last, while the engine sleeps for ten minutes."""
    with opened() as executor:
        executor.submit({"part": 7})
        for _ in range(1000):
            assert executor.workers() == 2
            assert executor.running() == 1
        os.killpg(executor._process.pid, signal.SIGKILL)


def test_errors_keep_their_kind_and_notes_on_the_way() -> None:
    error = NonFiniteError("a tensor")
    error.add_note("part 1")

    restored = restore_error(describe_error(error))

    assert (type(restored), str(restored), restored.__notes__) == (
        NonFiniteError,
        "a tensor",
        ["part 1"],
    )
    assert type(restore_error({"kind": "SystemExit", "message": "no"})) is not SystemExit
    assert isinstance(restore_error({}), StreamMergeError)


@pytest.mark.parametrize("engine", apart.ENGINES)
def test_every_engine_is_known_by_name(engine: str) -> None:
    check_engine(engine)
    check_engine(f"{engine}://host:80")
    with pytest.raises(ValueError, match=f"{engine} or {engine}://HOST:PORT"):
        check_engine(f"{engine}://host")
