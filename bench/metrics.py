"""Plain measures of texts: chrF of translations and ROUGE-L of summaries, as sacrebleu and rouge-score define
them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

ORDER = 6
"""The longest n-gram of chrF, in characters."""
_BETA2 = 2.0**2


def chrf(made: Sequence[str], wanted: Sequence[str]) -> float:
    """chrF2 of a corpus, from 0 to 100: the F-score of n-grams of characters without white space, recall
    counting twice. Equals sacrebleu's CHRF with its defaults."""
    precision, recall, orders = 0.0, 0.0, 0
    for n in range(1, ORDER + 1):
        pairs = [(_grams(a, n), _grams(b, n)) for a, b in zip(made, wanted, strict=True)]
        same = sum((a & b).total() for a, b in pairs)
        given = sum(a.total() for a, b in pairs if b)  # a reference that is shorter than n counts for nothing
        there = sum(b.total() for _, b in pairs)
        if given and there:
            precision, recall, orders = precision + same / given, recall + same / there, orders + 1
    if not precision or not recall:
        return 0.0
    return 100 / orders * (1 + _BETA2) * precision * recall / (_BETA2 * precision + recall)


def _grams(text: str, n: int) -> Counter[str]:
    letters = "".join(text.split())
    return Counter(letters[i : i + n] for i in range(len(letters) - n + 1))


def rouge_l(made: str, wanted: str) -> float:
    """ROUGE-L, from 0 to 1: the F1-score of the longest common subsequence of words. Equals rouge-score's
    rougeL without stemming."""
    a, b = (re.findall(r"[a-z0-9]+", text.lower()) for text in (made, wanted))
    common = _longest(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _longest(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        before = row[:]
        for j, other in enumerate(b):
            row[j + 1] = before[j] + 1 if word == other else max(row[j], before[j + 1])
    return row[-1]
