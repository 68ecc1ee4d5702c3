"""A plan as an SVG timeline: a lane for each device, a bar for each stage, a line for each hop. One panel
shows one token, the other several in flight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .planner import Plan
from .planner.streams import Fixed, Message, Walker, Way

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


class _Recorder(Walker):
    """Draws what it walks."""

    def __init__(self, plan: Plan) -> None:
        stages = [Fixed([0.0, stage.seconds]) for stage in plan.stages]
        hops = plan.hops
        latency = [hop.seconds - hop.busy_seconds for hop in hops]
        super().__init__(Way(stages, latency, [hop.busy_seconds for hop in hops]))
        self.drawn: list[Bar | Hop] = []

    def send(self, to: int, messages: Sequence[Message], left: float) -> None:
        for message in messages:
            start = max(left, self.link_free[to])
            super().send(to, (message,), left)
            self.drawn.append(Hop(to, to + 1, message[3], start, self.arrivals[to][-1]))

    def call(self) -> tuple[int, float, float, Message]:
        at, start, end, message = super().call()
        self.drawn.append(Bar(at + 1, message[3], start, end))
        return at, start, end, message

    def returned(self, message: Message, at: float, left: float) -> None:
        start = max(left, self.link_free[-1])
        self.drawn.append(Hop(len(self.stages), 0, message[3], start, at))


def schedule(plan: Plan, calls: int) -> list[Bar | Hop]:
    """The timeline of `calls` decode calls that start together; each stage and link serves one at a time.
    Lane 0 is the coordinator's, and the stages follow in their order."""
    walker = _Recorder(plan)
    walker.send(0, [(1, 0, True, call) for call in range(calls)], 0.0)
    while walker.next_call < math.inf:
        walker.call()
    return walker.drawn


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
