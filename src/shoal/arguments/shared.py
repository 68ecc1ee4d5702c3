"""Arguments that several commands have."""

import argparse
from typing import TypeAlias

from .kinds import addresses, positive
from .parser import Parser

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

DTYPES = ("int8", "int4", "f32")
BACKENDS = ("auto", "native", "numba", "numpy")
ISAS = ("auto", "scalar", "avx2", "avxvnni", "avx512", "neon", "neon_dot", "neon_i8mm")


def command(commands: Commands, name: str, summary: str, more: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.{' ' if more else ''}{more}"
    )
    add_traceback(parser, default=argparse.SUPPRESS, text=argparse.SUPPRESS)
    return parser


def add_traceback(parser: argparse.ArgumentParser, *, default: object, text: str) -> None:
    """Adds the option that `shoal` itself and each command have."""
    parser.add_argument("--traceback", action="store_true", default=default, help=text)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a name from `shoal ls`, or a path to a model directory"
    )


def add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=(*DTYPES, "keep"),
        default="int8",
        help="int8: small and fast; int4: half of that, and less exact; f32: exact and four times as large; "
        "keep: the values of the file, not rounded (GGUF: Q8_0, Q5_0, IQ4_NL as int8, Q4_0, Q4_1 as int4) "
        "(default int8)",
    )
    parser.add_argument(
        "--head-dtype",
        choices=("int8", "int4"),
        help="int4: the type of the head and of the embedding tied to it (default: as --dtype)",
    )
    parser.add_argument(
        "--min",
        dest="has_min",
        action="store_true",
        help="int4: groups have a minimum: an eighth larger, and more exact",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("f16", "int8", "f32"),
        help="what keys and values of the context are kept as; int8: half the memory "
        "(default f16; with f32, f32)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_nodes(parser: argparse._ActionsContainer, text: str) -> None:
    parser.add_argument("--nodes", type=addresses, default=(), metavar="HOST:PORT,...", help=text)


def add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--threads", type=positive, metavar="N", help="(default: chosen for this device)")
    add_kernels(group)


def add_kernels(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--resident",
        action=argparse.BooleanOptionalAction,
        help="read weights into memory and keep them there; no: map files, whose pages the system may drop "
        "(default: read them if half of the free memory holds them; `run` maps them for a prompt with "
        "-n 64 or less)",
    )
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
