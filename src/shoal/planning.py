"""Joins the engine and the planner: a model's costs and a device's measurements as the planner's rows.

Neither package imports the other; this module imports both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from . import planner
from .engine.costs import constant_bytes, tied_bytes, unit_cost
from .engine.errors import NoPlanError, ShoalError
from .engine.layout import GROUP, PAGE, PART_BYTES, round_up
from .engine.measure import DeviceMeasurements
from .engine.model_directory import Model
from .engine.program import Buffer
from .engine.stage import StageOptions
from .net.inbox import most_bytes
from .net.work import PORTION_BYTES
from .planner.cost import PAUSE_SECONDS, StageCost, Step

MB = 1_000_000
USUAL_TOKENS = 2048
"""Positions of a usual conversation, for plans without a given context length."""
BASE_BYTES = 60 * MB
"""RAM of a node's process without any unit, if it was not measured."""
NOTHING_BYTES = 1 * MB
"""A node that promises no more RAM than this runs no layers, and gives others the files of theirs."""
FREE_SHARE = 0.75
"""Share of the free RAM that is promised by default; other programs need some, too."""


def runs_layers(device: planner.Device) -> bool:
    """Whether a node with this row runs layers. A second range does, however little its promise is: of a
    small model, the LM head needs no more."""
    return device.ram_bytes > NOTHING_BYTES or bool(device.beside)


def planner_model(model: Model, options: StageOptions) -> planner.ModelCosts:
    """The planner's view of a model: one row for each unit."""
    units = []
    constants, messages = constant_bytes(model.program), message_bytes(model, options)
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
                workspace_bytes=workspace_bytes(model, options, u, u + 1) + constants + messages,
                attend_macs=cost.attend_macs,
            )
        )
    return planner.ModelCosts(tuple(units), tied_bytes(model), PAGE)


def workspace_bytes(model: Model, options: StageOptions, first: int, last: int) -> int:
    """Bytes of activations of the largest batch in a stage of units [first, last), with every buffer in
    memory of its own. A stage reuses memory of buffers that are not live at the same time, which leaves room
    for messages. Stages without a layer (embedding or LM head alone) touch few buffers: these are counted,
    and the rows of a message."""
    program = model.program
    rows = {"rows": options.max_rows, "wanted": min(options.max_rows, options.max_wanted)}
    names = [buffer.name for buffer in program.buffers]
    if not any(unit.states for unit in program.units[first:last]):
        touched = {name for _, op in program.ops(first, last) for name in (*op.reads(), op.writes())}
        names = [*program.cut, *(name for name in names if name in touched)]
    buffers = [program.buffer(name) for name in names]
    return sum(_row_bytes(buffer) * rows[buffer.domain] for buffer in buffers)


def message_bytes(model: Model, options: StageOptions) -> int:
    """Bytes of the messages that wait in a node's inbox, at most, and of keys and values that are on their
    way to other nodes. Rows that wait to be sent have the room that `workspace_bytes` leaves."""
    return most_bytes(options.max_rows, model.program.cut_cols) + PORTION_BYTES


def scratch_bytes(model: Model, threads: int) -> int:
    """Bytes of scratch memory beside the workspace, whichever units are loaded: for each thread, three
    numbers a logit and one for every 64 logits (csrc/sample.c); and partial results that threads share in an
    attention."""
    padded = round_up(model.program.vocab, 64)
    shared = PART_BYTES if threads > 1 else 0
    return threads * round_up(padded * 12 + padded // 64 * 4, 64) + shared


def _row_bytes(buffer: Buffer) -> int:
    """Bytes of a row of a buffer, in whole cache lines: floats, or int8 with a scale and a sum for each
    group."""
    groups = -(-buffer.cols // GROUP)
    return round_up(4 * buffer.cols if buffer.type == "f32" else groups * (GROUP + 8), 64)


def stage_expectation(
    costs: planner.ModelCosts, device: planner.Device
) -> Callable[[int, int], Callable[[Sequence[Step], float], float]]:
    """A function of (first, last), a stage of a device. It returns a function of (steps, pause): the
    predicted seconds of a call with these steps after the stage has waited for `pause` seconds."""

    def stage(first: int, last: int) -> Callable[[Sequence[Step], float], float]:
        cost = StageCost(costs, device, first, last)

        def seconds(steps: Sequence[Step], pause: float) -> float:
            return cost.call_seconds(steps) + (cost.pause if pause > PAUSE_SECONDS else 0.0)

        return seconds

    return stage


def device_row(
    name: str, measured: DeviceMeasurements, *, ram_bytes: int, base_bytes: int, hop_s: float = 0.0
) -> planner.Device:
    """A measured device as the planner's row, which network messages and profile files contain unchanged. It
    promises `ram_bytes`, of which its process needs `base_bytes`; every step needs `hop_s` more than was
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


def layer_constraints(
    layers: Sequence[int],
    cluster: planner.Cluster,
    exclude: Collection[str] = (),
    first: str | None = None,
    last: str | None = None,
) -> planner.Constraints:
    """Constraints of the command line's --layers: so many layers on each device, in the devices' order, which
    the plan keeps; a second range (planner/home.py) has none and comes last. ShoalError: there is not one
    number for each device. ValueError: constraints contradict each other."""
    names = [device.name for device in cluster.devices if not device.beside]
    if len(layers) != len(names):
        raise ShoalError(
            f"--layers has {len(layers)} numbers for {len(names)} devices: give one number each for "
            f"{', '.join(names)}; 0 excludes a device"
        )
    seconds = [device.name for device in cluster.devices if device.beside]
    order = tuple(name for name in [*names, *seconds] if name not in exclude)
    by_name = dict(zip(names, layers, strict=True))
    return planner.Constraints(frozenset(exclude), by_name, first, last, order)


def plan_or_error(question: planner.Question, *, explain: bool = True) -> planner.Plan:
    """The best plan, with reasons if it is to `explain`. NoPlanError: there is none; the message says what is
    missing."""
    from .plan_report import render_infeasible  # only here, since a node prints no plan

    answer = planner.plan(question, explain=explain)
    if isinstance(answer, planner.Infeasible):
        raise NoPlanError(render_infeasible(answer).strip())
    return answer


def default_workload(context: int, *, given: bool, prompt: int = 1, streams: int = 1) -> planner.Workload:
    """The workload of `shoal run` and `shoal plan`. Unless the context length was `given`, speed is predicted
    for the middle of a conversation of usual length instead of the middle of the context."""
    prompt = min(prompt, context)
    depth = None if given else (prompt + min(context, USUAL_TOKENS)) // 2
    return planner.Workload(context, sequences=streams, prompt_tokens=prompt, streams=streams, depth=depth)


def plan_that_fits(
    question: planner.Question, *, shrink: bool, explain: bool = True
) -> tuple[planner.Plan, planner.Workload]:
    """The best plan and its workload. If the context length does not fit in the devices' RAM and may
    `shrink`, it becomes the largest that fits. Errors as for plan_or_error."""
    workload = question.workload
    try:
        return plan_or_error(question, explain=explain), workload
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

    # `high` pages do not fit. If none was found to fit, one page is tried at the end.
    low, high = 1, -(-workload.context // PAGE)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return plan_or_error(of(low), explain=explain), of(low).workload
