"""The units of which a device should hold copies of the weights, in RAM that its stage does not need: those
that it would get if another device became slower or were lost, and then its neighbours' nearest ones. A
change of the stages then moves keys and values only, and no device has to load weights."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from types import MappingProxyType

from . import cost
from .evaluation import Plan
from .moves import steals
from .rows import Assignment, Device, Question
from .solve import plan

HOT = 2.5
"""How many times as long as now a device takes that has become slow."""


def copies(
    question: Question,
    stages: Sequence[Assignment],
    slowed: Callable[[Device, float], Device],
    files: Mapping[str, frozenset[int]] = MappingProxyType({}),
) -> dict[str, tuple[int, ...]]:
    """The units whose weights each device of a chain should hold beside those of its stage, the most useful
    first, as far as its RAM cap allows. `slowed`: a device that takes so many times as long. `files`: the
    units whose files a device has, where it has not all: they go first, since others have to be fetched."""
    wanted: dict[str, Counter[int]] = {stage.device: Counter() for stage in stages}
    for later in _later(question, stages, slowed):
        for stage in later:
            if stage.device in wanted:
                wanted[stage.device].update(range(stage.first, stage.last))
    found = {}
    for at, stage in enumerate(stages):
        device, own = question.cluster.device(stage.device), range(stage.first, stage.last)
        free = device.ram_bytes - cost.range_ram_bytes(
            question.model, device, question.workload, stage.first, stage.last
        )
        near = _near(stages, at)
        place = {u: by for by, u in enumerate(near)}
        useful = [u for u in wanted[stage.device] if u not in own]
        useful.sort(key=lambda u: (-wanted[stage.device][u], place.get(u, len(place)), u))
        held = []
        there = files.get(stage.device)
        for u in sorted(dict.fromkeys([*useful, *near]), key=lambda u: there is not None and u not in there):
            size = question.model.units[u].bytes
            if size <= free:
                free -= size
                held.append(u)
        found[stage.device] = tuple(held)
    return found


def _later(
    question: Question, stages: Sequence[Assignment], slowed: Callable[[Device, float], Device]
) -> Iterator[Sequence[Assignment]]:
    """The stages that are best when one device of the chain is slower, and when it is lost."""
    cluster, held = question.cluster, question.constraints
    for stage in stages:
        devices = tuple(slowed(d, HOT) if d.name == stage.device else d for d in cluster.devices)
        asked = replace(question, cluster=replace(cluster, devices=devices))
        yield from (steal.stages for steal in [*steals(asked, stages)][-1:])
        others = tuple(one.device for one in stages if one is not stage)
        if others and stage.device not in (held.first, held.last):  # without these there is no plan
            without = replace(held, exclude=held.exclude | {stage.device}, order=others)
            lost = plan(replace(question, constraints=without), method="dp", explain=False)
            if isinstance(lost, Plan):
                yield lost.assignments


def _near(stages: Sequence[Assignment], at: int) -> list[int]:
    """The units of the stages beside one, the nearest first, in turns from either side."""
    stage = stages[at]
    before = reversed(range(stages[at - 1].first, stage.first)) if at else ()
    after = range(stage.last, stages[at + 1].last) if at + 1 < len(stages) else ()
    pairs = zip_longest(before, after)
    return [u for u in chain.from_iterable(pairs) if u is not None]
