"""Joins engine and planner: a model's costs and a device's measurements as the planner's rows.

The planner imports nothing of ours, the engine nothing of the planner: this is the one place that knows both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from . import planner
from .engine.costs import constant_bytes, tied_bytes, unit_cost
from .engine.errors import NoPlanError
from .engine.layout import GROUP, PAGE, PART_BYTES, round_up
from .engine.measure import Measured
from .engine.model_directory import Model
from .engine.program import Buffer
from .engine.stage import StageOptions
from .planner.cost import PAUSE_SECONDS, StageCost, Step

MB = 1_000_000
USUAL_TOKENS = 2048
"""Positions that a conversation fills, where nobody says how many it may."""
BASE_BYTES = 60 * MB
"""What a node's process holds before its first unit, when nobody measured it."""
FREE_SHARE = 0.75
"""Of the free RAM is promised when nobody says how much: other programs want to grow, too."""


def planner_model(model: Model, options: StageOptions) -> planner.ModelCosts:
    """The planner's view of a model: one row per unit."""
    units = []
    constants = constant_bytes(model.program)
    for u in range(len(model.program.units)):
        cost = unit_cost(model, u)
        units.append(
            planner.Unit(
                name=cost.name,
                bytes=cost.bytes,
                read_bytes=cost.read_bytes,
                macs=cost.macs,
                kv_bytes_per_token=cost.kv_bytes_per_token,
                fixed_state_bytes=cost.fixed_state_bytes,
                cut_bytes=cost.cut_bytes,
                workspace_bytes=workspace_bytes(model, options, u, u + 1) + constants,
                attend_macs=cost.attend_macs,
            )
        )
    return planner.ModelCosts(tuple(units), tied_bytes(model), PAGE)


def workspace_bytes(model: Model, options: StageOptions, first: int, last: int) -> int:
    """Activations of the largest batch in a stage of units [first, last): all buffers at once. Those that
    never live together share memory in a stage, which leaves room for messages. Embedding and head, where no
    layer is with them, touch few buffers: these, and the rows once more in a message."""
    program = model.program
    rows = {"rows": options.max_rows, "wanted": min(options.max_rows, options.max_wanted)}
    names = [buffer.name for buffer in program.buffers]
    if not any(unit.states for unit in program.units[first:last]):
        touched = {name for _, op in program.ops(first, last) for name in (*op.reads(), op.writes())}
        names = [*program.cut, *(name for name in names if name in touched)]
    buffers = [program.buffer(name) for name in names]
    return sum(_row_bytes(buffer) * rows[buffer.domain] for buffer in buffers)


def scratch_bytes(model: Model, threads: int) -> int:
    """What drawing tokens takes beside that, whichever units are held: three numbers a logit and thread, and
    one for every 64 (csrc/sample.c); and what several threads share of one attention."""
    padded = round_up(model.program.vocab, 64)
    shared = PART_BYTES if threads > 1 else 0
    return threads * round_up(padded * 12 + padded // 64 * 4, 64) + shared


def _row_bytes(buffer: Buffer) -> int:
    """A row of a buffer: floats, or int8 with a scale and a sum a group; whole cache lines."""
    groups = -(-buffer.cols // GROUP)
    return round_up(4 * buffer.cols if buffer.type == "f32" else groups * (GROUP + 8), 64)


def stage_expectation(
    costs: planner.ModelCosts, device: planner.Device
) -> Callable[[int, int], Callable[[Sequence[Step], float], float]]:
    """For stages [first, last) of a device: seconds that a call should take, of its steps and of how long the
    stage has waited for them."""

    def stage(first: int, last: int) -> Callable[[Sequence[Step], float], float]:
        cost = StageCost(costs, device, first, last)

        def seconds(steps: Sequence[Step], pause: float) -> float:
            return cost.call_seconds(steps) + (cost.pause if pause > PAUSE_SECONDS else 0.0)

        return seconds

    return stage


def device_row(
    name: str, measured: Measured, *, ram_bytes: int, base_bytes: int, hop_s: float = 0.0
) -> planner.Device:
    """A measured device as the planner's row, which the network and the files of profiles carry as it is: it
    promises `ram_bytes`, its process takes `base_bytes` of them, and every step takes `hop_s` beside what was
    measured."""
    return planner.Device(
        name=name,
        ram_bytes=ram_bytes,
        read_bytes_per_s=measured.read_bytes_per_s,
        macs_per_s=measured.macs_per_s,
        base_bytes=base_bytes,
        step_overhead_s=measured.step_overhead_s + hop_s,
        idle_overhead_s=measured.idle_overhead_s,
        row_rates=measured.row_rates,
        attend_macs_per_s=measured.attend_macs_per_s,
        prefill_attend_macs_per_s=measured.prefill_attend_macs_per_s,
    )


def plan_or_error(question: planner.Question) -> planner.Plan:
    """The best plan. NoPlanError: none fits; the message says how many MB are missing."""
    from .plan_report import render_infeasible  # only here: a node reports no plan

    answer = planner.plan(question)
    if isinstance(answer, planner.Infeasible):
        raise NoPlanError(render_infeasible(answer).strip())
    return answer


def default_workload(context: int, *, given: bool, prompt: int = 1, streams: int = 1) -> planner.Workload:
    """What `shoal run` and `shoal plan` ask a plan for. Unless the context was `given`, speed is that of the
    middle of a conversation of usual length, not of half of what the model could hold."""
    prompt = min(prompt, context)
    depth = None if given else (prompt + min(context, USUAL_TOKENS)) // 2
    return planner.Workload(context, sequences=streams, prompt_tokens=prompt, streams=streams, depth=depth)


def plan_that_fits(question: planner.Question, *, shrink: bool) -> tuple[planner.Plan, planner.Workload]:
    """The best plan, and the workload that it is for: where the context that is asked for does not fit the
    devices' RAM and may `shrink`, the largest that does. Errors as for plan_or_error."""
    workload = question.workload
    try:
        return plan_or_error(question), workload
    except NoPlanError:
        if not shrink or workload.context <= PAGE:
            raise

    def of(pages: int) -> planner.Question:
        context = pages * PAGE
        depth = None if workload.depth is None else min(workload.depth, context)
        prompt = min(workload.prompt_tokens, context)
        return replace(
            question, workload=replace(workload, context=context, depth=depth, prompt_tokens=prompt)
        )

    def fits(pages: int) -> bool:
        answer = planner.plan(of(pages), method="dp", explain=False)
        return not isinstance(answer, planner.Infeasible)

    # The least that does not fit is above `low`; one page is tried in the end, whether it fits or not.
    low, high = 1, -(-workload.context // PAGE)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return plan_or_error(of(low)), of(low).workload
