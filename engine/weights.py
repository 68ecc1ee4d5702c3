"""Weights of the units that are loaded, each file once."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backends.base import WeightData
from .memory import Arena, affordable, room
from .model_directory import Model, Tensor
from .safetensors_file import SafetensorsFile


class WeightStore:
    """Weights by unit. Units are loaded and unloaded while others are being read.

    Files are copied into memory or mapped, as `StageOptions.resident` says. The memory of a file is freed
    once neither a loaded unit nor a bound program refers to it: a table that two units share stays for
    the second."""

    def __init__(self, model: Model, resident: bool | None = None) -> None:
        self.model = model
        self._resident = resident
        self._lock = threading.Lock()
        self._files: dict[str, SafetensorsFile] = {}
        self._units: dict[int, dict[str, Tensor]] = {}
        self._constants: dict[str, WeightData] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are loaded, each counted once."""
        return sum(self.model.index.files[name].size for name in list(self._files))

    @property
    def units(self) -> frozenset[int]:
        """The units that are loaded."""
        return frozenset(self._units)

    def unlock(self) -> None:
        """Forgets who was loading: in a forked process nobody is."""
        self._lock = threading.Lock()

    def load(self, first: int, last: int) -> None:
        """Loads units [first, last), but for those that are loaded. ModelFileError: a file is missing or
        not what it should be; MemoryError: there is no room. Then nothing more than before is held."""
        model = self.model
        with self._lock:
            if not self._constants:
                self._constants = {name: _Constant(values) for name, values in model.constants().items()}
            missing = [u for u in range(first, last) if u not in self._units]
            files, units = dict(self._files), dict(self._units)
            arena = self._arena({name for u in missing for name in model.index.units[u].files} - files.keys())
            if arena is None and missing:
                model.fetch_ahead(
                    missing[0], missing[-1] + 1
                )  # each is read from disk while those before it run

            def opened(name: str) -> SafetensorsFile:
                if name not in files:
                    files[name] = model.open_file(name, arena)
                return files[name]

            for i, unit in enumerate(missing):
                if arena is not None and i + 1 < len(missing):
                    model.fetch_ahead(missing[i + 1], missing[i + 1] + 1)  # while this one is copied
                units[unit] = model.unit_weights(unit, opened)
            self._files, self._units = files, units

    def keep(self, units: Container[int]) -> None:
        """Unloads all units but these."""
        with self._lock:
            self._units = {u: tensors for u, tensors in self._units.items() if u in units}
            used = {name for u in self._units for name in self.model.index.units[u].files}
            self._files = {name: file for name, file in self._files.items() if name in used}

    def of(self, first: int, last: int) -> dict[tuple[int, str], WeightData]:
        """The weights of units [first, last) by unit and name. KeyError: one of them is not loaded."""
        units = self._units
        return {(u, name): tensor for u in range(first, last) for name, tensor in units[u].items()}

    def constants(self) -> dict[tuple[int, str], WeightData]:
        """The constants of the program, under unit -1."""
        return {(-1, name): constant for name, constant in self._constants.items()}

    def _arena(self, names: Iterable[str]) -> Arena | None:
        """Memory for copies of these files; None: they are mapped."""
        size = room(self.model.index.files[name].size for name in names)
        if self._resident is False or (self._resident is None and size > affordable()):
            return None
        return Arena(size, pinned=self._resident is True)


@dataclass(frozen=True, slots=True)
class _Constant:
    """An f64 vector of the program, seen as a weight."""

    data: NDArray[np.float64]

    scales: None = None
    mins: None = None

    @property
    def rows(self) -> int:
        return 1

    @property
    def cols(self) -> int:
        return int(self.data.size)
