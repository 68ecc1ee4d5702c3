"""What a process holds at most, beside the files of its model and the keys and values:

    python -m bench.memory [MODEL] [-t 1,2]

of `shoal run` (one token after a short text), of a start without tokenizer (one token after four ids), and of
a node that holds all units while a head draws 24 tokens through it."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import engines

from shoal.engine.costs import unit_cost
from shoal.engine.layout import PAGE
from shoal.engine.shards import Model
from shoal.store import resolve
from shoal.text_table import table

_HEADER = ("threads", "process", "peak MB", "shards", "a page of K and V", "the rest", "in MiB")
_TOKENS = 24  # of an answer that, after a short text, stays within a page of keys and values


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="(default smollm2-135m)")
    parser.add_argument("-t", "--threads", default="1,2", help="(default 1,2)")
    args = parser.parse_args(argv)
    path = resolve(args.model)
    rows = []
    for threads in map(int, args.threads.split(",")):
        text, ids = engines.start_jobs(path, threads)
        peaks = {
            "run": engines.run(text.command, ()).peak_rss,
            "ids": engines.run(ids.command, ()).peak_rss,
            "node": node_peak(path, threads),
        }
        rows += [[str(threads), *line] for line in parts(Model.open(path), peaks)]
    print(table(_HEADER, rows))
    return 0


def parts(model: Model, peaks: dict[str, int]) -> list[list[str]]:
    """For each process: its peak, what of that the model is, and what is left, in MB; the last in MiB too."""
    shards = sum(entry.size for name, entry in model.index.files.items() if name.endswith(".safetensors"))
    state = PAGE * sum(unit_cost(model, u).kv_bytes_per_token for u in range(model.n_units))
    lines = []
    for process, peak in peaks.items():
        numbers = [peak, shards, state, peak - shards - state]
        lines.append([process, *(f"{n / 1e6:.1f}" for n in numbers), f"{numbers[-1] / 2**20:.1f}"])
    return lines


def node_peak(model: Path, threads: int) -> int:
    """Bytes that a node held at most when it ended after an answer. RuntimeError: the answer failed."""
    with tempfile.TemporaryDirectory() as scratch:
        port = Path(scratch) / "port"
        listen = ["node", str(model), "--listen", "127.0.0.1:0", "--port-file", str(port)]
        command = [sys.executable, "-m", "shoal", *listen, "--threads", str(threads)]
        node = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not port.exists() and node.poll() is None:
                time.sleep(0.05)
            flags = ["--raw", "-n", str(_TOKENS), "--nodes", port.read_text().strip()]
            head = [sys.executable, "-m", "shoal", "run", str(model), engines.START_TEXT, *flags]
            engines.run(head, ())
        finally:
            node.send_signal(signal.SIGTERM)
            _, status, usage = os.wait4(node.pid, 0)
            node.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
