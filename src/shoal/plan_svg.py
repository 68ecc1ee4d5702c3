"""A plan as an SVG timeline: a lane for each device, a bar for each stage, a line for each hop. One panel
shows one token, the other several in flight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .planner import Plan
from .planner.groups import Fixed, Way
from .planner.streams import passage

WIDTH, LABELS, LANE, BAR, TITLE, MARGIN = 960, 150, 34, 20, 34, 16
COLOURS = ("#3b6ea5", "#c9692c", "#4d8f5b", "#8a5fa3", "#a8433f", "#5a7f8c", "#b0912f", "#6b6b6b")
MOST_CALLS = 8  # more calls could not be told apart


@dataclass(frozen=True, slots=True)
class Bar:
    """A stage's work on one call, from `start` to `end` in seconds."""

    lane: int
    call: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Hop:
    """A message between two lanes, from `start` to `end` in seconds."""

    source: int
    target: int
    call: int
    start: float
    end: float


def schedule(plan: Plan, calls: int) -> list[Bar | Hop]:
    """The timeline of `calls` decode calls that start together; each stage and link serves one at a time.
    Lane 0 is the coordinator's, and the stages follow in their order."""
    hops, lanes = plan.hops, len(plan.stages) + 1
    way = Way(
        [Fixed([0.0, stage.seconds]) for stage in plan.stages],
        [hop.seconds - hop.busy_seconds for hop in hops],
        [hop.busy_seconds for hop in hops],
    )
    drawn: list[Bar | Hop] = []
    for call, spans in enumerate(passage(way, [(1, 0, True)] * calls)):
        drawn += [Hop(at, (at + 1) % lanes, call, *span) for at, span in enumerate(spans[::2])]
        drawn += [Bar(at, call, *span) for at, span in enumerate(spans[1::2], 1)]
    return drawn


def draw(plan: Plan) -> str:
    """The timeline as SVG text."""
    many = min(MOST_CALLS, max(2, len(plan.stages), -(-plan.streams // plan.batch)))
    share = f" of {plan.batch} sequences" if plan.batch > 1 else ""
    # Of several sequences a call finds stages busy and pays no pause, which one token by itself would.
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
    for lane, name in enumerate(["coordinator", *(stage.device for stage in plan.stages)]):
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
