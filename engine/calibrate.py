"""Measures the size of each input channel of each matmul, during conversion, for quantisation.

The float program runs over a short text, one unit at a time, on the `numpy` backend in float64. Machines
differ in the order of their sums, but the sizes, once rounded, must be equal on all of them; otherwise equal
checkpoints would get different model hashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .arrays import F32, F64
from .backends.base import BoundProgram, SequenceRows, WeightData
from .backends.numpy_backend import NumpyExecutor
from .batch import Sampling
from .kv import PagePool, SequenceKv
from .program import Attend, Matmul, Program, Sample, Store

_MAX_ROWS = 256
_CHUNK = 1 << 21  # elements of a weight that are converted to f64 at a time

# Prose, dialogue, numbers, code, lists and other scripts: the text should be varied; its subject does not
# matter.
TEXT = """The ferry was late, so the passengers talked. An old engineer explained how the bridge had been
built in 1932: two towers, 141 metres apart. "And before that?" asked the girl.

def mean(values):
    total = 0.0
    for i, value in enumerate(values):
        total += value  # not weighted
    return total / max(len(values), 1)

Question: Why does ice float on water?
Answer: Water expands when it freezes, so a litre of ice weighs less than a litre of water.

1. Peel the onions, and cut them into thin rings.
2. Heat 30 g of butter; fry them slowly.

Le vent se lève. Der Zug fährt um 14:35 Uhr ab. Сегодня хорошая погода. 今日は雨。 See https://example.org/a?b=c.
{"name": "heron", "weight_kg": 1.7, "tags": ["bird", "wader"]}"""


@dataclass(frozen=True, slots=True)
class _Float:
    """An f32 weight in memory, with the interface `WeightData`."""

    data: F32
    rows: int
    cols: int
    scales: None = None
    mins: None = None


class Calibration:
    """The run of one text through a model, unit by unit."""

    def __init__(self, program: Program, tokens: list[int]) -> None:
        """`program` is a float program, as families build it; `tokens` is the text."""
        self.program = program
        self._tokens = np.array(tokens[:_MAX_ROWS], np.int32)
        self.hidden: Any = None
        """Output of the last unit that ran, which is the next unit's input: f64 `[tokens, cut]`."""
        self._constants = {name: np.array(values) for name, values in program.constants}

    def run(self, u: int, weights: Mapping[str, F32]) -> dict[tuple[str, ...], F64]:
        """Runs unit u, which must follow the unit of the previous call. Returns, for each matmul by the names
        of its weights, the root mean square of every column of its input. Logits are not computed."""
        unit, last = self.program.units[u], u == len(self.program.units) - 1
        bound_weights: dict[tuple[int, str], WeightData] = {
            (u, w.name): _Float(weights[w.name], w.rows, w.cols) for w in unit.weights if w.name in weights
        }
        for name, values in self._constants.items():
            bound_weights[-1, name] = _Float(values, 1, values.size)
        ops = tuple(self.program.ops(u, u + 1))
        bound = BoundProgram(
            program=self.program,
            ops=ops,
            weights=bound_weights,
            states=tuple((u, state) for state in unit.states),
            kv_type="f32",
            reads_tokens=u == 0,
            last=last,
            max_rows=len(self._tokens),
            max_wanted=len(self._tokens),
        )
        executor = _Recorder(bound)
        rows = len(self._tokens)
        nothing = SequenceKv(PagePool("f32"), (), 0)
        sequence = SequenceRows(nothing, self._tokens, Sampling(), rows, 0, rows if last else 0, 0)
        self.hidden = executor.run([sequence], self.hidden, False, np.zeros(1, np.int32)).hidden
        return executor.sizes


class _Recorder(NumpyExecutor):
    """The numpy backend in float64, which does not round keys and values, and records the sizes of matmul
    inputs."""

    def __init__(self, bound: BoundProgram) -> None:
        super().__init__(bound)
        self.sizes: dict[tuple[str, ...], F64] = {}
        self._kept: dict[str, tuple[F64, F64]] = {}

    def _write(self, name: str, value: Any) -> None:
        self.buffers[name] = value.astype(np.float64)

    def matmul(self, unit: int, op: Matmul) -> None:
        x = self.buffers[op.x].astype(np.float64)
        self.sizes[op.weights] = np.sqrt(np.mean(x * x, axis=0))
        if self.domains[op.out] != "wanted":
            super().matmul(unit, op)

    def sample(self, unit: int, op: Sample) -> None:
        """Does nothing, since logits are not computed."""

    def product(self, x: Any, weight: Any) -> Any:
        out = np.empty((len(x), len(weight)))
        step = max(1, _CHUNK // weight.shape[1])
        for first in range(0, len(weight), step):
            out[:, first : first + step] = x @ weight[first : first + step].astype(np.float64).T
        return out

    def store(self, unit: int, op: Store) -> None:
        state = self.bound.states[self.state_rows[unit, op.state]][1]
        x, width = self.buffers[op.x], state.kv_heads * state.head_dim

        def heads(at: int) -> F64:
            columns: Any = x[:, at : at + width].reshape(-1, state.kv_heads, state.head_dim)
            # Contiguous, because NumPy multiplies other stacks of matrices without BLAS.
            return np.ascontiguousarray(columns.transpose(1, 0, 2))

        self._kept[op.state] = heads(op.key), heads(op.value)

    def attend(self, unit: int, op: Attend) -> None:
        state = self.bound.states[self.state_rows[unit, op.state]][1]
        x, group = self.buffers[op.x], op.heads // state.kv_heads
        queries = x[:, : op.heads * state.head_dim].reshape(-1, state.kv_heads, group, state.head_dim)
        queries = np.ascontiguousarray(queries.transpose(1, 2, 0, 3))
        keys, values = self._kept[op.state]
        out: Any = self.attention(queries, keys, values, op.scale)  # type: ignore[arg-type]
        self._write(op.out, out)

    ops: ClassVar[dict[type[Any], Callable[[Any, int, Any], None]]] = {
        **NumpyExecutor.ops,
        Matmul: matmul,
        Store: store,
        Attend: attend,
        Sample: sample,
    }


def pseudo_tokens(vocab: int) -> list[int]:
    """Token ids for a checkpoint without a tokenizer: spread over the vocabulary and always the same."""
    return [i * 2654435761 % vocab for i in range(1, _MAX_ROWS + 1)]
