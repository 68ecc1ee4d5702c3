"""The cost model: every formula once. Searches, reports and a node that watches its own pace read them.

A unit takes the longer of reading its weights and computing its matmuls, and then its attention the longer of
reading the state and computing; a stage is its units plus a fixed overhead a call; a hop is a latency plus
bytes over a rate. RAM is weights, state, workspace and the process itself. Sums over units are plain: the
searches rely on that, and on a longer range never taking less RAM or time than one inside it. docs/planner.md
has the reasons.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from operator import add, attrgetter

from .rows import Assignment, Cluster, Device, LinkSpeed, ModelCosts, Unit, Workload

TOKEN_BYTES = 4  # a token id on its way from the coordinator to the first device, or from the last one back
CALL_STEPS = 32  # steps of one call at most, as a node takes them
PAUSE_SECONDS = 0.0005  # a stage that waited longer starts as after a pause
Step = tuple[int, int, bool]  # rows of one sequence, their first position, whether a token is wanted

unit_costs = attrgetter(
    "bytes", "read_bytes", "macs", "kv_bytes_per_token", "fixed_state_bytes", "attend_macs"
)


class Kinds:
    """The units of a model by what they cost: most layers cost the same, so values are found once a kind."""

    def __init__(self, model: ModelCosts) -> None:
        self._keys = [unit_costs(unit) for unit in model.units]
        self._unit = dict(zip(self._keys, model.units, strict=True))

    def each(self, value: Callable[[Unit, Device], float], device: Device) -> list[float]:
        """The value of every unit on a device."""
        values = {key: value(unit, device) for key, unit in self._unit.items()}
        return [values[key] for key in self._keys]


def work_seconds(device: Device, rows: int, macs: int) -> float:
    """The multiplications of a call of `rows` rows, `macs` a row: between measured row counts along a line,
    below the least and beyond the largest at their rates."""
    rates = device.row_rates
    if not rates:
        return rows * macs / device.macs_per_s
    low, rate = rates[0]
    if rows <= low:
        return rows * macs / rate
    for high, faster in rates[1:]:
        if rows <= high:
            at_low, at_high = low / rate, high / faster
            return macs * (at_low + (at_high - at_low) * (rows - low) / (high - low))
        low, rate = high, faster
    return rows * macs / rate


def matmul_seconds(unit: Unit, device: Device, rows: int) -> float:
    """The matmuls of `rows` rows in one call, which reads the weights once (of a table, a row each)."""
    read = min(unit.bytes, rows * unit.read_bytes)
    return max(read / device.read_bytes_per_s, work_seconds(device, rows, unit.macs))


def position_seconds(unit: Unit, device: Device) -> float:
    """The attention of one row to one position."""
    return max(unit.kv_bytes_per_token / device.read_bytes_per_s, unit.attend_macs / device.attend_macs_per_s)


def attention_seconds(unit: Unit, device: Device, rows: int, position: int) -> float:
    """The attention of `rows` rows of one sequence from `position` on. One row attends to the `position` rows
    before it; a chunk reads the state up to its end, and each of its rows attends to what is before it. State
    of a fixed size belongs to an operation of its own, which reads it once."""
    read = device.read_bytes_per_s
    if rows == 1:
        growing = position * position_seconds(unit, device)
    else:
        macs = rows * (position + (rows + 1) / 2) * unit.attend_macs
        growing = max(
            unit.kv_bytes_per_token * (position + rows) / read, macs / device.prefill_attend_macs_per_s
        )
    return unit.fixed_state_bytes / read + growing


def decode_seconds(unit: Unit, device: Device, rows: int, depth: int) -> float:
    """One row of each of `rows` sequences at that depth through one unit, in one call."""
    return matmul_seconds(unit, device, rows) + rows * attention_seconds(unit, device, 1, depth)


def chunk_seconds(unit: Unit, device: Device, rows: int, position: int) -> float:
    """A chunk of `rows` prompt rows from `position` on through one unit."""
    return matmul_seconds(unit, device, rows) + attention_seconds(unit, device, rows, position)


class StageCost:
    """What calls of units [first, last) of a model take on a device. `rows(n)`: seconds of a call of n
    decoded rows without the positions that they attend to; `position`: of one position that one row attends
    to; `pause`: what a call after a pause takes more. The last unit runs only on rows whose token is
    wanted."""

    def __init__(self, model: ModelCosts, device: Device, first: int, last: int) -> None:
        units = model.units[first:last]
        self._device = device
        self._end = units[-1:] if last == len(model.units) else ()
        body = units[:-1] if self._end else units
        kinds = {unit_costs(unit): unit for unit in body}
        self._kinds = [(kinds[key], count) for key, count in Counter(map(unit_costs, body)).items()]
        every = [*self._kinds, *((unit, 1) for unit in self._end)]
        fixed = sum(count * attention_seconds(unit, device, 1, 0) for unit, count in every)
        self.position = sum(count * position_seconds(unit, device) for unit, count in every)
        self.pause = device.idle_overhead_s
        self._matmuls = cache(self._matmul_seconds)
        self.rows: Callable[[int], float] = cache(
            lambda n: device.step_overhead_s + n * fixed + self._matmuls(n, n)
        )

    def decode_seconds(self, rows: int, depth: int) -> float:
        """A call of one row of each of `rows` sequences at that depth, right after another call."""
        return self.rows(rows) + rows * depth * self.position

    def call_seconds(self, steps: Sequence[Step]) -> float:
        """A call of any mixture of decoded rows and chunks, right after another call."""
        rows = wanted = 0
        seconds = self._device.step_overhead_s
        for count, position, wants in steps:
            rows += count
            for unit, units in self._kinds:
                seconds += units * attention_seconds(unit, self._device, count, position)
            if wants:
                wanted += 1
                for unit in self._end:
                    seconds += attention_seconds(unit, self._device, 1, position + count - 1)
        return seconds + self._matmuls(rows, wanted)

    def _matmul_seconds(self, rows: int, wanted: int) -> float:
        seconds = sum(count * matmul_seconds(unit, self._device, rows) for unit, count in self._kinds)
        return seconds + sum(matmul_seconds(unit, self._device, wanted) for unit in self._end)


def sequence_state_bytes(model: ModelCosts, unit: Unit, context: int) -> int:
    """State that one sequence of `context` positions holds in one unit, in whole pages."""
    pages = -(-context // model.kv_page_tokens)
    return unit.kv_bytes_per_token * pages * model.kv_page_tokens + unit.fixed_state_bytes


def unit_held_bytes(model: ModelCosts, unit: Unit, workload: Workload) -> int:
    """Weights and all sequences' state of one unit."""
    return unit.bytes + sequence_state_bytes(model, unit, workload.context) * workload.sequences


def held_bytes(model: ModelCosts, workload: Workload) -> list[list[int]]:
    """RAM of units [b, c) without the process itself, as [b][c - b - 1]: weights, a tied table once, state,
    and the largest workspace."""
    held = [unit_held_bytes(model, unit, workload) for unit in model.units]
    scratch = [unit.workspace_bytes for unit in model.units]
    table, most = [], max(scratch)
    for b, own in enumerate(scratch):
        if own == most:  # as in most layers: one sum
            table.append(list(accumulate(held[b:], initial=most))[1:])
        else:
            table.append(list(map(add, accumulate(held[b:]), accumulate(scratch[b:], max))))
    table[0][-1] -= model.tied_bytes
    return table


def range_ram_bytes(model: ModelCosts, device: Device, workload: Workload, first: int, last: int) -> int:
    """RAM that the device takes with units [first, last): its base, and what it holds. The table of a tied LM
    head that a second range of a device holds is the one of its first range."""
    units = model.units[first:last]
    held = sum(unit_held_bytes(model, unit, workload) for unit in units)
    second = bool(device.beside) and last == len(model.units)
    tied = model.tied_bytes if second or len(units) == len(model.units) else 0
    return device.base_bytes + held - tied + max(unit.workspace_bytes for unit in units)


def link_busy_seconds(link: LinkSpeed, size: float) -> float:
    """How long a message takes the link itself; the latency overlaps with other messages."""
    return size / link.bytes_per_s


def hop_seconds(link: LinkSpeed, size: float) -> float:
    """From sending a message of `size` bytes to having it all."""
    return link.latency_s + size / link.bytes_per_s


def chain_hops(
    model: ModelCosts, cluster: Cluster, stages: Sequence[Assignment]
) -> list[tuple[LinkSpeed, int]]:
    """The links of a chain with the bytes of one row on each: coordinator to first, between neighbours, last
    to coordinator. ValueError names a pair without a link."""
    nodes = [cluster.coordinator, *(stage.device for stage in stages), cluster.coordinator]
    cuts = [model.units[stage.last - 1].cut_bytes for stage in stages[:-1]]
    hops = []
    for (source, target), size in zip(pairwise(nodes), [TOKEN_BYTES, *cuts, TOKEN_BYTES], strict=True):
        link = cluster.link(source, target)
        if link is None:
            raise ValueError(f"there is no link {source} -> {target}")
        hops.append((link, size))
    return hops


def per_second(seconds: float) -> float:
    """Tokens/s of a token that takes so long."""
    return 1.0 / seconds if seconds else math.inf
