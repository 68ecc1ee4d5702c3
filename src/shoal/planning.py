"""Joins engine and planner: a model's costs and a device's measurements as the planner's rows.

The planner imports nothing of ours, the engine nothing of the planner: this is the one place that knows both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import planner
from .engine.costs import constant_bytes, tied_bytes, unit_cost
from .engine.errors import NoPlanError, ShoalError
from .engine.host import Ram
from .engine.layout import GROUP, PAGE, PART_BYTES, round_up
from .engine.measure import Measured
from .engine.program import Buffer
from .engine.shards import Model
from .engine.stage import StageOptions
from .planner.stagecost import PAUSE_SECONDS, StageCost

if TYPE_CHECKING:
    from .net.messages import Device

MB = 1_000_000
USUAL_TOKENS = 2048
"""Positions that a conversation fills, where nobody says how many it may."""
BASE_BYTES = 60 * MB
"""What a node's process holds before its first unit, when nobody measured it."""


def planner_model(model: Model, options: StageOptions) -> planner.Model:
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
    return planner.Model(tuple(units), tied_bytes(model), PAGE)


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
    rows: planner.Model, device: planner.Device
) -> Callable[[int, int], Callable[[Sequence[tuple[int, int, bool]], float], float]]:
    """For stages [first, last) of a device: seconds that a call should take, of (rows, first position, wants
    a token) for each of its steps, after a pause of so many seconds."""

    def stage(first: int, last: int) -> Callable[[Sequence[tuple[int, int, bool]], float], float]:
        cost = StageCost(rows, device, first, last)

        def seconds(steps: Sequence[tuple[int, int, bool]], pause: float) -> float:
            found = cost.call_seconds([(0.0, 0, *step) for step in steps])
            return found + (cost.pause if pause > PAUSE_SECONDS else 0.0)

        return seconds

    return stage


def device_of(name: str, offer: Device) -> planner.Device:
    """The planner's view of what a node offers."""
    return planner.Device(
        name=name,
        ram_bytes=offer.ram_bytes,
        read_bytes_per_s=offer.read_bytes_per_s,
        macs_per_s=offer.macs_per_s,
        base_bytes=offer.base_bytes,
        step_overhead_s=offer.step_overhead_s,
        idle_overhead_s=offer.idle_overhead_s,
        row_rates=tuple(sorted({rate.rows: rate.macs_per_s for rate in offer.row_rates}.items())),
        attend_macs_per_s=offer.attend_macs_per_s,
        prefill_attend_macs_per_s=offer.prefill_attend_macs_per_s,
    )


def device_profile(name: str, measured: Measured, ram: Ram) -> planner.DeviceProfile:
    """A measurement as the planner's profile row. ShoalError: the system does not say how much RAM it has."""
    if ram.total is None or ram.estimate is None:
        raise ShoalError(
            "this system does not say how much RAM it has, so there is no profile of it: describe the device "
            "in a .toml file with its ram_mb"
        )
    backend, _, isa = measured.backend.partition(" ")
    return planner.DeviceProfile(
        name=name,
        backend=backend,
        isa=isa.strip("()") or backend,
        threads=measured.threads,
        read_bytes_per_s=measured.read_bytes_per_s,
        macs_per_s=measured.macs_per_s,
        ram_total=ram.total,
        ram_free=ram.estimate,
        step_overhead_s=measured.step_overhead_s,
        idle_overhead_s=measured.idle_overhead_s,
        row_rates=measured.row_rates,
        attend_macs_per_s=measured.attend_macs_per_s,
        prefill_attend_macs_per_s=measured.prefill_attend_macs_per_s,
    )


def read_devices(path: Path) -> planner.Cluster:
    """The cluster that a file describes: TOML written by a person (README), or the JSON of `shoal profile`.

    ShoalError: unreadable, unknown keys, values out of range.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            profile = planner.load_profile(text)
            if not profile.devices:
                raise ValueError("it describes no device")
            base = {device.name: BASE_BYTES for device in profile.devices}
            return planner.cluster_from(profile, profile.devices[0].name, base_bytes=base)
        import tomllib  # only here: a node reads no such file

        return _cluster(tomllib.loads(text))
    except FileNotFoundError:
        raise ShoalError(f"{path} is missing: name a file that describes the devices") from None
    except RecursionError:
        raise ShoalError(f"{path} is nested too deeply") from None
    except (OSError, ValueError) as e:
        raise ShoalError(f"{path}: {e}") from e


def _cluster(body: dict[str, Any]) -> planner.Cluster:
    """A Cluster of a TOML table. ValueError names what is wrong."""
    _keys("the file", body, {"device", "head", "default_link", "link"})
    rows = body.get("device")
    if not isinstance(rows, list) or not rows:
        raise ValueError("it needs at least one [[device]]")
    devices = tuple(_device(row) for row in rows)
    names = [device.name for device in devices]
    head = _name("head", body.get("head", names[0]))
    links = {}
    if "default_link" in body:
        link = _link("default_link", body["default_link"], set())
        links = {(a, b): link for a in {head, *names} for b in {head, *names} if a != b}
    rows = body.get("link", [])
    if not isinstance(rows, list):
        raise ValueError("a link is a table of its own: [[link]]")
    for row in rows:
        link = _link("[[link]]", row, {"from", "to"})
        ends = (_name("[[link]]: from", row["from"]), _name("[[link]]: to", row["to"]))
        links[ends] = links[ends[::-1]] = link
    return planner.Cluster(devices, links, head)


_LARGEST = 1e15
_EXTRA = {"base_mb", "step_overhead_ms", "idle_overhead_ms"}


def _device(row: Any) -> planner.Device:
    name = row.get("name") if isinstance(row, dict) else None
    needed = {"name", "read_gb_per_s", "gmac_per_s", "ram_mb"}
    _keys(f"[[device]] {name}", row, needed | _EXTRA, needed)
    number = _numbers(f"[[device]] {name}", {k: v for k, v in row.items() if k != "name"})
    return planner.Device(
        name=_name("[[device]]: name", row["name"]),
        ram_bytes=int(number["ram_mb"] * MB),
        read_bytes_per_s=number["read_gb_per_s"] * 1e9,
        macs_per_s=number["gmac_per_s"] * 1e9,
        base_bytes=int(number["base_mb"] * MB) if "base_mb" in number else BASE_BYTES,
        step_overhead_s=number.get("step_overhead_ms", 0.1) / 1e3,
        idle_overhead_s=number.get("idle_overhead_ms", 0.0) / 1e3,
    )


def _link(what: str, row: Any, more: set[str]) -> planner.Link:
    known = {"latency_ms", "mbit_per_s"} | more
    _keys(what, row, known, known)
    number = _numbers(what, {key: row[key] for key in ("latency_ms", "mbit_per_s")})
    return planner.Link(number["latency_ms"] / 1e3, number["mbit_per_s"] * 1e6 / 8)


def _keys(what: str, row: Any, known: AbstractSet[str], needed: AbstractSet[str] = frozenset()) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{what} must be a table")
    for key in sorted(row.keys() - known):
        raise ValueError(f"{what} has an unknown key {key!r}; known: {', '.join(sorted(known))}")
    for key in sorted(needed - row.keys()):
        raise ValueError(f"{what} lacks {key!r}")


def _name(what: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} must be a name, not {value!r}")
    return value


def _numbers(what: str, row: dict[str, Any]) -> dict[str, float]:
    for key, value in row.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{what}: {key} must be a number, not {value!r}")
        if not abs(value) <= _LARGEST:  # nor NaN
            raise ValueError(f"{what}: {key} is no number that a device has")
    return {key: float(value) for key, value in row.items()}


def plan_or_error(
    model: planner.Model, cluster: planner.Cluster, workload: planner.Workload, objective: Any, **wishes: Any
) -> planner.Plan:
    """The best plan; `wishes` as planner.plan takes them. NoPlanError: none fits; the message says how many
    MB are missing. ShoalError: wishes that contradict the model or the devices."""
    try:
        answer = planner.plan(model, cluster, workload, objective, **wishes)
    except ValueError as error:
        if not wishes:  # then it is no user's mistake
            raise
        raise ShoalError(str(error)) from error
    if isinstance(answer, planner.Infeasible):
        raise NoPlanError(planner.render_infeasible(answer).strip())
    return answer


def default_workload(context: int, *, given: bool, prompt: int = 1, streams: int = 1) -> planner.Workload:
    """What `shoal run` and `shoal plan` ask a plan for. Unless the context was `given`, speed is that of the
    middle of a conversation of usual length, not of half of what the model could hold."""
    prompt = min(prompt, context)
    depth = None if given else (prompt + min(context, USUAL_TOKENS)) // 2
    return planner.Workload(context, sequences=streams, prompt_tokens=prompt, streams=streams, depth=depth)


def plan_that_fits(
    model: planner.Model,
    cluster: planner.Cluster,
    workload: planner.Workload,
    objective: Any,
    *,
    shrink: bool,
    **wishes: Any,
) -> tuple[planner.Plan, planner.Workload]:
    """The best plan for the workload; where its context does not fit the devices' RAM and may `shrink`, for
    the largest that does. Errors as for plan_or_error."""
    try:
        return plan_or_error(model, cluster, workload, objective, **wishes), workload
    except NoPlanError:
        if not shrink or workload.context <= PAGE:
            raise

    def of(pages: int) -> planner.Workload:
        context = pages * PAGE
        depth = None if workload.depth is None else min(workload.depth, context)
        prompt = min(workload.prompt_tokens, context)
        return replace(workload, context=context, depth=depth, prompt_tokens=prompt)

    def fits(pages: int) -> bool:
        answer = planner.plan(model, cluster, of(pages), objective, **wishes, method="dp", explain=False)
        return not isinstance(answer, planner.Infeasible)

    # The least that does not fit lies above `low`; one page is tried in the end, whether it fits or not.
    low, high = 1, -(-workload.context // PAGE)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return plan_or_error(model, cluster, of(low), objective, **wishes), of(low)
