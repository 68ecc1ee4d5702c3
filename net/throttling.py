"""How much of a node may be used at the moment: `decide(policy, memory, readings, now) -> (memory,
condition)`, without I/O or a clock.

A rule that a reading breaks for some seconds makes the node leave, for good: its layers move to other nodes,
and its process ends before the system or the battery ends it. Rules of heat and of other programs make it
ease off instead: it computes for a smaller share of the time, less and less as long as one of them is broken,
and more again once all readings have been well within their limits for a while. So readings near a limit
change nothing. A node that soon has to ease off again waits longer each time before it tries more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..engine.power import Readings
from .messages import Condition
from .policy import Policy

SHARES = (1.0, 0.7, 0.5, 0.35, 0.25)
"""The shares of the allowed time, by how many steps the node has eased off."""
STEP_SECONDS = 20.0
"""The least time between two steps down: heat follows slowly."""
CALM_SECONDS, MOST_CALM = 60.0, 960.0
"""How long readings are well within their limits before a step up. The time doubles with each step down that
follows a step up soon."""
TOO_HOT = 5.0
"""°C above the limit of the battery's temperature at which a node leaves."""
LEAVE_SECONDS = 10.0
"""How long a reading breaks a rule before the node leaves."""
RAM_SECONDS = 4.0
"""How long free RAM is below its limit before the node leaves: the system kills programs soon after it has
none left."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is remembered between two decisions. `since`: when the rules that make a node leave began to be
    broken. `step`: how often the node has eased off. `changed`, `raised`: when it last changed, and rose.
    `calm`: since when all readings have been well within their limits. `wait`: how long they must be."""

    since: Mapping[str, float] = field(default_factory=dict)
    leaving: str = ""
    step: int = 0
    easing: str = ""
    changed: float = float("-inf")
    raised: float = float("-inf")
    calm: float | None = None
    wait: float = CALM_SECONDS


NOTHING = Memory()


def decide(policy: Policy, memory: Memory, readings: Readings, now: float) -> tuple[Memory, Condition]:
    """The condition of the node by its readings at `now`, and what to remember for the next decision. A
    reading that is not there breaks no rule."""
    memory = _eased(policy, _left(policy, memory, readings, now), readings, now)
    share = SHARES[memory.step] * (policy.time or 100.0) / 100
    return memory, Condition(share, bool(memory.leaving), memory.leaving or memory.easing)


def forbidden(policy: Policy, readings: Readings) -> dict[str, str]:
    """The rules that make a node leave which these readings break, each with a clause for the user."""
    found = {}
    if policy.charging and readings.plugged is False:
        found["charging"] = "it is not plugged in"
    for rule, limit in policy.limits():
        value = getattr(readings, rule.reading)
        if rule.name == "temperature":
            limit += TOO_HOT
        elif rule.kind == "ease":
            continue
        if value is not None and rule.breaks(value, limit):
            found[rule.name] = rule.clause(value, limit)
    return found


def _left(policy: Policy, memory: Memory, readings: Readings, now: float) -> Memory:
    """Decides whether the node leaves."""
    if memory.leaving:
        return memory
    broken = forbidden(policy, readings)
    since = {name: memory.since.get(name, now) for name in broken}
    for name, clause in broken.items():
        if now - since[name] >= (RAM_SECONDS if name == "ram" else LEAVE_SECONDS):
            return replace(memory, since=since, leaving=clause)
    return replace(memory, since=since)


def _eased(policy: Policy, memory: Memory, readings: Readings, now: float) -> Memory:
    """Decides how far the node eases off."""
    rules = [(rule, limit) for rule, limit in policy.limits() if rule.kind == "ease"]
    read = [(rule, limit, getattr(readings, rule.reading)) for rule, limit in rules]
    known = [(rule, limit, value) for rule, limit, value in read if value is not None]
    broken = [rule.clause(value, limit) for rule, limit, value in known if rule.breaks(value, limit)]
    if broken:
        memory = replace(memory, calm=None, easing=broken[0])
        if memory.step + 1 == len(SHARES) or now - memory.changed < STEP_SECONDS:
            return memory
        memory = replace(memory, step=memory.step + 1, changed=now)
        if now - memory.raised < 2 * memory.wait:  # it was too early
            return replace(memory, wait=min(MOST_CALM, 2 * memory.wait), raised=float("-inf"))
        return replace(memory, wait=CALM_SECONDS) if memory.step == 1 else memory
    if not memory.step or not all(rule.calm(value, limit) for rule, limit, value in known):
        return replace(memory, calm=None)
    calm = now if memory.calm is None else memory.calm
    if now - calm < memory.wait:
        return replace(memory, calm=calm)
    easing = memory.easing if memory.step > 1 else ""
    return replace(memory, step=memory.step - 1, easing=easing, changed=now, raised=now, calm=now)
