"""Sizes of JSON schemas: what patterns repeat, multiples and properties, which is what a grammar may cost."""

from __future__ import annotations

import pytest

from shoal.grammars import GrammarError, check_grammar, check_sizes, remainders, written_out


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0), ("abc", 3), ("a{7}", 7), ("a{2,9}", 9), ("a{3,}", 3), ("(ab){5}c", 11),
        ("((a{10}){10}){10}", 1000),
        ("(a|bc){4}", 16), ("[^]a{9}]{3}", 3), (r"[\]]{4}", 4), (r"\{5\}", 3), (r"\({6}", 6), ("a{0}", 0),
        ("))", 2), ("(((", 0), ("{5}", 0), ("[" * 100_000, 1),
    ],
)  # fmt: skip
def test_repetitions_are_written_out(pattern: str, size: int) -> None:
    assert written_out(pattern) == size


def test_a_pattern_that_repeats_too_much_is_found_wherever_it_is() -> None:
    bad = {"type": "string", "pattern": "(a{101}){100}"}
    for schema in (bad, {"properties": {"x": {"items": [bad]}}}, {"patternProperties": {bad["pattern"]: {}}}):
        with pytest.raises(GrammarError, match="repeats more than 10000 characters"):
            check_sizes(schema)
    check_sizes({"pattern": "(a{100}){100}", "properties": {"pattern": {"type": "string"}}})


@pytest.mark.parametrize(
    ("divisor", "size"),
    [(1, 1), (100_000, 1), (0.001, 1), (12.5, 1), (7, 7), (86_400, 86_400), (1.1, 11), (0, 1), (3e-14, 3)],
)
def test_remainders_are_those_of_the_digits(divisor: float, size: int) -> None:
    assert remainders(divisor) == size


def test_multiples_and_properties_are_limited_in_a_schema() -> None:
    def multiples(of: float) -> dict[str, object]:
        return {"properties": {name: {"type": "integer", "multipleOf": of} for name in ("a", "b")}}

    def properties(count: int) -> dict[str, object]:
        return {"items": {"properties": {f"p{i}": {} for i in range(count)}}}

    for schema in (multiples(50_000 - 1), multiples(10**9), properties(1000)):
        check_sizes(schema)
    for several in (multiples(50_001), [{"multipleOf": 1_000_000_007}], [multiples(30_001)] * 2):
        with pytest.raises(GrammarError, match="multipleOf are more than 100000 together"):
            check_sizes(several)
    with pytest.raises(GrammarError, match="more than 1000 properties"):
        check_sizes(properties(1001))


REPEATED = r"(a{1000}){1000}"


@pytest.mark.parametrize(
    "grammar",
    [
        f'start: %json {{"type": "string", "pattern": "{REPEATED}"}}',
        'start: "%json" %json\n{"multipleOf": 99999} %json {"multipleOf": 77777}',
        f'start: "[" /{REPEATED}/ "]"',
        'start: ("a"{1000}){1000}',
        "start: /a{999}/{999}",
        "start: /a{9000}/ /b{9000}/",
        f'start: %regex {{"pattern": "{REPEATED}"}}',
        f'{{"grammars": [{{"json_schema": {{"pattern": "{REPEATED}"}}}}]}}',
        f'{{"grammars": [{{"lark_grammar": "start: /{REPEATED}/"}}]}}',
        '{"grammars": [' + "[" * 100_000,
        "start: %json {" * 3,
        "x" * ((1 << 20) + 1),
    ],
    ids=lambda text: text[:40],
)
def test_a_grammar_is_held_to_the_sizes_of_its_schemas_and_patterns(grammar: str) -> None:
    with pytest.raises(GrammarError):
        check_grammar(grammar)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: ("sea" | "ships"){1,9} "!\\n" /[a-z]{2,90}/',
        'start: "{" %json {"pattern": "a{1000}", "description": "%json {"} "}"',
        '{"grammars": [{"json_schema": {"type": "object"}}]}',
    ],
)
def test_other_grammars_are_not(grammar: str) -> None:
    check_grammar(grammar)
