"""The command line's parser, the kinds of values that its options have, and options that several commands
share.

Each command adds its own options in `shoal/commands/NAME.py`. This module and those import nothing heavy
until a command runs, so `shoal --help` is quick and works where NumPy does not.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

from . import __version__
from .engine.errors import ShoalError

_COMMANDS = (
    "pull", "ls", "rm", "convert", "verify", "inspect", "run", "serve", "score", "classify", "embed", "plan",
    "profile", "bench", "node", "up", "invite", "join", "devices", "top", "demo", "export-c",
)  # fmt: skip
SHORT_ANSWER = 16
"""Tokens. Reading the weights into RAM before an answer of this length or less takes more time than it saves
(docs/performance.md)."""
DTYPES = ("int8", "int4", "f32", "keep")
BACKENDS = ("auto", "native", "numba", "numpy")
ISAS = ("auto", "scalar", "avx2", "avxvnni", "avx512", "neon", "neon_dot", "neon_i8mm")
T = TypeVar("T")
_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of the command line. Its result has the command's name as `command`. If `argv` begins with a
    command, the parser knows that command only: a command starts sooner without the modules of the others."""
    parser = argparse.ArgumentParser(
        prog="shoal",
        description="Run one language model across the devices you own. Each device holds some of its "
        "layers.",
        epilog='Start with `shoal pull smollm2-135m`, then `shoal run smollm2-135m "Hello"`. '
        "`shoal COMMAND --help` explains each command.",
    )
    parser.add_argument("--version", action="version", version=f"shoal {__version__}")
    _add_traceback(parser, default=False, text="show the Python traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for command in argv[:1] if argv and argv[0] in _COMMANDS else _COMMANDS:
        import_module(f"{__package__}.commands.{module_name(command)}").add_parser(commands)
    return parser


def module_name(command: str) -> str:
    """The module of a command, in `shoal.commands`."""
    return command.replace("-", "_")


class Parser(argparse.ArgumentParser):
    """The parser of one command. Options and positional arguments may be in any order; each option has one
    value or none.

    Before the Python releases of autumn 2024, argparse gives an optional positional argument its default as
    soon as the required one before it is filled, and then rejects the "Hello" of `run MODEL -n 4 "Hello"`. So
    options are moved to the front, where every version of argparse parses them in the same way.
    """

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(self._options_first(given), namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The value of one option or argument. A single "--" is a value here; older versions of argparse drop
        it."""
        if arg_strings == ["--"]:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)

    def _options_first(self, args: Sequence[str]) -> list[str]:
        options: list[str] = []
        positionals: list[str] = []
        left = iter(args)
        for arg in left:
            if arg == "--":
                positionals += left
            elif self._is_option(arg):
                options.append(self._with_value(arg, left))
            else:
                positionals.append(arg)
        return [*options, "--", *positionals] if positionals else options

    def _with_value(self, arg: str, left: Iterator[str]) -> str:
        """The option as one word, joined with its value if that is the next argument."""
        action = self._action(arg)
        attached = "=" in arg or (arg[1] != "-" and len(arg) > 2)
        if action is None or action.nargs == 0 or attached:
            return arg
        value = next(left, "--")
        if value == "--" or self._is_option(value):
            self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        return f"{max(action.option_strings, key=len)}={value}"

    def _is_option(self, arg: str) -> bool:
        """Whether this is an option, known or not: it begins with a dash, and is neither a negative number
        nor text with white space."""
        if len(arg) < 2 or arg[0] != "-":
            return False
        return self._action(arg) is not None or not (_NUMBER.fullmatch(arg) or re.search(r"\s", arg))

    def _action(self, arg: str) -> argparse.Action | None:
        """The option that `arg` names in full, abbreviated, or with its value attached. None: no option has
        that name, or the abbreviation is ambiguous."""
        known = self._option_string_actions
        name = arg.partition("=")[0] if arg[1] == "-" else arg[:2]
        if name in known:
            return known[name]
        matches = [known[option] for option in known if arg[1] == "-" and option.startswith(name)]
        return matches[0] if len(matches) == 1 else None


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


# Kinds of values: each function converts the text of an argument, or says what is wrong with it.


def address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 192.168.1.20:7000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("a name is empty")
    return text


def text(given: str) -> str:
    try:
        given.encode("utf-8")  # Python passes other bytes on as surrogates
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8 text") from None
    return given


def _whole(least: int, what: str) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return int(text)

    return convert


def _number(low: float, high: float, what: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:  # false for nan
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return convert


def listed(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Several values of a kind, separated by commas."""
    return lambda text: tuple(kind(part.strip()) for part in text.split(","))


whole = _whole(0, "a whole number")
positive = _whole(1, "a whole number above 0")
non_negative = _number(0.0, sys.float_info.max, "a number from 0 up")
fraction = _number(0.0, 1.0, "a number from 0 to 1")
factor = _number(sys.float_info.min, sys.float_info.max, "a number above 0")
seconds = _number(0.01, 3600.0, "a number of seconds from 0.01 up")


def policy(text: str) -> object:
    """A net.policy.Policy."""
    from .net.policy import parse_policy

    try:
        return parse_policy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# Arguments that several commands have.


def add_command(commands: Commands, name: str, summary: str, more: str = "") -> argparse.ArgumentParser:
    """Adds a command with its line in `shoal --help`; its own help shows `more` after that line."""
    description = f"{summary[0].upper()}{summary[1:]}.{' ' if more else ''}{more}"
    parser = commands.add_parser(name, help=summary, description=description)
    _add_traceback(parser, default=argparse.SUPPRESS, text=argparse.SUPPRESS)
    return parser


def _add_traceback(parser: argparse.ArgumentParser, *, default: object, text: str) -> None:
    parser.add_argument("--traceback", action="store_true", default=default, help=text)


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="name from `shoal ls`, or path to a model directory")


def add_types(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how a model's values are stored."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="int8",
        help="type of the weights. int8: small and fast; int4: half the size, less exact; f32: not rounded, "
        "four times the size; keep: the quantised values of a GGUF file, not rounded again (Q8_0, Q5_0, "
        "IQ4_NL as int8; Q4_0, Q4_1 as int4) (default int8)",
    )
    parser.add_argument(
        "--head-dtype",
        choices=("int8", "int4"),
        help="with --dtype int4: type of the LM head, and of the embedding if they share one table (default: "
        "as --dtype)",
    )
    parser.add_argument(
        "--min",
        dest="has_min",
        action="store_true",
        help="with --dtype int4: store a minimum for each group of weights (an eighth larger, more exact)",
    )
    parser.add_argument(
        "--kv-dtype",
        choices=("f16", "int8", "f32"),
        help="type of the KV cache; int8 needs half the RAM of f16 (default f16; f32 with --dtype f32)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_nodes(parser: argparse._ActionsContainer, text: str) -> None:
    """Adds --nodes; a command adds --insecure by `add_insecure`, since it is no alternative to others."""
    parser.add_argument("--nodes", type=listed(address), default=(), metavar="HOST:PORT,...", help=text)


def add_insecure(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="connect to nodes without encryption although this device is paired; they need the same option",
    )


def add_alone(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--alone",
        action="store_true",
        help="compute in this process, also while `shoal up` runs on this device with the same model",
    )


def add_private(
    parser: argparse._ActionsContainer,
    device: str = "this device",
    default: str = "where it costs less than 5%%",
) -> None:
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"keep both ends of the model on {device}, so that no other device sees a token of a prompt "
        f"or an answer; --no-private plans for speed alone (default: {default})",
    )


def add_layers(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--layers",
        type=listed(whole),
        default=(),
        metavar="N,N,...",
        help="number of layers on each device, in the devices' order; 0 excludes a device",
    )


def add_context(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--context",
        type=positive,
        metavar="N",
        help="context length in tokens, prompt and answer together (default: the model's, or the largest "
        "that fits in RAM)",
    )


def add_moves(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--moves",
        choices=("move", "reload", "off"),
        default="move",
        help="what happens when devices become slower or quicker, come or go while answers are computed. "
        "move: layers move with their keys and values; reload: all layers are loaded and all tokens computed "
        "again; off: nothing, until a device is lost (default move)",
    )


def add_wait(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--wait",
        type=seconds,
        default=60.0,
        metavar="S",
        help="wait at most S seconds for lost nodes that the model needs (default 60)",
    )


def check_nodes(nodes: Sequence[tuple[str, int]]) -> None:
    """ShoalError: --nodes has an address twice."""
    if len(set(nodes)) < len(nodes):
        raise ShoalError("--nodes has an address twice: give each node once")


def add_lending(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how much of this device its node may use."""
    parser.add_argument(
        "--ram",
        type=positive,
        metavar="MB",
        help="RAM that the node of this device never exceeds (default: three quarters of what is available; "
        "in a container, of what the container may still use)",
    )
    parser.add_argument(
        "--policy",
        type=policy,
        metavar="RULE,...",
        help="limits of this device's use. The node leaves beyond charging, battery=30%% or ram=100MB, works "
        "less beyond temperature=42 or cpu=50%%, and never works more than time=60%% of the time. phone and "
        "none are whole policies (default: phone on Android, none elsewhere; rules: docs/policy.md)",
    )


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a node, which `shoal join` has, too."""
    parser.add_argument(
        "--listen",
        type=address,
        metavar="HOST:PORT",
        help="address to listen on. HOST may have several addresses, and [::] means all of this device; port "
        "0 is any free one, which the node prints (default [::]:0 if this device is paired, else "
        "127.0.0.1:0)",
    )
    parser.add_argument("--name", help="name of this device in plans (default: its host name)")
    add_lending(parser)
    parser.add_argument(
        "--disk",
        type=positive,
        metavar="MB",
        help="disk space for the files of layers that this node fetches from other devices (default: half of "
        "what is free)",
    )
    parser.add_argument(
        "--head",
        type=listed(address),
        default=(),
        metavar="HOST:PORT,...",
        help="where `shoal up` listens on the head (default: where it was when this device last heard of it)",
    )
    add_mdns(parser, "look in the local network for a head that has moved")
    add_engine(parser)


def add_mdns(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--no-mdns",
        dest="mdns",
        action="store_false",
        help=f"do not {what} by mDNS (without this option it does if the zeroconf package is installed)",
    )


def add_boot(parser: argparse.ArgumentParser) -> None:
    """Adds the options that print a text instead of running the command: see prints_boot."""
    shown = parser.add_argument_group("start with the device").add_mutually_exclusive_group()
    shown.add_argument(
        "--print-systemd",
        action="store_true",
        help="print a systemd user unit that runs this command with the other options given, and exit",
    )
    shown.add_argument(
        "--print-termux-boot",
        action="store_true",
        help="print a script with which Termux:Boot runs this command when the phone starts, and exit",
    )


def prints_boot(args: argparse.Namespace) -> bool:
    """Prints the text of `add_boot` that was asked for; returns whether one was."""
    if not (args.print_systemd or args.print_termux_boot):
        return False
    from .boot import systemd_unit, termux_script

    print((systemd_unit if args.print_systemd else termux_script)(sys.argv[1:], os.environ), end="")
    return True


def add_engine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads to compute with (default: the fastest number if `shoal profile` measured it, else one "
        "for each big core, four at most)",
    )
    add_kernels(group)


def add_kernels(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--resident",
        action=argparse.BooleanOptionalAction,
        help="read the weights into RAM and keep them there; --no-resident maps the files, whose pages the "
        "system may drop (default: read into RAM if that takes at most half of what is available, but map "
        "for `shoal run` "
        f"with a prompt and -n {SHORT_ANSWER} or less)",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        help="implementation of the operations; native is the C library (default auto: the fastest "
        "available)",
    )
    group.add_argument(
        "--isa",
        choices=ISAS,
        default="auto",
        help="instruction set of the native backend (default auto: the fastest that the CPU has)",
    )
