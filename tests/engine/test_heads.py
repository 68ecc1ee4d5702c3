"""Rows of the final norm (Want.ROWS) and classification heads, on every backend, cut and kernel set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tests import families
from tests.families import LABELS, TOKENS

from shoal.engine.arrays import F32
from shoal.engine.backends.native import isa_names
from shoal.engine.batch import Result, Run, Sampling, Want
from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.convert import convert
from shoal.engine.errors import ModelFileError, ShoalError, UnsupportedModelError
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

BACKENDS = ["native", "numpy", "numba"]
CLASSIFIERS = ["llama-biases", "mistral-window", "qwen2-tied", "qwen3"]


def results(
    model: Model,
    cuts: Sequence[int],
    tokens: Sequence[int],
    sizes: Sequence[int],
    want: Want,
    o: StageOptions,
) -> list[Result]:
    """What a chain of stages cut at `cuts` gives for the tokens, in chunks of `sizes` (the last repeats)."""
    stages = [Stage(model, a, b, o) for a, b in pairwise([0, *cuts, model.n_units])]
    for stage in stages:
        stage.open_sequence(0, Sampling(), len(tokens))
    found, at, i = [], 0, 0
    while at < len(tokens):
        part = tokens[at : at + sizes[min(i, len(sizes) - 1)]]
        hidden = None
        for stage in stages:
            (result,) = stage.run([Run(0, at, part, want, hidden)])
            hidden = result.hidden
        found.append(result)
        at, i = at + len(part), i + 1
    for stage in stages:
        stage.close()
    return found


def rows_of(
    model: Model, cuts: Sequence[int], tokens: Sequence[int], sizes: Sequence[int], o: StageOptions
) -> F32:
    outputs = [result.output for result in results(model, cuts, tokens, sizes, Want.ROWS, o)]
    return np.concatenate([output for output in outputs if output is not None])


def head_of(model: Model, name: str) -> F32:
    weight = model.unit_weights(model.n_units - 1)[name]
    assert weight.data.dtype == np.float32
    return weight.data


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A case with a classification head, in a type. Each is made once."""
    found: dict[tuple[str, str], Model] = {}
    folder = tmp_path_factory.mktemp("heads")

    def make(name: str, dtype: str) -> Model:
        if (name, dtype) not in found:
            source = folder / name
            if not source.exists():
                families.write_classifier(name, source)
            convert(source, folder / f"{name}-{dtype}", dtype=dtype)
            found[name, dtype] = Model.open(folder / f"{name}-{dtype}")
        return found[name, dtype]

    return make


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_what_the_head_reads(tiny_f32: Model, backend: str) -> None:
    o = StageOptions(backend, threads=1, max_wanted=256)
    rows = rows_of(tiny_f32, [], TOKENS[:70], [50, 7, 1], o)
    assert rows.shape == (70, tiny_f32.program.cut_cols)
    logits = [result.logits for result in results(tiny_f32, [], TOKENS[:70], [70], Want.LOGITS, o)]
    assert logits[0] is not None
    np.testing.assert_allclose(rows @ head_of(tiny_f32, "head.weight").T, logits[0], atol=1e-4)


def test_rows_have_the_same_bits_on_every_set_and_cut(tiny: Model) -> None:
    whole = rows_of(tiny, [], TOKENS[:80], [80], StageOptions("native", isa="scalar", threads=1))
    assert np.abs(whole).max() > 0
    for isa in isa_names():
        for cuts, sizes, threads in (([], [80], 2), ([1, 3], [1, 30, 5], 1), ([4], [17], 3)):
            o = StageOptions("native", isa=isa, threads=threads, max_wanted=1)  # rows need no logits
            assert rows_of(tiny, cuts, TOKENS[:80], sizes, o).tobytes() == whole.tobytes(), (isa, cuts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantised_rows_agree_with_floats(tiny_int8: Model, tiny_f32: Model, backend: str) -> None:
    o = StageOptions(backend, threads=1)
    floats, ours = (rows_of(model, [], TOKENS[:40], [40], o) for model in (tiny_f32, tiny_int8))
    cosines = (floats * ours).sum(1) / np.linalg.norm(floats, axis=1) / np.linalg.norm(ours, axis=1)
    assert cosines.mean() > 0.99


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_batch_may_want_rows_tokens_logits_and_nothing(tiny_int8: Model, backend: str) -> None:
    wants = [Want.ROWS, Want.TOKEN, Want.LOGITS, Want.NOTHING, Want.ROWS]
    runs = [Run(i, 0, TOKENS[9 * i : 9 * i + 4 + i], want) for i, want in enumerate(wants)]
    with Stage(tiny_int8, 0, tiny_int8.n_units, StageOptions(backend, threads=1)) as stage:
        for run in runs:
            stage.open_sequence(run.sequence)
        together = stage.run(runs)
        alone = [stage.run([run])[0] for run in runs]
    for run, one, other in zip(runs, together, alone, strict=True):
        given = [one.output is not None, one.token is not None, one.logits is not None]
        assert given == [run.want is want for want in (Want.ROWS, Want.TOKEN, Want.LOGITS)]
        assert (one.token, one.rows) == (other.token, len(run.tokens))
        for mine, theirs in ((one.output, other.output), (one.logits, other.logits)):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert len(mine) == len(run.tokens)
                np.testing.assert_allclose(mine, theirs, atol=0 if backend == "native" else 1e-5)


def test_rows_that_are_not_finite_are_an_error(tiny_f32: Model) -> None:
    for backend in BACKENDS:
        with Stage(tiny_f32, 4, 5, StageOptions(backend, threads=1)) as last:
            last.open_sequence(0)
            large = np.full((2, tiny_f32.program.cut_cols), 3e38, np.float32)
            large[0] = 1
            with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="NaN or infinity"):
                last.run([Run(0, 0, [1, 2], Want.ROWS, np.where(large > 2, np.inf, large))])


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("dtype", ["f32", "int8", "int4"])
def test_a_classification_head_gives_logits_of_labels(classifiers: Any, name: str, dtype: str) -> None:
    model = classifiers(name, dtype)
    assert model.config.labels == LABELS
    assert (model.program.labels, model.program.logit_cols, model.program.vocab) == (3, 3, 267)
    scores = head_of(model, "score.weight")
    for backend in BACKENDS:
        o = StageOptions(backend, threads=1, max_wanted=64)
        rows = rows_of(model, [], TOKENS[:50], [50], o)
        (result,) = results(model, [], TOKENS[:50], [50], Want.LOGITS, o)
        assert result.logits is not None
        np.testing.assert_allclose(result.logits, rows @ scores.T, atol=2e-5)


def test_logits_of_labels_have_the_same_bits_on_every_set_and_cut(classifiers: Any) -> None:
    model = classifiers("qwen3", "int8")
    o = StageOptions("native", isa="scalar", threads=1, max_wanted=64)
    (whole,) = results(model, [], TOKENS[:60], [60], Want.LOGITS, o)
    assert whole.logits is not None
    for isa in isa_names():
        o = StageOptions("native", isa=isa, threads=2, max_wanted=64)
        parts = [result.logits for result in results(model, [2, 4], TOKENS[:60], [40, 1], Want.LOGITS, o)]
        assert (
            np.concatenate([part for part in parts if part is not None]).tobytes() == whole.logits.tobytes()
        )


def test_the_head_stays_as_it_is_in_the_checkpoint(classifiers: Any, tmp_path: Path) -> None:
    source = open_checkpoint(families.write_classifier("qwen2-tied", tmp_path / "source"))
    for dtype in ("f32", "int8", "int4"):
        model = classifiers("qwen2-tied", dtype)
        np.testing.assert_array_equal(head_of(model, "score.weight"), source.tensor("score.weight"))
        assert model.program.units[0].weights[0].type == {"f32": "f32", "int8": "q8", "int4": "q4"}[dtype]
        assert list(model.verify())


def test_a_classifier_draws_no_tokens(classifiers: Any) -> None:
    model = classifiers("qwen3", "int8")
    with Stage(model, 0, model.n_units, StageOptions(threads=1)) as stage:
        with pytest.raises(UnsupportedModelError, match=r"classification head \(3 labels\).*LLM.classify"):
            list(generate(stage, TOKENS[:5], max_tokens=2))
        stage.open_sequence(0)
        with pytest.raises(UnsupportedModelError, match="no LM head"):
            stage.run([Run(0, 0, TOKENS[:5], Want.TOKEN)])
        with pytest.raises(ValueError, match=r"not in \[0, 267\)"):
            stage.run([Run(0, 0, [267], Want.ROWS)])


def test_a_rehearsal_of_a_classifier_ends_nothing(classifiers: Any) -> None:
    """It wants no token, which such a model cannot draw."""
    model = classifiers("qwen3", "int8")
    with Stage(model, 0, model.n_units, StageOptions("native", threads=1)) as stage:
        stage.open_sequence(0, Sampling())
        (before,) = stage.run([Run(0, 0, [1, 2, 3], Want.LOGITS)])
        stage.rehearse(0)
        (after,) = stage.run([Run(0, 0, [1, 2, 3], Want.LOGITS)])
        assert before.logits is not None and np.array_equal(before.logits, after.logits)


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ({"id2label": None}, ("LABEL_0", "LABEL_1")),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"id2label": {"0": "score"}, "problem_type": "regression"}, ("score",)),
    ],
)
def test_names_of_labels(values: dict[str, Any], labels: tuple[str, ...], tmp_path: Path) -> None:
    convert(
        families.write_classifier("llama", tmp_path / "source", **values), tmp_path / "model", dtype="f32"
    )
    model = Model.open(tmp_path / "model")
    assert (model.config.labels, model.program.labels) == (labels, len(labels))


@pytest.mark.parametrize(
    "names", [{}, {"0": "a", "2": "b"}, {"0": "a", "1": "a"}, {"0": 1}, {"0": ""}, [["a"]], "a"]
)
def test_labels_without_distinct_names_are_refused(names: Any, tmp_path: Path) -> None:
    source = families.write_classifier("llama", tmp_path / "source")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(json.dumps({**json.loads(text), "id2label": names}))
    with pytest.raises(ModelFileError, match="id2label must name the labels 0, 1, 2 … differently"):
        convert(source, tmp_path / "model")


def test_a_head_of_another_size_and_a_type_for_it_are_refused(tmp_path: Path) -> None:
    source = families.write_classifier("llama", tmp_path / "source", num_labels=3)
    with pytest.raises(ShoalError, match="omit --head-dtype"):
        convert(source, tmp_path / "model", dtype="int4", head_dtype="int8")
    other = families.write_classifier("llama", tmp_path / "other", id2label={"0": "a", "1": "b"})
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    tensors["score.weight"] = np.zeros((5, 72), np.float32)
    safetensors.numpy.save_file(tensors, other / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"'score.weight' has the shape \(5, 72\), and \(2, 72\)"):
        convert(other, tmp_path / "model")
