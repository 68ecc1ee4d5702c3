"""The window of a transfer over a simulated link: it fills the link, and keeps the queue short."""

import pytest

from shoal.net.fetch_window import FULL_SECONDS, GENTLE_SECONDS, Window


def fetched(rate: float, trip: float, gentle: bool, seconds: float = 12.0) -> tuple[float, float]:
    """Bytes/s over a link of `rate` bytes/s with a round trip of `trip` seconds, and the longest time that
    bytes waited in its queue, both after the first half. Other traffic arrives in bursts of 2 ms, and
    measurements have noise."""
    window, now, free = Window(), 0.0, 0.0
    flying: list[tuple[float, float, int]] = []  # arrival, request, size
    outstanding = got = burst = 0
    longest = 0.0
    while now < seconds:
        while size := window.request(outstanding, now):
            start = max(now + trip / 2, free)
            free = start + size / rate
            flying.append((free + trip / 2, now, size))
            outstanding += size
            if now > seconds / 2:
                longest = max(longest, start - now - trip / 2)
        arrival, asked, size = flying.pop(0)
        now, outstanding = arrival, outstanding - size
        if now > (burst + 1) * 0.5:
            burst, free = burst + 1, max(free, now) + 0.002
        window.answered(now - asked + 0.0003 * (len(flying) % 3), now, gentle=gentle)
        if now > seconds / 2:
            got += size
    return got / (seconds / 2), longest


@pytest.mark.parametrize("mbit", [2, 10, 100, 500])
@pytest.mark.parametrize("trip", [0.0005, 0.01, 0.05])
def test_it_fills_the_link_and_keeps_its_queue_short(mbit: int, trip: float) -> None:
    rate = mbit * 1e6 / 8
    got, longest = fetched(rate, trip, gentle=False)
    assert got >= 0.9 * rate
    assert longest <= 2 * FULL_SECONDS
    got, longest = fetched(rate, trip, gentle=True)
    assert got >= 0.6 * rate
    assert longest <= 2 * GENTLE_SECONDS + 2048 / rate + 0.01
