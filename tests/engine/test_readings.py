"""Texts that are read: what is wanted of each row, by every backend, at every cut, and beside answers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from queue import SimpleQueue

import numpy as np
import pytest
from tests.patience import LIMIT

from shoal.engine.arrays import F32
from shoal.engine.batch import ReadRequest, Result, Run, Sampling, Want
from shoal.engine.batcher import Batcher
from shoal.engine.errors import ContextError
from shoal.engine.generate import generate
from shoal.engine.kv_page import page_bytes
from shoal.engine.model_directory import Model
from shoal.engine.sampler import draw
from shoal.engine.stage import Stage, StageOptions

LIVELY = Sampling(
    temperature=1.5, top_k=40, repetition_penalty=1.3, presence_penalty=0.3, bias=((9, 2.0),), seed=11
)
TEXT = [(7 * i) % 50 + 1 for i in range(80)]


def logits_of(model: Model, tokens: list[int], backend: str = "native") -> F32:
    with Stage(model, 0, model.n_units, StageOptions(backend, max_wanted=128)) as stage:
        stage.open_sequence(0)
        (whole,) = stage.run([Run(0, 0, tokens, Want.LOGITS)])
    assert whole.logits is not None
    return whole.logits


def scores_of(logits: F32, following: list[int]) -> list[float]:
    values = logits.astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=1, keepdims=True))
    found: list[float] = values[np.arange(len(following)), following].tolist()
    return found


@pytest.mark.parametrize("backend", ["native", "numpy", "numba"])
def test_what_a_run_wants_of_its_rows(tiny_f32: Model, backend: str) -> None:
    close = 1e-5 if backend == "native" else 1e-4  # whose sums depend on the number of rows
    logits = logits_of(tiny_f32, TEXT[:40], backend)
    drawn = [
        draw(logits[i], LIVELY, np.array(TEXT[: i + 1], np.int32), i + 1) for i in range(20, 40)
    ]  # the definition in NumPy
    with Stage(tiny_f32, 0, tiny_f32.n_units, StageOptions(backend, max_wanted=64)) as stage:
        for sequence in (1, 2, 3):
            stage.open_sequence(sequence, LIVELY)
            stage.run([Run(sequence, 0, TEXT[:20], Want.NOTHING)])
        tokens, scores, one = stage.run(
            [
                Run(1, 20, TEXT[20:40], Want.TOKENS, report=2),
                Run(2, 20, TEXT[20:40], Want.SCORES, following=TEXT[40], report=1),
                Run(3, 20, TEXT[20:40], Want.TOKEN),
            ]
        )
        assert list(tokens.tokens) == drawn
        assert (tokens.token, one.token, one.tokens, scores.tokens) == (None, drawn[-1], (), ())
        expected = scores_of(logits[20:], TEXT[21:41])
        assert list(scores.scores) == pytest.approx(expected, abs=close)
        assert [told.drawn for told in scores.logprobs] == list(scores.scores)
        assert [told.drawn for told in tokens.logprobs] == pytest.approx(
            scores_of(logits[20:], drawn), abs=close
        )
        best = np.argsort(-logits[20:], axis=1, kind="stable")
        assert [[t for t, _ in told.likeliest] for told in tokens.logprobs] == best[:, :2].tolist()
        assert [[t for t, _ in told.likeliest] for told in scores.logprobs] == best[:, :1].tolist()
        for bad, words in (
            (Run(1, 40, [1], Want.SCORES), "following is None"),
            (Run(1, 40, [1], Want.SCORES, following=10**6), "a token id is not in"),
            (Run(1, 40, [1], Want.TOKENS, report=65), "more than 64"),
        ):
            with pytest.raises(ValueError, match=words):
                stage.run([bad])


@pytest.mark.parametrize("quantised", [False, True])
def test_the_same_bits_at_every_cut_and_in_any_portions(
    tiny_f32: Model, tiny_int8: Model, quantised: bool
) -> None:
    model = tiny_int8 if quantised else tiny_f32

    def read(cuts: list[int], portion: int, threads: int) -> tuple[list[int], list[float]]:
        edges = [0, *cuts, model.n_units]
        options = StageOptions(threads=threads, max_wanted=64)
        stages = [Stage(model, first, last, options) for first, last in pairwise(edges)]
        tokens, scores = list[int](), list[float]()
        for want in (Want.TOKENS, Want.SCORES):
            for stage in stages:
                stage.open_sequence(want, LIVELY)
            for at in range(0, 60, portion):
                hidden, part = None, TEXT[at : at + portion][: 60 - at]
                for stage in stages:
                    run = Run(want, at, part, want, hidden, following=TEXT[at + len(part)])
                    (result,) = stage.run([run])
                    hidden = result.hidden
                tokens += result.tokens
                scores += result.scores
        for stage in stages:
            stage.close()
        return tokens, scores

    whole = read([], 60, 1)
    assert len(whole[0]) == len(whole[1]) == 60
    for cuts, portion, threads in (([1], 7, 2), ([2, 3], 1, 1), ([model.n_units - 1], 30, 3)):
        assert read(cuts, portion, threads) == whole


class Reading:
    """A reading that was begun."""

    def __init__(self, batcher: Batcher, tokens: list[int], first: int, want: Want) -> None:
        self.items: SimpleQueue[Result | Exception | None] = SimpleQueue()
        self.stop = batcher.read(ReadRequest(tokens, first, want, context=400), self.items.put)

    def results(self) -> list[Result]:
        found = []
        while isinstance(item := self.items.get(timeout=LIMIT), Result):
            found.append(item)
        if item is not None:
            raise item
        return found

    def scores(self) -> list[float]:
        return [score for result in self.results() for score in result.scores]


@pytest.mark.parametrize("first", [0, 1, 40, 78, 79])
def test_a_text_is_read_in_portions(tiny_int8: Model, first: int) -> None:
    expected = scores_of(logits_of(tiny_int8, TEXT), TEXT[1:])[first:]
    options = StageOptions(max_rows=24, max_wanted=8)
    with (
        Stage(tiny_int8, 0, tiny_int8.n_units, options) as stage,
        Batcher(stage, share_prefixes=False) as batcher,
    ):
        results = Reading(batcher, TEXT, first, Want.SCORES).results()
        at = first
        for result in results:  # the rows from `first` on, in order, none twice
            assert (result.first, result.rows) == (at, len(result.scores))
            at += result.rows
        assert at == 79
        found = [score for result in results for score in result.scores]
        assert found == pytest.approx(expected, abs=1e-5)
        tokens = Reading(batcher, TEXT, first, Want.TOKENS).results()
        greedy = [int(token) for token in np.argmax(logits_of(tiny_int8, TEXT), axis=1)]
        assert [token for result in tokens for token in result.tokens] == greedy[first:]
        assert stage.kv_bytes == 0


def test_readings_and_answers_share_calls(tiny_int8: Model) -> None:
    expected = scores_of(logits_of(tiny_int8, TEXT), TEXT[1:])
    with Stage(tiny_int8, 0, tiny_int8.n_units, StageOptions(threads=1)) as stage:
        alone = list(generate(stage, [1, 2, 3], LIVELY, max_tokens=60, end=()))
    options = StageOptions(max_rows=24, max_wanted=8)
    with (
        Stage(tiny_int8, 0, tiny_int8.n_units, options) as stage,
        Batcher(stage, share_prefixes=False) as batcher,
    ):
        answers: list[SimpleQueue[int | Exception | None]] = [SimpleQueue() for _ in range(9)]
        for tokens in answers:
            batcher.begin_alone([1, 2, 3], LIVELY, tokens.put, context=400, max_tokens=60, end=())
        readings = [Reading(batcher, TEXT[: 40 + i], i, Want.SCORES) for i in range(6)]
        stopped = Reading(batcher, TEXT, 0, Want.SCORES)
        stopped.stop()
        for i, reading in enumerate(readings):
            assert reading.scores() == pytest.approx(expected[i : 39 + i], abs=1e-5)
        for tokens in answers:
            assert [tokens.get(timeout=LIMIT) for _ in range(61)] == [*alone, None]
        while stopped.items.get(timeout=LIMIT) is not None:
            pass
        assert stage.kv_bytes == 0


def test_a_reading_that_is_set_aside_puts_no_row_twice(tiny_int8: Model) -> None:
    states = [state for unit in tiny_int8.program.units for state in unit.states]
    limit = 2 * sum(page_bytes(state, tiny_int8.kv_dtype) for state in states)
    options = StageOptions(max_rows=64, max_wanted=8, kv_bytes=limit)
    texts = [[(3 * i + j) % 90 + 1 for j in range(290)] for i in range(3)]
    with Stage(tiny_int8, 0, tiny_int8.n_units, options) as stage, Batcher(stage) as batcher:
        readings = [Reading(batcher, text, 100, Want.SCORES) for text in texts]
        found = [reading.scores() for reading in readings]
    for text, scores in zip(texts, found, strict=True):
        with Stage(tiny_int8, 0, tiny_int8.n_units, StageOptions()) as stage, Batcher(stage) as batcher:
            assert scores == Reading(batcher, text, 100, Want.SCORES).scores()


def test_readings_that_cannot_be(tiny_int8: Model) -> None:
    with Stage(tiny_int8, 0, tiny_int8.n_units) as stage:
        with Batcher(stage) as batcher:
            good = Reading(batcher, TEXT, 0, Want.SCORES)
            for tokens, words in (([], "the text is empty"), ([1] * 401, "holds 400")):
                with pytest.raises(ContextError, match=words):
                    Reading(batcher, tokens, 0, Want.SCORES)
            with pytest.raises(ValueError, match="a token id is not in"):
                Reading(batcher, [1, 10**6], 0, Want.SCORES).results()
            assert len(good.scores()) == 79
            assert Reading(batcher, [5], 0, Want.SCORES).results() == []
        with pytest.raises(ValueError, match="has been closed"):
            Reading(batcher, TEXT, 0, Want.SCORES)


def multiples(tokens: Sequence[int]) -> Collection[int] | None:
    """Changes with every token, and allows all after every fifth."""
    return None if len(tokens) % 5 == 4 else range(0, 90, 2 + len(tokens) % 7)


def masked(model: Model, prompt: list[int], count: int) -> list[int]:
    """The answer by the definition in NumPy, from the logits of one row at a time."""
    known, vocab = list(prompt), model.program.vocab
    with Stage(model, 0, model.n_units, StageOptions(max_wanted=64)) as stage:
        stage.open_sequence(0)
        stage.run([Run(0, 0, known[:-1], Want.NOTHING)])
        while len(known) < len(prompt) + count:
            (row,) = stage.run([Run(0, len(known) - 1, known[-1:], Want.LOGITS)])
            allowed, mask = multiples(known[len(prompt) :]), np.zeros(vocab, bool)
            mask[list(range(vocab) if allowed is None else allowed)] = True
            bits = np.packbits(mask, bitorder="little")
            assert row.logits is not None
            known.append(draw(row.logits[0], LIVELY, np.array(known, np.int32), len(known), bits))
    return known[len(prompt) :]


def test_answers_draw_from_allowed_tokens(tiny_f32: Model) -> None:
    def broken(tokens: Sequence[int]) -> Collection[int] | None:
        if len(tokens) == 3:
            raise KeyError("broken")
        return [] if len(tokens) > 3 else None

    prompts = [[5 + i, 9, 11] for i in range(4)]
    expected = [masked(tiny_f32, prompt, 20) for prompt in prompts]
    with Stage(tiny_f32, 0, tiny_f32.n_units) as stage, Batcher(stage) as batcher:
        answers: list[SimpleQueue[int | Exception | None]] = [SimpleQueue() for _ in range(5)]
        rest = {"context": 100, "max_tokens": 20, "end": ()}
        for prompt, tokens in zip(prompts, answers, strict=False):
            batcher.begin_alone(prompt, LIVELY, tokens.put, allow=multiples, **rest)  # type: ignore[arg-type]
        batcher.begin_alone([1, 2], LIVELY, answers[4].put, allow=broken, **rest)  # type: ignore[arg-type]
        for tokens, right in zip(answers, expected, strict=False):
            assert [tokens.get(timeout=LIMIT) for _ in range(21)] == [*right, None]
        got = [answers[4].get(timeout=LIMIT) for _ in range(4)]
        assert isinstance(got[3], KeyError) and all(isinstance(token, int) for token in got[:3])
        session = batcher.session(LIVELY, context=100, allow=multiples)
        assert list(session.answer(prompts[0], max_tokens=20, end=())) == expected[0]
        longer = [*prompts[0], *expected[0], 7]
        assert list(session.answer(longer, max_tokens=5, end=())) == masked(tiny_f32, longer, 5)
        session.close()
        with pytest.raises(ValueError, match="no token may follow"):
            list(batcher.session(LIVELY, allow=lambda tokens: ()).answer([1], max_tokens=2, end=()))
