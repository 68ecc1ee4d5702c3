"""Requests that begin alike compute that once, and have the tokens of requests alone, whatever happens to the
one that computes it."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from tests.engine.test_batcher import Ask, Watched
from tests.patience import LIMIT
from tests.weights.checkpoints import change_config

from shoal.engine.batch import ReadRequest, Result, Sampling, Want
from shoal.engine.batcher import Batcher
from shoal.engine.convert import convert
from shoal.engine.errors import ContextError
from shoal.engine.generate import generate
from shoal.engine.kv_page import page_bytes
from shoal.engine.layout import PAGE
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

GREEDY = Sampling()
SEEDED = Sampling(temperature=1.5, top_p=0.95, seed=11)
PENALISED = Sampling(
    temperature=1.2, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4, seed=3
)
TINY = Path(__file__).parent.parent / "fixtures" / "tiny-llama"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny Llama with a context of 2,048 positions."""
    directory = tmp_path_factory.mktemp("long")
    change_config(shutil.copytree(TINY, directory / "source"), max_position_embeddings=2048)
    convert(directory / "source", directory / "model", dtype="int8")
    return Model.open(directory / "model")


@pytest.fixture
def stage(model: Model) -> Iterator[Stage]:
    with Stage(model, 0, model.n_units, StageOptions(max_rows=64, max_wanted=16, threads=1)) as opened:
        yield opened


def text(n: int, seed: int = 0) -> list[int]:
    return [(7 * i * (seed + 1) + i * i + seed) % 250 + 1 for i in range(n)]


def alone(model: Model, prompt: list[int], sampling: Sampling, tokens: int) -> list[int]:
    with Stage(model, 0, model.n_units, StageOptions(threads=1)) as stage:
        return list(generate(stage, prompt, sampling, max_tokens=tokens, end=()))


def ask(batcher: Batcher, prompt: list[int], sampling: Sampling = SEEDED, tokens: int = 8) -> Ask:
    return Ask(batcher, prompt, sampling, tokens, context=len(prompt) + tokens)


def rows(watched: Watched) -> int:
    return sum(len(run.tokens) for batch in watched.batches for run in batch)


def test_sixteen_requests_compute_their_prefix_once(stage: Stage, model: Model) -> None:
    prefix, watched = text(1000), Watched(stage)
    prompts = [prefix + text(3 + i, i + 1) for i in range(16)]
    watched.gate.clear()
    with Batcher(stage) as batcher:
        asked = [ask(batcher, prompt, PENALISED, 4) for prompt in prompts]
        watched.gate.set()
        found = [one.tokens() for one in asked]
        own = sum(len(prompt) - 1000 for prompt in prompts) + 16 * 3
        assert rows(watched) == 1000 + own
        watched.batches.clear()
        again = [ask(batcher, prompt, PENALISED, 4) for prompt in prompts]
        assert [one.tokens() for one in again] == found
        assert rows(watched) <= 16 * 4  # the last row of each prompt, and those of its answer
    with Batcher(stage, share_prefixes=False) as batcher:
        watched.batches.clear()
        asked = [ask(batcher, prompt, PENALISED, 4) for prompt in prompts]
        assert [one.tokens() for one in asked] == found
        assert rows(watched) == 16 * 1000 + own
    assert found[3] == alone(model, prompts[3], PENALISED, 4)
    assert stage.kv_bytes == 0


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED, PENALISED], ids=["greedy", "seeded", "penalised"])
def test_tokens_are_those_without_sharing(stage: Stage, model: Model, sampling: Sampling) -> None:
    story = text(PAGE + 100)
    prompts = [story[:at] + text(5, at) for at in (20, 64, PAGE - 1, PAGE, PAGE + 1, PAGE + 100)]
    prompts += [story[:300], story[:300], story[: PAGE + 44] + text(90, 9)]
    expected = [alone(model, prompt, sampling, 20) for prompt in prompts]
    with Batcher(stage, slots=4) as batcher:
        for _ in range(2):  # the second time all of it is there
            asked = [ask(batcher, prompt, sampling, 20) for prompt in prompts]
            assert [one.tokens() for one in asked] == expected
    assert stage.kv_bytes == 0


@pytest.mark.parametrize("pages", [2, 3, 5])
def test_tokens_are_the_same_under_eviction(model: Model, pages: int) -> None:
    states = [state for unit in model.program.units for state in unit.states]
    limit = pages * sum(page_bytes(state, model.kv_dtype) for state in states)
    prompts = [text(PAGE + 30)[:at] + text(7, at) for at in (40, 60, PAGE - 20, PAGE + 10, PAGE + 30)]
    prompts += [text(200, 5), [*text(150, 5), 1]]
    expected = [alone(model, prompt, PENALISED, 30) for prompt in prompts]
    options = StageOptions(max_rows=64, kv_bytes=limit, threads=1)
    with Stage(model, 0, model.n_units, options) as stage, Batcher(stage) as batcher:
        for _ in range(2):
            asked = [ask(batcher, prompt, PENALISED, 30) for prompt in prompts]
            assert [one.tokens() for one in asked] == expected
    with Stage(model, 0, model.n_units, options) as stage, Batcher(stage) as batcher:
        held = ask(batcher, text(PAGE * (pages - 1) + 5), tokens=2)
        assert len(held.tokens()) == 2
        if pages == 2:  # its own room is needed, and what it shares goes with it
            prompt = text(PAGE + 5)[:PAGE] + text(PAGE - 10, 3)
            assert ask(batcher, prompt, tokens=3).tokens() == alone(model, prompt, SEEDED, 3)
            with pytest.raises(ContextError, match="promised"):
                ask(batcher, text(2 * PAGE + 9, 4), tokens=2).tokens()


def test_a_cancelled_one_leaves_its_rows_to_another(stage: Stage, model: Model) -> None:
    prefix, watched = text(500), Watched(stage)
    prompts = [prefix + text(4, i + 1) for i in range(4)]
    calls = 0

    def cancel_in_the_third_call() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            stopping.start()
            cancelled.wait(20)

    cancelled = threading.Event()
    watched.before = cancel_in_the_third_call
    watched.gate.clear()
    with Batcher(stage) as batcher:
        asked = [ask(batcher, prompt) for prompt in prompts]
        cancel = stage.cancel

        def noted(sequence: int | None = None) -> None:
            cancel(sequence)
            cancelled.set()

        stage.cancel = noted  # type: ignore[method-assign]
        stopping = threading.Thread(target=asked[0].stop)
        watched.gate.set()
        assert asked[0].tokens() == []
        assert [one.tokens() for one in asked[1:]] == [alone(model, p, SEEDED, 8) for p in prompts[1:]]
        stopping.join(20)
    assert rows(watched) <= 3 * 64 + 500 + 3 * (4 + 7)


def test_a_failed_one_leaves_its_rows_to_another(stage: Stage, model: Model) -> None:
    prefix, watched = text(300), Watched(stage)
    watched.gate.clear()
    with Batcher(stage) as batcher:
        first = ask(batcher, prefix[:150])
        bad = ask(batcher, [*prefix[:200], 10**6, *prefix[200:]])
        unlikely = ask(batcher, prefix, Sampling(bias=((10**6, 1.0),)))
        good = [ask(batcher, prefix + text(4, i + 1)) for i in range(3)]
        watched.gate.set()
        for wrong in (bad, unlikely):
            with pytest.raises(ValueError, match="a token id is not in"):
                wrong.tokens()
        assert first.tokens() == alone(model, prefix[:150], SEEDED, 8)
        for i, one in enumerate(good):
            assert one.tokens() == alone(model, prefix + text(4, i + 1), SEEDED, 8)
    assert stage.kv_bytes == 0


def test_sessions_give_and_take(stage: Stage, model: Model) -> None:
    prefix, watched = text(400), Watched(stage)
    with Batcher(stage) as batcher:
        assert len(ask(batcher, [*prefix, 7]).tokens()) == 8
        watched.batches.clear()
        session = batcher.session(PENALISED)
        first = list(session.answer([*prefix, 8, 9], max_tokens=6, end=()))
        assert first == alone(model, [*prefix, 8, 9], PENALISED, 6)
        assert rows(watched) == 2 + 5
        watched.batches.clear()
        turn = [*prefix, 8, 9, *first, 5, 4, 3]
        assert ask(batcher, turn).tokens() == alone(model, turn, SEEDED, 8)  # from the session, which goes on
        assert list(session.answer(turn, max_tokens=6, end=())) == alone(model, turn, PENALISED, 6)
        assert rows(watched) == (4 + 7) + (4 + 5)
        session.close()
        other = text(300, 4)
        assert list(batcher.session(SEEDED).answer(other, max_tokens=3, end=())) == alone(
            model, other, SEEDED, 3
        )
    assert stage.kv_bytes == 0


def test_texts_that_are_read_share_their_prompt(stage: Stage) -> None:
    prompt, watched = text(200), Watched(stage)
    labels = [text(4, i + 1) for i in range(6)]

    def scores(batcher: Batcher) -> list[list[float]]:
        items = [SimpleQueue[Result | Exception | None]() for _ in labels]
        for label, queue in zip(labels, items, strict=True):
            request = ReadRequest(prompt + label, len(prompt) - 1, Want.SCORES, context=300)
            batcher.read(request, queue.put)
        found = []
        for queue in items:
            found.append(list[float]())
            while isinstance(item := queue.get(timeout=LIMIT), Result):
                found[-1] += item.scores
            assert item is None
        return found

    with Batcher(stage) as batcher:
        together = scores(batcher)
        assert rows(watched) == 199 + 6 * 4
    watched.batches.clear()
    with Batcher(stage, share_prefixes=False) as batcher:
        assert scores(batcher) == together
        assert rows(watched) == 6 * (199 + 4)


def test_a_chat_leaves_its_last_turn_alone(stage: Stage, model: Model) -> None:
    turn = text(PAGE + 40)
    with Batcher(stage) as batcher:
        for more in range(4):
            said = ask(batcher, turn, PENALISED).tokens()
            assert said == alone(model, turn, PENALISED, 8)
            turn = [*turn, *said, more + 1, 7]
        last = stage.kv_bytes
        assert len(batcher._scheduler.idle) == 1
    with Batcher(stage) as batcher:
        ask(batcher, turn[:-10], tokens=8).tokens()
        assert stage.kv_bytes == last  # no more than one such sequence takes


def test_what_is_idle_is_bounded(stage: Stage) -> None:
    with Batcher(stage, slots=3) as batcher:
        for i in range(5):
            ask(batcher, text(20, i), tokens=2).tokens()
        one = stage.kv_bytes // 3
        assert stage.kv_bytes == 3 * one > 0
        batcher._most_bytes = 2 * one
        assert len(ask(batcher, text(20, 6), tokens=2).tokens()) == 2
        assert stage.kv_bytes <= 2 * one


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_drops_what_its_parent_holds(stage: Stage, model: Model) -> None:
    prompt = text(PAGE + 40)
    expected = alone(model, prompt, SEEDED, 8)
    with Batcher(stage) as batcher:
        assert ask(batcher, prompt).tokens() == expected
        held = stage.kv_bytes
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                right = ask(batcher, prompt).tokens() == expected and stage.kv_bytes == held
                batcher.close()
                code = 0 if right and stage.kv_bytes == 0 else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert ask(batcher, prompt).tokens() == expected
        assert stage.kv_bytes == held  # one of the two answers is enough for later ones


def test_threads_that_ask_at_any_time(stage: Stage, model: Model) -> None:
    prefix = text(120)
    expected = [alone(model, prefix[: 30 * i] + text(6, i), PENALISED, 6) for i in range(5)]
    wrong: list[int] = []

    def asking(first: int) -> None:
        for i in range(first, first + 10):
            found = ask(batcher, prefix[: 30 * (i % 5)] + text(6, i % 5), PENALISED, 6)
            if i % 7 == 6:
                found.stop()
            elif found.tokens() != expected[i % 5]:
                wrong.append(i)

    with Batcher(stage, slots=3) as batcher:
        threads = [threading.Thread(target=asking, args=(first,)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert not wrong
    assert stage.kv_bytes == 0
