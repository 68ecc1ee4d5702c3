"""The runs of a batch as the rows that an executor computes, checked against their sequences, and the
executor's outcome as their results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .arrays import F32
from .backends.base import BoundProgram, Outcome, SequenceRows
from .batch import MOST_REPORTED, Result, Run, Want
from .errors import ContextError
from .kv import KvRows
from .model_directory import Model
from .sampler import check_allowed
from .transition import OpenSequence


def check_tokens(tokens: Sequence[int] | NDArray[np.int32], model: Model) -> None:
    """ValueError: a token is not in the vocabulary."""
    ids = np.asarray(tokens)
    if len(ids) and (ids.min() < 0 or ids.max() >= model.program.vocab):
        raise ValueError(f"a token id is not in [0, {model.program.vocab})")


def check_inputs(run: Run, state: OpenSequence, model: Model, bound: BoundProgram, units: range) -> None:
    """Checks what a run through these units brings to its sequence. ValueError: it does not fit the sequence
    or the units. ContextError: it exceeds the sequence's context."""
    n, end = len(run.tokens), run.first + len(run.tokens)
    if n == 0 or not 0 <= run.first <= state.length:
        raise ValueError(
            f"sequence {run.sequence} holds {state.length} positions and cannot run {n} rows from "
            f"position {run.first}"
        )
    if end > len(state.tokens):
        raise ContextError(
            f"sequence {run.sequence} would have {end} positions, more than its context of "
            f"{len(state.tokens)}"
        )
    check_tokens(run.tokens, model)
    if run.history is not None:
        if run.history.shape != (end,):
            raise ValueError(f"a history of shape {run.history.shape} is not one of {end} positions")
        check_tokens(run.history, model)
    if run.sampling is not None:
        check_tokens([token for token, _ in run.sampling.bias], model)
    if not bound.reads_tokens:
        width = model.program.cut_cols
        if run.hidden is None or run.hidden.shape != (n, width):
            raise ValueError(
                f"the stage of units [{units.start}, {units.stop}) needs hidden rows of shape ({n}, {width})"
            )


def rows_of(run: Run, state: OpenSequence, kv: KvRows, model: Model, bound: BoundProgram) -> SequenceRows:
    """A run as rows for the executor, whose keys and values are written to `kv`. ValueError: what it wants is
    not possible. UnsupportedModelError: it wants a token, and the model has no LM head."""
    n = len(run.tokens)
    want = run.want if bound.last else Want.NOTHING
    if want in (Want.TOKEN, Want.TOKENS, Want.SCORES):
        model.check_generates()
    wanted = n if want in (Want.LOGITS, Want.TOKENS, Want.SCORES) else int(want is Want.TOKEN)
    given = None
    report = run.report if want in (Want.TOKEN, Want.TOKENS, Want.SCORES) else None
    if report is not None and not 0 <= report <= min(MOST_REPORTED, model.program.vocab):
        raise ValueError(f"log-probabilities of {report} tokens are wanted, more than {MOST_REPORTED}")
    if want is Want.SCORES:
        if run.following is None:
            raise ValueError("scores are wanted, and Run.following is None")
        check_tokens([run.following], model)
        given, report = np.array([*run.tokens[1:], run.following], np.int32), report or 0
    if run.allowed is not None:
        check_allowed(run.allowed, model.program.vocab)
    return SequenceRows(
        *(kv, state.tokens, run.sampling or state.sampling, n, run.first, wanted),
        wanted if want in (Want.TOKEN, Want.TOKENS) else 0,
        report,
        run.allowed if want is Want.TOKEN else None,
        given,
        want is Want.ROWS,
    )


def joined_hidden(batch: Sequence[Run]) -> F32:
    """The hidden rows of all runs: f32 [rows, cols]."""
    arrays = [run.hidden for run in batch if run.hidden is not None]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def results_of(batch: Sequence[Run], rows: Sequence[SequenceRows], outcome: Outcome) -> list[Result]:
    """The result of each run of a batch, in its order."""
    results, row, wanted = [], 0, 0
    for run, item in zip(batch, rows, strict=True):
        hidden = None if outcome.hidden is None else outcome.hidden[row : row + item.rows]
        logits = None
        if run.want is Want.LOGITS and outcome.logits is not None:
            logits = outcome.logits[wanted : wanted + item.wanted]
        told = [outcome.reports[i] for i in range(wanted, wanted + item.wanted) if i in outcome.reports]
        drawn = outcome.drawn[wanted : wanted + item.wanted].tolist() if item.sample else []
        token = drawn.pop() if run.want is Want.TOKEN and drawn else None
        output = None
        if item.output and outcome.output is not None:
            output = outcome.output[row : row + item.rows]
        results.append(
            Result(
                *(run.sequence, run.first, item.rows, hidden, token, logits),
                () if run.report is None else tuple(told),
                tuple(drawn),
                () if item.given is None else tuple(one.drawn for one in told),
                output,
            )
        )
        row, wanted = row + item.rows, wanted + item.wanted
    return results
