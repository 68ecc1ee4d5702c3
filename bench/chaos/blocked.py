"""`shoal run` whose standard output nobody reads for a while: its answer is complete, and the same."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time

import trio

from .trial import PATIENCE_SECONDS, STREAMS, Outcome, Trial

KIND = "blocked-output"
TOKENS = 150
PIPE_BYTES = 4096


async def run(trial: Trial) -> Outcome:
    """Compares the text of `shoal run` on the nodes with that of `shoal run` in one process."""
    start, rng, problems = time.monotonic(), trial.rng, list[str]()
    prompt = "".join(chr(rng.randint(97, 122)) for _ in range(12))
    command = [sys.executable, "-m", "shoal", "run", str(trial.model), prompt, "--raw", "-n", str(TOKENS)]
    if rng.random() < 0.5:
        command += ["--temperature", "0.8", "--seed", str(rng.randrange(1 << 31))]
    alone = await trio.run_process(command, capture_stdout=True, stderr=subprocess.DEVNULL)
    addresses = ",".join(f"{host}:{port}" for host, port in (gate.address for gate in trial.network.gates))
    source, sink = os.pipe()
    try:
        fcntl.fcntl(sink, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        filling = os.write(sink, bytes(PIPE_BYTES))  # so the first write of the process finds no room
        process = await trio.lowlevel.open_process(
            [*command, "--nodes", addresses], stdout=sink, stderr=subprocess.PIPE
        )
    finally:
        os.close(sink)
    seconds = trial.seconds(0.5, 20)
    text = said = b""

    async def complain() -> None:
        nonlocal said
        assert process.stderr is not None
        async for data in process.stderr:
            said += data

    with trio.move_on_after(PATIENCE_SECONDS + seconds) as limit:
        async with trio.lowlevel.FdStream(source) as stream, trio.open_nursery() as tasks:
            tasks.start_soon(complain)
            await trio.sleep(seconds)
            async for data in stream:
                text += data
            await process.wait()
    if limit.cancelled_caught:
        problems.append(f"nothing for {PATIENCE_SECONDS:g} s")
        process.kill()
        await process.wait()
    elif process.returncode != 0:
        problems.append(
            f"shoal run ended with code {process.returncode}: {said.decode(errors='replace')[-300:]}"
        )
    same = text[filling:] == alone.stdout
    if not same and not problems:
        problems.append("the answers differ")
    return Outcome(KIND, STREAMS * same, 0.0, 0.0, 0, (), time.monotonic() - start, tuple(problems))
