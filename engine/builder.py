"""Builds a float program op by op. Families use it to describe their layers; it infers buffer widths.

A tensor has a name in the model directory and one in a Hugging Face checkpoint: `("q", "self_attn.q_proj")`
is the weight `q.weight` of the unit, from `self_attn.q_proj.weight` of its layer in the checkpoint. The
caller names buffers; all layers use the same names, so that they share memory. Types other than f32 are set
later, by the pass `typed`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from .program import (
    Angles,
    Attend,
    Buffer,
    Domain,
    Embed,
    Gate,
    HeadNorm,
    KvState,
    Matmul,
    Norm,
    Op,
    Program,
    Rope,
    Sample,
    Store,
    Unit,
    Weight,
)

Names = tuple[str, str]
"""The names of a tensor in the model directory and in the checkpoint, both without `.weight`."""


class Builder:
    """A program under construction. Methods that compute append ops to the current unit and return the name
    of the buffer that they write."""

    def __init__(self, *, ignored: Sequence[str] = ()) -> None:
        """`ignored`: patterns (fnmatch) of tensors that a checkpoint may have and the program does not
        use."""
        self._ignored = tuple(ignored)
        self._prologue: list[Op] = []
        self._constants: list[tuple[str, tuple[float, ...]]] = []
        self._buffers: dict[str, Buffer] = {}
        self._units: list[Unit] = []
        self._name, self._source = "", ""
        self._ops: list[Op] = []
        self._weights: list[Weight] = []
        self._states: list[KvState] = []
        self._tied: tuple[str, ...] = ()
        self._window: int | None = None
        self._vocab = self._labels = 0
        self._output: Norm | None = None

    def window(self, positions: int | None) -> None:
        """Sets the attention window: positions visible to a query, its own included; None: all."""
        self._window = positions

    def unit(self, name: str, source: str = "") -> None:
        """Starts a unit; `source` is the prefix of its tensors' names in the checkpoint."""
        self._end_unit()
        self._name, self._source = name, source

    def angles(self, frequencies: Sequence[float]) -> str:
        """Cosines and sines of the rows' positions, for `rope`. All units share them."""
        self._constants.append(("rope.inv_freq", tuple(frequencies)))
        self._prologue.append(Angles(self._buffer("angles", 2 * len(frequencies)), "rope.inv_freq"))
        return "angles"

    def embed(self, out: str, names: Names, vocab: int, cols: int) -> str:
        """The rows of a table `[vocab, cols]` at the token ids."""
        self._vocab = vocab
        self._ops.append(Embed(self._buffer(out, cols), self._weight(names, vocab, cols)))
        return out

    def norm(self, out: str, x: str, names: Names, epsilon: float, domain: Domain = "rows") -> str:
        """RMS norm of x, times a vector."""
        cols = self._buffers[x].cols
        weight = self._weight(names, 1, cols, vector=True)
        self._ops.append(Norm(self._buffer(out, cols, domain), x, weight, epsilon))
        return out

    def linear(
        self, out: str, x: str, parts: Mapping[str, tuple[str, int]], *, bias: Collection[str] = ()
    ) -> str:
        """The concatenated products of x with several matrices. `parts` has, by the weight's name, its source
        and its number of outputs; weights named in `bias` have a bias."""
        self._buffer(out, sum(rows for _, rows in parts.values()), self._buffers[x].domain)
        self._matmul(out, x, parts, bias, accumulate=False)
        return out

    def add(self, out: str, x: str, names: Names, *, bias: bool = False) -> None:
        """Adds the product of x with a matrix to `out`."""
        name, source = names
        parts = {name: (source, self._buffers[out].cols)}
        self._matmul(out, x, parts, (name,) if bias else (), accumulate=True)

    def head_norm(
        self, x: str, names: Names, epsilon: float, heads: int, head_dim: int, column: int = 0
    ) -> None:
        """In-place RMS norm of each of `heads` heads of x from `column` on, times a vector `[head_dim]`."""
        weight = self._weight(names, 1, head_dim, vector=True)
        self._ops.append(HeadNorm(x, weight, column, heads, head_dim, epsilon))

    def rope(self, x: str, angles: str, heads: int, head_dim: int) -> None:
        """In-place rotary position embedding of the first `heads` heads of x."""
        self._ops.append(Rope(x, angles, heads, head_dim))

    def attend(self, out: str, qkv: str, heads: int, kv_heads: int, head_dim: int) -> str:
        """Causal attention. qkv has queries, keys and values in this order; keys and values are stored in a
        state."""
        queries, keys = heads * head_dim, kv_heads * head_dim
        self._states.append(KvState("kv", kv_heads, head_dim))
        self._ops.append(Store(qkv, "kv", key=queries, value=queries + keys))
        self._ops.append(Attend(self._buffer(out, queries), qkv, "kv", heads, head_dim**-0.5))
        return out

    def gate(self, out: str, x: str, activation: Literal["silu", "gelu_tanh"]) -> str:
        """activation(first half of x) * second half."""
        self._ops.append(Gate(self._buffer(out, self._buffers[x].cols // 2), x, activation))
        return out

    def final_norm(self, out: str, x: str, names: Names, epsilon: float) -> str:
        """RMS norm of x for the head, of the rows whose logits are wanted; and once more of every row, where
        a run wants rows."""
        self.norm(out, x, names, epsilon, "wanted")
        self._output = Norm(self._buffer("output", self._buffers[x].cols), x, f"{names[0]}.weight", epsilon)
        return out

    def lm_head(self, x: str, names: Names, vocab: int, *, tied: str | None = None) -> None:
        """The logits, and the draw of a token, in the last unit. `tied`: the name of the embedding's table,
        if it is also the LM head's matrix."""
        if tied is not None:
            self._ignored += (f"{names[1]}.weight",)  # some checkpoints have the table twice
            table = self._units[0].weight(f"{tied}.weight")
            self._weights.append(table)
            self._tied = (table.name,)
        weight = self._tied[0] if self._tied else self._weight(names, vocab, self._buffers[x].cols)
        self._ops.append(Matmul(self._buffer("logits", vocab, self._buffers[x].domain), x, (weight,)))
        self._ops.append(Sample("logits"))

    def label_head(self, x: str, names: Names, labels: int) -> None:
        """The logits of labels, in the last unit. An LM head that the checkpoint has besides is not used."""
        self._ignored += ("lm_head.weight",)
        self._labels = labels
        self.linear("logits", x, {names[0]: (names[1], labels)})

    def program(self, cut: str) -> Program:
        """The finished program; `cut` is the buffer that crosses from unit to unit."""
        self._end_unit()
        return Program(
            units=tuple(self._units),
            prologue=tuple(self._prologue),
            buffers=tuple(self._buffers.values()),
            cut=(cut,),
            constants=tuple(self._constants),
            logits="logits",
            vocab=self._vocab,
            output=self._output,
            labels=self._labels,
            ignored=self._ignored,
            window=self._window,
        )

    def _end_unit(self) -> None:
        if self._name:
            parts = tuple(self._ops), tuple(self._weights), tuple(self._states), self._tied
            self._units.append(Unit(self._name, *parts))
        self._ops, self._weights, self._states, self._tied = [], [], [], ()

    def _matmul(
        self,
        out: str,
        x: str,
        parts: Mapping[str, tuple[str, int]],
        bias: Collection[str],
        *,
        accumulate: bool,
    ) -> None:
        cols = self._buffers[x].cols
        weights = tuple(self._weight((name, source), rows, cols) for name, (source, rows) in parts.items())
        biases = tuple(
            self._weight((name, source), 1, rows, vector=True, kind="bias") if name in bias else None
            for name, (source, rows) in parts.items()
        )
        self._ops.append(Matmul(out, x, weights, accumulate, biases if any(biases) else ()))

    def _buffer(self, name: str, cols: int, domain: Domain = "rows") -> str:
        buffer = Buffer(name, cols, "f32", domain)
        assert self._buffers.setdefault(name, buffer) == buffer, f"{name} has two shapes"
        return name

    def _weight(
        self, names: Names, rows: int, cols: int, *, vector: bool = False, kind: str = "weight"
    ) -> str:
        name, source = names
        weight = Weight(f"{name}.{kind}", rows, cols, f"{self._source}{source}.{kind}", vector)
        self._weights.append(weight)
        return weight.name
