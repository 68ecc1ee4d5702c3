"""Policies as text: what `--policy` accepts, what it means, and what it says of a mistake."""

from pathlib import Path

import pytest

from shoal.engine.power import Readings
from shoal.net.policy import NO_POLICY, PHONE, RULES, Policy, default_policy, parse_policy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", NO_POLICY),
        ("charging", Policy(charging=True)),
        (
            "charging,battery>=30,temperature<=42,time<=60%",
            Policy(charging=True, battery=30, temperature=42, time=60),
        ),
        ("charging,battery=30,temperature=42,time=60", Policy(True, battery=30, temperature=42, time=60)),
        (" battery >= 30 % , time <= 12.5%", Policy(battery=30, time=12.5)),
        ("temperature<=42C,chip<=85°C", Policy(temperature=42, chip=85)),
        ("clock>=50%,cpu<=40,memory<=10", Policy(clock=50, cpu=40, memory=10)),
        ("ram>=300MB", Policy(ram=300e6)),
        ("ram=1.5gb", Policy(ram=1.5e9)),
        ("phone", PHONE),
        (
            "phone,charging,battery=50",
            Policy(True, battery=50, temperature=42, clock=40, cpu=50, memory=20, ram=100e6),
        ),
    ],
)
def test_a_policy_is_what_its_text_says(text: str, expected: Policy) -> None:
    assert parse_policy(text) == expected
    assert parse_policy(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is no rule: the rules are charging, battery,"),
        ("charging,", "'' is no rule"),
        (
            "bettery>=30",
            "'bettery>=30' is no rule: the rules are charging, battery, temperature, chip, clock,",
        ),
        ("battery", "battery needs a limit: write battery=30%, or 'battery>=30%' in quotes, since a shell"),
        ("time", "time needs a limit: write time=60%, or 'time<=60%' in quotes"),
        ("battery<=30", "'battery<=30' has another sign than >=: write it as in battery>=30%"),
        ("temperature>=42", "has another sign than <=: write it as in temperature<=42"),
        ("battery>30", "has another sign than >="),
        ("battery==30", "has another sign than >="),
        ("battery>=30>=40", "has no limit in %"),
        ("battery>=", "'battery>=' has no limit in %: write it as in battery>=30%"),
        ("battery>=-5", "has no limit in %"),
        ("battery>=nan", "has no limit in %"),
        ("battery>=1e1", "has no limit in %"),
        ("battery>=30C", "has no limit in %"),
        ("temperature<=108F", "has no limit in °C: write it as in temperature<=42"),
        ("ram>=300", "'ram>=300' has no limit in MB: write it as in ram>=100MB"),
        ("battery>=0", "'battery>=0' is out of range: give a limit from 1 to 99 %"),
        ("battery>=100", "is out of range"),
        ("temperature<=420", "is out of range: give a limit from 25 to 60 °C"),
        ("time<=0.5%", "is out of range: give a limit from 5 to 100 %"),
        ("ram>=0.5MB", "is out of range: give a limit from 1 to 1e+06 MB"),
        ("battery>=" + "9" * 5000, "has no limit in %"),
        ("charging>=1", "charging has no limit: write charging alone"),
        ("charging,charging", "charging is there twice: give each rule once"),
        ("battery=30,battery=40", "battery is there twice"),
        ("none,charging", "none is no rule, but a whole policy: write it alone"),
        ("charging,none", "none is no rule, but a whole policy: write it alone"),
        ("charging,phone", "phone is no rule, but a whole policy: write it first"),
        ("phone,phone", "phone is no rule, but a whole policy: write it first"),
    ],
)
def test_a_mistake_is_named_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        parse_policy(text)
    assert message in str(caught.value)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_the_examples_of_messages_are_policies(rule: object) -> None:
    from shoal.net.policy import Rule

    assert isinstance(rule, Rule)
    text = rule.text(rule.example)
    assert parse_policy(text) == parse_policy(text.replace(rule.sign, "=")) != NO_POLICY
    assert rule.low <= rule.example <= rule.high


def test_a_phone_has_a_policy_and_other_devices_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANDROID_ROOT", "/system")
    assert default_policy() == PHONE
    monkeypatch.delenv("ANDROID_ROOT")
    assert default_policy() == NO_POLICY


def test_the_page_has_every_rule_and_the_policy_of_a_phone() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")
    assert f"`{PHONE}`" in page
    for rule in RULES:
        assert f"| `{rule.text(rule.example)}` |" in page


def test_rules_without_a_reading_are_named() -> None:
    policy = parse_policy("charging,battery=30,temperature=42,ram=100MB,time=50")
    assert policy.unread(Readings(ram=10**9)) == ["charging", "battery", "temperature"]
    assert policy.unread(Readings(False, 10, 30, ram=0)) == []
    assert NO_POLICY.unread(Readings()) == []
