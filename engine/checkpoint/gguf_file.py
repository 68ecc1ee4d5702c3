"""A reader of GGUF files. It parses the header itself, to refuse an invalid one before allocating memory.

Every count in the header is compared with the number of remaining bytes. The `gguf` package is used for
dequantising only. Format: ggml-org/ggml, docs/gguf.md."""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..errors import MissingDependencyError, ModelFileError, UnsupportedModelError
from ..files import refuse_pointer

_VERSIONS = (2, 3)
_OLDER = (b"lmgg", b"fmgg", b"tjgg", b"algg")  # GGUF's predecessors GGML, GGMF, GGJT and GGLA
_CUT = re.compile(r"\.gguf[._-](split|part)", re.IGNORECASE)
_REMOVED = {  # types that llama.cpp no longer writes, and their replacements
    4: ("Q4_2", "Q4_0"),
    5: ("Q4_3", "Q4_1"),
    **{31 + i: (f"Q4_0_{rows}", "Q4_0") for i, rows in enumerate(("4_4", "4_8", "8_8"))},
    **{36 + i: (f"IQ4_NL_{rows}", "IQ4_NL") for i, rows in enumerate(("4_4", "4_8", "8_8"))},
}
_F64 = 28
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MIN_ENTRY, _MIN_TENSOR = 13, 24  # bytes of the shortest key-value pair and tensor description
_MAX_DIMS = 4
_MAX_ELEMENTS = 1 << 48
_CHUNK = 1 << 20  # elements dequantised per call, because the package makes several copies of them


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """The header's entry of a tensor. `shape` is row-major (the file lists it reversed); `begin` is a byte
    offset in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int
    nbytes: int


class GgufFile:
    """A mapped GGUF file with a fully checked header. `values` is its metadata. ModelFileError: unreadable or
    damaged. UnsupportedModelError: its version or a tensor's type is not supported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._memory = _map(path)
        self.values, self.tensors = _Header(self._memory, str(path)).read()

    def tensor(self, name: str) -> F32:
        """A tensor dequantised to f32. UnsupportedModelError: the gguf package cannot dequantise its type."""
        info = self.tensors[name]
        gguf = import_gguf()
        kind = gguf.GGMLQuantizationType(info.type)
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        data = self.bytes_of(name)
        if info.type == _F64:  # not supported by the package
            with np.errstate(over="ignore"):
                return data.view("<f8").astype(np.float32).reshape(info.shape)
        flat = np.empty(math.prod(info.shape), np.float32)
        step = _CHUNK // block
        blocks = data.reshape(-1, block_bytes)
        with np.errstate(all="ignore"):  # the conversion refuses values that are not finite
            for first in range(0, len(blocks), step):
                part = blocks[first : first + step].reshape(1, -1)  # one row: the package loops over rows
                try:
                    values = gguf.quants.dequantize(part, kind)
                except NotImplementedError as e:
                    raise UnsupportedModelError(
                        f"{self.path}: tensor {name!r} is {kind.name}, which the gguf package cannot "
                        "dequantise: fetch the model as F16, Q8_0 or a k-quant (Q4_K …)"
                    ) from e
                flat[first * block : first * block + values.size] = values.reshape(-1)
        return flat.reshape(info.shape)

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, as a view of the mapped file."""
        info = self.tensors[name]
        return np.frombuffer(self._memory, np.uint8, info.nbytes, info.begin)


def import_gguf() -> ModuleType:
    """The gguf package. MissingDependencyError: not installed."""
    try:
        import gguf
        import gguf.quants
    except ImportError as e:
        raise MissingDependencyError(f"GGUF files need the gguf package ({e}): pip install gguf") from e
    module: ModuleType = gguf
    return module


@cache
def _block_sizes() -> Mapping[int, tuple[int, int]]:
    """The values and the bytes of a block, by the number of a type. Errors: see `import_gguf`."""
    return {int(kind): size for kind, size in import_gguf().GGML_QUANT_SIZES.items()}


def _map(path: Path) -> mmap.mmap:
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 24:
                raise ModelFileError(f"{path} is not a GGUF file: it is too short")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as e:
        raise ModelFileError(f"{path} cannot be read: {e.strerror}") from e


class _Header:
    """A cursor over the header, which checks every read against the file's length."""

    def __init__(self, memory: mmap.mmap, where: str) -> None:
        self.memory, self.where, self.at = memory, where, 0

    def refuse(self, what: str) -> ModelFileError:
        if _CUT.search(self.where):
            return ModelFileError(
                f"{self.where} {what}: it is a piece of a file; join the pieces with `cat`, in order"
            )
        return ModelFileError(f"{self.where} {what}: the file is damaged; fetch it again")

    def read(self) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
        magic = self.take(4)
        if magic in _OLDER:
            raise UnsupportedModelError(
                f"{self.where} is a GGML file, older than GGUF and not supported: fetch the model as GGUF"
            )
        if magic != b"GGUF":
            raise ModelFileError(f"{self.where} is not a GGUF file")
        version = self.scalar("I")
        if version and version % (1 << 16) == 0:
            raise UnsupportedModelError(
                f"{self.where} is big-endian: convert it with `gguf-convert-endian {self.where} little` "
                "(from the gguf package)"
            )
        if version not in _VERSIONS:
            readable = " and ".join(map(str, _VERSIONS))
            raise UnsupportedModelError(
                f"{self.where} is GGUF version {version}, and versions {readable} are supported: fetch the "
                "model in one of these"
            )
        tensors = self.count(_MIN_TENSOR, "tensors")
        entries = self.count(_MIN_ENTRY, "key-value pairs")
        values: dict[str, Any] = {}
        for _ in range(entries):
            key = self.string()
            if key in values:
                raise self.refuse(f"has a duplicate key {key!r}")
            values[key] = self.value(self.scalar("I"), key)
        return values, self.tensor_table(tensors, values.get("general.alignment", 32))

    def take(self, n: int) -> bytes:
        if n > len(self.memory) - self.at:
            raise self.refuse(f"is truncated or invalid: its header needs {n} bytes at {self.at}")
        data = self.memory[self.at : self.at + n]
        self.at += n
        return data

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def count(self, least: int, what: str) -> int:
        n: int = self.scalar("Q")
        if n * least > len(self.memory) - self.at:
            raise self.refuse(f"is truncated or invalid: its header claims {n} {what}, more than fit")
        return n

    def string(self) -> str:
        data = self.take(self.scalar("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.refuse(f"has a string that is not UTF-8 at {self.at - len(data)}") from e

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.refuse(f"has a value of {key!r} with the unknown type {kind}")
        kind = self.scalar("I")
        if kind == _STRING:
            return [self.string() for _ in range(self.count(8, f"strings in {key!r}"))]
        if kind not in _SCALARS:
            raise self.refuse(f"has an array {key!r} of the unknown type {kind}")
        code = "<" + _SCALARS[kind]
        size = struct.calcsize(code)
        n = self.count(size, f"values in {key!r}")
        return [value for (value,) in struct.iter_unpack(code, self.take(n * size))]

    def tensor_table(self, n: int, alignment: object) -> dict[str, GgufTensor]:
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.refuse(f"has the impossible alignment {alignment!r}")
        described = [self.description() for _ in range(n)]
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        end = start
        for name, shape, kind, offset in sorted(described, key=lambda d: d[3]):
            info = GgufTensor(name, shape, kind, start + offset, self.nbytes(name, shape, kind))
            if name in tensors:
                raise self.refuse(f"has a duplicate tensor {name!r}")
            if offset % alignment or info.begin < end:
                raise self.refuse(f"has the tensor {name!r} at {offset}, inside another or misaligned")
            end = info.begin + info.nbytes
            if end > len(self.memory):
                raise self.refuse(
                    f"is truncated or invalid: the tensor {name!r} ends at byte {end} of {len(self.memory)}"
                )
            tensors[name] = info
        return tensors

    def description(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string()
        dims = self.scalar("I")
        if not 1 <= dims <= _MAX_DIMS:
            raise self.refuse(f"has the tensor {name!r} with {dims} dimensions")
        shape = tuple(self.scalar("Q") for _ in range(dims))[::-1]
        if not all(0 < d <= _MAX_ELEMENTS for d in shape) or math.prod(shape) > _MAX_ELEMENTS:
            raise self.refuse(f"has the tensor {name!r} with the impossible shape {shape}")
        return name, shape, self.scalar("I"), self.scalar("Q")

    def nbytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        sizes = _block_sizes()
        if kind in _REMOVED:
            old, new = _REMOVED[kind]
            raise UnsupportedModelError(
                f"{self.where}: tensor {name!r} is {old}, a type that was removed: fetch the model as {new}"
            )
        if kind not in sizes:
            raise UnsupportedModelError(
                f"{self.where}: tensor {name!r} has type {kind}, which this gguf package does not know: "
                "try a newer one (pip install --upgrade gguf)"
            )
        block, block_bytes = sizes[kind]
        if shape[-1] % block:
            raise self.refuse(f"has the tensor {name!r} with rows of {shape[-1]}, not a multiple of {block}")
        total: int = math.prod(shape) // block * block_bytes
        return total
