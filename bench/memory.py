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
from shoal.engine.layout import CHUNK
from shoal.engine.model_directory import Model
from shoal.store import resolve
from shoal.text_table import table

_HEADER = ("threads", "process", "peak MB", "shards", "64 positions of K and V", "the rest", "in MiB")
_PATIENCE_S = 60
_TOKENS = 24  # of an answer that, after a short text, stays within a chunk of 64 positions


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
        for process, peak in peaks.items():
            parts = known(Model.open(path))
            numbers = [peak, *parts, peak - sum(parts)]
            megabytes = [f"{n / 1e6:.1f}" for n in numbers]
            rows.append([str(threads), process, *megabytes, f"{numbers[-1] / 2**20:.1f}"])
    print(table(_HEADER, rows))
    return 0


def known(model: Model) -> tuple[int, int]:
    """Bytes of a model's shards, and of a chunk of keys and values in all its layers: a short context touches
    no more of its pages."""
    shards = sum(entry.size for name, entry in model.index.files.items() if name.endswith(".safetensors"))
    return shards, CHUNK * sum(unit_cost(model, u).kv_bytes_per_token for u in range(model.n_units))


def node_peak(model: Path, threads: int) -> int:
    """Bytes that a node held at most when it ended after an answer. RuntimeError: node or answer failed."""
    with tempfile.TemporaryDirectory() as scratch:
        port = Path(scratch) / "port"
        listen = ["--listen", "127.0.0.1:0", "--port-file", str(port), "--threads", str(threads)]
        node = [sys.executable, "-m", "shoal", "node", str(model), *listen]
        flags = ["--raw", "-n", str(_TOKENS), "--nodes"]
        head = [sys.executable, "-m", "shoal", "run", str(model), engines.START_TEXT, *flags]
        with engines.running(node) as process:
            address = _address(process, port)
            engines.run([*head, address], ())
            process.send_signal(signal.SIGTERM)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * 1024


def _address(node: subprocess.Popen[bytes], port: Path) -> str:
    """Where a node listens, once it does."""
    until = time.monotonic() + _PATIENCE_S
    while not port.exists():
        if node.poll() is not None or time.monotonic() > until:
            raise RuntimeError("the node ended, or did not listen in time; its words stand above")
        time.sleep(0.05)
    return port.read_text(encoding="ascii").strip()


if __name__ == "__main__":
    sys.exit(main())
