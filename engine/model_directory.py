"""A model directory: reads its index and configuration, and opens the files of single units.

A device needs only the files of its own layers. Opening a file maps it (no copy, no repacking) and checks
it against the index (size, hash) and against the program (names, shapes, types). Each file is hashed once:
see `hash_cache`."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from . import families
from .config import Config, read_config
from .errors import ModelFileError, UnsupportedModelError
from .hash_cache import HashCache
from .index import COMMON, CONFIG, INDEX, Index, UnitEntry, read_index
from .mapped import WholeFiles
from .memory import Arena, fetch_ahead
from .packing import packed_shapes, packed_shapes_q4
from .program import Program, Unit, Weight, WeightType
from .safetensors_file import PAD, SafetensorsFile, TensorInfo, open_file
from .typed import typed

SCALE, MIN = ".scale", ".min"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A read-only weight in memory: f32 `[rows, cols]`, or packed quantised values with scales and minima
    (see `packing`)."""

    data: NDArray[Any]
    scales: NDArray[np.float16] | None
    mins: NDArray[np.float16] | None
    rows: int
    cols: int
    type: WeightType


class Model:
    """An open model directory: its index, configuration and program, which agree. Weights are opened
    unit by unit."""

    def __init__(self, path: Path, index: Index, config: Config, digest: str, hashes: HashCache) -> None:
        self.path = path
        self.index = index
        self.hash = digest
        """SHA-256 of index.json. Nodes with equal hashes have the same model."""
        self.program: Program = typed(families.build(config), *index.types)
        self.config = config.within(self.program.window)
        self._hashes = hashes
        self._sharing = threading.Lock()
        self._shared = WeakValueDictionary[tuple[str, bool], SafetensorsFile]()
        self._check_units()

    @classmethod
    def open(cls, path: Path | str) -> Model:
        """Opens the directory at `path` without reading weights. ModelFileError: it is not a model directory,
        or damaged. UnsupportedModelError: its family or version is not supported."""
        path = Path(path)
        index, data = read_index(path / INDEX)
        hashes = HashCache(path)
        hashes.check(path / CONFIG, index.files[CONFIG])
        return cls(path, index, read_config(path / CONFIG), hashlib.sha256(data).hexdigest(), hashes)

    @property
    def dtype(self) -> str:
        """Type of the matrices: int8, int4 or f32."""
        return self.index.dtype

    @property
    def kv_dtype(self) -> str:
        """Type of keys and values: f32, f16 or int8."""
        return self.index.kv_dtype

    def check_generates(self) -> None:
        """UnsupportedModelError: the model has a classification head, so that no token can be drawn."""
        if self.program.labels:
            raise UnsupportedModelError(
                f"{self.path} has a classification head ({self.program.labels} labels) and no LM head, so it "
                "generates no text: use LLM.classify or `shoal classify`, or choose another model"
            )

    @property
    def n_units(self) -> int:
        """Number of units: the embedding, the layers, and the final norm with the head."""
        return len(self.program.units)

    def files_of(self, first: int, last: int) -> tuple[str, ...]:
        """Names of the files that a stage of units [first, last) needs in addition to index.json."""
        units = self.index.units[first:last]
        names = (CONFIG, *self.index.common, *(name for unit in units for name in unit.files))
        return tuple(dict.fromkeys(names))

    def unit_bytes(self, u: int) -> int:
        """Bytes of the files of unit u, including a table that it shares with unit 0."""
        return sum(self.index.files[name].size for name in self.index.units[u].files)

    def unit_weights(
        self, u: int, opened: Callable[[str], SafetensorsFile] | None = None
    ) -> dict[str, Tensor]:
        """The weights of unit u by name. `opened` opens a file by its name; None maps it. ModelFileError: a
        file is missing, truncated, altered, or does not match the program."""
        unit, entry = self.program.units[u], self.index.units[u]
        files = [(opened or self.open_file)(name) for name in entry.files]
        own = [weight for weight in unit.weights if weight.name not in unit.tied]
        self._check_names(files[0], {info.name for w in own for info in tensors_of(w)})
        return {w.name: self._weight(files[w.name in unit.tied], w) for w in unit.weights}

    def fetch_ahead(self, first: int, last: int, left: int) -> None:
        """Asks the system to read the files of units [first, last) into its page cache, in order, without
        waiting. Stops at `left` bytes (memory.affordable): more would evict the first files before they are
        used."""
        for name in dict.fromkeys(name for unit in self.index.units[first:last] for name in unit.files):
            left -= self.index.files[name].size
            if left < 0:
                return
            fetch_ahead(self.path / name)

    def constants(self) -> dict[str, NDArray[np.float64]]:
        """Copies of the f64 vectors by name that every stage needs, such as rotary frequencies.
        ModelFileError: the file is missing, altered, or does not match the program."""
        file = self.open_file(COMMON)
        wanted = {name: len(values) for name, values in self.program.constants}
        self._check_names(file, set(wanted))
        for name, size in wanted.items():
            self._check(file, TensorInfo(name, "F64", (size,)))
        constants = {name: file.tensor(name).copy() for name in wanted}
        _check_whole(file)
        return constants

    def verify(self) -> Iterator[tuple[str, int]]:
        """Hashes every file of the index again; yields the name and size of each correct file.
        ModelFileError: a file is missing, truncated or altered."""
        for name, entry in self.index.files.items():
            self._hashes.check(self.path / name, entry, trust=False, also=_check_int8)
            yield name, entry.size

    def open_file(self, name: str, arena: Arena | None = None) -> SafetensorsFile:
        """A file of the index by its name: mapped and watched, or read into the arena. ModelFileError:
        missing, truncated or altered."""
        path = self.path / name
        self._hashes.check(path, self.index.files[name], also=_check_int8)
        return open_file(path, arena, watched=True)

    def unlock(self) -> None:
        """Replaces the lock of shared files, as WeightStore.unlock."""
        self._sharing = threading.Lock()

    def shared_file(self, name: str, arena: Arena | None = None) -> SafetensorsFile:
        """As `open_file`. A file that several units need, such as a tied table, is the one that another stage
        of this process has open already, if that has read or mapped it, too."""
        if sum(name in unit.files for unit in self.index.units) < 2:
            return self.open_file(name, arena)
        with self._sharing:
            file = self._shared.get((name, arena is None))
            if file is None:
                file = self._shared[name, arena is None] = self.open_file(name, arena)
            return file

    def _weight(self, file: SafetensorsFile, weight: Weight) -> Tensor:
        infos = tensors_of(weight)
        for info in infos:
            self._check(file, info)
        data = file.tensor(weight.name)
        if len(infos) == 1:
            return Tensor(data.reshape(weight.rows, weight.cols), None, None, weight.rows, weight.cols, "f32")
        scales, *mins = (file.tensor(info.name) for info in infos[1:])
        return Tensor(data, scales, mins[0] if mins else None, weight.rows, weight.cols, weight.type)

    def _check(self, file: SafetensorsFile, wanted: TensorInfo) -> None:
        info = file.tensors.get(wanted.name)
        if info is None:
            raise ModelFileError(f"{file.path}: tensor {wanted.name!r} is missing: convert the model again")
        if (info.dtype, info.shape) != (wanted.dtype, wanted.shape):
            raise ModelFileError(
                f"{file.path}: tensor {wanted.name!r} is {info.dtype} {list(info.shape)}, but the model "
                f"needs {wanted.dtype} {list(wanted.shape)}: convert the model again"
            )

    def _check_names(self, file: SafetensorsFile, wanted: set[str]) -> None:
        for name in file.tensors:
            if name not in wanted and not name.startswith(PAD):
                raise ModelFileError(
                    f"{file.path}: tensor {name!r} does not belong there: convert the model again"
                )

    def _check_units(self) -> None:
        """ModelFileError: the index and the configuration describe different units or families."""
        expected = units_of(self.program)
        if self.index.units != expected or self.index.common != (COMMON,):
            raise ModelFileError(
                f"{self.path / INDEX} does not list the {len(expected)} units that its config.json "
                f"describes: pull or convert the model again"
            )
        if self.index.family != self.config.family:
            raise ModelFileError(
                f"{self.path / INDEX} has the family {self.index.family!r}, but config.json "
                f"{self.config.family!r}: pull or convert the model again"
            )


def _check_int8(path: Path) -> None:
    """ModelFileError: an int8 value is -128. It has no int8 negative, so kernels that multiply magnitudes
    would give another product than those that do not."""
    if path.suffix != ".safetensors":
        return
    file = open_file(path, watched=True)
    for name, info in file.tensors.items():
        if info.dtype == "I8" and file.tensor(name).min(initial=0) == -128:
            raise ModelFileError(f"{path}: tensor {name!r} holds -128: pull or convert the model again")
    _check_whole(file)


def _check_whole(file: SafetensorsFile) -> None:
    """ModelFileError: a mapped file has become shorter while it was used."""
    if file.mapped is not None:
        WholeFiles([file.mapped]).check()


def unit_file(u: int) -> str:
    """Name of the file of unit u."""
    return f"unit-{u:03d}.safetensors"


def units_of(program: Program) -> tuple[UnitEntry, ...]:
    """Index entries of the units of a program: their names and files."""

    def files(u: int, unit: Unit) -> tuple[str, ...]:
        return (unit_file(u), unit_file(0)) if unit.tied else (unit_file(u),)

    return tuple(UnitEntry(unit.name, files(u, unit)) for u, unit in enumerate(program.units))


def tensors_of(weight: Weight) -> tuple[TensorInfo, ...]:
    """The tensors of a unit file that store a weight: one f32 tensor, or packed values, scales and, with
    minima, those."""
    if weight.vector:
        return (TensorInfo(weight.name, "F32", (weight.cols,)),)
    if weight.type == "f32":
        return (TensorInfo(weight.name, "F32", (weight.rows, weight.cols)),)
    if weight.type == "q8":
        values, scales = packed_shapes(weight.rows, weight.cols)
        return (TensorInfo(weight.name, "I8", values), TensorInfo(weight.name + SCALE, "F16", scales))
    values, scales = packed_shapes_q4(weight.rows, weight.cols)
    suffixes = (SCALE, MIN) if weight.type == "q4_min" else (SCALE,)
    groups = (TensorInfo(weight.name + suffix, "F16", scales) for suffix in suffixes)
    return (TensorInfo(weight.name, "U8", values), *groups)
