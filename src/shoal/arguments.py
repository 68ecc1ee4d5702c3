"""The grammar of the command line: every subcommand, its options, and the words a first-time user reads.

What each command finds in its `args` is listed in commands/__init__.py.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DTYPES = ("int8", "f32")
BACKENDS = ("auto", "native", "numba", "numpy")
ISAS = ("auto", "scalar", "avx2", "avxvnni", "avx512", "neon", "neon_dot", "neon_i8mm")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shoal",
        description="Run one language model across the devices you own: each holds some of its layers.",
        epilog='New here? `shoal pull smollm2-135m`, then `shoal run smollm2-135m "Hello"`. '
        "`shoal COMMAND --help` explains each command.",
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    parser.add_argument(
        "--traceback", action="store_true", help="on an error show where in the code it arose"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for add in (_pull, _ls, _convert, _verify, _inspect, _run, _plan, _profile, _bench, _node, _demo):
        add(commands)
    return parser


def _command(commands: "Commands", name: str, summary: str, more: str = "") -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.{' ' if more else ''}{more}"
    )


def _pull(commands: "Commands") -> None:
    parser = _command(
        commands,
        "pull",
        "fetch a model and convert it for use here",
        "An interrupted download goes on where it stopped.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="smollm2-135m; or hf:ORG/NAME, a repository on Hugging Face; or a local directory or .gguf file",
    )
    _add_dtype(parser)
    parser.add_argument("--name", help="what to call it in `shoal ls` (default: after the source)")


def _ls(commands: "Commands") -> None:
    _command(commands, "ls", "list the models on this device, and where they are kept")


def _convert(commands: "Commands") -> None:
    parser = _command(
        commands,
        "convert",
        "turn a checkpoint (safetensors directory or .gguf file) into a model directory",
        "`shoal pull PATH` does the same into the cache.",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        type=Path,
        help="directory with config.json and *.safetensors, or a .gguf file",
    )
    parser.add_argument(
        "destination", metavar="DST", type=Path, help="the model directory to write; must not exist yet"
    )
    _add_dtype(parser)
    parser.add_argument(
        "--no-equalise",
        dest="equalise",
        action="store_false",
        help="int8: do not balance the channels before rounding (a little less exact)",
    )


def _verify(commands: "Commands") -> None:
    parser = _command(commands, "verify", "read every file of a model again and compare it with its SHA-256")
    _add_model(parser)


def _inspect(commands: "Commands") -> None:
    parser = _command(
        commands, "inspect", "show a model as a table: each operation, its shapes, bytes and multiplications"
    )
    _add_model(parser)
    _add_json(parser)


def _run(commands: "Commands") -> None:
    parser = _command(
        commands,
        "run",
        "answer a prompt, or chat",
        "Without PROMPT: a chat on a terminal, otherwise the prompt is read from standard input.",
    )
    _add_model(parser)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to answer")
    _add_nodes(parser, "run on these nodes, in a chain (default: in this process alone)")
    text = parser.add_argument_group("text")
    text.add_argument(
        "-n",
        "--max-tokens",
        type=_positive,
        default=512,
        metavar="N",
        help="stop after N tokens (default 512)",
    )
    text.add_argument("--system", metavar="TEXT", help="the system message (default: the model's own)")
    text.add_argument(
        "--raw", action="store_true", help="continue PROMPT as it is, without the chat template"
    )
    text.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be given again"
    )
    text.add_argument(
        "--context",
        type=_positive,
        metavar="N",
        help="tokens of prompt and answer to make room for (default: the model's)",
    )
    sampling = parser.add_argument_group("sampling (default: always the likeliest token)")
    sampling.add_argument(
        "--temperature",
        type=_non_negative,
        default=0.0,
        metavar="T",
        help="0: greedy; 0.8: livelier (default 0)",
    )
    sampling.add_argument(
        "--top-k", type=_whole, default=0, metavar="K", help="draw from the K likeliest (default 0: all)"
    )
    sampling.add_argument(
        "--top-p",
        type=_fraction,
        default=1.0,
        metavar="P",
        help="draw from the likeliest that sum to P (default 1: all)",
    )
    sampling.add_argument(
        "--min-p",
        type=_fraction,
        default=0.0,
        metavar="P",
        help="drop those below P times the likeliest (default 0)",
    )
    sampling.add_argument(
        "--repeat-penalty",
        type=_factor,
        default=1.0,
        metavar="R",
        help="divide what was said before by R (default 1: off)",
    )
    sampling.add_argument(
        "--seed", type=_whole, metavar="S", help="draw the same tokens again (default: a new one each time)"
    )
    _add_engine(parser)
    parser.add_argument(
        "--stats", action="store_true", help="afterwards print tokens/s and times on standard error"
    )


def _plan(commands: "Commands") -> None:
    parser = _command(
        commands,
        "plan",
        "say which device should hold which layers, how fast that is, and whether one alone is faster",
    )
    _add_model(parser)
    devices = parser.add_mutually_exclusive_group(required=True)
    devices.add_argument(
        "--devices", type=Path, metavar="FILE", help="a .toml or .json file with the devices' profiles"
    )
    _add_nodes(devices, "ask these running nodes for their profiles")
    parser.add_argument(
        "--context",
        type=_positive,
        default=2048,
        metavar="N",
        help="tokens of context to make room for (default 2048)",
    )
    parser.add_argument(
        "--streams", type=_positive, default=1, metavar="N", help="requests at the same time (default 1)"
    )
    parser.add_argument(
        "--objective",
        choices=("latency", "throughput"),
        default="latency",
        help="latency: one request as fast as can be; throughput: many together (default latency)",
    )
    _add_json(parser)


def _profile(commands: "Commands") -> None:
    parser = _command(commands, "profile", "measure how fast this device runs a model's operations")
    _add_model(parser)
    _add_engine(parser)
    _add_json(parser)


def _bench(commands: "Commands") -> None:
    parser = _command(
        commands,
        "bench",
        "measure tokens/s of a model on this device alone: prompts (pp) and generated tokens (tg)",
        "Numbers may be lists: `-t 1,2` measures with one thread, and then with two.",
    )
    _add_model(parser)
    lists: tuple[tuple[tuple[str, ...], str, tuple[int, ...] | None, str], ...] = (
        (("-p", "--n-prompt"), "N", (512,), "tokens of a prompt, run in one go; 0: none (default 512)"),
        (("-n", "--n-gen"), "N", (128,), "tokens generated one by one; 0: none (default 128)"),
        (("-d", "--n-depth"), "N", (0,), "tokens that the context holds before (default 0)"),
        (("-t", "--threads"), "N", None, "threads (default: chosen for this device)"),
        (("--batch",), "N", (1,), "sequences that generate side by side (default 1)"),
    )
    for flags, metavar, default, text in lists:
        kind = _counts if flags[0] in {"-t", "--batch"} else _wholes
        parser.add_argument(*flags, type=kind, metavar=metavar, default=default, help=text)
    parser.add_argument(
        "-r", "--repetitions", type=_positive, default=5, metavar="N", help="times each is run (default 5)"
    )
    parser.add_argument(
        "-o",
        "--output",
        choices=("md", "json", "csv"),
        default="md",
        help="md: a table; json and csv: all figures (default md)",
    )
    _add_kernels(parser.add_argument_group("engine"))


def _node(commands: "Commands") -> None:
    parser = _command(
        commands,
        "node",
        "offer this device as a node, until Ctrl-C",
        "It runs the layers that a head (`shoal run --nodes`) gives it.",
    )
    _add_model(parser)
    parser.add_argument(
        "--listen",
        type=_address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="where to listen; port 0 takes a free one and says which (default 127.0.0.1:0)",
    )
    parser.add_argument("--name", help="what to call this device in plans (default: its host name)")
    parser.add_argument(
        "--ram",
        type=_positive,
        metavar="MB",
        help="never use more than this for weights and state (default: what is free)",
    )
    parser.add_argument(
        "--slow",
        type=_factor,
        default=1.0,
        metavar="F",
        help="take F times as long for each step, to play a slower device (default 1)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="listen on an address that others can reach, without encryption",
    )
    parser.add_argument("--port-file", type=Path, metavar="FILE", help="write the port there once listening")
    _add_engine(parser)


def _demo(commands: "Commands") -> None:
    parser = _command(
        commands, "demo", "three nodes on this machine answer a question together, step by step"
    )
    parser.add_argument(
        "--prompt",
        default="What is the capital of France?",
        metavar="TEXT",
        help="the question (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout", type=_positive, default=300, metavar="S", help="give up after S seconds (default 300)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a name from `shoal ls`, or a path to a model directory"
    )


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="int8",
        help="int8: small and fast; f32: exact and four times as large (default int8)",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_nodes(parser: argparse._ActionsContainer, text: str) -> None:
    parser.add_argument("--nodes", type=_addresses, default=(), metavar="HOST:PORT,...", help=text)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--threads", type=_positive, metavar="N", help="(default: chosen for this device)")
    _add_kernels(group)


def _add_kernels(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="native is the C library (default auto: the best there is)",
    )
    group.add_argument(
        "--isa",
        choices=ISAS,
        default="auto",
        help="instruction set of the native backend (default auto: the best there is)",
    )


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 192.168.1.20:7000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _addresses(text: str) -> tuple[tuple[str, int], ...]:
    return tuple(_address(part.strip()) for part in text.split(","))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(part.strip()) for part in text.split(","))


def _wholes(text: str) -> tuple[int, ...]:
    return tuple(_whole(part.strip()) for part in text.split(","))


def _number(text: str, low: float, high: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:  # false for nan
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _non_negative(text: str) -> float:
    return _number(text, 0.0, sys.float_info.max, "a number from 0 up")


def _fraction(text: str) -> float:
    return _number(text, 0.0, 1.0, "a number from 0 to 1")


def _factor(text: str) -> float:
    return _number(text, sys.float_info.min, sys.float_info.max, "a number above 0")
