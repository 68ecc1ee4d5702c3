"""A plan as text for people (`shoal plan`, the demo) and as JSON for programs; measured beside predicted if
given."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .explain import MB, units_text
from .rows import Alone, Infeasible, Plan


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run of the plan gave, in the plan's own terms; leave out what was not measured."""

    tokens_per_s: float | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)  # per decode step, by device
    hop_seconds: Mapping[int, float] = field(default_factory=dict)  # per token, by place in Plan.hop_seconds
    alone_tokens_per_s: Mapping[str, float] = field(default_factory=dict)  # the whole model on one device


def render(plan: Plan, measured: Measured | None = None) -> str:
    """The plan as lines of text: stages and hops in the order a token takes, the prediction, one device
    alone, reasons.

    ValueError: something was measured of a device or hop that the plan does not have.
    """
    measured = measured or Measured()
    _check(plan, measured)
    lines = [*_table(plan, measured), "", *_summary(plan, measured), "", *_alone(plan, measured)]
    if plan.reasons:
        lines += ["", *_columns([(_in_or_out(r.used), r.device, r.text) for r in plan.reasons])]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def render_infeasible(answer: Infeasible) -> str:
    """Why there is no plan, how many MB are missing, and what would help."""
    remedy = "Raise a cap, add a device, or shorten the context." if answer.missing_bytes else "Add a link."
    return f"No plan: {answer.reason}. {remedy}\n"


def to_json(answer: Plan | Infeasible) -> str:
    """The answer as JSON: its fields by name, `feasible` first; an infinite rate becomes null."""
    body = {"feasible": isinstance(answer, Plan), **asdict(answer)}
    return json.dumps(_finite(body), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check(plan: Plan, measured: Measured) -> None:
    used = {stage.device for stage in plan.stages}
    known = {alone.device for alone in plan.alone}
    for name in measured.stage_seconds:
        if name not in used:
            raise ValueError(f"a stage was measured on {name}, which has none in the plan")
    for name in measured.alone_tokens_per_s:
        if name not in known:
            raise ValueError(f"{name} was measured alone, and the plan does not know it")
    for hop in measured.hop_seconds:
        if not 0 <= hop < len(plan.hop_seconds):
            raise ValueError(f"hop {hop} was measured, and the plan has {len(plan.hop_seconds)}")


def _table(plan: Plan, measured: Measured) -> list[str]:
    """A row per hop and stage, in a token's order."""
    with_measured = bool(measured.stage_seconds or measured.hop_seconds)
    head = ["device", "units", "layers", "RAM MB", "cap MB", "ms"] + ["measured"] * with_measured
    rows: list[Sequence[str]] = [head]

    def add(cells: list[str], seconds: float, found: float | None) -> None:
        rows.append([*cells, f"{seconds * 1e3:.2f}", *([_ms(found)] if with_measured else [])])

    for at, stage in enumerate(plan.stages):
        add(
            ["  -> hop", f"{plan.link_bytes[at]:,} bytes a token", "", "", ""],
            plan.hop_seconds[at],
            measured.hop_seconds.get(at),
        )
        layers = min(stage.last, plan.units - 1) - max(stage.first, 1)
        add(
            [
                stage.device,
                units_text(stage.first, stage.last, plan.units),
                str(layers),
                f"{plan.ram_bytes[at] / MB:.1f}",
                f"{plan.cap_bytes[at] / MB:.1f}",
            ],
            plan.stage_seconds[at],
            measured.stage_seconds.get(stage.device),
        )
    back = len(plan.stages)
    add(
        ["  -> head", f"{plan.link_bytes[back]:,} bytes a token", "", "", ""],
        plan.hop_seconds[back],
        measured.hop_seconds.get(back),
    )
    return _columns(rows, right=2)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _summary(plan: Plan, measured: Measured) -> list[str]:
    what = f"{plan.streams} streams together" if plan.objective == "throughput" else "one stream"
    rate = f"Predicted {plan.tokens_per_s:.2f} tokens/s ({what})"
    if measured.tokens_per_s is not None:
        error = (plan.tokens_per_s / measured.tokens_per_s - 1) * 100 if measured.tokens_per_s else math.inf
        rate += f", measured {measured.tokens_per_s:.2f} (prediction {error:+.0f} %)"
    found = f"Found by {plan.method}" + (", proved best." if plan.optimal else ".")
    first = f"First token of the prompt after {plan.first_token_seconds * 1e3:.0f} ms."
    over = [
        f"{stage.device} is {(ram - cap) / MB:.1f} MB over its cap."
        for stage, ram, cap in zip(plan.stages, plan.ram_bytes, plan.cap_bytes, strict=True)
        if ram > cap
    ]
    return [f"{rate}. {first}", found, *over, *_extras(plan)]


def _extras(plan: Plan) -> list[str]:
    """What is not in every plan: shared calls."""
    lines = []
    if plan.batch > 1:
        lines.append(f"Streams that wait share a call, {plan.batch} of them by this prediction.")
    return lines


def _alone(plan: Plan, measured: Measured) -> list[str]:
    """Whether one device by itself would be faster, and every device's own figure."""
    best = plan.best_alone
    if best is None or best.tokens_per_s is None:
        verdict = "One device alone: none holds the whole model under its cap."
        if any(not alone.missing_bytes for alone in plan.alone):
            verdict = "One device alone: none that holds the whole model has links to the head and back."
    elif [stage.device for stage in plan.stages] == [best.device]:
        verdict = f"One device alone: this plan is that, {best.device} by itself."
    else:
        than = "faster" if best.tokens_per_s > plan.tokens_per_s else "slower"
        verdict = (
            f"One device alone: {best.device} {best.tokens_per_s:.2f} tokens/s, {than} than this plan"
            f" ({plan.tokens_per_s:.2f})."
        )
    rows = [("", alone.device, _alone_text(alone, measured)) for alone in plan.alone]
    return [verdict, *_columns(rows)]


def _alone_text(alone: Alone, measured: Measured) -> str:
    if alone.tokens_per_s is None:
        return "has no link to the head and back"
    text = f"{alone.tokens_per_s:.2f} tokens/s"
    if alone.device in measured.alone_tokens_per_s:
        text += f", measured {measured.alone_tokens_per_s[alone.device]:.2f}"
    if alone.missing_bytes:
        text += (
            f", but it needs {alone.ram_bytes / MB:.1f} MB, {alone.missing_bytes / MB:.1f} MB over its cap"
        )
    return text


def _in_or_out(used: bool) -> str:
    return "in" if used else "out"


def _columns(rows: Sequence[Sequence[str]], right: int | None = None) -> list[str]:
    """Cells padded to columns two spaces apart, from column `right` on set flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right is not None and at >= right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
