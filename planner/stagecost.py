"""What a call of a stage takes, for any mixture of decoded rows and chunks: cost.py's formulas, summed once
per stage, since a simulation asks millions of times."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from . import cost
from .rows import Device, Model

CALL_STEPS = 32  # sessions of one call, as a node takes them
PAUSE_SECONDS = 0.0005  # a stage that waited longer starts as after a pause
Step = tuple[float, int, int, int, bool]  # arrival, session, rows, first position, wants a token


class StageCost:
    """Units [first, last) of a model on a device.

    `rows[n]`: seconds of a call of n decoded rows without what they attend to; `position`: of one position
    that one row attends to; `pause`: what a call after a pause takes more. State that does not grow with
    positions counts as read, beside what they compute.
    """

    def __init__(self, model: Model, device: Device, first: int, last: int) -> None:
        units = model.units[first:last]
        self._device = device
        self._ends = units[-1:] if last == len(model.units) else ()
        body = units[:-1] if self._ends else units
        self._kinds = Counter(replace(unit, name="unit") for unit in body)
        read = device.read_bytes_per_s
        self._fixed = sum(count * unit.fixed_state_bytes for unit, count in self._kinds.items()) / read
        self.position = sum(
            count * max(unit.kv_bytes_per_token / read, unit.attend_macs / device.attend_macs_per_s)
            for unit, count in self._kinds.items()
        )
        self.pause = device.idle_overhead_s
        self._matmuls = cache(self._matmul_seconds)
        self._heads = cache(self._head_seconds)
        self.rows = [0.0, *(self._call(n, n, n) for n in range(1, CALL_STEPS + 1))]

    def call_seconds(self, steps: Sequence[Step]) -> float:
        """Of such steps in one call, right after another call."""
        rows = wanted = 0
        attention = 0.0
        for _, _, count, first, wants in steps:
            rows += count
            wanted += wants
            attention += first * self.position if count == 1 else self._chunk_attention(count, first)
        return self._call(rows, wanted, len(steps)) + attention

    def _call(self, rows: int, wanted: int, steps: int) -> float:
        fixed = self._device.step_overhead_s + self._fixed * steps
        return fixed + self._matmuls(rows) + self._heads(wanted)

    def _matmul_seconds(self, rows: int) -> float:
        device = self._device
        return sum(
            count
            * max(
                min(unit.bytes, rows * unit.read_bytes) / device.read_bytes_per_s,
                cost.work_seconds(device, rows, unit.macs),
            )
            for unit, count in self._kinds.items()
        )

    def _head_seconds(self, wanted: int) -> float:
        device = self._device
        return sum(
            max(
                min(unit.bytes, wanted * unit.read_bytes) / device.read_bytes_per_s,
                cost.work_seconds(device, wanted, unit.macs),
            )
            for unit in self._ends
        )

    def _chunk_attention(self, rows: int, first: int) -> float:
        device = self._device
        return sum(
            count
            * max(
                unit.kv_bytes_per_token * (first + rows) / device.read_bytes_per_s,
                rows * (first + (rows + 1) / 2) * unit.attend_macs / device.prefill_attend_macs_per_s,
            )
            for unit, count in self._kinds.items()
        )
