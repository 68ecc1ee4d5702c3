"""Rows kept true while they run: every measured step and message moves them a little.

Pure functions for whoever sees the steps. A device that gets hot, or shares its cores, is slower in all it
does, so one factor over its rates and overheads follows it; the shape that the profile found stays.
"""

from dataclasses import replace

from .check import check_real
from .rows import Device, Link

WEIGHT = 0.1  # of one measurement: about the last twenty count
MOST = 4.0  # times quicker or slower that one measurement may look: beyond, it is a hiccup


def slowed(device: Device, factor: float) -> Device:
    """The device with everything it does taking `factor` times as long (below 1: quicker).

    ValueError: a factor that is not above 0."""
    check_real(f"the slow factor of {device.name}", factor, above=0)
    return replace(
        device,
        read_bytes_per_s=device.read_bytes_per_s / factor,
        macs_per_s=device.macs_per_s / factor,
        step_overhead_s=device.step_overhead_s * factor,
        idle_overhead_s=device.idle_overhead_s * factor,
        row_rates=tuple((rows, rate / factor) for rows, rate in device.row_rates),
        attend_macs_per_s=device.attend_macs_per_s / factor,
        prefill_attend_macs_per_s=device.prefill_attend_macs_per_s / factor,
    )


def refreshed(device: Device, expected_s: float, measured_s: float, weight: float = WEIGHT) -> Device:
    """The device after a step that took `measured_s` where its own row predicts `expected_s` (of cost.py's
    stage functions): an exponentially weighted mean of the ratio.

    ValueError: times that are not above 0."""
    check_real(f"the expected step of {device.name}", expected_s, above=0)
    check_real(f"the measured step of {device.name}", measured_s, above=0)
    return slowed(device, refreshed_factor(1.0, expected_s, measured_s, weight))


def refreshed_factor(factor: float, expected_s: float, measured_s: float, weight: float = WEIGHT) -> float:
    """The same for whoever keeps the factor apart: a device takes `factor` times the `expected_s` of its
    profile so far.

    ValueError: values that are not above 0."""
    for what, value in (("factor", factor), ("expected step", expected_s), ("measured step", measured_s)):
        check_real(f"the {what}", value, above=0)
    ratio = min(MOST, max(1 / MOST, measured_s / (factor * expected_s)))
    return factor * (1 + weight * (ratio - 1))


def refreshed_link(link: Link, size: int, measured_s: float, weight: float = WEIGHT) -> Link:
    """The link after a message of `size` bytes that took `measured_s`. Latency and rate share the blame by
    their parts in what was expected, so a small message moves the one and a large one the other.

    ValueError: a time that is not above 0."""
    check_real("the measured hop", measured_s, above=0)
    busy = size / link.bytes_per_s
    expected = link.latency_s + busy
    if expected == 0:
        return Link(weight * measured_s, link.bytes_per_s)
    ratio = min(MOST, max(1 / MOST, measured_s / expected))
    share = busy / expected
    return Link(
        link.latency_s * (1 + weight * (1 - share) * (ratio - 1)),
        link.bytes_per_s / (1 + weight * share * (ratio - 1)),
    )
