"""Every formula of the cost model, once: the searches, the reports and the answers all read these functions.

A unit takes the longer of reading its weights and computing, and then attention takes the longer of reading
the state and computing; a stage is its units plus a fixed overhead a step; a hop is a latency plus bytes over
a rate. RAM is weights, state, workspace and the process itself. Sums over units are plain, so a stage's time
is additive in its units: the searches rely on that, and on a longer range never taking less RAM or time than
a range inside it. docs/planner.md has the formulas with their reasons.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from .rows import TOKEN_BYTES, Cluster, Device, Link, Model, Objective, Stage, Unit, Workload


def work_seconds(device: Device, rows: int, macs: int) -> float:
    """The matmuls of a call of `rows` rows, `macs` a row: between measured row counts along a line, below the
    least and beyond the largest at their rates."""
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


def unit_decode_seconds(unit: Unit, device: Device, workload: Workload, batch: int = 1) -> float:
    """One row of each of `batch` sequences through one unit, in one call: weights are read once (of a table,
    a row each), state once a sequence."""
    read = min(unit.bytes, batch * unit.read_bytes)
    matmuls = max(read / device.read_bytes_per_s, work_seconds(device, batch, unit.macs))
    depth = workload.decode_depth
    attention = max(
        state_bytes_read(unit, depth) / device.read_bytes_per_s,
        depth * unit.attend_macs / device.attend_macs_per_s,
    )
    return matmuls + batch * attention


def unit_prefill_seconds(unit: Unit, device: Device, rows: int, position: int) -> float:
    """One chunk of `rows` prompt rows from `position` on through one unit.

    It reads each weight once (a table: one row a token) and the state up to its end; a row attends to what is
    before it.
    """
    read = min(unit.bytes, rows * unit.read_bytes)
    matmuls = max(read / device.read_bytes_per_s, work_seconds(device, rows, unit.macs))
    attention = max(
        state_bytes_read(unit, position + rows) / device.read_bytes_per_s,
        rows * (position + (rows + 1) / 2) * unit.attend_macs / device.prefill_attend_macs_per_s,
    )
    return matmuls + attention


def state_bytes_read(unit: Unit, depth: int) -> int:
    """State that one call reads for one sequence at that depth."""
    return unit.kv_bytes_per_token * depth + unit.fixed_state_bytes


def stage_decode_seconds(
    model: Model,
    device: Device,
    workload: Workload,
    first: int,
    last: int,
    *,
    batch: int = 1,
    idle: bool = False,
) -> float:
    """One decode step of a row of each of `batch` sequences through units [first, last); `idle`: after a
    pause."""
    overhead = device.step_overhead_s + (device.idle_overhead_s if idle else 0.0)
    return overhead + sum(
        unit_decode_seconds(unit, device, workload, batch) for unit in model.units[first:last]
    )


def stages_pause(objective: Objective, workload: Workload) -> bool:
    """Whether stages wait between calls: with one stream each does while the others have their turn."""
    return objective != "throughput" or workload.streams == 1


def stage_prefill_seconds(
    model: Model, device: Device, first: int, last: int, rows: int, position: int, wanted: int
) -> float:
    """One chunk of `rows` prompt rows from `position` on through units [first, last). The model's last unit
    runs only on the `wanted` rows whose logits somebody wants."""
    seconds = device.step_overhead_s
    for index in range(first, last):
        run = rows if index < len(model.units) - 1 else wanted
        if run:
            seconds += unit_prefill_seconds(model.units[index], device, run, position)
    return seconds


def sequence_state_bytes(model: Model, unit: Unit, context: int) -> int:
    """State that one sequence of `context` positions holds in one unit, in whole pages."""
    pages = -(-context // model.kv_page_tokens)
    return unit.kv_bytes_per_token * pages * model.kv_page_tokens + unit.fixed_state_bytes


def unit_held_bytes(model: Model, unit: Unit, workload: Workload) -> int:
    """Weights and all sequences' state of one unit."""
    return unit.bytes + sequence_state_bytes(model, unit, workload.context) * workload.sequences


def held_bytes_from(model: Model, workload: Workload, first: int) -> list[int]:
    """RAM of units [first, last) without the process itself, for every last > first: entry 0 is last = first
    + 1.

    Weights, a tied table once, state, and the largest workspace.
    """
    held, total, workspace = [], 0, 0
    for unit in model.units[first:]:
        total += unit_held_bytes(model, unit, workload)
        workspace = max(workspace, unit.workspace_bytes)
        held.append(total + workspace)
    if first == 0:
        held[-1] -= model.tied_bytes
    return held


def range_ram_bytes(model: Model, device: Device, workload: Workload, first: int, last: int) -> int:
    """RAM that the device takes with units [first, last): its base, and what it holds."""
    return device.base_bytes + held_bytes_from(model, workload, first)[last - first - 1]


def link_busy_seconds(link: Link, size: int) -> float:
    """How long a message takes the link itself; the latency overlaps with other messages."""
    return size / link.bytes_per_s


def hop_seconds(link: Link, size: int) -> float:
    """From sending a message of `size` bytes to having it all."""
    return link.latency_s + link_busy_seconds(link, size)


def chain_hops(model: Model, cluster: Cluster, stages: Sequence[Stage]) -> list[tuple[Link, int]]:
    """The links of a chain with the bytes of one row on each: head to first, between neighbours, last to
    head.

    ValueError names a pair without a link.
    """
    nodes = [cluster.head, *(stage.device for stage in stages), cluster.head]
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


def chunks(workload: Workload) -> list[tuple[int, int]]:
    """(first position, rows) of the prompt's chunks."""
    size, end = workload.chunk_tokens, workload.prompt_tokens
    return [(position, min(size, end - position)) for position in range(0, end, size)]


def first_token_seconds(model: Model, cluster: Cluster, workload: Workload, stages: Sequence[Stage]) -> float:
    """From the prompt's arrival at the head to its first token there, its chunks pipelined along the chain.

    A chunk enters a stage when it has arrived and the chunk before has left; a link carries one chunk at a
    time; the first chunk finds every stage after a pause.
    """
    hops = chain_hops(model, cluster, stages)
    devices = [cluster.device(stage.device) for stage in stages]
    place_free = [0.0] * len(stages)
    link_free = [0.0] * len(stages)
    done = 0.0
    for position, rows in chunks(workload):
        wanted = int(position + rows == workload.prompt_tokens)
        done = 0.0
        for i, (stage, device) in enumerate(zip(stages, devices, strict=True)):
            link, size = hops[i]
            link_free[i] = max(done, link_free[i]) + link_busy_seconds(link, size * rows)
            arrived = link_free[i] + link.latency_s
            place_free[i] = max(arrived, place_free[i]) + stage_prefill_seconds(
                model, device, stage.first, stage.last, rows, position, wanted
            )
            if position == 0:
                place_free[i] += device.idle_overhead_s
            done = place_free[i]
    back, size = hops[-1]
    return done + hop_seconds(back, size)
