"""A head's Status as text, for `shoal top`: a pure function of it, and of the size of the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from .status import DeviceStatus, LinkStatus, Status, TransferStatus
from .text_table import columns

COORDINATOR = "coordinator"
"""The head itself, in links."""
_HEADER = ("device", "state", "layers", "RAM MB", "step ms", "planned", "waits", "link ms", "MB/s")
_RIGHT = (False, False, False, *[True] * 6)
_SHOWN_MOVES = 5
_BAR = 20


def render(status: Status, *, width: int = 1 << 16, height: int = 1 << 16) -> list[str]:
    """Lines of at most `width` characters; what does not fit in `height` is cut off at the end, the oldest
    moves last."""
    lines = [*_summary(status), "", *_devices(status)]
    if status.transfers:
        lines += ["", "weights on their way", *_transfers(status.transfers)]
    if status.moves:
        lines += [
            "",
            "latest changes of the plan",
            *(move.text for move in status.moves[: -_SHOWN_MOVES - 1 : -1]),
        ]
    return [line if len(line) <= width else line[: max(0, width - 1)] + "…" for line in lines[:height]]


def _summary(status: Status) -> list[str]:
    answers = f"{status.running} answer{'' if status.running == 1 else 's'}"
    if status.queued:
        answers += f" and {status.queued} waiting"
    first = f"{status.model}: {status.phase}"
    if status.reason:
        first += f" ({status.reason})"
    second = f"{answers}, {status.tokens_per_s:.1f} tokens/s, {status.tokens:,} tokens so far"
    if status.recoveries:
        times = "once" if status.recoveries == 1 else f"{status.recoveries} times"
        second += f", went on {times} after a loss"
    plan, lines = status.plan, [first, second]
    if plan is not None:
        planned = f"planned {plan.tokens_per_s:.1f} tokens/s for one answer"
        if plan.alone is not None and plan.alone_tokens_per_s is not None:
            planned += f", {plan.alone} alone {plan.alone_tokens_per_s:.1f}"
        lines.append(f"{planned}; context {status.context:,} tokens; epoch {status.epoch}")
        lines += [plan.ends] if plan.ends else []
    return lines


def _devices(status: Status) -> list[str]:
    """A row for each device, those with layers in the order of the chain, with the link to each from the one
    before."""
    if not status.devices:
        return ["no device yet: `shoal invite` prints what to type on one"]
    links = {(link.source, link.target): link for link in status.links}
    rows: list[Sequence[str]] = [_HEADER]
    last = COORDINATOR
    for device in status.devices:
        rows.append(_row(device, links.get((COORDINATOR if device.units is None else last, device.name))))
        last = last if device.units is None else device.name
    if (last, COORDINATOR) in links:
        rows.append(("  back", *[""] * 6, *_link(links[last, COORDINATOR])))
    notes = [f"{device.name}: {note}" for device in status.devices if (note := _note(device, status.units))]
    return [*columns(rows, _RIGHT), *([""] if notes else []), *notes]


def _row(device: DeviceStatus, link: LinkStatus | None) -> Sequence[str]:
    return (
        device.name,
        device.state,
        device.layers or "-",
        "-"
        if device.ram_promise is None
        else f"{_megabytes(device.ram)} of {_megabytes(device.ram_promise)}",
        _milliseconds(device.measured_s),
        _milliseconds(device.predicted_s),
        "-" if device.waiting is None or device.units is None else f"{device.waiting:.0%}",
        *_link(link),
    )


def _note(device: DeviceStatus, units: int) -> str:
    notes = [] if device.share == 1 else [f"computes {device.share:.0%} of the time"]
    if device.battery is not None:
        notes.append(f"battery {device.battery:.0f}%")
    if device.temperature is not None:
        notes.append(f"{device.temperature:.0f} °C")
    if device.held is not None and device.held < units:
        notes.append(f"files of {device.held} of {units} units on disk")
    if device.copies:
        notes.append(f"copies of {device.copies} more units in RAM")
    return ", ".join([*notes, *([device.reason] if device.reason else [])])


def _link(link: LinkStatus | None) -> tuple[str, str]:
    if link is None:
        return "-", "-"
    rate = "-" if link.bytes_per_s is None else f"{link.bytes_per_s / 1e6:.1f}"
    return _milliseconds(link.latency_s), rate


def _transfers(transfers: Sequence[TransferStatus]) -> list[str]:
    rows = []
    for one in transfers:
        done = one.got / one.wanted if one.wanted else 1.0
        full = min(_BAR, int(_BAR * done))
        bar = f"[{'#' * full}{'.' * (_BAR - full)}]"
        left = max(0, one.wanted - one.got)
        rest = f"{left / one.bytes_per_s:,.0f} s left" if one.bytes_per_s > 0 and left else one.problem
        amount = f"{one.got / 1e6:,.1f} of {one.wanted / 1e6:,.1f} MB"
        rows.append((one.device, bar, amount, f"{one.bytes_per_s / 1e6:.1f} MB/s", rest))
    return columns(rows, (False, False, True, True, False))


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
