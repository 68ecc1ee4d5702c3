"""Dummy weights of the right shapes for a model of which files are missing, so that a device can measure its
speed before it has any weights. A call's time does not depend on the values, as long as they are ordinary
numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .memory import Arena
from .model_directory import MIN, SCALE, Model, tensors_of, unit_file
from .program import Weight
from .safetensors_file import SafetensorsFile, lay_out

_TILE = 1 << 16
_SPREAD = {"q8": 73.0, "q4": 4.6, "q4_min": 4.6}
"""The standard deviation of quantised values that are drawn evenly, by type."""


class DummyModel(Model):
    """A model whose missing files of units have dummy weights, in memory."""

    def open_file(self, name: str, arena: Arena | None = None) -> SafetensorsFile:
        unit = {unit_file(u): u for u in range(self.n_units)}.get(name)
        if unit is None or has_file(self, name):
            return super().open_file(name, arena)
        described = self.program.units[unit]
        own = [weight for weight in described.weights if weight.name not in described.tied]
        placed, header = lay_out([info for weight in own for info in tensors_of(weight)])
        start = 8 + len(header)
        size = start + placed[-1].end
        memory = np.zeros(size, np.uint8) if arena is None or arena.left < size else arena.take(size)
        tensors = {info.name: info.moved(start) for info in placed}
        file = SafetensorsFile(Path(f"{self.path / name} (dummy)"), tensors, memory.data)
        for weight in own if arena is not None else ():  # a table that is only mapped stays zeros
            _fill(file, weight)
        return file


def has_file(model: Model, name: str) -> bool:
    """Whether a file of the index is there, by its size."""
    try:
        return (model.path / name).stat().st_size == model.index.files[name].size
    except OSError:
        return False


def complete(model: Model, first: int, last: int) -> bool:
    """Whether the files of units [first, last) are there."""
    return all(has_file(model, name) for name in model.files_of(first, last))


def _fill(file: SafetensorsFile, weight: Weight) -> None:
    """Gives a weight values whose products have about the size of their inputs."""
    values, *groups = (file.tensor(info.name) for info in tensors_of(weight))
    if weight.vector:
        values[...] = 1.0
        return
    scale = 1 / (_SPREAD.get(weight.type, 1.0) * float(weight.cols) ** 0.5)
    if weight.type == "f32":
        values[...] = np.resize(np.sin(np.arange(4096, dtype=np.float32)), values.shape) * np.float32(scale)
        return
    _tile(values)
    for info, array in zip(tensors_of(weight)[1:], groups, strict=True):
        assert info.name.endswith((SCALE, MIN))
        array[...] = scale if info.name.endswith(SCALE) else -7.5 * scale


def _tile(values: NDArray[Any]) -> None:
    """Fills packed values with even random ones; an int8 is never -128."""
    flat = values.reshape(-1).view(np.uint8)
    tile = np.frombuffer(random.Random(0).randbytes(_TILE), np.uint8)
    if values.dtype == np.int8:
        tile = np.where(tile == 128, np.uint8(0), tile)
    for at in range(0, len(flat), _TILE):
        flat[at : at + _TILE] = tile[: len(flat) - at]
