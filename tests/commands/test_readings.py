"""`LLM.embed` and `LLM.classify`: what they make of rows, logits of labels and scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models import SPECIAL, tiny_chat_checkpoint, tiny_chat_model
from tests.weights.checkpoints import HEAD, change_config, rewrite, tensors

from shoal import LLM, Classification
from shoal.cli import main
from shoal.engine.batch import ReadRequest, Result, Run, Want
from shoal.engine.convert import convert
from shoal.engine.errors import ContextError, ShoalError, UnsupportedModelError
from shoal.engine.stage import Stage
from shoal.processes import NodeSpec, nodes

TEXTS = ["The tide is out.", "a", "Nets hang in the wind, and the gulls wait for what falls from them. " * 3]
PAD = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("readings"))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    with LLM(directory, threads=1) as opened:
        yield opened


def classifier(folder: Path, **values: Any) -> Path:
    """The tiny checkpoint with a head of three labels, converted to int8."""
    source = tiny_chat_checkpoint(folder / "source")
    labels = values.get("id2label", {"0": "calm", "1": "glad", "2": "sad"})
    said = {"architectures": ["LlamaForSequenceClassification"], "id2label": labels, "pad_token_id": PAD}
    change_config(source, **{**said, **values})
    weights = {name: values for name, values in tensors(source).items() if name != HEAD}
    random = np.random.default_rng(3).standard_normal((len(labels), 72))
    rewrite(source, {**weights, "score.weight": (random / 8).astype(np.float32)})
    convert(source, folder / "classifier")
    return folder / "classifier"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("classifier"))


def rows_of(llm: LLM, text: str) -> np.ndarray:
    """Rows of the final norm by the engine alone."""
    tokens = llm.tokenize(text)
    with Stage(llm.model, 0, llm.model.n_units) as stage:
        stage.open_sequence(0)
        (result,) = stage.run([Run(0, 0, tokens, Want.ROWS)])
    assert result.output is not None
    return result.output.astype(np.float64)


def test_embeddings_are_of_the_rows_of_the_final_norm(llm: LLM) -> None:
    rows = [rows_of(llm, text) for text in TEXTS]
    for pooling, vectors in (("mean", [r.mean(axis=0) for r in rows]), ("last", [r[-1] for r in rows])):
        plain = llm.embed(TEXTS, pooling=pooling, normalize=False)  # type: ignore[arg-type]
        assert plain.shape == (3, llm.model.program.cut_cols)
        assert plain.dtype == np.float32
        np.testing.assert_allclose(plain, vectors, rtol=1e-6, atol=1e-6)
        unit = llm.embed(TEXTS, pooling=pooling)  # type: ignore[arg-type]
        np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5)


def test_a_list_has_the_bits_of_its_texts_alone(llm: LLM) -> None:
    together = llm.embed(TEXTS * 6)
    for i, text in enumerate(TEXTS * 6):
        alone = llm.embed(text)
        assert alone.shape == together.shape[1:]
        assert alone.tobytes() == together[i].tobytes()
    assert llm.embed([]).shape == (0, llm.model.program.cut_cols)


def test_texts_that_cannot_be_read(llm: LLM) -> None:
    with pytest.raises(ContextError, match="the context holds"):
        llm.embed(["fine", "x" * (llm.context + 1)])
    with pytest.raises(ContextError, match="empty"):
        llm.embed("")
    with pytest.raises(ValueError, match="'mean' or 'last'"):
        llm.embed("a", pooling="max")  # type: ignore[arg-type]
    assert llm.embed("still here").shape == (llm.model.program.cut_cols,)


def test_labels_are_scored_as_continuations(llm: LLM) -> None:
    prompt = "Text: {text}\nMood:"
    found = llm.classify(TEXTS, ["calm", "glad", "sad"], prompt=prompt)
    for text, one in zip(TEXTS, found, strict=True):
        asked = prompt.replace("{text}", text)
        scores = {label: llm.score(f" {label}", prompt=asked).logprob for label in ("calm", "glad", "sad")}
        assert one.scores == pytest.approx(scores, abs=1e-5)
        total = sum(np.exp(score) for score in scores.values())
        assert one.probabilities == pytest.approx({k: np.exp(v) / total for k, v in scores.items()}, abs=1e-5)
        assert list(one.probabilities) == sorted(scores, key=lambda label: -scores[label])
        assert one.label == next(iter(one.scores)) == next(iter(one.probabilities))
    assert llm.classify(TEXTS[0], ["calm", "glad", "sad"], prompt=prompt) == found[0]
    assert llm.classify([], ["a", "b"]) == []


def test_a_mapping_says_how_labels_continue(llm: LLM) -> None:
    made = llm.classify(TEXTS[0], {"good": "+", "bad": "-"}, prompt="{text}\n")
    assert isinstance(made, Classification)
    plain = {k: llm.score(v, prompt=f"{TEXTS[0]}\n").logprob for k, v in (("good", "+"), ("bad", "-"))}
    assert made.scores == pytest.approx(plain, abs=1e-5)
    listed = llm.classify(TEXTS[0], ["+", "-"], prompt="{text}\n")  # no space after white space
    assert list(listed.scores.values()) == list(made.scores.values())


def test_a_neutral_text_is_subtracted(llm: LLM) -> None:
    labels = ["calm", "glad"]
    plain, nothing = llm.classify([TEXTS[0], "N/A"], labels)
    made = llm.classify(TEXTS[0], labels, neutral="N/A")
    assert made.scores == pytest.approx({k: plain.scores[k] - nothing.scores[k] for k in labels}, abs=1e-9)
    assert sum(made.probabilities.values()) == pytest.approx(1)
    assert llm.classify("N/A", labels, neutral="N/A").probabilities == pytest.approx(
        dict.fromkeys(labels, 0.5)
    )


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (None, {}, "no classification head: give classify the labels"),
        (["one"], {}, "at least two labels"),
        (["one", ""], {}, "none of them empty"),
        ({"a": "x", "b": " "}, {}, "none of them empty"),
        (["one", "one"], {}, "twice"),
        ("one", {}, "must be a list or a mapping"),
        (["a", "b"], {"prompt": "which?"}, r"lacks \{text\}"),
    ],
)
def test_questions_without_sense(llm: LLM, labels: Any, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.classify("a text", labels, **options)


def test_a_classification_head_has_its_labels(labelled: Path) -> None:
    with LLM(labelled, threads=1) as llm:
        head = llm.model.unit_weights(llm.model.n_units - 1)["score.weight"].data
        for text, one in zip(TEXTS, llm.classify(TEXTS), strict=True):
            logits = dict(zip(llm.model.config.labels, head @ rows_of(llm, text)[-1], strict=True))
            assert one.scores == pytest.approx(logits, abs=1e-4)
            shares = np.exp(list(logits.values())) / np.exp(list(logits.values())).sum()
            assert one.probabilities == pytest.approx(dict(zip(logits, shares, strict=True)), abs=1e-4)
            assert one.label == max(logits, key=lambda label: logits[label])
        assert llm.classify(TEXTS[0]) == llm.classify(TEXTS)[0]
        padded = TEXTS[0] + SPECIAL[PAD] * 2
        assert llm.tokenize(padded)[-2:] == [PAD, PAD]
        assert llm.classify(padded) == llm.classify(TEXTS[0])
        with pytest.raises(ValueError, match="labels of its own: calm, glad, sad"):
            llm.classify(TEXTS, ["a", "b"])
        assert llm.embed(TEXTS).shape == (3, llm.model.program.cut_cols)


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ({"problem_type": "multi_label_classification"}, None),
        ({"problem_type": "single_label_classification"}, 1.0),
        ({"problem_type": "regression"}, 0.0),
        ({"id2label": {"0": "reward"}}, None),
    ],
)
def test_kinds_of_heads(values: dict[str, Any], total: float | None, tmp_path: Path) -> None:
    with LLM(classifier(tmp_path, **values), threads=1) as llm:
        made = llm.classify(TEXTS[0])
    assert list(made.scores) == sorted(made.scores, key=lambda label: -made.scores[label])
    if total is None:
        logistic = {label: 1 / (1 + np.exp(-score)) for label, score in made.scores.items()}
        assert made.probabilities == pytest.approx(logistic)
    else:
        assert sum(made.probabilities.values()) == pytest.approx(total)


def test_a_classifier_answers_nothing_and_goes_on(labelled: Path) -> None:
    with LLM(labelled, threads=1) as llm:
        for ask in (
            lambda: llm.generate("a"),
            lambda: llm.generate("a", stream=True),
            lambda: llm.chat("a"),
            lambda: llm.session(),
            lambda: llm.score("a text"),
        ):
            with pytest.raises(
                UnsupportedModelError, match=r"classification head \(3 labels\) and no LM head"
            ):
                ask()
        assert llm.classify(TEXTS[0]).label in ("calm", "glad", "sad")


@pytest.mark.parametrize(
    "command", [["run", "MODEL", "a"], ["bench", "MODEL", "-r", "1"], ["export-c", "MODEL", "-o", "OUT"]]
)
def test_commands_that_need_an_lm_head_say_so(
    command: list[str], labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"MODEL": str(labelled), "OUT": str(tmp_path / "out")}
    assert main([known.get(word, word) for word in command]) != 0
    assert "no LM head, so it generates no text" in capsys.readouterr().err


def test_profile_and_plan_take_a_classifier(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "here.json"
    assert main(["profile", str(labelled), "--threads", "1", "--save", str(saved)]) == 0
    assert main(["plan", str(labelled), "--devices", str(saved), "--context", "128"]) == 0
    assert "alone: this plan is " in capsys.readouterr().out


def test_rows_of_another_width_are_refused(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a node that runs something else might send."""
    read = llm._engine.read

    def narrower(request: ReadRequest, put: Any) -> Any:
        def less(item: Any) -> None:
            put(replace(item, output=item.output[:, :-1]) if isinstance(item, Result) else item)

        return read(request, less)

    monkeypatch.setattr(llm._engine, "read", narrower)
    with pytest.raises(ShoalError, match="rows of 71 columns, and the model's have 72"):
        llm.embed(TEXTS)


def test_inspect_and_verify_know_the_head(labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(labelled)]) == 0
    out = capsys.readouterr().out
    assert "a classification head of 3 labels (calm, glad, sad), f32" in out
    assert "score.weight [3, 72]" in out
    assert main(["inspect", str(labelled), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["calm", "glad", "sad"]
    assert main(["verify", str(labelled)]) == 0


@pytest.mark.slow
def test_nodes_give_the_same_embeddings_and_classes(directory: Path, labelled: Path, tmp_path: Path) -> None:
    """Bit for bit, for a model with an LM head and for one with a classification head."""
    for model in (directory, labelled):
        specs = [NodeSpec(f"n{i}", ram_mb=300, options=("--measure-seconds", "0.01")) for i in range(3)]
        (tmp_path / model.name).mkdir()
        with nodes(model, specs, tmp_path / model.name) as running:
            addresses = ["{}:{}".format(*node.address) for node in running]
            with LLM(model, threads=1) as near, LLM(model, nodes=addresses, context=300) as far:
                choices: list[dict[str, Any]] = [{}, {"pooling": "last"}, {"normalize": False}]
                for options in choices:
                    ours, theirs = near.embed(TEXTS, **options), far.embed(TEXTS, **options)
                    assert ours.tobytes() == theirs.tobytes()
                if model == labelled:
                    assert far.classify(TEXTS) == near.classify(TEXTS)
                    with pytest.raises(UnsupportedModelError, match="no LM head"):
                        far.generate("a")
                else:
                    labels = ["calm", "glad", "sad"]
                    assert far.classify(TEXTS, labels, neutral="-") == near.classify(
                        TEXTS, labels, neutral="-"
                    )
