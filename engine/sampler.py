"""The sampler in NumPy, with the rules of `csrc/sample.c`: for the backends without C, and as the reference
in tests.

A draw is a pure function of logits, parameters, token history and (seed, position), so a replay draws the
same token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from .arrays import F32
from .batch import Logprobs, Sampling

Allow = Callable[[Sequence[int]], Collection[int] | None]
"""The tokens that may follow those of an answer so far; None: all. It is called before each token is drawn,
perhaps again with the same tokens, and other answers wait meanwhile. What it raises ends the answer."""

_MASK = (1 << 64) - 1


def uniform(seed: int, position: int) -> float:
    """A uniform number in [0, 1) with 53 bits, from (seed, position) alone, by SplitMix64's finaliser
    (Steele et al., 2014)."""
    z = _mix((seed + 0x9E3779B97F4A7C15) & _MASK)
    z = _mix((z ^ position) + 0x9E3779B97F4A7C15 & _MASK)
    return (z >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def draw(
    logits: F32,
    sampling: Sampling,
    history: NDArray[np.int32],
    position: int,
    allowed: NDArray[np.uint8] | None = None,
) -> int:
    """The token at `position`, from logits `[vocab]` and the earlier tokens `history`; `allowed` as in
    batch.Run.

    Biases, penalties and the mask, then temperature (0: the largest logit, ties to the lowest id), top-k,
    top-p over the remaining tokens, min-p against the largest; then inverse transform sampling."""
    logits = logits.astype(np.float32)
    for token, bias in sampling.bias:
        logits[token] += np.float32(bias)
    if sampling.penalises:
        seen, counts = np.unique(history, return_counts=True)
        penalty = np.float32(sampling.repetition_penalty)
        changed = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        often = np.float32(sampling.frequency_penalty) * counts.astype(np.float32)
        logits[seen] = changed - (np.float32(sampling.presence_penalty) + often)
    if allowed is not None:
        logits[~allowed_tokens(allowed, len(logits))] = -np.inf
    if sampling.temperature == 0:
        return int(np.argmax(logits))
    logits /= np.float32(sampling.temperature)
    truncated = sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
    # A stable sort keeps equal logits in the order of their ids.
    ids = np.argsort(-logits, kind="stable") if truncated else np.arange(len(logits))
    if sampling.top_k:
        ids = ids[: sampling.top_k]
    p = np.exp(logits[ids] - logits.max()).astype(np.float64)
    if sampling.top_p < 1:
        keep = int(np.searchsorted(np.cumsum(p), sampling.top_p * p.sum())) + 1
        ids, p = ids[:keep], p[:keep]
    if sampling.min_p > 0:
        keep = int(np.count_nonzero(p >= sampling.min_p * p[0]))
        ids, p = ids[:keep], p[:keep]
    cumulative = np.cumsum(p)
    at = int(np.searchsorted(cumulative, uniform(sampling.seed, position) * cumulative[-1], side="right"))
    return int(ids[min(at, len(ids) - 1)])


def report(logits: F32, drawn: int, count: int) -> Logprobs:
    """The log-probabilities of the drawn token and of the `count` likeliest, from logits `[vocab]`."""
    values = logits.astype(np.float64) - float(logits.max())
    values = (values - np.log(np.exp(values).sum())).astype(np.float32)
    likeliest = np.argsort(-logits, kind="stable")[:count].tolist()
    return Logprobs(float(values[drawn]), tuple((i, float(values[i])) for i in likeliest))


def allowed_tokens(allowed: NDArray[np.uint8], vocab: int) -> NDArray[np.bool_]:
    """The mask of allowed tokens `[vocab]`, from its bits."""
    return np.unpackbits(allowed, count=vocab, bitorder="little").astype(bool)


def mask_of(tokens: Collection[int], vocab: int) -> NDArray[np.uint8]:
    """The bits of a mask that allows these tokens. ValueError: there are none, or one is not in the
    vocabulary."""
    ids = tokens if isinstance(tokens, np.ndarray) else np.fromiter(tokens, np.int64, len(tokens))
    if not len(ids):
        raise ValueError("no token may follow: allow at least one")
    if ids.min() < 0 or ids.max() >= vocab:
        raise ValueError(f"a token that may follow is not in [0, {vocab})")
    mask = np.zeros(vocab, bool)
    mask[ids] = True
    return np.packbits(mask, bitorder="little")


def check_allowed(allowed: NDArray[np.uint8], vocab: int) -> None:
    """ValueError: this is no mask of `vocab` tokens, or allows none."""
    if allowed.dtype != np.uint8 or allowed.shape != (-(-vocab // 8),) or not allowed.flags.c_contiguous:
        raise ValueError(f"a mask of {vocab} tokens is uint8 of shape ({-(-vocab // 8)},)")
    if not allowed_tokens(allowed, vocab).any():
        raise ValueError("the mask allows no token")
