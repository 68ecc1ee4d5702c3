"""Verdicts on changes: whether they brought what was predicted."""

import pytest

from shoal.net.trials import Speed, Trial, distance
from shoal.planner import Assignment

OLD = (Assignment("a", 0, 4), Assignment("b", 4, 10))
NEW = (Assignment("a", 0, 6), Assignment("b", 6, 10))


def trial(before: Speed, *, undoes: bool = False) -> Trial:
    """60 tokens/s instead of 40."""
    return Trial(OLD, NEW, 1 / 40, 1 / 60, 0.1, 4, before, undoes, since=0.0)


@pytest.mark.parametrize(
    ("measured", "failed", "undo"),
    [(62, False, False), (50, False, False), (40, True, True), (30, True, True)],
)
@pytest.mark.parametrize("error", [0.7, 1.0, 1.3])
def test_the_gain_is_compared_with_the_predicted_one(
    measured: float, failed: bool, undo: bool, error: float
) -> None:
    """Whatever the model's error is, as long as it is the same before and after."""
    verdict = trial(Speed(4000 * error, 100, 4000)).judged(Speed(100 * measured * error, 100, 6000))
    assert verdict is not None
    assert verdict.before == pytest.approx(40 * error)
    assert verdict.predicted == pytest.approx(60 * error)
    assert verdict.measured == pytest.approx(measured * error)
    assert (verdict.failed, verdict.undo) == (failed, undo)


def test_a_change_that_brought_little_is_kept_and_has_failed() -> None:
    verdict = trial(Speed(40_000, 1000, 40_000)).judged(Speed(45_000, 1000, 60_000))
    assert verdict is not None
    assert verdict.failed
    assert not verdict.undo


def test_a_device_that_changed_meanwhile_is_not_the_changes_fault() -> None:
    """The model expects 30 tokens/s of the new stages by now, and there are 30."""
    verdict = trial(Speed(4000, 100, 4000)).judged(Speed(3000, 100, 3000))
    assert verdict is not None
    assert not verdict.failed


@pytest.mark.parametrize(
    "speed", [Speed(), Speed(29, 10, 10), Speed(1000, 2.9, 1000)], ids=["nothing", "tokens", "time"]
)
def test_nothing_is_judged_by_little(speed: Speed) -> None:
    assert trial(Speed(4000, 100, 4000)).judged(speed) is None


def test_few_tokens_excuse_a_change() -> None:
    """Four streams and 40 tokens before: any of the streams may have had one more or less."""
    verdict = trial(Speed(40, 1, 40)).judged(Speed(130, 3, 180))
    assert verdict is not None
    assert not verdict.failed
    assert trial(Speed(4000, 100, 4000)).judged(Speed(130, 3, 180)).failed  # type: ignore[union-attr]


@pytest.mark.parametrize("one", [trial(Speed(10, 1, 10)), trial(Speed(4000, 100, 4000), undoes=True)])
def test_without_a_speed_before_or_after_an_undoing_there_is_only_a_report(one: Trial) -> None:
    verdict = one.judged(Speed(300, 10, 600))
    assert verdict is not None
    assert verdict.measured == 30
    assert not verdict.failed
    assert not verdict.undo


def test_the_distance_is_the_number_of_units_elsewhere() -> None:
    assert distance(OLD, OLD) == 0
    assert distance(OLD, NEW) == distance(NEW, OLD) == 2
    assert distance(OLD, (Assignment("c", 0, 10),)) == 10
    assert distance(OLD, (Assignment("b", 0, 6), Assignment("a", 6, 10))) == 8
