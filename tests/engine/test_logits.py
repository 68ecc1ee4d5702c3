"""Logits of every backend against transformers (fixtures), and the exactness that the network relies on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from shoal.engine.arrays import F32
from shoal.engine.backends.native import isa_names
from shoal.engine.backends.numba_backend import NumbaExecutor
from shoal.engine.backends.numpy_backend import NumpyExecutor, quantised
from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.model_directory import Model
from shoal.engine.prepared import bind
from shoal.engine.stage import Stage, StageOptions
from shoal.engine.weights import WeightStore

FIXTURES = Path(__file__).parent.parent / "fixtures"


def options(backend: str, threads: int = 1, isa: str = "auto") -> StageOptions:
    return StageOptions(backend=backend, threads=threads, isa=isa, max_wanted=256)


def chain(
    model: Model, cuts: Sequence[int], tokens: Sequence[int], sizes: Sequence[int], o: StageOptions
) -> F32:
    """Logits of all tokens, run through stages cut at `cuts`, in chunks of `sizes` (the last repeats)."""
    edges = [0, *cuts, len(model.program.units)]
    stages = [Stage(model, a, b, o) for a, b in pairwise(edges)]
    for stage in stages:
        stage.open_sequence(0, Sampling(), len(tokens))
    out, at, i = [], 0, 0
    while at < len(tokens):
        part = tokens[at : at + sizes[min(i, len(sizes) - 1)]]
        hidden = None
        for stage in stages:
            (result,) = stage.run([Run(0, at, part, Want.LOGITS, hidden)])
            hidden = result.hidden
        assert result.logits is not None
        out.append(result.logits)
        at, i = at + len(part), i + 1
    for stage in stages:
        stage.close()
    return np.concatenate(out)


@pytest.fixture(scope="module")
def oracle() -> dict[str, np.ndarray]:
    with np.load(FIXTURES / "tiny-llama.npz") as file:
        return dict(file)


@pytest.mark.parametrize("backend", ["numpy", "native", "numba"])
def test_f32_equals_transformers(tiny_f32: Model, oracle: dict[str, np.ndarray], backend: str) -> None:
    tokens = oracle["tokens"].tolist()
    logits = chain(tiny_f32, [], tokens, [200, 7, 1], options(backend))
    assert np.abs(logits - oracle["logits"]).max() <= 1e-3


@pytest.mark.parametrize("backend", ["native", "numba"])
def test_quantised_backends_agree(tiny_quantised: Model, oracle: dict[str, np.ndarray], backend: str) -> None:
    """Sums differ in their last bits, so a value on the edge between two int8 steps may fall to either side,
    and this random model amplifies every such fall. All of them together cost less than rounding the weights
    does; how near the ops are to each other one by one is tested in tests/kernels, and below."""
    tokens = oracle["tokens"].tolist()[:64]
    numpy = chain(tiny_quantised, [], tokens, [64], options("numpy"))
    other = chain(tiny_quantised, [], tokens, [64], options(backend))
    cost = np.abs(numpy - oracle["logits"][:64]).mean()
    assert 0 < np.abs(other - numpy).mean() <= 0.5 * cost
    np.testing.assert_allclose(other[0], numpy[0], atol=0.05 * cost)


@pytest.mark.parametrize("name", ["q.weight", "down.weight"])
def test_numba_matmul_equals_numpys(tiny_quantised: Model, name: str) -> None:
    weights = WeightStore(tiny_quantised)
    weights.load(0, tiny_quantised.n_units)
    bound = bind(weights, 0, tiny_quantised.n_units, StageOptions())
    weight = bound.weights[2, name]
    x = quantised(np.random.default_rng(0).standard_normal((5, weight.cols)).astype(np.float32))
    numpy, numba = NumpyExecutor(bound), NumbaExecutor(bound)
    expected = numpy.product(x, numpy.weights[2, name])
    np.testing.assert_allclose(numba.product(x, numba.weights[2, name]), expected, atol=1e-5)
    ids = np.array([0, 15, 16, 30], np.int32)
    np.testing.assert_array_equal(
        numba.rows(numba.weights[2, name], ids), numpy.rows(numpy.weights[2, name], ids)
    )


def test_native_bits_do_not_depend_on_cut_chunks_threads_or_isa(
    tiny: Model, oracle: dict[str, np.ndarray]
) -> None:
    tokens = oracle["tokens"].tolist()
    whole = chain(tiny, [], tokens, [256], options("native", isa="scalar"))
    for isa in isa_names():
        for cuts, sizes, threads in (
            ([], [256], 2),
            ([1], [1, 3, 64, 5], 1),
            ([2, 3], [63, 1, 1, 200], 3),
            ([1, 2, 3, 4], [17], 2),
        ):
            logits = chain(tiny, cuts, tokens, sizes, options("native", threads, isa))
            assert logits.tobytes() == whole.tobytes(), (isa, cuts, sizes, threads)


def test_rows_of_several_sequences_do_not_touch_each_other(tiny: Model) -> None:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 267, n).tolist() for n in (1, 30, 65, 130)]
    n = len(tiny.program.units)
    alone = [chain(tiny, [], prompt, [256], options("native")) for prompt in prompts]
    with Stage(tiny, 0, n, options("native", 2)) as stage:
        for s, prompt in enumerate(prompts):
            stage.open_sequence(s, Sampling(), len(prompt))
        at = [0] * len(prompts)
        got: list[list[F32]] = [[] for _ in prompts]
        while any(at[s] < len(p) for s, p in enumerate(prompts)):
            left = [s for s, p in enumerate(prompts) if at[s] < len(p)]
            batch = []
            for s in rng.permutation(left).tolist()[: int(rng.integers(1, 5))]:
                size = int(rng.integers(1, 40))
                batch.append(Run(s, at[s], prompts[s][at[s] : at[s] + size], Want.LOGITS))
            for result in stage.run(batch):
                assert result.logits is not None
                got[result.sequence].append(result.logits)
                at[result.sequence] += result.rows
    for parts, expected in zip(got, alone, strict=True):
        assert np.concatenate(parts).tobytes() == expected.tobytes()


def test_going_back_gives_the_same_bits(tiny: Model) -> None:
    tokens = list(range(100))
    with Stage(tiny, 0, len(tiny.program.units), options("native")) as stage:
        stage.open_sequence(0, Sampling(), 200)
        stage.run([Run(0, 0, tokens, Want.NOTHING)])
        (first,) = stage.run([Run(0, 70, tokens[70:], Want.LOGITS)])
        stage.run([Run(0, 64, [9, 8, 7], Want.NOTHING)])
        (again,) = stage.run([Run(0, 64, tokens[64:], Want.LOGITS)])
        assert first.logits is not None and again.logits is not None
        assert again.logits[6:].tobytes() == first.logits.tobytes()
