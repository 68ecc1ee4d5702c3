"""How long silence, calls and stillness are waited for, in literals."""

import pytest

from shoal.engine.batch import Want
from shoal.net.inbox import Batch
from shoal.net.liveness import (
    FIRST_LATE,
    SLOWEST_REDIAL,
    AwakeClock,
    Heartbeat,
    RoundTrip,
    Stillness,
    call_bound,
    load_bound,
    next_tick,
    redial_pause,
)
from shoal.net.messages import Close, Epoch, Progress, Step
from shoal.net.pace import NodePace

EPOCH = Epoch(1, 1)


def test_round_trips_are_estimated_as_in_rfc_6298() -> None:
    first = RoundTrip().measured(0.100)
    assert first == RoundTrip(0.100, 0.050)
    assert first.late == pytest.approx(0.300)
    # SRTT = 7/8 * 100 ms + 1/8 * 180 ms; RTTVAR = 3/4 * 50 ms + 1/4 * 80 ms
    second = first.measured(0.180)
    assert (second.smoothed, second.spread) == (pytest.approx(0.110), pytest.approx(0.0575))


def test_the_bound_of_silence_follows_the_link_and_never_exceeds_the_fixed_one() -> None:
    assert RoundTrip().bound(10) == 2 + 4 * FIRST_LATE == 5
    lan, radio = RoundTrip(), RoundTrip()
    for i in range(50):
        lan = lan.measured(0.001)
        radio = radio.measured(0.050 if i % 2 else 0.250)
    assert lan.bound(10) == pytest.approx(2.004, abs=1e-3) and lan.suspect() == pytest.approx(0.301, abs=1e-3)
    assert 4 < radio.bound(10) < 5
    assert radio.bound(3) == 3
    assert RoundTrip(20.0, 1.0).bound(10) == 10


def test_silence_begins_with_the_first_ping_that_nothing_follows() -> None:
    heartbeat = Heartbeat()
    assert heartbeat.silence(1e9) == 0
    heartbeat = heartbeat.ping(5.0).ping(5.5)
    assert heartbeat.silence(6.0) == 1.0 and heartbeat.pinged == 5.5
    assert heartbeat.heard().silence(7.0) == 0 and heartbeat.heard().trip == RoundTrip()
    assert heartbeat.heard(0.002).trip == RoundTrip(0.002, 0.001)
    assert heartbeat.heard().ping(8.0).silence(8.25) == 0.25
    assert (heartbeat.bound(10, busy=True), heartbeat.bound(10, busy=False)) == (5, 10)


def test_time_in_which_this_process_did_not_run_is_no_silence() -> None:
    awake = AwakeClock(100.0, most=0.5)
    assert awake.tick(100.25) == 0.25
    assert (awake.at(100.5), awake.at(160.0)) == (0.5, 0.75)  # asked before the tick that is late
    assert awake.tick(160.25) == 0.75
    assert awake.tick(160.5) == 1.0
    assert awake.tick(160.5) == 1.0


def test_calls_and_loading_are_bounded_by_what_they_should_take() -> None:
    assert call_bound(0.0) == 3 and call_bound(0.5) == 7
    assert load_bound(0) == 30 and load_bound(4_000_000_000) == 230


def test_a_lost_node_is_redialled_quickly_at_first() -> None:
    pauses = [redial_pause(tries) for tries in range(100)]
    assert pauses == sorted(pauses) and pauses[0] == 0.3
    assert sum(pauses[:68]) == pytest.approx(20.4)  # links that are cut for so long are found at once
    assert pauses[68] == pytest.approx(0.45) and pauses[-1] == SLOWEST_REDIAL == 5


def test_stillness_counts_only_while_something_is_due() -> None:
    still = Stillness()
    assert still.seconds(1.0, 7, due=True) == 0
    assert still.seconds(3.0, 7, due=True) == 2
    assert still.seconds(4.0, 8, due=True) == 0  # it has moved
    assert still.seconds(9.0, 8, due=True) == 5
    assert still.seconds(10.0, 8, due=False) == 0
    assert still.seconds(20.0, 8, due=True) == 0  # due again, since now
    assert still.seconds(21.0, 8, due=True) == 1


def batch(rows: int = 1) -> Batch:
    return Batch((), (Step(1, EPOCH, 0, (5,) * rows, Want.TOKEN),))


def test_a_node_reports_how_far_its_call_is_and_what_it_should_take() -> None:
    pace = NodePace(first_call=60)
    pace.assigned(lambda steps, pause: 0.5 * len(steps))
    assert pace.progress(EPOCH, 3) == Progress(EPOCH, 0, None, None, 3)
    pace.began(batch())
    for now in (10.0, 12.0, 70.0):
        pace.tick(now)
    # The first call may read the weights from the disk, so it has a bound and no prediction.
    assert pace.progress(EPOCH, 0) == Progress(EPOCH, 0, 60.0, None, 0)
    assert pace.stuck() is None and pace.stuck(0.5) == 60.5
    pace.returned()
    pace.count(batch(), 9.0, 70.0)
    pace.tick(70.25)
    assert (pace.progress(EPOCH, 0).running, pace.progress(EPOCH, 0).calls) == (None, 1)
    pace.began(batch())
    pace.tick(70.5)
    pace.tick(77.5)
    assert pace.progress(EPOCH, 0) == Progress(EPOCH, 1, 7.0, 0.5, 0)
    assert pace.stuck() is None  # 3 s, and 8 times half a second
    pace.tick(77.75)
    assert pace.stuck() == 7.25
    pace.returned()
    pace.count(batch(), 70.3, 77.8)
    assert pace.stuck() is None


def test_the_first_call_after_a_transition_is_predicted() -> None:
    """It may read the units that have come, and does not count for the pace."""
    pace = NodePace(first_call=60)
    pace.assigned(lambda steps, pause: 0.5)
    pace.assigned(lambda steps, pause: 0.5, 0.25)
    pace.began(batch())
    assert pace.progress(EPOCH, 0).expected is None  # the stage has never computed
    pace.returned()
    pace.count(batch(), 0.0, 0.5)
    pace.assigned(lambda steps, pause: 1.0, 0.25)
    pace.began(batch())
    pace.tick(10.0)
    pace.tick(23.5)
    assert pace.progress(EPOCH, 0) == Progress(EPOCH, 0, 13.5, 1.25, 0)
    assert pace.stuck() == 13.5
    pace.returned()
    pace.count(batch(), 10.0, 24.0)
    assert pace.slower == 1.0
    pace.began(batch())
    assert pace.progress(EPOCH, 0).expected == 1.0


def test_calls_that_follow_each_other_are_not_one_long_call() -> None:
    pace = NodePace()
    pace.assigned(lambda steps, pause: 0.001)
    for at in range(100):
        pace.began(batch())
        pace.tick(float(at))
        pace.returned()
        pace.count(batch(), float(at), at + 0.9)
    assert pace.stuck() is None


def test_a_hot_device_may_take_longer() -> None:
    pace = NodePace()
    pace.assigned(lambda steps, pause: 1.0)
    for at in range(300):
        pace.began(batch())
        pace.returned()
        pace.count(batch(), 10.0 * at, 10.0 * at + 5.0)
    assert pace.slower == pytest.approx(5, rel=1e-3)
    pace.began(batch())
    pace.tick(0.0)
    pace.tick(42.0)
    assert pace.stuck() is None and pace.stuck(2.0) == 44.0  # 3 s and 8 * 5 s


def test_a_batch_without_rows_has_no_prediction() -> None:
    def refuse(steps: object, pause: float) -> float:
        raise AssertionError("nothing to predict")

    pace = NodePace()
    pace.assigned(refuse)
    pace.returned()
    pace.count(batch(), 1.0, 2.0)
    pace.began(Batch((Close(1, EPOCH),), ()))
    assert pace.progress(EPOCH, 0).expected is None


def test_whoever_looks_from_time_to_time_does_so_at_the_same_times() -> None:
    for seconds in (0.25, 0.5, 1.0):
        assert {next_tick(now, seconds) for now in (17.0, 17.1, 17.0 + seconds - 0.01)} == {17.0 + seconds}
    assert next_tick(17.3, 0.25) == 17.5
    assert next_tick(17.5, 0.25) == 17.75
