"""What texts are read for: embeddings and classes, from rows, logits of labels and scores that an engine
gives. `shoal.LLM` has the methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from queue import SimpleQueue
from typing import Literal, TypeVar

import numpy as np

from .answering import Engine, Stop, stop_all
from .engine.arrays import F32, F64
from .engine.batch import ReadRequest, Result, Want
from .engine.config import Config
from .engine.errors import ShoalError
from .engine.generate import check_text
from .engine.program import Program
from .engine.tokenizer import Tokenizer
from .results import Classification

Pooling = Literal["mean", "last"]
Labels = Mapping[str, str] | Sequence[str]
Readings = Sequence[tuple[Sequence[int], int]]
"""Texts to read: tokens, and the first row of which something is wanted."""
T = TypeVar("T")
LAST = -1
"""For `read_all`: only the last row of each text."""
PROMPT = "Text: {text}\nLabel:"
PLACE = "{text}"
"""Where a text stands in a prompt for classification."""


def read_all(
    engine: Engine,
    texts: Readings,
    want: Want,
    context: int,
    program: Program,
    each: Callable[[list[Result]], T],
) -> list[T]:
    """What `each` makes of the results of a text, for all texts (tokens, first row); they are read together.
    The first error ends the others and is raised."""
    for tokens, _ in texts:
        check_text(tokens, context, program.vocab)
    items: SimpleQueue[tuple[int, Result | Exception | None]] = SimpleQueue()
    parts: list[list[Result]] = [[] for _ in texts]
    found: dict[int, T] = {}
    stops: list[Stop] = []
    try:
        for i, (tokens, first) in enumerate(texts):
            put = partial(_put, items, i)
            at = len(tokens) - 1 if first == LAST else first
            stops.append(engine.read(ReadRequest(tokens, at, want, context), put))
        while len(found) < len(texts):
            i, item = items.get()
            if isinstance(item, Exception):
                raise item
            if item is not None and item.output is not None and item.output.shape[1] != program.output_cols:
                raise ShoalError(
                    f"a node sent rows of {item.output.shape[1]} columns, and the model's have "
                    f"{program.output_cols}: restart that node with this version of shoal"
                )
            if item is None:
                found[i] = each(parts[i])
                parts[i] = []  # rows of many texts would fill the memory
            else:
                parts[i].append(item)
    finally:
        stop_all(stops)
    return [found[i] for i in range(len(texts))]


def _put(
    items: SimpleQueue[tuple[int, Result | Exception | None]], i: int, item: Result | Exception | None
) -> None:
    items.put((i, item))


def scores_of(results: Sequence[Result]) -> tuple[float, ...]:
    """The log-probabilities of the tokens that were read."""
    return tuple(chain.from_iterable(result.scores for result in results))


def embedding(results: Sequence[Result], pooling: Pooling, normalize: bool) -> F32:
    """One vector `[hidden]` of the rows of a text: their mean, in f64 and in the order of positions, or the
    last one; of length 1 with `normalize`."""
    rows = [result.output for result in results if result.output is not None]
    whole = np.concatenate([row.astype(np.float64) for row in rows])
    vector: F64 = whole[-1] if pooling == "last" else np.add.accumulate(whole)[-1] / len(whole)
    if normalize:
        vector = vector / (np.sqrt(np.sum(vector * vector)) or 1.0)
    return vector.astype(np.float32)


def text_to_classify(tokens: Sequence[int], pad: int | None) -> Sequence[int]:
    """The tokens up to the one whose logits count for a classification head: the last that is no padding, as
    in transformers."""
    end = len(tokens)
    while end > 1 and tokens[end - 1] == pad:
        end -= 1
    return tokens[:end]


def class_by_head(results: Sequence[Result], config: Config, head: F32) -> Classification:
    """What a classification head `[labels, hidden]` makes of the last row: probabilities by softmax, or, of
    labels that do not exclude each other and of a single one, by the logistic function. A head for regression
    gives none. The row has the same bits wherever it was computed, so the head, a small matrix, is applied
    here, in f64, and nodes need not send anything but rows."""
    (row,) = [result.output[-1] for result in results if result.output is not None]
    logits = (head.astype(np.float64) @ row.astype(np.float64)).astype(np.float32).astype(np.float64)
    kind = config.values.get("problem_type")
    if kind == "regression":
        shares = None
    elif kind == "multi_label_classification" or len(logits) == 1:
        shares = 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
    else:
        shares = _softmax(logits)
    return _classification(config.labels, logits, shares)


def class_by_scores(labels: Sequence[str], scores: Sequence[float]) -> Classification:
    """What the log-probabilities of the labels as continuations of one prompt say, by softmax."""
    values = np.array(scores, np.float64)
    return _classification(labels, values, _softmax(values))


def _softmax(values: F64) -> F64:
    shares: F64 = np.exp(values - values.max())
    return shares / math.fsum(shares)


def _classification(labels: Sequence[str], scores: F64, shares: F64 | None) -> Classification:
    order = sorted(range(len(labels)), key=lambda i: -scores[i])
    return Classification(
        labels[order[0]],
        {labels[i]: float(shares[i]) for i in order} if shares is not None else {},
        {labels[i]: float(scores[i]) for i in order},
    )


def continuations(labels: Labels, prompt: str) -> dict[str, str]:
    """By label, the text that is scored for it. Labels of a list follow a space, unless the prompt ends with
    white space. ValueError: fewer than two labels, one that is empty, or a prompt without a place for the
    text."""
    if PLACE not in prompt:
        raise ValueError(f"the prompt {prompt!r} lacks {PLACE}, where each text stands")
    if isinstance(labels, str):
        raise ValueError(f"labels must be a list or a mapping, not the text {labels!r}")
    if isinstance(labels, Mapping):
        found = dict(labels)
    else:
        space = "" if prompt[-1:].isspace() else " "
        found = {label: space + label for label in labels}
        if len(found) < len(labels):
            raise ValueError("a label is given twice")
    if len(found) < 2 or not all(text.strip() for text in found.values()):
        raise ValueError("classify needs at least two labels, none of them empty")
    return found


def classes_by_likelihood(
    read: Callable[[Readings, Want, Callable[[list[Result]], float]], list[float]],
    tokenizer: Tokenizer,
    texts: Sequence[str],
    labels: Labels,
    prompt: str,
    neutral: str | None,
) -> list[Classification]:
    """The labels that each text makes likeliest, as continuations of the prompt with the text in its place.
    From their scores those after the `neutral` text are subtracted. `read`: `read_all` of an engine."""
    told = continuations(labels, prompt)
    ends = [tokenizer.encode(text, special=False) for text in told.values()]
    asked = [*texts, *([] if neutral is None else [neutral])]
    readings = []
    for text in asked:
        before = tokenizer.encode(prompt.replace(PLACE, text))
        if not before:
            raise ShoalError("the prompt is empty: it needs a token before the label")
        readings += [([*before, *end], len(before) - 1) for end in ends]
    sums = read(readings, Want.SCORES, lambda found: math.fsum(scores_of(found)))
    rows = np.array(sums, np.float64).reshape(len(asked), len(told))
    if neutral is not None:
        rows = rows[:-1] - rows[-1]
    return [class_by_scores(list(told), row.tolist()) for row in rows]
