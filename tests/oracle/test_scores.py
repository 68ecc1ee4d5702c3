"""Scores, perplexity and log-probabilities against transformers in float32."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from tests import families
from tests.families import CASES, TOKENS
from tests.patience import LIMIT

from shoal.engine.batch import Logprobs, ReadRequest, Result, Run, Sampling, Want
from shoal.engine.batcher import Batcher
from shoal.engine.convert import convert
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.results import Score

pytestmark = pytest.mark.oracle


def theirs(source: Path) -> np.ndarray:
    """The log-probabilities `[positions, vocab]` of what follows each position of the text."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0]
        found: np.ndarray = torch.log_softmax(logits, dim=-1).numpy()
    return found


def scored(stage: Stage, tokens: list[int], first: int) -> tuple[list[float], list[Logprobs]]:
    items: SimpleQueue[Result | Exception | None] = SimpleQueue()
    scores, logprobs = list[float](), list[Logprobs]()
    with Batcher(stage) as batcher:
        batcher.read(ReadRequest(tokens, first, Want.SCORES, len(tokens), report=5), items.put)
        while isinstance(result := items.get(timeout=LIMIT), Result):
            scores += result.scores
            logprobs += result.logprobs
    assert result is None
    return scores, logprobs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_scores_and_perplexity(name: str, backend: str, tmp_path: Path) -> None:
    source = families.write_checkpoint(name, tmp_path / "source")
    convert(source, tmp_path / "model", dtype="f32")
    expected, model = theirs(source), Model.open(tmp_path / "model")
    following = expected[np.arange(len(TOKENS) - 1), TOKENS[1:]]
    with Stage(model, 0, model.n_units, StageOptions(backend=backend)) as stage:
        for first in (0, 200):
            scores, logprobs = scored(stage, TOKENS, first)
            np.testing.assert_allclose(scores, following[first:], atol=1e-3, rtol=0)
            score = Score(tuple(TOKENS[first + 1 :]), tuple(scores))
            assert score.perplexity == pytest.approx(float(np.exp(-following[first:].mean())), rel=1e-3)
            for row, told in zip(expected[first:], logprobs, strict=False):
                assert len(told.likeliest) == 5
                best = np.sort(row)[:-6:-1]
                np.testing.assert_allclose([value for _, value in told.likeliest], best, atol=1e-3, rtol=0)
                ids = [token for token, _ in told.likeliest]
                np.testing.assert_allclose(row[ids], best, atol=1e-3, rtol=0)  # near ties may change places


@pytest.mark.parametrize("name", CASES)
def test_log_probabilities_of_drawn_tokens(name: str, tmp_path: Path) -> None:
    source = families.write_checkpoint(name, tmp_path / "source")
    convert(source, tmp_path / "model", dtype="f32")
    expected, model = theirs(source), Model.open(tmp_path / "model")
    with Stage(model, 0, model.n_units, StageOptions(max_wanted=len(TOKENS))) as stage:
        stage.open_sequence(0, Sampling(temperature=1.0, seed=5))
        (first,) = stage.run([Run(0, 0, TOKENS[:200], Want.TOKENS, report=0)])
        (rest,) = stage.run([Run(0, 200, TOKENS[200:], Want.TOKENS, report=0)])
    tokens, told = [*first.tokens, *rest.tokens], [*first.logprobs, *rest.logprobs]
    drawn = expected[np.arange(len(TOKENS)), tokens]
    np.testing.assert_allclose([one.drawn for one in told], drawn, atol=1e-3, rtol=0)
