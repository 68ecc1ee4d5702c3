"""Strict decoding of untrusted JSON, or of tables from another parser such as TOML, into frozen dataclasses;
and encoding of dataclasses as JSON.

The dataclass is the schema. Exactly its fields must be present, once each, with exactly the declared types
(`Annotated` adds a range or a length); numbers must be finite. Anything else is a ValueError that names the
place, as are the dataclass's own checks. It uses the standard library only, so that a phone needs no
codec."""

from __future__ import annotations

import json
import math
import types
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Between:
    """A number within [low, high]."""

    low: float
    high: float

    def check(self, where: str, value: Any) -> None:
        if not self.low <= value <= self.high:
            raise ValueError(f"{where} = {_short(value)} is not between {self.low:g} and {self.high:g}")


@dataclass(frozen=True, slots=True)
class AtMost:
    """A list of at most `items` items."""

    items: int

    def check(self, where: str, value: Any) -> None:
        if len(value) > self.items:
            raise ValueError(f"{where} has {len(value)} items, more than {self.items}")


@dataclass(frozen=True, slots=True)
class Printable:
    """A string of low to high printable characters: no control characters, which could move the terminal's
    cursor, and no lone surrogates."""

    low: int
    high: int

    def check(self, where: str, value: Any) -> None:
        if not self.low <= len(value) <= self.high:
            raise ValueError(f"{where} has {len(value)} characters, not {self.low} to {self.high}")
        if not value.isprintable():
            raise ValueError(f"{where} holds a character that cannot be printed")


def parse(body: bytes | bytearray | str) -> Any:
    """The value of a JSON text. ValueError: invalid JSON, a duplicate key, NaN or infinity."""
    try:
        text = body if isinstance(body, str) else bytes(body).decode("utf-8")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def decode(kind: type[T], body: bytes | bytearray) -> T:
    """The dataclass `kind` from a JSON text. ValueError: the text does not match it exactly."""
    return convert(kind, parse(body), kind.__name__)


def convert(kind: type[T], value: Any, where: str, *, defaults: bool = False) -> T:
    """The dataclass `kind` from a parsed value; `where` names the value in errors. `defaults`: fields with a
    default may be missing. ValueError: the value does not match it."""
    result: T = _convert(kind, value, where, defaults)
    return result


def encode(message: Any) -> bytes:
    """The JSON text of a dataclass, which `decode` turns back into an equal one. ValueError: `decode` would
    refuse a field."""
    body = asdict(message)
    _convert(type(message), body, type(message).__name__, False)
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        raise ValueError("duplicate key in an object")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


@cache
def _schema(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


@cache
def _optional(kind: type) -> frozenset[str]:
    plain = (field.name for field in fields(kind) if field.default is not MISSING)
    made = (field.name for field in fields(kind) if field.default_factory is not MISSING)
    return frozenset((*plain, *made))


def _convert(hint: Any, value: Any, where: str, defaults: bool) -> Any:
    """The value converted to the type `hint`. ValueError, with the place: it has another type."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *checks = get_args(hint)
        result = _convert(base, value, where, defaults)
        for check in checks:
            check.check(where, result)
        return result
    if origin in (types.UnionType, Union):
        (inner,) = (arm for arm in get_args(hint) if arm is not type(None))
        return None if value is None else _convert(inner, value, where, defaults)
    if origin is Literal:
        if type(value) is not str or value not in get_args(hint):
            raise ValueError(f"{where} = {_short(value)} is none of {', '.join(get_args(hint))}")
        return value
    if origin is tuple:
        return _convert_list(get_args(hint), value, where, defaults)
    if is_dataclass(hint):
        return _convert_object(hint, value, where, defaults)
    if hint is float and type(value) in (int, float):
        return _finite(value, where)
    if type(value) is not hint:
        raise ValueError(f"{where} = {_short(value)} is not {_WORDS.get(hint, hint.__name__)}")
    return value


_WORDS = {float: "a number", int: "an integer", str: "a string", bool: "true or false"}


def _convert_list(kinds: tuple[Any, ...], value: Any, where: str, defaults: bool) -> Any:
    """A list converted to a tuple: tuple[X, ...], or a tuple of fixed length."""
    if type(value) not in (list, tuple):
        raise ValueError(f"{where} = {_short(value)} is not a list")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    elif len(value) != len(kinds):
        raise ValueError(f"{where} has {len(value)} items, not {len(kinds)}")
    items = zip(kinds, value, strict=True)
    return tuple(_convert(kind, item, f"{where}[{i}]", defaults) for i, (kind, item) in enumerate(items))


def _convert_object(kind: Any, value: Any, where: str, defaults: bool) -> Any:
    if type(value) is not dict:
        raise ValueError(f"{where} is not an object")
    schema = _schema(kind)
    missing, unknown = schema.keys() - value.keys(), sorted(value.keys() - schema.keys(), key=str)
    if defaults:
        missing = missing - _optional(kind)
    if missing:
        raise ValueError(f"{where} lacks {', '.join(map(repr, sorted(missing)))}")
    if unknown:
        raise ValueError(
            f"{where} has an unknown key {_short(unknown[0])}; known: {', '.join(sorted(schema))}"
        )
    values = {key: _convert(schema[key], item, f"{where}.{key}", defaults) for key, item in value.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} is not finite")
    return number


def _short(value: object) -> str:
    """An untrusted value for an error message: at most 60 characters, unprintable ones escaped."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # Python refuses to format integers of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
