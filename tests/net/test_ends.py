"""What a node between the ends of a chain gets to see of a prompt: all bytes that reach it and leave it, and
the memory of its process, hold no sequence of token ids. Real processes, whose traffic passes a proxy."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import trio
from tests.patience import LIMIT

from shoal.cli import main
from shoal.engine.batch import Sampling
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.net.coordinator import Coordinator, CoordinatorOptions
from shoal.net.identity import identity_of, shape_of
from shoal.net.placement import plan_at
from shoal.planner import Assignment

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"
WINDOW = 6
"""So many token ids in a row are no accident."""
PAGE = 4096
SAMPLING = Sampling(temperature=0.8, repetition_penalty=1.3, seed=4, bias=((5, -1.0),))


class Recorder:
    """A proxy in front of a node: what passes, each direction of each connection on its own."""

    def __init__(self, port: int) -> None:
        self.port, self.recorded = port, list[bytearray]()

    async def serve(self, stream: trio.SocketStream) -> None:
        try:
            node = await trio.open_tcp_stream("127.0.0.1", self.port)
        except OSError:
            return
        async with stream, node, trio.open_nursery() as tasks:
            for source, target in ((stream, node), (node, stream)):
                tasks.start_soon(self._pass_on, source, target, tasks)

    async def _pass_on(
        self, source: trio.SocketStream, target: trio.SocketStream, tasks: trio.Nursery
    ) -> None:
        self.recorded.append(bytearray())
        record = self.recorded[-1]
        try:
            while data := await source.receive_some(65536):
                record += data
                await target.send_all(data)
            await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            tasks.cancel_scope.cancel()


def written(data: bytes) -> bytes:
    """The pages that are not all zeros, and those beside them: most memory was never written."""
    words = np.frombuffer(data, np.uint64).reshape(-1, PAGE // 8)
    used = words.any(axis=1)
    used[1:] |= (was := used.copy())[:-1]
    used[:-1] |= was[1:]
    return words[used].tobytes()


def found_in(data: bytes | bytearray | memoryview, ids: Sequence[int]) -> bool:
    """Whether bytes hold some of these token ids in a row: packed, in JSON, or as objects of Python."""
    windows = [ids[at : at + WINDOW] for at in (10, 100, len(ids) - WINDOW)]
    whole = len(data) // PAGE * PAGE
    raw = written(bytes(data[:whole])) + bytes(data[whole:])
    for window in windows:
        forms = [struct.pack(f"<{WINDOW}{kind}", *window) for kind in "iq"]
        if any(form in raw for form in (*forms, ",".join(map(str, window)).encode())):
            return True
    # Small integers are objects that lie next to each other, so pointers to them differ as their values do.
    words = np.frombuffer(raw, np.uint64, len(raw) // 8)
    steps = np.diff(words)
    for window in windows:
        wanted = 32 * np.diff(np.array(window, np.uint64))
        at = np.flatnonzero(steps[: len(steps) - WINDOW + 2] == wanted[0])
        for i in range(1, WINDOW - 1):
            at = at[steps[at + i] == wanted[i]]
        if len(at):
            return True
    return False


def memory(pid: int) -> Iterator[bytes]:
    """What a process may write to and has written to, a mapping at a time."""
    with open(f"/proc/{pid}/maps", encoding="utf-8") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for line in maps:
            span, rights, *_ = line.split()
            first, last = (int(end, 16) for end in span.split("-"))
            if rights.startswith("rw"):
                with suppress(OSError):  # it is gone, or belongs to a device
                    yield written(os.pread(mem.fileno(), last - first, first))


async def remembers(process: subprocess.Popen[bytes], ids: Sequence[int]) -> bool:
    """Whether the memory of a process holds token ids."""

    def look() -> bool:
        return any(found_in(part, ids) for part in memory(process.pid))

    return await trio.to_thread.run_sync(look)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[Path, list[tuple[subprocess.Popen[bytes], int]]]]:
    """A model directory, and four nodes of it: processes and ports."""
    model = tmp_path / "tiny"
    assert main(["convert", str(TINY), str(model), "--dtype", "f32"]) == 0
    environment = {**os.environ, "XDG_CONFIG_HOME": str(tmp_path / "config")}
    with ExitStack() as stack:
        processes = []
        for name in "abcd":
            options = ("--name", name, "--ram", "300", "--threads", "1", "--port-file", str(tmp_path / name))
            process = subprocess.Popen(
                [sys.executable, "-m", "shoal", "node", str(model), *options],
                env=environment,
                stdout=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)

        async def ports() -> list[int]:
            files = [tmp_path / name for name in "abcd"]
            with trio.fail_after(LIMIT):
                while not all(file.exists() for file in files):  # noqa: ASYNC110
                    await trio.sleep(0.02)
            return [int(file.read_text(encoding="ascii").rpartition(":")[2]) for file in files]

        yield model, list(zip(processes, trio.run(ports), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is read in /proc")
def test_a_node_in_the_middle_gets_no_token_ids(
    started: tuple[Path, list[tuple[subprocess.Popen[bytes], int]]],
) -> None:
    """Neither when it computes, nor when it joins and layers move to it; the answer penalises tokens."""
    path, nodes = started
    model, rng = Model.open(path), random.Random(12)
    prompt = [rng.randrange(20, 250) for _ in range(150)]
    with Stage(model, 0, model.n_units) as stage:
        expected = list(generate(stage, prompt, SAMPLING, max_tokens=40, end=()))
        expected.append(77)
        expected += generate(stage, [*prompt, *expected], SAMPLING, max_tokens=20, end=())

    async def run() -> tuple[list[int], list[bool]]:
        async with trio.open_nursery() as tasks:
            addresses, got = list[tuple[str, int]](), list[int]()
            for recorder in recorders:
                listeners: list[trio.SocketListener] = await tasks.start(
                    partial(trio.serve_tcp, recorder.serve, 0, host="127.0.0.1")
                )
                addresses.append(listeners[0].socket.getsockname()[:2])
            me, options = identity_of(model, "laptop", "0"), CoordinatorOptions(measure_links=False)
            places = (addresses, me, shape_of(model), plan_at((0, 2, 3, 5)), options)
            async with Coordinator.open(*places) as coordinator, coordinator.session(SAMPLING) as session:
                async with session.answer(prompt, max_tokens=40) as tokens:
                    got += [token async for token in tokens]
                order = [coordinator.nodes[i].label for i in (0, 3, 2)]
                cuts = zip(order, (0, 2, 3), (2, 3, 5), strict=True)
                coordinator.move([Assignment(*cut) for cut in cuts], "it is a test")
                while not any(not move.moved.recovery for move in coordinator.moves):  # noqa: ASYNC110
                    await trio.sleep(0.01)
                async with session.answer([*prompt, *got, 77], max_tokens=20) as tokens:
                    got.append(77)
                    async for token in tokens:
                        got.append(token)
                    memories = [await remembers(process, [*prompt, *got]) for process, _ in nodes]
            tasks.cancel_scope.cancel()
            return got, memories

    recorders = [Recorder(port) for _, port in nodes]
    got, memories = trio.run(run)
    assert got == expected
    assert (memories[0], memories[1], memories[3]) == (True, False, False)
    known = [*prompt, *got]
    seen = [[found_in(record, known) for record in recorder.recorded] for recorder in recorders]
    assert any(seen[0]) and not any(seen[1]) and not any(seen[3])
    onward = [record for record in recorders[2].recorded if b'"purpose":"step"' in record[:400]]
    assert onward and not any(found_in(record, known) for record in onward)
    assert sum(map(len, recorders[1].recorded)) > 4 * 72 * len(prompt)  # its rows have passed
    assert sum(map(len, recorders[3].recorded)) > 4 * 72 * 10
