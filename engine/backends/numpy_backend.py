"""The NumPy backend: a readable reference in floats, not a fast one.

Agrees with `native` within a stated tolerance (docs/numerics.md), not bit for bit: NumPy's sums have
another order. A q8 buffer holds dequantised f32 values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..batch import Logprobs
from ..errors import CancelledRunError
from ..layout import GROUP, round_up
from ..packing import unpack
from ..program import Angles, Attend, Embed, Gate, HeadNorm, Matmul, Norm, Op, Quantise, Rope, Sample, Store
from ..sampler import draw, report
from .base import CANCELLED, BoundProgram, Outcome, SequenceRows, WeightData


def quantised(x: F32) -> F32:
    """x `[..., cols]` quantised to int8 with one scale per row and group, and dequantised again."""
    cols = x.shape[-1]
    padded = np.zeros((*x.shape[:-1], round_up(cols, GROUP)), np.float32)
    padded[..., :cols] = x
    groups = padded.reshape(*x.shape[:-1], -1, GROUP)
    amax = np.abs(groups).max(axis=-1, keepdims=True)
    inverse = np.where(amax < 1e-30, np.float32(0), np.float32(127) / np.maximum(amax, np.float32(1e-30)))
    q = np.rint(np.clip(groups * inverse, -127, 127))
    values: F32 = (q * (amax / np.float32(127))).reshape(padded.shape)[..., :cols].astype(np.float32)
    return values


class NumpyExecutor:
    """Runs ops one after another on NumPy arrays, by the program's buffer names. See base.Executor."""

    def __init__(self, bound: BoundProgram) -> None:
        self.bound = bound
        self.types = {b.name: b.type for b in bound.program.buffers}
        self.domains = {b.name: b.domain for b in bound.program.buffers}
        self.state_rows = {(unit, state.name): row for row, (unit, state) in enumerate(bound.states)}
        self.weights = {key: self.prepare(weight) for key, weight in bound.weights.items()}
        self.buffers: dict[str, F32] = {}
        self.sequences: Sequence[SequenceRows] = ()
        self.drawn: NDArray[np.int32] = np.empty(0, np.int32)
        self.reports: dict[int, Logprobs] = {}

    def prepare(self, weight: WeightData) -> Any:
        """Converts a weight to the form that this backend's ops read: f32 (or f64) `[rows, cols]`."""
        if weight.scales is None:
            return weight.data
        return unpack(weight.data, weight.scales, weight.mins, weight.rows, weight.cols)

    def run(
        self,
        sequences: Sequence[SequenceRows],
        hidden: F32 | None,
        want_logits: bool,
        cancel: NDArray[np.int32],
    ) -> Outcome:
        """See base.Executor.run."""
        self.sequences = sequences
        self.drawn = np.full(sum(s.wanted for s in sequences), -1, np.int32)
        self.reports = {}
        self.buffers = {}
        program = self.bound.program
        if hidden is not None:
            if not np.isfinite(hidden).all():
                raise FloatingPointError("the incoming activations hold NaN or infinity")
            parts = np.split(
                hidden, np.cumsum([program.buffer(name).cols for name in program.cut])[:-1], axis=1
            )
            self.buffers |= {name: part.copy() for name, part in zip(program.cut, parts, strict=True)}
        wanted, wants_output = any(s.wanted for s in sequences), any(s.output for s in sequences)
        for unit, op in self.bound.ops:
            if cancel[0]:
                raise CancelledRunError(CANCELLED)
            if wants_output if op is program.output else wanted or not self._for_wanted_rows(op):
                self.ops[type(op)](self, unit, op)
        if not self.bound.last:
            cut = np.concatenate([self.buffers[name] for name in program.cut], axis=1)
            return Outcome(cut, None, self.drawn)
        logits = self.buffers[program.logits] if want_logits and wanted else None
        output = None if program.output is None else self.buffers.get(program.output.out)
        if output is not None and not np.isfinite(output).all():
            raise FloatingPointError("the output of the final norm holds NaN or infinity")
        return Outcome(None, logits, self.drawn, self.reports, output)

    def close(self) -> None:
        """Does nothing: there is nothing to free."""

    def _for_wanted_rows(self, op: Op) -> bool:
        return self.domains[op.writes() or op.reads()[0]] == "wanted"

    def _write(self, name: str, value: F32) -> None:
        self.buffers[name] = quantised(value) if self.types[name] == "q8" else value

    def embed(self, unit: int, op: Embed) -> None:
        tokens = np.concatenate([s.history[s.first : s.first + s.rows] for s in self.sequences])
        self._write(op.out, self.rows(self.weights[unit, op.table], tokens))

    def rows(self, weight: Any, tokens: NDArray[np.int32]) -> F32:
        """The rows of an embedding table at the token ids: f32 `[tokens, cols]`."""
        table: F32 = weight[tokens]
        return table

    def angles(self, unit: int, op: Angles) -> None:
        positions = np.concatenate([np.arange(s.first, s.first + s.rows) for s in self.sequences])
        angle = positions[:, None].astype(np.float64) * self.weights[unit, op.inv_freq]
        self._write(op.out, np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32))

    def norm(self, unit: int, op: Norm) -> None:
        x = self.buffers[op.x]
        if self.domains[op.out] == "wanted" and self.domains[op.x] == "rows":
            ends = np.cumsum([s.rows for s in self.sequences])
            x = np.concatenate([x[end - s.wanted : end] for s, end in zip(self.sequences, ends, strict=True)])
        scale = 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + np.float32(op.epsilon))
        self._write(op.out, x * scale * self.weights[unit, op.weight].reshape(1, -1))

    def head_norm(self, unit: int, op: HeadNorm) -> None:
        x = self.buffers[op.out]
        first, last = op.changes()
        heads = x[:, first:last].reshape(len(x), op.heads, op.head_dim)
        scale = 1 / np.sqrt(np.mean(heads * heads, axis=2, keepdims=True) + np.float32(op.epsilon))
        normed = heads * scale * self.weights[unit, op.weight].reshape(1, 1, -1)
        x[:, first:last] = normed.reshape(len(x), -1)

    def quantise(self, unit: int, op: Quantise) -> None:
        self._write(op.out, self.buffers[op.x])

    def matmul(self, unit: int, op: Matmul) -> None:
        x = self.buffers[op.x]
        products = [self.product(x, self.weights[unit, name]) for name in op.weights]
        for i, name in enumerate(op.biases):
            if name is not None:
                products[i] = products[i] + self.weights[unit, name].reshape(1, -1)
        y = products[0] if len(products) == 1 else np.concatenate(products, axis=1)
        self._write(op.out, self.buffers[op.out] + y if op.accumulate else y)

    def product(self, x: F32, weight: Any) -> F32:
        """x @ weight^T."""
        y: F32 = x @ weight.T
        return y

    def rope(self, unit: int, op: Rope) -> None:
        x, angles = self.buffers[op.out], self.buffers[op.angles]
        half = angles.shape[1] // 2
        heads = x[:, : op.heads * op.head_dim].reshape(len(x), op.heads, op.head_dim)
        cos, sin = angles[:, None, :half], angles[:, None, half:]
        a, b = heads[..., :half].copy(), heads[..., half : 2 * half].copy()
        heads[..., :half], heads[..., half : 2 * half] = a * cos - b * sin, b * cos + a * sin

    def store(self, unit: int, op: Store) -> None:
        x, at = self.buffers[op.x], 0
        s = self.state_rows[unit, op.state]
        state = self.bound.states[s][1]
        width = state.kv_heads * state.head_dim
        for sequence in self.sequences:
            rows = x[at : at + sequence.rows]
            shape = (sequence.rows, state.kv_heads, state.head_dim)
            keys, values = rows[:, op.key : op.key + width], rows[:, op.value : op.value + width]
            sequence.kv.write(s, sequence.first, keys.reshape(shape), values.reshape(shape))
            at += sequence.rows

    def attend(self, unit: int, op: Attend) -> None:
        x, at = self.buffers[op.x], 0
        s = self.state_rows[unit, op.state]
        state = self.bound.states[s][1]
        group, outs = op.heads // state.kv_heads, []
        for sequence in self.sequences:
            n, total = sequence.rows, sequence.first + sequence.rows
            queries = x[at : at + n, : op.heads * state.head_dim]
            queries = queries.reshape(n, state.kv_heads, group, state.head_dim).transpose(1, 2, 0, 3)
            keys, values, value_scales = sequence.kv.keys_values(s, total)
            outs.append(self.attention(queries, keys, values, op.scale, value_scales))
            at += n
        self._write(op.out, np.concatenate(outs))

    def attention(
        self, queries: F32, keys: F32, values: F32, scale: float, value_scales: F32 | None = None
    ) -> F32:
        """Causal attention of the last rows: queries `[kv_heads, group, rows, head_dim]`, keys and values
        `[kv_heads, positions, head_dim]`; returns `[rows, kv_heads * group * head_dim]`. With value_scales
        `[kv_heads, positions]` keys and values are int8, so queries and softmax weights are quantised,
        too."""
        rows, total = queries.shape[2], keys.shape[1]
        if value_scales is not None:
            queries = quantised(queries)
        scores = queries @ keys[:, None].transpose(0, 1, 3, 2) * np.float32(scale)
        scores[..., np.arange(total) > np.arange(total - rows, total)[:, None]] = -np.inf
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights = p if value_scales is None else quantised(p * value_scales[:, None, None])
        out = (weights @ values[:, None]) / p.sum(axis=-1, keepdims=True)
        flat: F32 = out.transpose(2, 0, 1, 3).reshape(rows, -1)
        return flat

    def gate(self, unit: int, op: Gate) -> None:
        x = self.buffers[op.x]
        half = x.shape[1] // 2
        gate, up = x[:, :half], x[:, half:]
        if op.activation == "silu":
            with np.errstate(
                over="ignore"
            ):  # exp(-x) may overflow to infinity, and x / infinity is the right 0
                act = gate / (1 + np.exp(-gate))
        else:
            inner = np.float32(np.sqrt(2 / np.pi)) * (gate + np.float32(0.044715) * gate**3)
            act = np.float32(0.5) * gate * (1 + np.tanh(inner))
        self._write(op.out, act * up)

    def sample(self, unit: int, op: Sample) -> None:
        logits, end = self.buffers[op.x], 0
        if not np.isfinite(logits).all():
            raise FloatingPointError("the logits hold NaN or infinity")
        for s in self.sequences:
            end += s.wanted
            for i in range(s.sample if s.given is None else s.wanted):
                row, position = end - 1 - i, s.first + s.rows - i
                if s.given is not None:
                    self.drawn[row] = s.given[s.wanted - 1 - i]
                else:
                    before = s.history[:position]
                    self.drawn[row] = draw(logits[row], s.sampling, before, position, s.allowed)
                if s.report is not None:
                    self.reports[row] = report(logits[row], int(self.drawn[row]), s.report)

    ops: ClassVar[dict[type[Any], Callable[[Any, int, Any], None]]] = {
        Embed: embed,
        Angles: angles,
        Norm: norm,
        HeadNorm: head_norm,
        Quantise: quantise,
        Matmul: matmul,
        Rope: rope,
        Store: store,
        Attend: attend,
        Gate: gate,
        Sample: sample,
    }
