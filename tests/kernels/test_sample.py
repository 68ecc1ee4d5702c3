"""The sampler against an oracle written from docs/numerics.md, in float64 and with a plain sort."""

from __future__ import annotations

import numpy as np
import pytest

from .harness import Program, Refused, Rows, everywhere, isas
from .weights import f32, floats

MASK = (1 << 64) - 1


def mix(z):
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


def uniform(seed, position):
    golden = 0x9E3779B97F4A7C15
    return (mix((mix(seed + golden & MASK) ^ position) + golden & MASK) >> 11) * 2.0**-53


def candidates(
    logits,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    bias=None,
    allowed=None,
    history=(),
    **_,
):
    """Ids in the order of the definition, and their weights."""
    logits = logits.astype(np.float64)
    penalty = float(np.float32(repetition_penalty))
    for token, value in (bias or {}).items():
        logits[token] += float(np.float32(value))
    for token in set(history):
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        logits[token] -= float(np.float32(presence_penalty))
        logits[token] -= float(np.float32(frequency_penalty)) * history.count(token)
    if allowed is not None:
        logits[~allowed] = -np.inf
    by_value = sorted(np.flatnonzero(np.isfinite(logits)).tolist(), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return by_value[:1], np.ones(1)
    truncated = top_k > 0 or top_p < 1 or min_p > 0
    ids = (by_value if truncated else sorted(by_value))[: top_k or None]
    p = np.exp((logits[ids] - logits.max()) / float(np.float32(temperature)))
    p[p < 1.7e-38] = 0  # exp is 0 below -87
    if top_p < 1:
        keep = int(np.argmax(np.cumsum(p) >= float(np.float32(top_p)) * p.sum() * (1 - 1e-9))) + 1
        ids, p = ids[:keep], p[:keep]
    if min_p > 0:
        keep = int(np.count_nonzero(p >= float(np.float32(min_p)) * p[0]))
        ids, p = ids[:keep], p[:keep]
    return ids, p


def sampler(vocab, max_rows=64):
    """Draws from the wanted rows of an input. Only norms gather rows, and this one scales them: tests read
    the logits that were drawn from as the output."""
    p = Program(max_rows=max_rows)
    source, x = p.input(vocab), p.buffer(vocab, "F32", "WANTED_ROWS")
    p.op("NORM", x, source, p.weight(f32(np.full(vocab, 2.0))), epsilon=1.0)
    p.output(x)
    p.op("SAMPLE", -1, x)
    return p


def draw_all(vocab, logits, seeds, isa="scalar", threads=1, history=None, **sampling):
    """One token per seed, and the logits as the sampler saw them."""
    p = sampler(vocab)
    executor = p.open(isa, threads)
    drawn = []
    for at in range(0, len(seeds), 64):
        chosen = seeds[at : at + 64]
        batch = [
            Rows(
                1,
                0 if history is None else len(history) - 1,
                1,
                1,
                history=history,
                sampling={**sampling, "seed": s},
            )
            for s in chosen
        ]
        outcome = executor.run(batch, [np.tile(logits, (len(chosen), 1))])
        drawn += outcome.drawn.tolist()
    return drawn, outcome.outputs[0][0]


PARAMETERS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 2.0, "top_k": 10**6},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.001},
    {"temperature": 4.0, "top_p": 0.9999},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 3.0, "min_p": 0.001},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "min_p": 0.05},
    {"temperature": 0.8, "repetition_penalty": 1.3},
    {"temperature": 0.8, "repetition_penalty": 0.5, "top_k": 7},
    {"repetition_penalty": 2.0},
    {"presence_penalty": 3.0},
    {"temperature": 1.5, "presence_penalty": 2.5, "frequency_penalty": 0.75},
    {"temperature": 1.5, "frequency_penalty": -0.5, "top_p": 0.9},
    {"temperature": 2.0, "repetition_penalty": 1.2, "presence_penalty": 0.5, "top_k": 30},
    {"bias": {3: 50.0}},
    {"temperature": 2.0, "bias": {0: 7.5, 6: -100.0, 2: 1e-3}, "min_p": 0.01},
    {"temperature": 1.0, "bias": {5: 9.0}, "repetition_penalty": 1.3, "frequency_penalty": 0.1},
]


def parameters_of(parameters, vocab, rng):
    """The parameters with a mask that allows some of the tokens."""
    allowed = rng.random(vocab) < 0.3
    allowed[rng.integers(vocab)] = True
    return {**parameters, "allowed": allowed}


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
@pytest.mark.parametrize("vocab", [7, 300, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_draws_as_the_oracle_does(vocab, parameters, masked):
    rng = np.random.default_rng(vocab)
    if masked:
        parameters = parameters_of(parameters, vocab, rng)
    logits = floats(rng, vocab) * 6
    history = rng.integers(0, vocab, 40).astype(np.int32)
    history[:5] = np.argmax(logits)
    seeds = [int(s) for s in rng.integers(0, 2**63, 128)]
    drawn, seen = draw_all(vocab, logits, seeds, history=history, **parameters)
    ids, p = candidates(seen, history=history.tolist(), **parameters)
    edges = np.concatenate([[0], np.cumsum(p) / p.sum()])
    for seed, token in zip(seeds, drawn, strict=True):
        u = uniform(seed, len(history))
        at = ids.index(token)
        assert edges[at] - 1e-5 <= u <= edges[at + 1] + 1e-5
    exact = [
        ids[min(int(np.searchsorted(edges[1:], uniform(s, len(history)), side="right")), len(ids) - 1)]
        for s in seeds
    ]
    assert (
        np.count_nonzero(np.array(exact) != drawn) <= 1
    )  # a draw next to an edge may fall to the other side
    for isa in isas():
        for threads in (1, 3):
            assert draw_all(vocab, logits, seeds, isa, threads, history=history, **parameters)[0] == drawn


def test_ties_go_to_the_lowest_id():
    logits = np.ones(100, np.float32)
    for isa in isas():
        assert draw_all(100, logits, [1], isa)[0] == [0]
        drawn, _ = draw_all(100, logits, list(range(200)), isa, temperature=1.0, top_k=3)
        assert set(drawn) == {0, 1, 2}
        drawn, _ = draw_all(100, logits, list(range(64)), isa, temperature=1.0, top_p=0.049999)
        assert set(drawn) == {0, 1, 2, 3, 4}


def test_the_position_is_that_of_the_token_to_come():
    """The same seed draws otherwise at another position, and the same again at the same one."""
    p = sampler(50)
    executor = p.open()
    logits = np.ones((1, 50), np.float32)

    def draw(first):
        return int(
            executor.run([Rows(1, first, 1, 1, sampling={"temperature": 1.0, "seed": 9})], [logits]).drawn[0]
        )

    tokens = [draw(first) for first in range(40)]
    assert tokens == [draw(first) for first in range(40)]
    assert tokens == [int(uniform(9, first + 1) * 50) for first in range(40)]


def test_frequencies_follow_the_distribution():
    logits = np.log(np.array([1, 2, 3, 4], np.float32))
    drawn, seen = draw_all(4, logits, list(range(6400)), temperature=1.0)
    p = np.exp(seen.astype(np.float64))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 6400, p / p.sum(), atol=0.02)


def test_only_sequences_that_ask_get_a_token():
    executor = sampler(20).open()
    batch = [Rows(1, 0, 1, 0), Rows(2, 0, 2, 1), Rows(1, 0, 0, 0), Rows(3, 0, 1, 1)]
    logits = np.zeros((7, 20), np.float32)
    logits[np.arange(7), np.arange(7)] = 5
    assert executor.run(batch, [logits]).drawn.tolist() == [-1, -1, 2, 6]
    batch = [Rows(2, 0, 2, 2), Rows(3, 0, 3, 1), Rows(2, 0, 2, 0, reported=1, given=[3, 9])]
    assert executor.run(batch, [logits]).drawn.tolist() == [0, 1, -1, -1, 4, 3, 9]


@pytest.mark.parametrize("temperature", [1e-38, 1e-45, 3e38])
def test_extreme_temperatures(temperature):
    logits = floats(np.random.default_rng(0), 64) * 10
    drawn, seen = draw_all(64, logits, list(range(64)), temperature=temperature)
    if temperature < 1:
        assert set(drawn) == {int(np.argmax(seen))}
    else:
        assert len(set(drawn)) > 20


def test_logits_that_are_not_finite_draw_nothing():
    p = Program(max_rows=4)
    x = p.input(32)
    normed = p.op(
        "NORM", p.buffer(32, "F32", "WANTED_ROWS"), x, p.weight(f32(np.full(32, 3e38))), epsilon=0.0
    )
    p.op("SAMPLE", -1, normed)
    for isa in isas():
        executor = p.open(isa, 2)
        with pytest.raises(Refused, match="logits of sequence 1"):
            executor.run([Rows(1, 0, 1, 0), Rows(2, 0, 1, 1)], [floats(np.random.default_rng(0), 3, 32)])
        scored = Rows(2, 0, 2, 0, reported=1, given=[3, 4])
        with pytest.raises(Refused, match="logits of sequence 1"):
            executor.run([Rows(1, 0, 1, 0), scored], [floats(np.random.default_rng(0), 3, 32)])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3e38])
def test_only_allowed_tokens_are_drawn_however_unlikely(temperature):
    rng = np.random.default_rng(2)
    logits = floats(rng, 1000) * 30
    allowed = np.zeros(1000, bool)
    allowed[np.argsort(logits)[:3]] = True
    for extra in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.001}):
        drawn, _ = draw_all(1000, logits, list(range(64)), temperature=temperature, allowed=allowed, **extra)
        assert set(drawn) <= set(np.flatnonzero(allowed).tolist())


@pytest.mark.parametrize("vocab", [7, 300, 4096])
def test_log_probabilities(vocab):
    rng = np.random.default_rng(vocab)
    logits = (floats(rng, 4, vocab) * 6).astype(np.float32)
    logits[1, 3] = logits[1, 5] = logits[1].max() + 1  # a tie
    reported = [0, 6, 1, min(vocab, 64) + 1]

    def work(executor):
        batch = [
            Rows(1, 0, 1, 1, reported=n, sampling={"temperature": 1.0, "seed": i, "bias": {2: 3.0}})
            for i, n in enumerate(reported)
        ]
        outcome = executor.run(batch, [logits])
        return outcome.drawn, outcome.reports, outcome.logprobs, outcome.outputs[0]

    drawn, reports, logprobs, seen = everywhere(sampler(vocab), work)
    expected = seen.astype(np.float64)
    expected -= expected.max(axis=1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    for i, n in enumerate(reported):
        if n:
            likeliest = np.argsort(-seen[i], kind="stable")[: n - 1]
            assert reports[i, :n].tolist() == [drawn[i], *likeliest.tolist()]
            np.testing.assert_allclose(logprobs[i, :n], expected[i, reports[i, :n]], atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_every_row_of_a_run_draws_as_if_it_were_alone(rows):
    vocab, rng = 300, np.random.default_rng(rows)
    logits = floats(rng, rows + 3, vocab) * 6
    history = rng.integers(0, vocab, 60).astype(np.int32)
    sampling = {"temperature": 1.5, "seed": 7, "repetition_penalty": 1.3, "frequency_penalty": 0.4}

    def many(executor):
        batch = [
            Rows(1, 9, 1, 1, history=history, sampling=sampling),
            Rows(rows, 12, rows, rows, history=history, sampling=sampling, reported=3),
            Rows(2, 0, 1, 0),
        ]
        outcome = executor.run(batch, [logits])
        return outcome.drawn, outcome.reports[1:-1], outcome.logprobs[1:-1]

    def alone(executor):
        found = []
        for row in range(rows):
            one = Rows(1, 12 + row, 1, 1, history=history[: 13 + row], sampling=sampling, reported=3)
            outcome = executor.run([one], [logits[1 + row : 2 + row]])
            found.append((outcome.drawn[0], outcome.reports[0], outcome.logprobs[0]))
        return tuple(map(np.array, zip(*found, strict=True)))

    program = sampler(vocab)
    drawn, reports, logprobs = everywhere(program, many)
    tokens, *expected = everywhere(program, alone)
    assert drawn.tolist()[1:-1] == tokens.tolist()
    assert drawn[-1] == -1
    np.testing.assert_array_equal(reports, expected[0])
    np.testing.assert_array_equal(logprobs, expected[1])


@pytest.mark.parametrize("vocab", [7, 4096])
def test_given_tokens_are_scored(vocab):
    rng = np.random.default_rng(vocab)
    logits = floats(rng, 20, vocab) * 6
    given = rng.integers(0, vocab, 17)

    def work(executor):
        batch = [Rows(17, 4, 17, 0, reported=3, given=given), Rows(3, 0, 3, 0, reported=1, given=given[:3])]
        outcome = executor.run(batch, [logits])
        return outcome.drawn, outcome.reports, outcome.logprobs, outcome.outputs[0]

    drawn, reports, logprobs, seen = everywhere(sampler(vocab), work)
    expected = seen.astype(np.float64) - seen.max(axis=1, keepdims=True)
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    tokens = [*given.tolist(), *given[:3].tolist()]
    assert drawn.tolist() == reports[:, 0].tolist() == tokens
    np.testing.assert_allclose(logprobs[:, 0], expected[np.arange(20), tokens], atol=2e-6, rtol=2e-6)
    for row in range(17):
        likeliest = np.argsort(-seen[row], kind="stable")[:2].tolist()
        assert reports[row, 1:].tolist() == likeliest
        np.testing.assert_allclose(logprobs[row, 1:], expected[row, likeliest], atol=2e-6, rtol=2e-6)
