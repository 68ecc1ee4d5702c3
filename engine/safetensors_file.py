"""safetensors files: a reader that checks everything in the header, and a writer that aligns tensors.

The format: a u64 header length, a JSON header, then the data without holes or overlap. The writer pads the
header with spaces, so that the data starts at a multiple of 16384 (the largest common memory page size). It
fills the gaps before tensors with U8 tensors named `__pad_N`, so that each tensor starts at a multiple of 64
(a cache line) and every other reader still opens the file. Source: huggingface/safetensors,
`safetensors/src/tensor.rs`."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ModelFileError, UnsupportedModelError
from .mapped import MappedFile, WholeFiles
from .memory import Arena

DATA_ALIGNMENT = 16384
TENSOR_ALIGNMENT = 64
PAD = "__pad_"
_MAX_HEADER = 100_000_000
_MAX_DIMS = 64
_MAX_BYTES = 1 << 62

# BF16 and the 8-bit floats have no NumPy type: they are read as unsigned integers with the same bits.
DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        name: np.dtype(kind).newbyteorder("<")
        for name, kind in {
            "BOOL": "u1",
            "U8": "u1",
            "I8": "i1",
            "F8_E4M3": "u1",
            "F8_E5M2": "u1",
            "U16": "u2",
            "I16": "i2",
            "F16": "f2",
            "BF16": "u2",
            "U32": "u4",
            "I32": "i4",
            "F32": "f4",
            "U64": "u8",
            "I64": "i8",
            "F64": "f8",
        }.items()
    }
)
# Types of the format that are not supported: smaller than a byte, or not used by language models.
_NOT_READ = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The header's entry of one tensor. `begin` and `end` are byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def moved(self, by: int) -> TensorInfo:
        """The same tensor, so many bytes further on."""
        return replace(self, begin=self.begin + by, end=self.end + by)


class SafetensorsFile:
    """An open safetensors file. Its arrays are read-only views of its memory, which is freed once the last of
    them is."""

    def __init__(
        self, path: Path, tensors: dict[str, TensorInfo], memory: memoryview, mapped: MappedFile | None = None
    ) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self._memory = memory
        self.mapped = mapped
        """The mapping, if it is watched."""

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor, in its stored type (see DTYPES). ModelFileError: the file has no such
        tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelFileError(f"{self.path}: tensor {name!r} is missing: fetch or convert the model again")
        dtype = DTYPES[info.dtype]
        flat = np.frombuffer(self._memory, dtype, math.prod(info.shape), info.begin)
        return flat.reshape(info.shape)


def open_file(path: Path, arena: Arena | None = None, *, watched: bool = False) -> SafetensorsFile:
    """Maps a file, or reads it into an arena, and checks its whole header. A mapped file that is truncated
    while it is in use ends the process, unless it is `watched`: then it reads as zeros there, and must be
    checked after use (mapped.WholeFiles). ModelFileError: missing, truncated or invalid.
    UnsupportedModelError: a tensor's type is not supported."""
    mapped = None
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ModelFileError(
                    f"{path} is truncated: {size} bytes are no safetensors file; fetch it again"
                )
            if arena is not None:
                memory = arena.read(file, size)
            elif watched:
                mapped = MappedFile(path, file.fileno(), size)
                memory = mapped.memory
            else:
                memory = memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing: fetch or convert the model again") from None
    except OSError as e:
        raise ModelFileError(f"{path} cannot be read: {e.strerror}") from e
    except ValueError as e:  # mmap: the file has become shorter
        raise ModelFileError(f"{path} was truncated while it was opened: fetch it again") from e
    length = int.from_bytes(memory[:8], "little")
    if length > _MAX_HEADER:
        raise ModelFileError(
            f"{path} is not a safetensors file: its header length is {length} bytes, more than {_MAX_HEADER}"
        )
    if 8 + length > size:
        raise ModelFileError(
            f"{path} is truncated: its header has {length} bytes and the file {size}; fetch it again"
        )
    header = bytes(memory[8 : 8 + length])
    if mapped is not None:
        WholeFiles([mapped]).check()
    return SafetensorsFile(path, parse_header(header, size, str(path)), memory, mapped)


def parse_header(header: bytes, size: int, where: str) -> dict[str, TensorInfo]:
    """The tensors in the header of a file of `size` bytes, in file order and fully checked; `where` names the
    file in errors. Errors: see `open_file`."""
    entries = _decode(header, where)
    start = 8 + len(header)
    tensors = [_tensor(name, entry, start, where) for name, entry in entries.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    at = start
    for info in tensors:
        if info.begin != at:
            what = "overlaps the tensor before it" if info.begin < at else "leaves a hole before it"
            raise ModelFileError(f"{where}: tensor {info.name!r} {what}: the file is damaged; fetch it again")
        at = info.end
    if at != size:
        what = "is truncated" if at > size else "has bytes that belong to no tensor"
        raise ModelFileError(
            f"{where} {what}: its header describes {at} bytes, and the file has {size}; fetch it again"
        )
    return {info.name: info for info in tensors}


def _decode(header: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("duplicate key")
        return result

    try:
        # Spaces may follow the object as padding, but nothing may precede it.
        if header[:1] != b"{":
            raise ValueError("it does not start with {")
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise ModelFileError(f"{where} is not a safetensors file: its header is not valid JSON ({e})") from e
    assert isinstance(entries, dict)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelFileError(f"{where}: __metadata__ in its header does not map strings to strings")
    return entries


def _tensor(name: str, entry: object, start: int, where: str) -> TensorInfo:
    def refuse(what: str) -> ModelFileError:
        return ModelFileError(f"{where}: tensor {name!r} {what}: the file is damaged; fetch it again")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("does not have exactly 'dtype', 'shape' and 'data_offsets'")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype in _NOT_READ:
        raise UnsupportedModelError(
            f"{where}: tensor {name!r} has the type {dtype}, which is not supported: fetch the model in F32, "
            "F16 or BF16"
        )
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"has the unknown type {dtype!r}")
    if not _counts(shape) or len(shape) > _MAX_DIMS:
        raise refuse("has a shape that is not a list of non-negative integers")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("has data_offsets that are not two ascending non-negative integers")
    needed = largest = DTYPES[dtype].itemsize
    for n in shape:
        needed, largest = needed * n, largest * max(n, 1)  # NumPy refuses a shape like [0, 2^62], too
        if largest > _MAX_BYTES:
            raise refuse(f"has the impossible shape {shape}")
    if needed != offsets[1] - offsets[0]:
        raise refuse(f"has {offsets[1] - offsets[0]} bytes, but {dtype} {shape} needs {needed}")
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_BYTES for n in value)


def write(path: Path, tensors: Sequence[TensorInfo], arrays: Iterable[NDArray[Any]]) -> tuple[int, str]:
    """Writes a file of `tensors`, whose contents are `arrays` in the same order; arrays are consumed one at a
    time. Returns the file's size in bytes and its SHA-256.

    The file appears under its name only when it is complete and on the disk. ValueError: an array does not
    match its tensor. OSError: it cannot be written."""
    placed, header = lay_out(tensors)
    digest = hashlib.sha256()
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            for chunk in _chunks(placed, header, iter(arrays)):
                digest.update(chunk)
                file.write(chunk)
            size = file.tell()
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return size, digest.hexdigest()


def lay_out(tensors: Sequence[TensorInfo]) -> tuple[list[TensorInfo], bytes]:
    """Tensors and padding tensors with their offsets in the data, and the header that describes them."""
    placed: list[TensorInfo] = []
    at = 0
    for tensor in tensors:
        gap = -at % TENSOR_ALIGNMENT
        if gap:
            placed.append(TensorInfo(f"{PAD}{len(placed)}", "U8", (gap,), at, at + gap))
        at += gap
        placed.append(TensorInfo(tensor.name, tensor.dtype, tensor.shape, at, at + tensor.nbytes))
        at += tensor.nbytes
    entries = {t.name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": (t.begin, t.end)} for t in placed}
    header = json.dumps(entries, separators=(",", ":")).encode()
    return placed, header + b" " * (-(8 + len(header)) % DATA_ALIGNMENT)


def _chunks(
    placed: Sequence[TensorInfo], header: bytes, arrays: Iterator[NDArray[Any]]
) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for tensor in placed:
        if tensor.name.startswith(PAD):
            yield bytes(tensor.nbytes)
            continue
        array = next(arrays)
        if array.shape != tensor.shape or array.dtype != DTYPES[tensor.dtype]:
            raise ValueError(
                f"the array of {tensor.name} is {array.dtype} {array.shape}, which is not {tensor}"
            )
        if array.size:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    if next(arrays, None) is not None:
        raise ValueError("there are more arrays than tensors")
