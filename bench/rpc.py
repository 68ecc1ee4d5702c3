"""Two nodes of shoal against llama.cpp's RPC with two servers, and against one process of shoal, on the same
weights: `python -m bench.peers --rpc`.

Nodes and servers have one thread and a core each, and one process has the last core; the coordinator and
llama.cpp's own process may use all. All take turns in a round. Both sides cut the layers in halves, where
llama.cpp counts the LM head as one layer. llama.cpp runs a prompt in parts (its option `ubatch`); each size
of the parts is a program of its own here, since the best one is not known before."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench import engines
from bench.chain import (
    Chain,
    Checkout,
    Expected,
    alone,
    chains,
    cores,
    in_turns,
    output_of,
    same,
    tokens_per_s,
)
from bench.rounds import Samples

from shoal.engine.model_directory import Model
from shoal.processes import end

NODES = 2
PARTS = (64, 128, 512)
"""Rows of a part of a prompt."""
_PATIENCE_S, _POLL_S = 60.0, 0.05


def compare(
    checkouts: Sequence[Checkout],
    model: Model,
    python: Path,
    peer_model: Path,
    prompt: int,
    generated: int,
    rounds: int,
) -> Samples:
    """Samples of `rounds` rounds. RuntimeError: a process failed, or the nodes' answers are not those of one
    process."""
    samples, expected = Samples(), Expected(checkouts[0], model, 1)
    token = alone(checkouts[0], model, "first", lengths=[prompt])["tokens"]
    read, decode = f"prompt of {prompt}, tokens/s", f"decode of {generated}, tokens/s"

    def one_process(number: int) -> None:
        job = {"prompt": 1, "tokens": generated + 1, "batches": [1]}
        (run,) = alone(checkouts[0], model, "decode", **job)["runs"]
        samples.add(decode, "one process", number, tokens_per_s(run["times"][0]))
        found = alone(checkouts[0], model, "first", lengths=[prompt])
        samples.add(read, "one process", number, prompt / found["seconds"][0])

    def nodes(chain: Chain, number: int) -> None:
        job: dict[str, Any] = {"streams": 1, "prompt": 1, "tokens": generated + 1, "context": generated + 2}
        found = chain.head(NODES, "decode", **job)
        expected.check(found["tokens"])
        samples.add(decode, chain.checkout.name, number, tokens_per_s(found["times"][0]))
        found = chain.head(NODES, "first", lengths=[prompt], context=prompt + 1)
        same(token, found["tokens"])
        samples.add(read, chain.checkout.name, number, prompt / found["seconds"][0])

    def peer(servers: Sequence[str], number: int) -> None:
        for rows in PARTS:
            decoded = generated if rows == PARTS[-1] else 0  # a part is one row then, whatever its limit
            command = engines.llama_rpc(python, peer_model, servers, rows, prompt, decoded)
            for row in json.loads(output_of(command)):
                figure = read if row["test"].startswith("pp") else decode
                samples.add(figure, f"RPC, parts of {rows}", number, row["avg_ts"])

    with ExitStack() as stack:
        running = stack.enter_context(chains(checkouts, model, NODES))
        servers = [stack.enter_context(_server(python, cores()[i % len(cores())])) for i in range(NODES)]
        turns = [lambda number, chain=chain: nodes(chain, number) for chain in running]
        in_turns(rounds, [*turns, one_process, lambda number: peer(servers, number)])
    return samples


@contextmanager
def _server(python: Path, core: int) -> Iterator[str]:
    """A server on a core, and its address. RuntimeError: it ended, or does not listen in time."""
    with socket.socket() as free:  # the server takes no port 0
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    process = subprocess.Popen(
        engines.llama_server(python, f"{host}:{port}"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=functools.partial(os.sched_setaffinity, 0, [core]),
    )
    try:
        until = time.monotonic() + _PATIENCE_S
        while not _listens(host, port):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"llama.cpp's RPC server on core {core} ended, or did not listen in time")
            time.sleep(_POLL_S)
        yield f"{host}:{port}"
    finally:
        end([process])


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1.0).close()
    except OSError:
        return False
    return True
