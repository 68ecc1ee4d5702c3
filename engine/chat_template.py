"""Renders Jinja chat templates with an origin for each character: the template or a message.

Only the template may write control tokens, but the rendered text does not show whether an `<|im_end|>` ends
a turn or was typed by a user. Searching the messages beforehand is not enough, because templates trim,
split, join and upper-case them. So every string that a template handles is a `Traced`: a str with an origin
for each character. The text is the same as in Hugging Face transformers (`utils/chat_template_utils.py`):
the sandbox, its options, filters and globals are equal.

This module is imported only where a template is used, because it needs jinja2."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn, Self, SupportsIndex

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE, ANSWER, DATA, UNKNOWN = "tad?"
"""Origins of a character: the template; an assistant's message; other data (messages, tools, documents); or
unknown, after an operation that loses origins, such as `indent`."""

_FIELD = re.compile(r"\{(\w*)\}")


class Traced(str):
    """A string with the origin of each character. Methods that are not overridden here return a plain str,
    whose origin is unknown."""

    __slots__ = ("_origin",)
    _origin: str

    def __new__(cls, text: str, origin: str | None = None) -> Self:
        """`origin`: one letter for each character; None: all unknown."""
        made = super().__new__(cls, text)
        made._origin = UNKNOWN * len(text) if origin is None else origin
        return made

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> str:
        if not isinstance(other, str):
            return NotImplemented
        return Traced(str.__add__(self, other), self._origin + origins(other))

    def __radd__(self, other: str) -> str:
        return Traced(str.__add__(other, self), origins(other) + self._origin)

    def __mul__(self, count: SupportsIndex) -> str:
        return Traced(str.__mul__(self, count), self._origin * count)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        given = values if isinstance(values, tuple) else (values,)
        return _filled(str.__mod__(self, values), self.split("%s"), given)

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        return Traced(str.__getitem__(self, key), self._origin[key])

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def join(self, parts: Iterable[str], /) -> str:
        parts = list(parts)
        return Traced(str.join(self, parts), self._origin.join(map(origins, parts)))

    def strip(self, chars: str | None = None, /) -> str:
        return Traced.rstrip(self.lstrip(chars), chars)  # type: ignore[arg-type]

    def lstrip(self, chars: str | None = None, /) -> str:
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> str:
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> str:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> str:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = self._pieces(str.splitlines(self, True), "")
        return whole if keepends else [line[: len(str.splitlines(line)[0])] for line in whole]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        first, middle, last = self._pieces(list(str.partition(self, sep)), "")
        return first, middle, last

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        first, middle, last = self._pieces(list(str.rpartition(self, sep)), "")
        return first, middle, last

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        return (
            Traced(new, origins(new)).join(self.split(old, count))
            if old
            else str.replace(self, old, new, count)
        )

    def upper(self) -> str:
        return self._spelled(str.upper(self))

    def lower(self) -> str:
        return self._spelled(str.lower(self))

    def casefold(self) -> str:
        return self._spelled(str.casefold(self))

    def title(self) -> str:
        return self._spelled(str.title(self))

    def capitalize(self) -> str:
        return self._spelled(str.capitalize(self))

    def swapcase(self) -> str:
        return self._spelled(str.swapcase(self))

    def _pieces(self, pieces: list[str], sep: str | None) -> list[str]:
        """Slices of self for consecutive `pieces` that are separated by `sep` (None: by white space)."""
        at, found = 0, []
        for piece in pieces:
            at = self.find(piece, at) if sep is None else at
            found.append(self[at : at + len(piece)])
            at += len(piece) + len(sep or "")
        return found

    def _spelled(self, text: str) -> str:
        """`text`, a change of case of self, with origins. Its length may differ: "ß" becomes "SS"."""
        if len(text) == len(self):
            return Traced(text, self._origin)
        return Traced(text, (self._origin[0] if len(set(self._origin)) == 1 else DATA) * len(text))


def _filled(text: str, pieces: list[str], values: Iterable[Any]) -> str:
    """`text` with origins, if it is equal to the pieces with the values between them; else unchanged."""
    between = [*map(str, values), ""]
    if len(pieces) != len(between):
        return text
    made = Traced("").join(part for pair in zip(pieces, between, strict=True) for part in pair)
    return made if made == text else text


def origins(text: str) -> str:
    """The origins of a string, one letter for each character."""
    return text._origin if isinstance(text, Traced) else UNKNOWN * len(text)


def traced(value: Any, origin: str) -> Any:
    """A copy of JSON-like data in which every string is `Traced` with the given origin. Other objects are
    replaced by the names of their types."""
    if isinstance(value, str):
        return Traced(value, origin * len(value))
    if isinstance(value, Mapping):
        return {traced(key, origin): traced(item, origin) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [traced(item, origin) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    return traced(f"<{type(value).__name__}>", origin)


def compile_template(source: str) -> Callable[..., str]:
    """The function that renders a template from its variables. jinja2.TemplateError: `source` is not a valid
    template."""
    template = _Environment().from_string(source)
    return template.render


def literals(source: str) -> str:
    """The literal strings of a template: its text and its string constants, separated by NUL."""
    tree = jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(source)
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join([*(node.data for node in tree.find_all(nodes.TemplateData)), *constants])


class _Code(CodeGenerator):
    """A code generator for templates whose string constants and concatenations are `Traced`."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, str):
            self.write(f"environment.written({node.value!r})")
        else:
            super().visit_Const(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
            super().visit_Concat(node, frame)
            return
        self.write("concat(map(str, (")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")))")

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return f"environment.written({''.join(group)!r})"


class _Generation(Extension):
    """The tag `{% generation %}`, which marks the assistant's words for training. It renders its content."""

    tags = {"generation"}  # noqa: RUF012 the base class declares it like this

    def parse(self, parser: Parser) -> nodes.Node:
        """A block that calls `_body`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Code

    def __init__(self) -> None:
        extensions = [_Generation, "jinja2.ext.loopcontrols"]
        # Not optimised, because the optimiser joins constants before they are traced.
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=extensions)
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's `str.format`, with origins if all fields are plain: `{}`, `{0}`, `{name}`."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None or not isinstance(value.__self__, Traced):
            return wrapped
        pattern: Traced = value.__self__

        def traced_format(*args: Any, **named: Any) -> str:
            given = {"": iter(args), **{str(i): arg for i, arg in enumerate(args)}, **named}
            fields = _FIELD.findall(pattern)
            values = [next(given[""], "") if not field else given.get(field, "") for field in fields]
            ends = [0, *(end for match in _FIELD.finditer(pattern) for end in match.span()), len(pattern)]
            pieces = [pattern[ends[i] : ends[i + 1]] for i in range(0, len(ends), 2)]
            return _filled(wrapped(*args, **named), pieces, values)

        return traced_format

    @staticmethod
    def written(text: str) -> Traced:
        """A constant of the template as a traced string."""
        return Traced(text, TEMPLATE * len(text))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Replaces "".join for output, `~`, macros and blocks, to keep origins."""
        return Traced("", "").join(parts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`. Unlike Jinja's own, it does not escape for HTML."""
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return Traced(text, DATA * len(text))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 local time, as in transformers


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
