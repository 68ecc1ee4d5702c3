"""Async code behind plain calls: what is given, what is raised where, and what is cancelled."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from tests.patience import LIMIT

from shoal.portal import Portal, logging_thread, open_portal

log: list[str] = []


@asynccontextmanager
async def quiet() -> AsyncIterator[str]:
    log.append("in")
    try:
        yield "opened"
    finally:
        log.append("out")


@asynccontextmanager
async def doomed() -> AsyncIterator[trio.Event]:
    """Something that ends with an error of its own once the event is set, whoever waits for it."""
    event = trio.Event()

    async def fail() -> None:
        await event.wait()
        raise OSError("the house is on fire")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        yield event


@pytest.fixture(autouse=True)
def ends_its_thread() -> None:
    log.clear()


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shoal network"]


async def count(put: Callable[[int], None]) -> None:
    for number in range(5):
        await trio.lowlevel.checkpoint()
        put(number)


async def count_for_ever(put: Callable[[int], None]) -> None:
    try:
        put(0)
        await trio.sleep_forever()
    finally:
        log.append("cancelled")


def test_items_come_in_order_and_the_manager_is_left_in_the_end() -> None:
    with open_portal(quiet) as portal:
        assert portal.opened == "opened"
        assert list(portal.stream(count)) == [0, 1, 2, 3, 4]
        assert list(portal.stream(count)) == [0, 1, 2, 3, 4]
        assert log == ["in"]
    assert log == ["in", "out"]
    assert running() == []


def test_a_call_returns_or_raises_what_the_function_does() -> None:
    async def six() -> int:
        await trio.lowlevel.checkpoint()
        return 6

    async def no() -> int:
        raise KeyError("no")

    with open_portal(quiet) as portal:
        assert portal.call(six) == 6
        with pytest.raises(KeyError, match="no"):
            portal.call(no)
        assert portal.call(six) == 6


def test_an_error_in_a_stream_comes_after_its_items_and_ends_nothing_else() -> None:
    async def breaks(put: Callable[[int], None]) -> None:
        put(1)
        raise ValueError("halfway")

    with open_portal(quiet) as portal:
        stream = portal.stream(breaks)
        assert next(stream) == 1
        with pytest.raises(ValueError, match="halfway"):
            next(stream)
        assert list(portal.stream(count)) == [0, 1, 2, 3, 4]


def test_closing_a_stream_cancels_it_and_waits_for_its_end() -> None:
    with open_portal(quiet) as portal:
        stream = portal.stream(count_for_ever)
        assert next(stream) == 0
        stream.close()
        assert log == ["in", "cancelled"]
        assert list(portal.stream(count)) == [0, 1, 2, 3, 4]
        portal.stream(count_for_ever).close()  # never begun
    assert log == ["in", "cancelled", "out"]


def test_leaving_the_portal_ends_a_stream_that_nobody_closed() -> None:
    with open_portal(quiet) as portal:
        stream = portal.stream(count_for_ever)
        assert next(stream) == 0
    assert log == ["in", "cancelled", "out"]
    with pytest.raises(RuntimeError, match="has been closed"):
        next(stream)
    with pytest.raises(RuntimeError, match="has been closed"):
        portal.call(trio.lowlevel.checkpoint)
    assert not portal.tell(log.clear)


def test_an_opening_that_fails_raises_its_error_and_leaves_no_thread() -> None:
    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        await trio.lowlevel.checkpoint()
        raise OSError("nobody there")
        yield

    with pytest.raises(OSError, match="nobody there"), open_portal(broken):
        pass
    assert running() == []


def fire(portal: Portal[trio.Event]) -> None:
    portal.tell(portal.opened.set)


def test_a_loop_that_fails_ends_who_waits_with_its_error() -> None:
    def wait() -> None:
        with open_portal(doomed) as portal:
            stream = portal.stream(count_for_ever)
            assert next(stream) == 0
            fire(portal)
            next(stream)

    with pytest.raises(ExceptionGroup) as caught:
        wait()
    assert "on fire" in str(caught.value.exceptions[0])
    assert log == ["cancelled"]


def test_a_loop_that_failed_meanwhile_says_so_to_the_next_and_at_the_end() -> None:
    def fail() -> None:
        with open_portal(doomed) as portal:
            fire(portal)
            while running():
                time.sleep(0.001)
            with pytest.raises(ExceptionGroup):
                list(portal.stream(count))
            with pytest.raises(ExceptionGroup):
                portal.call(trio.lowlevel.checkpoint)

    with pytest.raises(ExceptionGroup):
        fail()


def test_an_error_of_the_caller_is_not_hidden_by_the_loops() -> None:
    def divide() -> None:
        with open_portal(doomed) as portal:
            fire(portal)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        divide()


INTERRUPTED = """
import os, signal, sys, threading, time
from contextlib import asynccontextmanager
import trio
from shoal.portal import logging_thread, open_portal

def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)

@asynccontextmanager
async def slow():
    if "opening" in sys.argv:
        threading.Timer(0.05, ctrl_c).start()
        try:
            await trio.sleep_forever()
        finally:
            print("cancelled")
    yield

async def wait(put):
    threading.Timer(0.05, ctrl_c).start()
    try:
        await trio.sleep_forever()
    finally:
        print("cancelled")

async def six():
    return 6

try:
    with open_portal(slow) as portal:
        try:
            list(portal.stream(wait))
        except KeyboardInterrupt:
            print("interrupted", portal.call(six))
except KeyboardInterrupt:
    print("left")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "said"), [("opening", "cancelled\nleft\n"), ("later", "cancelled\ninterrupted 6\n")]
)
def test_ctrl_c_cancels_what_the_main_thread_waits_for(when: str, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, when], capture_output=True, text=True, timeout=LIMIT
    )
    assert (done.stdout, done.stderr, done.returncode) == (said, "", 0)


def test_a_reader_that_does_not_read_holds_up_nothing_in_the_loop() -> None:
    """As when a terminal is stopped: the reader's thread blocks in a write to standard output."""
    done = threading.Event()

    async def feed(put: Callable[[int], None]) -> None:
        for number in range(10_000):
            await trio.lowlevel.checkpoint()
            put(number)
        done.set()

    with open_portal(quiet) as portal:
        items = portal.stream(feed)
        assert next(items) == 0
        assert done.wait(30)  # while nobody reads
        assert portal.call(answer_of_the_loop) == "here"
        assert sum(1 for _ in items) == 9_999


async def answer_of_the_loop() -> str:
    await trio.lowlevel.checkpoint()
    return "here"


def test_sentences_about_nodes_are_printed_in_order_by_a_thread_that_may_block() -> None:
    printed: list[str] = []
    free = threading.Event()

    def blocked(line: str) -> None:
        free.wait(30)
        printed.append(line)

    with logging_thread(blocked) as say:
        say("b is lost")
        say("b is back")
        assert printed == []  # and `say` has returned
        free.set()
    assert printed == ["b is lost", "b is back"]


def test_a_sentence_that_cannot_be_written_does_not_keep_later_ones_back() -> None:
    printed: list[str] = []

    def full(line: str) -> None:
        if line == "b is lost":
            raise OSError(28, "No space left on device")
        printed.append(line)

    with logging_thread(full) as say:
        say("b is lost")
        say("b is back")
    assert printed == ["b is back"]


def test_a_terminal_that_accepts_nothing_does_not_keep_the_program_from_ending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal.portal._LAST_LINES_SECONDS", 0.05)
    free = threading.Event()
    with logging_thread(lambda line: free.wait(30)) as say:
        say("b is lost")
    free.set()


def test_a_forked_process_is_told_that_the_loop_is_not_there() -> None:
    """And what only ends something does nothing, there or in the parent."""
    code = """
import os, sys, trio
from contextlib import asynccontextmanager
from shoal.engine.errors import ShoalError
from shoal.portal import open_portal

@asynccontextmanager
async def nothing():
    yield

async def count(put):
    for number in range(3):
        put(number)
    await trio.sleep_forever()

with open_portal(nothing) as portal:
    numbers, stop = portal.stream(count), portal.start(count, [].append)
    assert next(numbers) == 0
    if not (child := os.fork()):
        asked = (lambda: next(numbers), lambda: portal.start(count, print), lambda: portal.call(trio.sleep))
        for ask in asked:
            try:
                ask()
            except ShoalError as error:
                print(error, flush=True)
        numbers.close(), stop(), portal.close()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(next(portal.stream(count)))
    numbers.close(), stop()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    *told, code_of_child, number = done.stdout.splitlines()
    assert len(told) == 3
    assert set(told) == {
        "connections to nodes belong to the process that opened them: open the model in this one, too"
    }
    assert (code_of_child, number) == ("0", "0")
