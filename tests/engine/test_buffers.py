"""Buffers and allowances are never exceeded, never lost, and never waited for in vain."""

from __future__ import annotations

import mmap
import random
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.engine.buffers import Allowance, Slot, SlotPool
from streammerge.engine.memory import resident_memory
from streammerge.engine.monitor import Monitor, StoppedError
from streammerge.engine.queues import Outstanding, WorkQueue

pytestmark = pytest.mark.timeout(30)


def in_thread(body: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def stopped(body: Callable[[], object]) -> Callable[[], None]:
    """Return the body of a thread that is expected to be stopped."""

    def run() -> None:
        with pytest.raises(StoppedError):
            body()

    return run


def test_slots_are_distinct_and_of_the_size_asked_for() -> None:
    slots = SlotPool(Monitor(), count=3, nbytes=1_234).acquire(3)

    assert [slot.memory.nbytes for slot in slots] == [1_234] * 3
    assert len({slot.memory.ctypes.data for slot in slots}) == 3


def test_large_slots_start_on_a_page() -> None:
    """They are mappings of their own, which leave the process when the pool goes."""
    slots = SlotPool(Monitor(), count=3, nbytes=2**20).acquire(3)

    assert [slot.memory.ctypes.data % mmap.PAGESIZE for slot in slots] == [0, 0, 0]


@pytest.mark.parametrize("nbytes", [2**16, 2**18 - 8, 2**18, 2**20])
def test_slots_can_be_viewed_as_any_element_type(nbytes: int) -> None:
    (slot,) = SlotPool(Monitor(), count=1, nbytes=nbytes).acquire(1)

    assert slot.memory.ctypes.data % 8 == 0


def test_slots_can_be_written() -> None:
    (slot,) = SlotPool(Monitor(), count=1, nbytes=10).acquire(1)
    slot.memory[:] = 7

    assert slot.memory.tolist() == [7] * 10


def test_a_slot_without_bytes_is_a_slot() -> None:
    """A job that only copies has output slots of size zero."""
    assert len(SlotPool(Monitor(), count=1, nbytes=0).acquire(1)) == 1


def test_slots_that_are_not_used_cost_nothing() -> None:
    before = resident_memory()
    pool = SlotPool(Monitor(), count=64, nbytes=2**24)
    slots = pool.acquire(64)

    assert resident_memory() - before < 2**24
    pool.release(slots)


def test_used_slots_come_back_before_new_ones_are_made() -> None:
    pool = SlotPool(Monitor(), count=2, nbytes=10)
    (used,) = pool.acquire(1)
    pool.release([used])

    assert pool.acquire(1)[0] is used


def test_all_slots_can_be_taken_at_once_and_no_more() -> None:
    monitor = Monitor()
    pool = SlotPool(monitor, count=2, nbytes=10)
    pool.acquire(2)
    thread = in_thread(stopped(lambda: pool.acquire(1)))
    thread.join(0.05)

    assert thread.is_alive()
    monitor.fail(RuntimeError())
    thread.join()


def test_a_release_wakes_who_waits_for_several() -> None:
    pool = SlotPool(Monitor(), count=2, nbytes=10)
    first, second = pool.acquire(2)
    taken: list[Slot] = []
    thread = in_thread(lambda: taken.extend(pool.acquire(2)))
    pool.release([first])
    # One of two is not enough, and nothing is held while waiting for the other.
    thread.join(0.05)
    assert thread.is_alive()
    assert pool.acquire(1) == [first]
    pool.release([first, second])
    thread.join()

    assert {id(slot) for slot in taken} == {id(first), id(second)}


def test_threads_that_need_several_slots_never_lock_up() -> None:
    """Each holds what it has while others wait; taking one by one would end in an embrace."""
    pool = SlotPool(Monitor(), count=5, nbytes=10)
    held: list[int] = []
    lock = threading.Lock()

    def work(seed: int) -> None:
        numbers = random.Random(seed)  # noqa: S311
        for _ in range(200):
            slots = pool.acquire(numbers.randint(1, 5))
            with lock:
                held.append(len(slots))
            pool.release(slots)

    threads = [in_thread(lambda seed=seed: work(seed)) for seed in range(8)]
    for thread in threads:
        thread.join()

    assert len(held) == 8 * 200
    assert len(pool.acquire(5)) == 5


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_an_allowance_is_never_exceeded(requests: list[int]) -> None:
    allowance = Allowance(Monitor(), 40)
    free = [40]
    lock = threading.Lock()
    overdrawn = threading.Event()

    def work(nbytes: int) -> None:
        reserved = allowance.reserve(nbytes)
        with lock:
            free[0] -= reserved
            if free[0] < 0:
                overdrawn.set()
        with lock:
            free[0] += reserved
        allowance.release(reserved)

    threads = [in_thread(lambda nbytes=nbytes: work(nbytes)) for nbytes in requests]
    for thread in threads:
        thread.join()

    assert not overdrawn.is_set()
    assert allowance.reserve(40) == 40


def test_an_allowance_gives_everything_away_at_once() -> None:
    """A reservation equal to the total is the last that fits."""
    allowance = Allowance(Monitor(), 13)

    assert allowance.reserve(13) == 13


def test_a_reservation_beyond_the_total_is_cut_to_it() -> None:
    """Whoever asked makes do with less; waiting would never end."""
    assert Allowance(Monitor(), 13).reserve(14) == 13
    assert Allowance(Monitor(), 13).total == 13


def test_an_empty_allowance_serves_who_needs_nothing() -> None:
    assert Allowance(Monitor(), 0).reserve(0) == 0


@pytest.mark.parametrize("what", ["slots", "allowance", "queue", "outstanding"])
def test_a_failure_wakes_everyone_who_waits(what: str) -> None:
    monitor = Monitor()
    pool = SlotPool(monitor, count=1, nbytes=1)
    pool.acquire(1)
    allowance = Allowance(monitor, 1)
    allowance.reserve(1)
    queue: WorkQueue[int] = WorkQueue(monitor)
    outstanding = Outstanding(monitor)
    outstanding.begin()
    body = {
        "slots": lambda: pool.acquire(1),
        "allowance": lambda: allowance.reserve(1),
        "queue": queue.take,
        "outstanding": outstanding.wait,
    }[what]
    threads = [in_thread(stopped(body)) for _ in range(4)]
    time.sleep(0.02)

    monitor.fail(RuntimeError("broken"))

    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_who_comes_after_a_failure_does_not_wait() -> None:
    monitor = Monitor()
    monitor.fail(RuntimeError("broken"))

    with pytest.raises(StoppedError):
        SlotPool(monitor, count=1, nbytes=1).acquire(1)


def test_the_first_failure_wins_and_the_others_become_its_notes() -> None:
    monitor = Monitor()
    first = RuntimeError("first")
    monitor.fail(first)
    monitor.fail(OSError("second"))
    monitor.fail(ValueError("third"))
    # The same error may be seen twice, by the thread that raised it and by the one that waits.
    monitor.fail(first)

    assert monitor.failure is first
    assert first.__notes__ == ["then: OSError: second", "then: ValueError: third"]


def test_urgent_work_comes_first_and_each_kind_in_order() -> None:
    queue: WorkQueue[str] = WorkQueue(Monitor())
    for item in ("a", "b"):
        queue.put(item)
    for item in ("c", "d"):
        queue.put(item, urgent=True)
    queue.close()

    assert [queue.take() for _ in range(6)] == ["c", "d", "a", "b", None, None]


def test_closing_a_queue_ends_those_who_wait_for_it() -> None:
    queue: WorkQueue[str] = WorkQueue(Monitor())
    taken: list[str | None] = []
    threads = [in_thread(lambda: taken.append(queue.take())) for _ in range(3)]
    time.sleep(0.02)
    queue.close()
    for thread in threads:
        thread.join()

    assert taken == [None] * 3


def test_outstanding_work_is_waited_for_until_it_ends_or_time_is_up() -> None:
    outstanding = Outstanding(Monitor())
    outstanding.begin(2)
    outstanding.end()

    assert not outstanding.wait(0.01)
    outstanding.end()
    assert outstanding.wait(0.01)
    assert outstanding.wait()
