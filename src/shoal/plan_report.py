"""A plan as text (`shoal plan`, the demo) or JSON, with measurements beside the predictions if there are
any."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .planner import Alone, Hop, Infeasible, Plan, units_text
from .text_table import columns

MB = 1e6


@dataclass(frozen=True, slots=True)
class RunMeasurements:
    """Measurements of a run of the plan, in the plan's terms. What was not measured is left out."""

    tokens_per_s: float | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)  # per decode call, by device
    alone_tokens_per_s: Mapping[str, float] = field(default_factory=dict)  # the whole model on one device


def render(plan: Plan, measured: RunMeasurements | None = None) -> str:
    """The plan as text: stages and hops in the order of a token's lap, the prediction, each device alone, and
    reasons.

    ValueError: there is a measurement of a device that is not in the plan.
    """
    measured = measured or RunMeasurements()
    _check(plan, measured)
    lines = [*_table(plan, measured), "", *_summary(plan, measured), "", *_alone(plan, measured)]
    if plan.reasons:
        lines += ["", *columns([("in" if r.used else "out", r.device, r.text) for r in plan.reasons])]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def render_infeasible(answer: Infeasible) -> str:
    """Why there is no plan, and what would help."""
    remedy = "Raise a cap, add a device, or shorten the context." if answer.missing_bytes else "Add a link."
    return f"No plan: {answer.reason}.{'' if answer.files else f' {remedy}'}\n"


def to_json(answer: Plan | Infeasible) -> str:
    """The answer as JSON: `feasible`, then its fields by name. An infinite rate becomes null."""
    body = {"feasible": isinstance(answer, Plan), **asdict(answer)}
    return json.dumps(_finite(body), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check(plan: Plan, measured: RunMeasurements) -> None:
    used = {stage.device for stage in plan.stages}
    known = {alone.device for alone in plan.alone}
    for name in measured.stage_seconds:
        if name not in used:
            raise ValueError(f"a stage was measured on {name}, which has none in the plan")
    for name in measured.alone_tokens_per_s:
        if name not in known:
            raise ValueError(f"{name} was measured alone, and the plan does not know it")


def _table(plan: Plan, measured: RunMeasurements) -> list[str]:
    """A row for each hop and stage, in the order of a token's lap."""
    with_measured = bool(measured.stage_seconds)
    rows: list[Sequence[str]] = [
        ["device", "units", "layers", "RAM MB", "cap MB", "ms"] + ["measured"] * with_measured
    ]

    def add(cells: list[str], seconds: float, found: float | None) -> None:
        rows.append([*cells, _ms(seconds), *([_ms(found)] if with_measured else [])])

    def add_hop(hop: Hop, to: str) -> None:
        add([f"  -> {to}", f"{hop.bytes:,} bytes a token", "", "", ""], hop.seconds, None)

    for stage in plan.stages:
        add_hop(stage.hop, stage.device)
        # The first unit is the embedding, and the last one the LM head.
        layers = min(stage.last, plan.units - 1) - max(stage.first, 1)
        units = units_text(stage.first, stage.last, plan.units)
        ram, cap = (f"{size / MB:.1f}" for size in (stage.ram_bytes, stage.cap_bytes))
        found = measured.stage_seconds.get(stage.device)
        add([stage.device, units, str(layers), ram, cap], stage.seconds, found)
    add_hop(plan.back, "coordinator")
    return columns(rows, [False, False, *[True] * (len(rows[0]) - 2)])


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _summary(plan: Plan, measured: RunMeasurements) -> list[str]:
    many = plan.objective == "throughput"
    what = f"{plan.streams} sequences together" if many else "one sequence"
    rate = f"Predicted {plan.tokens_per_s:.2f} tokens/s ({what})"
    if measured.tokens_per_s is not None:
        error = (plan.tokens_per_s / measured.tokens_per_s - 1) * 100 if measured.tokens_per_s else math.inf
        rate += f", measured {measured.tokens_per_s:.2f} (prediction {error:+.0f} %)"
    lines = [
        f"{rate}. First token of the prompt after {plan.first_token_seconds * 1e3:.0f} ms.",
        f"Found by {plan.method}" + (", proved best." if plan.optimal else "."),
    ]
    lines += [
        f"{stage.device} is {(stage.ram_bytes - stage.cap_bytes) / MB:.1f} MB over its cap."
        for stage in plan.stages
        if stage.ram_bytes > stage.cap_bytes
    ]
    if plan.ends:
        lines.append(f"{plan.ends[0].upper()}{plan.ends[1:]}.")
    if plan.batch > 1:
        lines.append(f"Predicted with {plan.batch} sequences in each call.")
    return lines


def _alone(plan: Plan, measured: RunMeasurements) -> list[str]:
    """Whether one device alone would be faster, and the speed of each device alone."""
    best = plan.best_alone
    if best is None or best.tokens_per_s is None:
        verdict = "One device alone: none can hold the whole model under its cap."
        if any(not alone.missing_bytes for alone in plan.alone):
            verdict = (
                "One device alone: none that holds the whole model has links to the coordinator and back."
            )
    elif [stage.device for stage in plan.stages] == [best.device]:
        verdict = f"One device alone: this plan is {best.device} alone."
    else:
        than = "faster" if best.tokens_per_s > plan.tokens_per_s else "slower"
        verdict = (
            f"One device alone: {best.device} {best.tokens_per_s:.2f} tokens/s, {than} than this plan"
            f" ({plan.tokens_per_s:.2f})."
        )
    rows = [("", alone.device, _alone_text(alone, measured)) for alone in plan.alone]
    return [verdict, *columns(rows)]


def _alone_text(alone: Alone, measured: RunMeasurements) -> str:
    if alone.tokens_per_s is None:
        return "has no link to the coordinator and back"
    text = f"{alone.tokens_per_s:.2f} tokens/s"
    if alone.device in measured.alone_tokens_per_s:
        text += f", measured {measured.alone_tokens_per_s[alone.device]:.2f}"
    if alone.missing_bytes:
        text += (
            f", but it needs {alone.ram_bytes / MB:.1f} MB, {alone.missing_bytes / MB:.1f} MB over its cap"
        )
    return text
