"""Log-probabilities, scores, rows and masks over nodes: the values of one process, whatever happens."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import trio
from tests.net.fake_stage import CONTEXT, UNITS, VOCAB, FakeStage
from tests.net.fake_stage import logprobs as reported
from tests.net.test_moving import moved, until, with_chain

from shoal.engine.batch import Logprobs, ReadRequest, Result, Run, Sampling, Want
from shoal.engine.errors import ContextError

TEXT = [(i * i + 3) % VOCAB for i in range(60)]
SAMPLING = Sampling(temperature=0.7, seed=11)


def alone(tokens: Sequence[int], first: int, want: Want, report: int | None = None) -> list[Result]:
    """The results of the rows from position `first` on in one process, row by row."""
    stage, found = FakeStage(0, UNITS), list[Result]()
    stage.open_sequence(0, Sampling(), CONTEXT)
    last = len(tokens) - 1 if want is Want.SCORES else len(tokens)
    for at in range(last):
        following = tokens[at + 1] if want is Want.SCORES else None
        wanted = want if at >= first else Want.NOTHING
        found += stage.run([Run(0, at, [tokens[at]], wanted, report=report, following=following)])
    return found[first:]


def told(prompt: Sequence[int], answer: Sequence[int], count: int) -> list[Logprobs]:
    """The log-probabilities of an answer in one process."""
    rows = alone([*prompt, *answer[:-1]], len(prompt) - 1, Want.ROWS)
    values = [int(row.output[0, 0]) for row in rows if row.output is not None]
    return [reported(value, token, count) for value, token in zip(values, answer, strict=True)]


def check(found: Sequence[Result], tokens: Sequence[int], first: int, want: Want, **how: Any) -> None:
    """Compares results, whose rows follow each other, with those of one process."""
    expected, at = alone(tokens, first, want, **how), first
    for result in found:
        assert result.first == at
        at += result.rows
    assert at == first + len(expected)
    for name in ("tokens", "scores", "logprobs"):
        of = [
            [value for result in results for value in getattr(result, name)] for results in (found, expected)
        ]
        assert of[0] == of[1]
    outputs = [[one.output for one in results if one.output is not None] for results in (found, expected)]
    assert len(outputs[0]) == (len(found) if want is Want.ROWS else 0)
    if want is Want.ROWS:
        np.testing.assert_array_equal(np.concatenate(outputs[0]), np.concatenate(outputs[1]))


async def read(coordinator: Any, tokens: Sequence[int], first: int, want: Want, **how: Any) -> list[Result]:
    async with coordinator.read(ReadRequest(tokens, first, want, CONTEXT, **how)) as results:
        return [result async for result in results]


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
@pytest.mark.parametrize("want", [Want.SCORES, Want.TOKENS, Want.ROWS])
@pytest.mark.parametrize("report", [None, 0, 3])
def test_texts_are_read_together(lab: ModuleType, names: str, want: Want, report: int | None) -> None:
    async def test(net: Any, coordinator: Any) -> None:
        texts = [(TEXT[i:], first) for i, first in ((0, 0), (3, 40), (30, 29), (57, 2), (59, 0))]
        found: dict[int, list[Result]] = {}

        async def one(i: int) -> None:
            found[i] = await read(coordinator, *texts[i], want, report=report)

        async with trio.open_nursery() as tasks:
            for i in range(len(texts)):
                tasks.start_soon(one, i)
            answer = await lab.collect(coordinator, [3, 1, 4], 30, sampling=SAMPLING)
        assert answer == lab.oracle([3, 1, 4], 30, SAMPLING)
        for i, (tokens, first) in enumerate(texts):
            check(found[i], tokens, first, want, report=None if want is Want.ROWS else report)
        await until(lambda: not any(s.sequences for node in net.nodes.values() for s in node.stages))

    with_chain(lab, test, names, share_prefixes=False)


@pytest.mark.parametrize("port", [7001, 7002, 7003])
@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("want", [Want.SCORES, Want.ROWS])
def test_a_text_is_read_on_after_a_loss(lab: ModuleType, port: int, after: int, want: Want) -> None:
    async def test(net: Any, coordinator: Any) -> None:
        async with coordinator.read(ReadRequest(TEXT, 3, want, CONTEXT, report=2)) as results:
            found = [await anext(results) for _ in range(after)]
            await net.kill(port)
            found += [result async for result in results]
        check(found, TEXT, 3, want, report=None if want is Want.ROWS else 2)
        assert coordinator.recoveries == 1

    with_chain(lab, test)


@pytest.mark.parametrize("to", ["a1 b4 c6", "a3 b4 c6", "b3 c6", "a2 c6", "c2 b4 a6"])
@pytest.mark.parametrize("want", [Want.SCORES, Want.TOKENS])
def test_a_text_is_read_on_after_a_move(lab: ModuleType, to: str, want: Want) -> None:
    async def test(net: Any, coordinator: Any) -> None:
        texts = [TEXT[i:] for i in range(12)]
        found: dict[int, list[Result]] = {}

        async def one(i: int) -> None:
            found[i] = await read(coordinator, texts[i], i, want, report=1)

        async with trio.open_nursery() as tasks:
            for i in range(len(texts)):
                tasks.start_soon(one, i)
            await trio.sleep(0.05)
            assert not found
            record = await moved(coordinator, to)
        assert not record.aborted, record
        for i, tokens in enumerate(texts):
            check(found[i], tokens, i, want, report=1)

    with_chain(lab, test, begin="a2 b4 c6")


async def answered(tokens: Any) -> tuple[list[int], list[Logprobs]]:
    got, logprobs = list[int](), list[Logprobs]()
    async for token in tokens:
        got.append(token)
        logprobs += tokens.logprobs
    return got, logprobs


@pytest.mark.parametrize("what", ["nothing", "loss", "move"])
def test_an_answer_reports_its_log_probabilities(lab: ModuleType, what: str) -> None:
    async def test(net: Any, coordinator: Any) -> None:
        prompt = [3, 1, 4, 1, 5]
        async with coordinator.generate(prompt, SAMPLING, max_tokens=40, report=4) as tokens:
            first = [await anext(tokens), *tokens.logprobs]
            if what == "loss":
                await net.kill(7002)
            if what == "move":
                assert not (await moved(coordinator, "a1 b5 c6")).aborted
            rest, logprobs = await answered(tokens)
        expected = lab.oracle(prompt, 40, SAMPLING)
        assert [first[0], *rest] == expected
        assert [first[1], *logprobs] == told(prompt, expected, 4)

    with_chain(lab, test, begin="a2 b4 c6" if what != "loss" else None)


def masked(prompt: Sequence[int], count: int, allow: Any, seed: int) -> list[int]:
    """The answer that one process gives with `allow`."""
    stage, known = FakeStage(0, UNITS), list(prompt)
    stage.open_sequence(0, Sampling(seed=seed), CONTEXT)
    stage.run([Run(0, 0, known[:-1], Want.NOTHING)])
    while len(known) < len(prompt) + count:
        allowed, mask = allow(known[len(prompt) :]), None
        if allowed is not None:
            bits = np.zeros(VOCAB, bool)
            bits[list(allowed)] = True
            mask = np.packbits(bits, bitorder="little")
        (result,) = stage.run([Run(0, len(known) - 1, known[-1:], Want.TOKEN, allowed=mask)])
        assert result.token is not None
        known.append(result.token)
    return known[len(prompt) :]


def multiples(tokens: Sequence[int]) -> Collection[int] | None:
    """Changes with every token, and allows all after every fifth."""
    return None if len(tokens) % 5 == 4 else range(0, VOCAB, 2 + len(tokens) % 7)


@pytest.mark.parametrize(
    ("names", "what"), [("a", "nothing"), ("abc", "nothing"), ("abc", "loss"), ("abc", "move")]
)
def test_masks_reach_the_last_node(lab: ModuleType, names: str, what: str) -> None:
    async def test(net: Any, coordinator: Any) -> None:
        found: dict[int, list[int]] = {}

        async def one(seed: int) -> None:
            sampling, prompt = Sampling(seed=seed), [seed] * (1 + 4 * seed)
            found[seed] = await lab.collect(coordinator, prompt, 30, sampling=sampling, allow=multiples)

        async with trio.open_nursery() as tasks:
            for seed in range(5):
                tasks.start_soon(one, seed)
            await trio.sleep(0.2)
            assert not found
            if what == "loss":
                await net.kill(7003)
            if what == "move":
                assert not (await moved(coordinator, "a1 b6")).aborted
        for seed in range(5):
            assert found[seed] == masked([seed] * (1 + 4 * seed), 30, multiples, seed)

    with_chain(lab, test, names)


def test_an_answer_ends_with_what_its_mask_raises(lab: ModuleType) -> None:
    def after(count: int, outcome: Any) -> Any:
        def allow(tokens: Sequence[int]) -> Any:
            if len(tokens) < count:
                return None
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return allow

    async def test(net: Any, coordinator: Any) -> None:
        for count in (0, 3):
            for outcome, kind, words in (
                (KeyError("broken"), KeyError, "broken"),
                ([], ValueError, "no token may follow"),
                ([VOCAB], ValueError, "is not in"),
            ):
                async with coordinator.generate([1, 2], max_tokens=9, allow=after(count, outcome)) as tokens:
                    got = [await anext(tokens) for _ in range(count)]
                    with pytest.raises(kind, match=words):
                        await anext(tokens)
                assert got == lab.oracle([1, 2], 9)[:count]
        assert await lab.collect(coordinator, [1, 2], 9) == lab.oracle([1, 2], 9)
        await until(lambda: not any(s.sequences for node in net.nodes.values() for s in node.stages))

    with_chain(lab, test, share_prefixes=False)


def test_a_session_masks_every_answer_and_may_leave_one(lab: ModuleType) -> None:
    async def test(net: Any, coordinator: Any) -> None:
        async with coordinator.session(Sampling(seed=4), allow=multiples) as session:
            for turn in range(6):
                prompt = [7] * (3 + turn % 2)
                async with session.answer(prompt, max_tokens=9) as tokens:
                    got = [await anext(tokens) for _ in range(turn)]  # the rest is on its way
                assert got == masked(prompt, turn, multiples, 4)
            async with session.answer([7, 7], max_tokens=9) as tokens:
                assert [token async for token in tokens] == masked([7, 7], 9, multiples, 4)

    with_chain(lab, test)


def test_rows_of_another_width_are_the_nodes_fault(lab: ModuleType) -> None:
    async def test(net: Any, coordinator: Any) -> None:
        stage = net.nodes[7002].stages[-1]
        honest = stage._wanted

        def wide(*args: Any) -> Result:
            result: Result = honest(*args)
            return replace(result, output=np.zeros((result.rows, 3), np.float32))

        stage._wanted = wide
        check(await read(coordinator, TEXT, 3, Want.ROWS), TEXT, 3, Want.ROWS)  # by the other node alone
        assert [node.port for node in coordinator.nodes] == [7001]

    with_chain(lab, test, "ab")


def test_texts_that_cannot_be_read(lab: ModuleType) -> None:
    async def test(net: Any, coordinator: Any) -> None:
        for tokens, words in (([], "0 tokens"), ([1] * (CONTEXT + 1), "the context holds")):
            with pytest.raises(ContextError, match=words):
                coordinator.read(ReadRequest(tokens, 0, Want.SCORES, CONTEXT))
        with pytest.raises(ValueError, match="which is not in"):
            coordinator.read(ReadRequest([1, VOCAB], 0, Want.SCORES, CONTEXT))
        assert await read(coordinator, [5], 0, Want.SCORES) == []
        async with coordinator.read(ReadRequest(TEXT, 0, Want.SCORES, CONTEXT)) as results:
            await anext(results)  # left early
        assert await lab.collect(coordinator, [1, 2], 9) == lab.oracle([1, 2], 9)
        await until(lambda: not any(s.sequences for node in net.nodes.values() for s in node.stages))

    with_chain(lab, test, share_prefixes=False)
