"""Fills the searches' tables from the cost formulas.

Formulas run once per kind of unit and device, not once per unit, and room is found by one sliding window per
device: a re-plan of 32 devices and 80 layers is to take milliseconds.
"""

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

from . import cost
from .constraints import Constraints
from .kinds import Kinds
from .rows import TOKEN_BYTES, Cluster, Device, Link, Model, Workload
from .tables import INF, Hops, LackTables, TimeTables

ANYTHING = Constraints()


def decode_tables(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    constraints: Constraints = ANYTHING,
    *,
    batch: int = 1,
    idle: bool = True,
) -> TimeTables:
    """Calls of one decoded row of each of `batch` sequences; `idle`: stages pause between calls."""
    kinds = Kinds(model)

    def layer(device: Device) -> list[float]:
        return kinds.each(lambda unit: cost.unit_decode_seconds(unit, device, workload, batch))

    prefix = [_prefix(layer(device)) for device in cluster.devices]
    places = [device.step_overhead_s for device in cluster.devices]
    pauses = [device.idle_overhead_s if idle else 0.0 for device in cluster.devices]
    relief = [
        pause if _at_once(cluster, device.name) else 0.0
        for device, pause in zip(cluster.devices, pauses, strict=True)
    ]
    rounds = [place + pause for place, pause in zip(places, pauses, strict=True)]
    return _time_tables(
        model, cluster, workload, constraints, batch, (rounds, prefix), (places, prefix), relief
    )


def prompt_tables(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    constraints: Constraints = ANYTHING,
) -> TimeTables:
    """Calls of one chunk of the prompt, the mean one: a later chunk attends to more."""
    kinds, pieces = Kinds(model), cost.chunks(workload)

    def mean(device: Device) -> list[float]:
        return kinds.each(
            lambda unit: (
                math.fsum(cost.unit_prefill_seconds(unit, device, rows, at) for at, rows in pieces)
                / len(pieces)
            )
        )

    lines = [mean(device) for device in cluster.devices]
    at = workload.prompt_tokens - 1
    heads = [cost.unit_prefill_seconds(model.units[-1], device, 1, at) for device in cluster.devices]
    rounds = [_prefix([*line[:-1], head]) for line, head in zip(lines, heads, strict=True)]
    places = [_prefix([*line[:-1], 0.0]) for line in lines]
    steps = [device.step_overhead_s for device in cluster.devices]
    first = [device.step_overhead_s + device.idle_overhead_s for device in cluster.devices]
    rows = workload.prompt_tokens / len(pieces)
    none = [0.0] * len(lines)
    return _time_tables(
        model, cluster, workload, constraints, rows, (first, rounds), (steps, places), none, back=1
    )


def lack_tables(
    model: Model, cluster: Cluster, workload: Workload, constraints: Constraints = ANYTHING
) -> LackTables:
    """What each range lacks on each device, in the cluster's order."""
    devices = cluster.devices
    held = [cost.held_bytes_from(model, workload, first) for first in range(len(model.units))]

    def presence(link: Link | None) -> float:
        return INF if link is None else 0.0

    hop, _ = _hops(model, cluster, 1)
    return LackTables(
        units=len(model.units),
        enter=_at_end(constraints.first, cluster, lambda name: presence(cluster.link(cluster.head, name))),
        leave=_at_end(constraints.last, cluster, lambda name: presence(cluster.link(name, cluster.head))),
        hop=[[None if line is None else [0.0] * len(line) for line in lines] for lines in hop],
        lack=[
            [[max(0, device.base_bytes + size - device.ram_bytes) for size in line] for line in held]
            for device in devices
        ],
        pins=_pins(cluster, constraints),
    )


def _prefix(values: Sequence[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))


def _time_tables(
    model: Model,
    cluster: Cluster,
    workload: Workload,
    constraints: Constraints,
    rows: float,
    rounds: tuple[list[float], list[list[float]]],
    places: tuple[list[float], list[list[float]]],
    relief: list[float],
    back: float | None = None,
) -> TimeTables:
    """Adds links, room and constraints; a call passes `rows` rows along each link, and `back` of them return
    (None: as many)."""
    leaving = TOKEN_BYTES * (rows if back is None else back)
    hop, busy = _hops(model, cluster, rows)
    head, link = cluster.head, cluster.link
    return TimeTables(
        units=len(model.units),
        enter=_at_end(constraints.first, cluster, lambda n: _way(link(head, n), TOKEN_BYTES * rows)[0]),
        leave=_at_end(constraints.last, cluster, lambda n: _way(link(n, head), leaving)[0]),
        hop=hop,
        busy_enter=[_way(link(head, device.name), TOKEN_BYTES * rows)[1] for device in cluster.devices],
        busy_leave=[_way(link(device.name, head), leaving)[1] for device in cluster.devices],
        busy=busy,
        overhead=rounds[0],
        prefix=rounds[1],
        place_overhead=places[0],
        place_prefix=places[1],
        first_fit=_first_fits(model, cluster, workload),
        relief=relief,
        pins=_pins(cluster, constraints),
    )


def _pins(cluster: Cluster, constraints: Constraints) -> dict[int, int]:
    names = [device.name for device in cluster.devices]
    return {names.index(name): count for name, count in constraints.layers.items() if count}


def _at_end(only: str | None, cluster: Cluster, value: Callable[[str], float]) -> list[float]:
    """A value per device; infinite for all but the one that must hold that end of the model."""
    return [value(d.name) if only in (None, d.name) else INF for d in cluster.devices]


def _at_once(cluster: Cluster, name: str) -> bool:
    """Whether the head is the device itself, so that it never waits for a message when it holds all units."""
    return name == cluster.head and _way(cluster.link(name, name), TOKEN_BYTES)[0] == 0.0


def _way(link: Link | None, size: float) -> tuple[float, float]:
    """Hop and busy seconds of a message; both infinite without a link."""
    if link is None:
        return INF, INF
    busy = size / link.bytes_per_s
    return link.latency_s + busy, busy


def _hops(model: Model, cluster: Cluster, rows: float) -> tuple[Hops, Hops]:
    """Hop and busy seconds per pair and boundary b, for the cut of so many rows before unit b; b = 0 has
    none."""
    cuts = [unit.cut_bytes for unit in model.units[:-1]]
    sizes = set(cuts)
    names, links = [device.name for device in cluster.devices], cluster.links
    flat = len(cuts) if len(sizes) == 1 else 0
    hops: list[list[Sequence[float] | None]] = []
    busies: list[list[Sequence[float] | None]] = []
    for source in names:
        hop_row: list[Sequence[float] | None] = []
        busy_row: list[Sequence[float] | None] = []
        for target in names:
            link = links.get((source, target)) if source != target else None
            if link is None:
                hop_row.append(None)
                busy_row.append(None)
            elif flat:
                busy = rows * cuts[0] / link.bytes_per_s
                hop_row.append((0.0,) + (link.latency_s + busy,) * flat)
                busy_row.append((0.0,) + (busy,) * flat)
            else:
                by_size = {size: _way(link, rows * size) for size in sizes}
                hop_row.append([0.0, *(by_size[size][0] for size in cuts)])
                busy_row.append([0.0, *(by_size[size][1] for size in cuts)])
        hops.append(hop_row)
        busies.append(busy_row)
    return hops, busies


def _first_fits(model: Model, cluster: Cluster, workload: Workload) -> list[list[int]]:
    """Per device, for every end c, the least start b whose range fits; it never moves back, since more units
    never take less."""
    count = len(model.units)
    held = list(accumulate((cost.unit_held_bytes(model, u, workload) for u in model.units), initial=0))
    scratch = [unit.workspace_bytes for unit in model.units]
    fits = []
    if len(set(scratch)) == 1:
        for device in cluster.devices:
            room = device.ram_bytes - device.base_bytes - scratch[0]
            fit = [min(bisect_left(held, size - room), c) for c, size in enumerate(held)]
            fits.append([*fit[:-1], 0 if held[-1] - model.tied_bytes <= room else fit[-1]])
        return fits
    for device in cluster.devices:
        room, fit, b = device.ram_bytes - device.base_bytes, [0], 0
        largest: deque[int] = deque()  # units of the window, their workspaces descending
        for c in range(1, count + 1):
            while largest and scratch[largest[-1]] <= scratch[c - 1]:
                largest.pop()
            largest.append(c - 1)
            while b < c:
                tied = model.tied_bytes if b == 0 and c == count else 0
                if held[c] - held[b] - tied + scratch[largest[0]] <= room:
                    break
                b += 1
                while largest and largest[0] < b:
                    largest.popleft()
            fit.append(b)
        fits.append(fit)
    return fits
