"""JSON that is believed only when all of it is right: bytes to frozen dataclasses and back.

The dataclass is the schema: every field must be there and no other, of the very type that is declared
(`Annotated` adds a range or a length), finite, and no key may come twice. Anything else is a ValueError that
says where. The standard library only, so a phone needs no codec.
"""

from __future__ import annotations

import json
import math
import types
from dataclasses import asdict, dataclass, fields, is_dataclass
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
    """A list of so many items."""

    items: int

    def check(self, where: str, value: Any) -> None:
        if len(value) > self.items:
            raise ValueError(f"{where} has {len(value)} items, more than {self.items}")


@dataclass(frozen=True, slots=True)
class Printable:
    """A string of [low, high] characters, none of which moves a cursor; lone surrogates count as such."""

    low: int
    high: int

    def check(self, where: str, value: Any) -> None:
        if not self.low <= len(value) <= self.high:
            raise ValueError(f"{where} has {len(value)} characters, not {self.low} to {self.high}")
        if not value.isprintable():
            raise ValueError(f"{where} holds a character that cannot be printed")


def decode(kind: type[T], body: bytes | bytearray) -> T:
    """The dataclass that the JSON text states. ValueError: anything about it that is not right."""
    try:
        value = json.loads(
            bytes(body).decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    result: T = _convert(kind, value, kind.__name__)
    return result


def encode(message: Any) -> bytes:
    """JSON text of a dataclass that `decode` gives back equal. ValueError: a field it would refuse."""
    body = asdict(message)
    _convert(type(message), body, type(message).__name__)
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode("utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        raise ValueError("a key comes twice in one object")
    return body


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


@cache
def _schema(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _convert(hint: Any, value: Any, where: str) -> Any:
    """The value as the declared type, or a ValueError that names the place."""
    origin = get_origin(hint)
    if origin is Annotated:
        base, *checks = get_args(hint)
        result = _convert(base, value, where)
        for check in checks:
            check.check(where, result)
        return result
    if origin in (types.UnionType, Union):
        (inner,) = (arm for arm in get_args(hint) if arm is not type(None))
        return None if value is None else _convert(inner, value, where)
    if origin is Literal:
        if type(value) is not str or value not in get_args(hint):
            raise ValueError(f"{where} = {_short(value)} is none of {', '.join(get_args(hint))}")
        return value
    if origin is tuple:  # tuple[X, ...]
        if type(value) not in (list, tuple):
            raise ValueError(f"{where} = {_short(value)} is not a list")
        inner = get_args(hint)[0]
        return tuple(_convert(inner, item, f"{where}[{i}]") for i, item in enumerate(value))
    if is_dataclass(hint):
        return _convert_object(hint, value, where)
    if hint is float and type(value) in (int, float):
        return _finite(value, where)
    if type(value) is not hint:
        raise ValueError(f"{where} = {_short(value)} is not of type {hint.__name__}")
    return value


def _convert_object(kind: Any, value: Any, where: str) -> Any:
    if type(value) is not dict:
        raise ValueError(f"{where} is not an object")
    schema = _schema(kind)
    if value.keys() != schema.keys():
        missing, unknown = sorted(schema.keys() - value.keys()), sorted(value.keys() - schema.keys())
        raise ValueError(f"{where} lacks the keys {missing} and has unknown keys {_short(unknown)}")
    return kind(**{key: _convert(hint, value[key], f"{where}.{key}") for key, hint in schema.items()})


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} is not finite")
    return number


def _short(value: object) -> str:
    """What a stranger sent, fit for a message: short, and with escapes for what does not print."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # an integer of thousands of digits has no decimal text
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
