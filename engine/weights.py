"""The weights of the loaded units; a file that two units share is loaded once."""

from __future__ import annotations

import threading
from collections.abc import Container, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .backends.base import WeightData
from .errors import OperatingSystemError
from .host import ram
from .mapped import WholeFiles
from .memory import Arena, affordable, room
from .model_directory import Model, Tensor
from .safetensors_file import SafetensorsFile


class WeightStore:
    """Weights by unit. Units can be loaded and unloaded while others run.

    Files are copied into memory or mapped, according to `StageOptions.resident`. The memory of a file is
    freed once neither a loaded unit nor a bound program refers to it, so a table that two units share stays
    while one of them is loaded, here or in another stage of the same Model."""

    def __init__(self, model: Model, resident: bool | None = None) -> None:
        self.model = model
        self._resident = resident
        self._lock = threading.Lock()
        self._files: dict[str, SafetensorsFile] = {}
        self._units: dict[int, dict[str, Tensor]] = {}
        self._constants: dict[str, WeightData] = {}
        self._mapped = WholeFiles(())

    @property
    def nbytes(self) -> int:
        """Total bytes of the loaded files."""
        return sum(self.model.index.files[name].size for name in list(self._files))

    @property
    def units(self) -> frozenset[int]:
        """The loaded units."""
        return frozenset(self._units)

    def unlock(self) -> None:
        """Replaces the locks. Called in a forked process, where a thread that held one does not exist."""
        self._lock = threading.Lock()
        self.model.unlock()

    def load(self, first: int, last: int) -> None:
        """Loads those of units [first, last) that are not loaded yet. ModelFileError: a file is missing or
        wrong. MemoryError, OperatingSystemError: out of memory. After an error the same units are loaded as
        before."""
        model = self.model
        with self._lock:
            if not self._constants:
                self._constants = {name: _Constant(values) for name, values in model.constants().items()}
            missing = [u for u in range(first, last) if u not in self._units]
            files, units = dict(self._files), dict(self._units)
            spare = affordable()  # asked once: it reads a dozen files of the system
            names = {name for u in missing for name in model.index.units[u].files} - files.keys()
            arena = self._arena(names, spare)
            if arena is None and missing:
                # The system reads each file from disk while the units before it run.
                model.fetch_ahead(missing[0], missing[-1] + 1, spare)

            def opened(name: str) -> SafetensorsFile:
                if name not in files:
                    files[name] = model.shared_file(name, arena)
                return files[name]

            for i, unit in enumerate(missing):
                if arena is not None and i + 1 < len(missing):
                    # Read from disk while this unit is copied.
                    model.fetch_ahead(missing[i + 1], missing[i + 1] + 1, spare)
                units[unit] = model.unit_weights(unit, opened)
            self._hold(files)
            self._units = units

    def keep(self, units: Container[int]) -> None:
        """Unloads all other units."""
        with self._lock:
            self._units = {u: tensors for u, tensors in self._units.items() if u in units}
            used = {name for u in self._units for name in self.model.index.units[u].files}
            self._files = {name: file for name, file in self._files.items() if name in used}
            self._mapped = WholeFiles(f.mapped for f in self._files.values() if f.mapped is not None)

    def check(self) -> None:
        """To be called after weights were used. ModelFileError: a file that is mapped was truncated
        meanwhile."""
        self._mapped.check()

    def _hold(self, files: dict[str, SafetensorsFile]) -> None:
        """Holds these files. ModelFileError: a mapped one has become shorter."""
        mapped = WholeFiles(file.mapped for file in files.values() if file.mapped is not None)
        mapped.check()
        self._files, self._mapped = files, mapped

    def of(self, first: int, last: int) -> dict[tuple[int, str], WeightData]:
        """The weights of units [first, last) by (unit, name). KeyError: a unit is not loaded."""
        units = self._units
        return {(u, name): tensor for u in range(first, last) for name, tensor in units[u].items()}

    def constants(self) -> dict[tuple[int, str], WeightData]:
        """The constants of the program by (-1, name)."""
        return {(-1, name): constant for name, constant in self._constants.items()}

    def _arena(self, names: Iterable[str], spare: int) -> Arena | None:
        """Memory for copies of these files; None: the files are to be mapped, as `resident` says or because
        copies would take more than `spare` bytes. OperatingSystemError: copies were asked for, and the
        system would end a process that makes them."""
        size = room(self.model.index.files[name].size for name in names)
        if self._resident is False or (self._resident is None and size > spare):
            return None
        if self._resident is True:
            _check_room(size)
        return Arena(size, pinned=self._resident is True)


def _check_room(size: int) -> None:
    free = ram()
    if free.available is not None and size > free.available:
        raise OperatingSystemError(
            f"the weights take {size / 1e6:.0f} MB, and {free.available / 1e6:.0f} MB of RAM are available "
            f"of the {(free.total or 0) / 1e6:.0f} MB {free.bound}: map their files instead of copying them "
            "(--no-resident)"
        )


@dataclass(frozen=True, slots=True)
class _Constant:
    """An f64 vector of the program as a weight with one row."""

    data: NDArray[np.float64]

    scales: None = None
    mins: None = None

    @property
    def rows(self) -> int:
        return 1

    @property
    def cols(self) -> int:
        return int(self.data.size)
