"""shoal against llama.cpp, and torch, on the same weights: ratios of tokens/s, pair by pair.

    python -m bench.peers [--model smollm2-135m] [--type Q8_0] [-t 1,2] [--rounds 5] [-o FILE.json [--add]]
                          [--torch PYTHON] [--startup]
    python -m bench.peers --rpc [--model …] [--type …] [--rounds 5] [--against DIRECTORY] [-o FILE.json]

Builds `llama-cpp-python` from PyPI in an environment of its own under the cache directory, once. shoal runs
the weights converted to int8 or int4; llama.cpp runs them requantised to --type, every matrix of them. In
each round the engines run one after the other, each in a session of its own, pinned to the same CPUs, and
take turns to be first. `--rounds 1 -o FILE --add`, repeated, spreads the rounds over time. `--rpc` compares
two nodes with llama.cpp's RPC and two servers, and with one process of shoal: bench/rpc.py."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import chain, engines, rpc
from bench.engines import LLAMA_CPP, Job
from bench.models import SHAPES, checkpoint
from bench.pairs import OURS, Reached, load, ratios, report, sample, save

from shoal.engine.host import usable_cpus
from shoal.engine.model_directory import Model
from shoal.store import cache_directory

_DTYPES = {"Q8_0": "int8", "Q4_0": "int4", "as-it-is": "int8"}
_MB = 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(parser, args)
    dtype = args.dtype or _DTYPES[args.type]
    python = engines.environment(
        cache_directory() / "peers" / LLAMA_CPP.replace("==", "-"), build=not args.skip_build
    )
    source = engines.gguf(args.model)
    peer_model = engines.requantised(python, source, args.type)
    model = Model.open(engines.shoal_model(args.model, dtype))
    print(f"shoal runs {model.path} ({dtype}, {model.hash[:12]}), llama.cpp runs {peer_model}")
    what = {
        "model": args.model,
        "dtype": dtype,
        "model_hash": model.hash,
        "peer": LLAMA_CPP,
        "peer_type": args.type,
        "machine": platform.machine(),
        "cpus": len(usable_cpus()),
    }
    if args.rpc:
        return _rpc(args, python, model, peer_model, what)
    samples = load(args.output, what) if args.add else []
    jobs = _jobs(args, python, model.path, peer_model)
    first = 1 + max((item.round for item in samples), default=-1)
    rounds = range(first, first + args.rounds)

    def measure(engine: str, threads: int) -> Mapping[str, Reached]:
        return engines.measure(jobs[engine](threads), threads)

    for item in sample(measure, list(jobs), args.threads or (1, 2), rounds):
        samples.append(item)
        print(
            f"round {item.round + 1}: {item.engine}, {item.threads} threads, {item.test}: "
            f"{item.tokens_per_s:.1f} t/s",
            flush=True,
        )
    print(report(ratios(samples)))
    if args.output is not None:
        save(args.output, what, samples)
    return 0


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program if options contradict each other."""
    for name in ("threads", "startup", "torch", "add"):
        if args.rpc and getattr(args, name):
            parser.error(
                f"--{name} does not go with --rpc: nodes and servers have one thread and a core each"
            )
    if args.rpc and not (args.n_prompt and args.n_gen):
        parser.error("--rpc measures a prompt and decoding: give -p and -n numbers above 0")
    if args.against is not None and not args.rpc:
        parser.error("--against goes with --rpc only")


def _rpc(
    args: argparse.Namespace, python: Path, model: Model, peer_model: Path, what: Mapping[str, Any]
) -> int:
    checkouts = chain.checkouts(args.against)
    samples = rpc.compare(checkouts, model, python, peer_model, args.n_prompt, args.n_gen, args.rounds)
    print(f"\n{samples.report(checkouts[0].name)}")
    samples.save(args.output, {**what, "command": "bench.peers --rpc"})
    return 0


def _jobs(
    args: argparse.Namespace, python: Path, model: Path, peer_model: Path
) -> dict[str, Callable[[int], list[Job]]]:
    """By engine, in the order of even rounds: what it runs with a number of threads."""
    prompt, generated = args.n_prompt, args.n_gen

    def shoal(threads: int) -> list[Job]:
        warm = [engines.shoal_job(model, threads, prompt, generated)] if prompt or generated else []
        return warm + (engines.start_jobs(model, threads) if args.startup else [])

    def llama(threads: int) -> list[Job]:
        warm = (
            [engines.llama_job(python, peer_model, threads, prompt, generated)] if prompt or generated else []
        )
        return warm + (engines.llama_start_jobs(python, peer_model, threads) if args.startup else [])

    jobs: dict[str, Callable[[int], list[Job]]] = {OURS: shoal, "llama.cpp": llama}
    if args.torch is not None:
        source = checkpoint(args.model) if args.model in SHAPES else engines.gguf(args.model)
        jobs["torch"] = lambda threads: [engines.torch_job(args.torch, source, threads, prompt)]
    return jobs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description="shoal against llama.cpp: ratios of tokens/s, pair by pair."
    )
    add = parser.add_argument
    add(
        "--model",
        default="smollm2-135m",
        help=f"a name that can be pulled, {' or '.join(SHAPES)}, or a .gguf file (default smollm2-135m)",
    )
    add("--type", choices=_DTYPES, default="Q8_0", help="what llama.cpp runs (default Q8_0)")
    add("--dtype", choices=("int8", "int4"), help="what shoal runs (default: int8, and int4 against Q4_0)")
    add("-p", "--n-prompt", type=int, default=512, help="tokens of the prompt (default 512)")
    add("-n", "--n-gen", type=int, default=128, help="tokens generated (default 128)")
    add("-t", "--threads", type=_counts, metavar="N,...", help="threads (default 1,2)")
    add("--rounds", type=int, default=5, help="pairs; quote no result of fewer than 5 (default 5)")
    add("--rpc", action="store_true", help="two nodes beside two RPC servers of llama.cpp and one process")
    add("--against", type=Path, metavar="DIRECTORY", help="with --rpc: nodes of another checkout as well")
    add("--startup", action="store_true", help="also from process start to one token and exit")
    add("--torch", type=Path, metavar="PYTHON", help="also a prompt in bf16, by the torch of that Python")
    add("--skip-build", action="store_true", help="fail if llama.cpp is not built, build nothing")
    add("-o", "--output", type=Path, help="write every sample and ratio there, as JSON")
    add("--add", action="store_true", help="keep the rounds that are in the output file, and add to them")
    return parser


def _counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1 or max(counts) > len(usable_cpus()):
        raise argparse.ArgumentTypeError(f"{text}: this process may use {len(usable_cpus())} CPUs")
    return counts


if __name__ == "__main__":
    sys.exit(main())
