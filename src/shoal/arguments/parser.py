"""An argument parser for which the order of options and positional arguments does not matter.

Before the Python releases of autumn 2024, argparse gives an optional positional argument its default as soon
as the required one before it is filled, and then refuses the "Hello" of `run MODEL -n 4 "Hello"`. A command
line whose options are all in front means the same to every version.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

_NUMBER = re.compile(r"-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """The parser of one command. Each of its options has one value or none."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(self._options_first(given), namespace)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The value of one option or argument. A "--" alone is that value; older versions remove it."""
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
        """The option in one word: with its value, if the next argument is that."""
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
        nor a text with blanks."""
        if len(arg) < 2 or arg[0] != "-":
            return False
        return self._action(arg) is not None or not (_NUMBER.fullmatch(arg) or re.search(r"\s", arg))

    def _action(self, arg: str) -> argparse.Action | None:
        """The option that `arg` names in full, abbreviated or with its value attached; None: none, or
        several."""
        known = self._option_string_actions
        name = arg.partition("=")[0] if arg[1] == "-" else arg[:2]
        if name in known:
            return known[name]
        matches = [known[option] for option in known if arg[1] == "-" and option.startswith(name)]
        return matches[0] if len(matches) == 1 else None
