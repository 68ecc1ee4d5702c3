"""llama.cpp's own HTTP server beside `shoal serve`: both with the same weights, each a process of its own.

llama-server is built from the source that llama-cpp-python has on PyPI, once, in the cache directory."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from bench import engines
from bench.engines import LLAMA_CPP

from shoal.processes import end, end_with_parent
from shoal.store import cache_directory

CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF "
    "-DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF "
    "-DLLAMA_TOOLS_INSTALL=OFF -DCMAKE_CXX_FLAGS=-U__AMX_INT8__"
)
"""For the CPU it is built on, without its page and without TLS; and without AMX, whose instructions virtual
machines may announce and refuse."""
PROGRAMS = ("llama-server", "llama-quantize")
NAME = "smollm2-135m"
"""What both servers call the model."""
_PATIENCE_S = 120.0
Running = tuple[int, subprocess.Popen[bytes]]
"""The port of a server, and its process."""


def programs(*, build: bool) -> Path:
    """The directory with PROGRAMS, built if need be, also if they were built with other options.
    FileNotFoundError: they are not there and not to be built."""
    directory = cache_directory() / "peers" / f"{LLAMA_CPP.replace('==', '-')}-server"
    stamp = directory / ".built"
    if stamp.exists() and stamp.read_text(encoding="ascii") == CMAKE:
        return directory
    if not build:
        raise FileNotFoundError(f"llama-server, built with {CMAKE}, is not in {directory}")
    print(f"building llama-server of {LLAMA_CPP} in {directory}: this takes many minutes", flush=True)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    with tempfile.TemporaryDirectory(dir=directory) as inside:
        into = Path(inside)
        _run([*pip, "--no-deps", "--no-binary", "llama-cpp-python", LLAMA_CPP, "--dest", inside])
        with tarfile.open(next(into.glob("*.tar.gz"))) as source:
            source.extractall(into, filter="data")
        root = next(into.glob("*/vendor/llama.cpp"))
        _run(["cmake", "-S", str(root), "-B", str(into / "build"), *CMAKE.split()])
        jobs = str(len(os.sched_getaffinity(0)))  # without a number it is as many as there are files
        _run(["cmake", "--build", str(into / "build"), "--parallel", jobs, "--target", *PROGRAMS])
        for name in PROGRAMS:
            shutil.copy(into / "build/bin" / name, directory)
    stamp.write_text(CMAKE, encoding="ascii")
    return directory


def _run(command: Sequence[str]) -> None:
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


def weights(directory: Path, kind: str) -> Path:
    """The model as a GGUF file in which every matrix is of one kind, made once from that of `shoal pull`."""
    source, target = engines.gguf(NAME), directory.parent / f"{NAME}.{kind}-pure.gguf"
    if not target.exists():
        part, all_of = target.with_suffix(".part"), kind.lower()
        types = ["--output-tensor-type", all_of, "--token-embedding-type", all_of]
        quantise = [str(directory / "llama-quantize"), "--allow-requantize", "--pure", *types]
        _run([*quantise, str(source), str(part), kind])
        part.rename(target)
    return target


@contextmanager
def llama_server(directory: Path, model: Path, threads: int, slots: int, context: int) -> Iterator[Running]:
    """A running llama-server, with room for `slots` answers of `context` tokens each. Each slot has a buffer
    of keys and values of its own, which is quicker here than one for all. Prompts stay cached in the slots,
    as by default."""
    port = free_port()
    options = f"--port {port} --threads {threads} --threads-batch {threads} --parallel {slots}"
    sizes = f"--ctx-size {slots * context} --alias {NAME} --no-ui --slots"
    command = [str(directory / "llama-server"), "--model", str(model), *options.split(), *sizes.split()]
    with _running(command, port) as process:
        yield port, process


@contextmanager
def shoal_server(model: Path, threads: int, slots: int, context: int) -> Iterator[Running]:
    """A running `shoal serve` with the same room."""
    port = free_port()
    options = f"--alone --port {port} --threads {threads} --answers {slots} --context {context} --name {NAME}"
    with _running([sys.executable, "-m", "shoal", "serve", str(model), *options.split()], port) as process:
        yield port, process


@contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers /health. RuntimeError: it does not; the end of its log."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=end_with_parent)
        try:
            until = time.monotonic() + _PATIENCE_S
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > until:
                    log.seek(0)
                    raise RuntimeError(
                        f"{shlex.join(command)} does not serve:\n{log.read()[-2000:].decode()}"
                    )
                time.sleep(0.1)
            yield process
        finally:
            end([process])


def _healthy(port: int) -> bool:
    url = f"http://127.0.0.1:{port}/health"
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
        return bool(reply.status == 200)
    return False


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
