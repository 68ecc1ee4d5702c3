"""A plan as a picture: a lane per device, a bar per stage, a line per hop, once for one token and once for
several in flight. Plain SVG, written by hand: no package draws it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .planner import Plan

WIDTH, LABELS, LANE, BAR, TITLE, MARGIN = 960, 150, 34, 20, 34, 16
COLOURS = ("#3b6ea5", "#c9692c", "#4d8f5b", "#8a5fa3", "#a8433f", "#5a7f8c", "#b0912f", "#6b6b6b")
MOST_CALLS = 8  # that stay apart to the eye


@dataclass(frozen=True, slots=True)
class Bar:
    """A stage's work on one call: seconds from `start` to `end` in a lane."""

    lane: int
    call: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Hop:
    """A message from lane to lane."""

    source: int
    target: int
    call: int
    start: float
    end: float


def schedule(plan: Plan, calls: int) -> list[Bar | Hop]:
    """What `calls` decode calls that start together do, each stage and link taking one at a time. Lane 0 is
    the head's; the stages follow in their order."""
    count = len(plan.stages)
    stage_free, link_free = [0.0] * count, [0.0] * (count + 1)
    drawn: list[Bar | Hop] = []
    for call in range(calls):
        at = 0.0
        for hop in range(count + 1):
            start = max(at, link_free[hop])
            link_free[hop] = start + plan.link_busy_seconds[hop]
            at = start + plan.hop_seconds[hop]
            drawn.append(Hop(hop, (hop + 1) % (count + 1), call, start, at))
            if hop < count:
                start = max(at, stage_free[hop])
                at = stage_free[hop] = start + plan.stage_seconds[hop]
                drawn.append(Bar(hop + 1, call, start, at))
    return drawn


def draw(plan: Plan) -> str:
    """The picture as SVG text."""
    many = min(MOST_CALLS, max(2, len(plan.stages), -(-plan.streams // plan.batch)))
    share = f" of {plan.batch} streams" if plan.batch > 1 else ""
    # Of several streams a call finds stages busy and pays no pause, which one token by itself would.
    one = f"one call{share}" if plan.objective == "throughput" and plan.streams > 1 else "one token"
    panels = [(one, 1), (f"{many} calls{share}", many)]
    lines: list[str] = []
    top = MARGIN
    for title, calls in panels:
        lines += _panel(plan, title, calls, top)
        top += TITLE + LANE * (len(plan.stages) + 1) + MARGIN
    size = f'width="{WIDTH}" height="{top}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    return "\n".join([opening, f'<rect {size} fill="white"/>', *lines, "</svg>\n"])


def _panel(plan: Plan, title: str, calls: int, top: int) -> Iterator[str]:
    drawn = schedule(plan, calls)
    end = max(item.end for item in drawn)
    scale = (WIDTH - LABELS - MARGIN) / (end or 1.0)

    def x(seconds: float) -> str:
        return f"{LABELS + seconds * scale:.1f}"

    def y(lane: int) -> float:
        return top + TITLE + LANE * lane + LANE / 2

    yield f'<text x="{MARGIN}" y="{top + 14}" font-weight="bold">{title}: {end * 1e3:.2f} ms</text>'
    for lane, name in enumerate(["head", *(stage.device for stage in plan.stages)]):
        yield f'<line x1="{LABELS}" x2="{WIDTH - MARGIN}" y1="{y(lane)}" y2="{y(lane)}" stroke="#ddd"/>'
        yield f'<text x="{MARGIN}" y="{y(lane) + 4}">{escape(_short(name))}</text>'
    for item in drawn:
        colour = COLOURS[item.call % len(COLOURS)]
        text = f"{(item.end - item.start) * 1e3:.2f} ms"
        if isinstance(item, Hop):
            yield (
                f'<line x1="{x(item.start)}" y1="{y(item.source)}" x2="{x(item.end)}" y2="{y(item.target)}" '
                f'stroke="{colour}" stroke-dasharray="3 2"><title>hop, {text}</title></line>'
            )
        else:
            stage = plan.stages[item.lane - 1]
            yield (
                f'<rect x="{x(item.start)}" y="{y(item.lane) - BAR / 2}" height="{BAR}" '
                f'width="{max((item.end - item.start) * scale, 1):.1f}" fill="{colour}" rx="2">'
                f"<title>{escape(stage.device)}: units {stage.first} to {stage.last - 1}, {text}</title>"
                "</rect>"
            )


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"
