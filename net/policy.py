"""The policy of a node: limits within which its owner lets it be used, and how `shoal node --policy` writes
them. What follows from them is decided in net/throttling.py.

This module imports no NumPy, since the command line is parsed before it may be imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from ..engine.power import Readings, is_android

LEAST_TIME = 5.0
"""The least per cent of the time that a policy must allow a node to compute."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A limit of one reading. With `at_least`, lower values break it, otherwise higher ones. `kind`: a node
    whose reading breaks the rule leaves the chain, or eases off. `low` and `high` bound the limits that may
    be given, and `slack` is how far within the limit a reading is good again. `says` describes the
    reading."""

    name: str
    reading: str
    kind: Literal["leave", "ease"]
    at_least: bool
    unit: Literal["%", "°C", "MB"]
    low: float
    high: float
    example: float
    slack: float = 0
    says: str = ""

    def breaks(self, value: float, limit: float) -> bool:
        """Whether a reading breaks the rule."""
        return value < limit if self.at_least else value > limit

    def calm(self, value: float, limit: float) -> bool:
        """Whether a reading is well within the limit."""
        return not self.breaks(value, limit + self.slack if self.at_least else limit - self.slack)

    def clause(self, value: float, limit: float) -> str:
        """How a reading breaks the rule, as a clause for the user."""
        than = "less" if self.at_least else "more"
        return f"{self.says.format(self._amount(value))}, {than} than {self._amount(limit)}"

    def text(self, limit: float) -> str:
        """The rule as `--policy` has it."""
        return f"{self.name}{self.sign}{limit / self.scale:g}{'' if self.unit == '°C' else self.unit}"

    @property
    def sign(self) -> str:
        """The sign before the limit."""
        return ">=" if self.at_least else "<="

    @property
    def scale(self) -> float:
        """What one of its unit is in the unit of the reading."""
        return 1e6 if self.unit == "MB" else 1.0

    def _amount(self, value: float) -> str:
        return f"{value / self.scale:.2f}".rstrip("0").rstrip(".") + f" {self.unit}"


RULES = (
    Rule("battery", "battery", "leave", True, "%", 1, 99, 30, 0, "its battery has {}"),
    Rule("temperature", "temperature", "ease", False, "°C", 25, 60, 42, 2, "its battery has {}"),
    Rule("chip", "chip", "ease", False, "°C", 40, 120, 85, 5, "its CPU has {}"),
    Rule("clock", "clock", "ease", True, "%", 1, 100, 40, 10, "its CPU is limited to {} of its frequency"),
    Rule("cpu", "cpu_pressure", "ease", False, "%", 1, 99, 50, 10, "its CPU is short {} of the time"),
    Rule("memory", "memory_pressure", "leave", False, "%", 1, 99, 20, 0, "its RAM is short {} of the time"),
    Rule("ram", "ram", "leave", True, "MB", 1e6, 1e12, 100e6, 0, "programs can get {} of RAM"),
)  # fmt: skip
"""The rules that limit a reading. `charging` and `time` are the others."""
_TIME = Rule("time", "", "ease", False, "%", LEAST_TIME, 100, 60)


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits of the use of a node. `charging`: only while it is plugged in; `time`: the most per cent of the
    time in which it computes; the others are those of RULES, in per cent, °C and bytes. None: no limit."""

    charging: bool = False
    battery: float | None = None
    temperature: float | None = None
    chip: float | None = None
    clock: float | None = None
    cpu: float | None = None
    memory: float | None = None
    ram: float | None = None
    time: float | None = None

    def __str__(self) -> str:
        words = ["charging"] if self.charging else []
        words += [rule.text(limit) for rule, limit in self.limits()]
        words += [_TIME.text(self.time)] if self.time is not None else []
        return ",".join(words) or "none"

    def limits(self) -> Iterator[tuple[Rule, float]]:
        """The rules that limit a reading, with their limits."""
        for rule in RULES:
            limit = getattr(self, rule.name)
            if limit is not None:
                yield rule, limit

    def unread(self, readings: Readings) -> list[str]:
        """The names of rules without effect, since this device does not say what they limit."""
        names = ["charging"] if self.charging and readings.plugged is None else []
        return names + [rule.name for rule, _ in self.limits() if getattr(readings, rule.reading) is None]


NO_POLICY = Policy()
PHONE = Policy(battery=30, temperature=42, clock=40, cpu=50, memory=20, ram=100e6)
"""The policy for a phone: it can be held and used meanwhile. A node promises three quarters of the RAM that
is available at its start, so there is more left than the limit unless other programs take it."""


def default_policy() -> Policy:
    """The policy of a node that was given none."""
    return PHONE if is_android() else NO_POLICY


def parse_policy(text: str) -> Policy:
    """The policy that a text such as `charging,battery>=30,time<=60%` means. ValueError: it means none; the
    message says what to write."""
    words = [word.strip() for word in text.split(",")]
    if words == ["none"]:
        return NO_POLICY
    values: dict[str, Any] = {}
    first = PHONE if words[0] == "phone" else NO_POLICY
    for word in words[first is PHONE :]:
        name, value = _rule(word)
        if name in values:
            raise ValueError(f"{name} is there twice: give each rule once")
        values[name] = value
    return replace(first, **values)


def _rule(word: str) -> tuple[str, float | bool]:
    """The name and the value of one rule."""
    found = re.fullmatch(r"([^<>=]*)([<>=]*)(.*)", word, re.DOTALL)
    assert found is not None, "it matches any text"
    name, sign, amount = found[1].strip(), found[2], found[3].strip()
    if name in ("none", "phone"):
        remedy = "write it alone" if name == "none" else "write it first, and rules that change it after it"
        raise ValueError(f"{name} is no rule, but a whole policy: {remedy}")
    if name == "charging":
        if sign:
            raise ValueError("charging has no limit: write charging alone")
        return name, True
    rule = next((rule for rule in (*RULES, _TIME) if rule.name == name), None)
    if rule is None:
        known = ", ".join(field.name for field in fields(Policy))
        raise ValueError(f"{word!r} is no rule: the rules are {known}")
    example = rule.text(rule.example)
    if not sign:
        raise ValueError(
            f"{name} needs a limit: write {example.replace(rule.sign, '=')}, or '{example}' in quotes, since "
            "a shell reads < and > as redirections"
        )
    if sign not in ("=", rule.sign):
        raise ValueError(f"{word!r} has another sign than {rule.sign}: write it as in {example}")
    return name, _limit(rule, word, amount, example)


def _limit(rule: Rule, word: str, amount: str, example: str) -> float:
    """The limit of a rule, in the unit of its reading."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*([^0-9.]*)", amount)
    units = {"%": ("%", ""), "°C": ("C", "°C", ""), "MB": ("MB", "GB")}[rule.unit]
    if found is None or found[2].upper() not in units:
        raise ValueError(f"{word!r} has no limit in {rule.unit}: write it as in {example}")
    limit = float(found[1]) * (1e9 if found[2].upper() == "GB" else rule.scale)
    if not rule.low <= limit <= rule.high:
        low, high = (f"{bound / rule.scale:g}" for bound in (rule.low, rule.high))
        raise ValueError(f"{word!r} is out of range: give a limit from {low} to {high} {rule.unit}")
    return limit
