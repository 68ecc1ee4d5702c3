"""Reads a checkpoint in one GGUF file, or in several parts made by llama.cpp's gguf-split, as one.

Each part has its number (split.no, from 0), the number of parts (split.count), and the total number of
tensors (split.tensors.count). The first part has the model's metadata, and possibly no tensors. Source:
ggml-org/llama.cpp, src/llama-model-loader.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..errors import ModelFileError
from .gguf_file import GgufFile, GgufTensor
from .gguf_names import part_names

_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_OWN = ("split.", "general.alignment")  # keys that may differ between parts


class GgufParts:
    """The file `path` and, if it is part of a split checkpoint, the other parts in its directory.

    `values` is the metadata of the first part. ModelFileError: a part is missing, damaged or of another
    checkpoint."""

    def __init__(self, path: Path) -> None:
        parts = _read(path)
        self.values: Mapping[str, Any] = parts[0].values
        self.tensors: dict[str, GgufTensor] = {}
        self._file_of: dict[str, GgufFile] = {}
        for part in parts:
            for name, tensor in part.tensors.items():
                if name in self.tensors:
                    raise ModelFileError(
                        f"the tensor {name!r} is in {self._file_of[name].path} and in {part.path}: they are "
                        "parts of different checkpoints; fetch all parts of one"
                    )
                self.tensors[name], self._file_of[name] = tensor, part
        total = self.values[_TENSORS] if len(parts) > 1 else len(self.tensors)
        if total != len(self.tensors):
            raise ModelFileError(
                f"{path}: {_TENSORS} is {total!r}, and its {len(parts)} parts hold {len(self.tensors)}: they "
                "are of different checkpoints; fetch all parts of one"
            )

    def tensor(self, name: str) -> F32:
        """A tensor dequantised to f32. UnsupportedModelError: the gguf package cannot dequantise its type."""
        return self._file_of[name].tensor(name)

    def bytes_of(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, as a view of its mapped file."""
        return self._file_of[name].bytes_of(name)


def _read(path: Path) -> list[GgufFile]:
    """All parts in order."""
    named = GgufFile(path)
    number, count = named.values.get(_NUMBER, 0), named.values.get(_COUNT, 1)
    if type(number) is not int or type(count) is not int or not 0 <= number < max(count, 1):
        raise ModelFileError(f"{path}: {_NUMBER} is {number!r} of {_COUNT} {count!r}, which is impossible")
    if count <= 1:
        return [named]
    names = part_names(path.name)
    if len(names) != count or names[number] != path.name:
        raise ModelFileError(
            f"{path} is part {number + 1} of {count} of a checkpoint, but its name is not: rename the "
            f"parts to NAME-00001-of-{count:05d}.gguf and so on"
        )
    missing = [name for name in names if not path.with_name(name).exists()]
    if missing:
        raise ModelFileError(
            f"{path} is part {number + 1} of {count} of a checkpoint, and {missing[0]} is missing in its "
            f"directory ({len(missing)} of {count} are): fetch the missing parts"
        )
    parts = [named if name == path.name else GgufFile(path.with_name(name)) for name in names]
    for i, part in enumerate(parts):
        for key, expected in ((_NUMBER, i), (_COUNT, count), (_TENSORS, parts[0].values.get(_TENSORS))):
            if part.values.get(key) != expected:
                raise ModelFileError(
                    f"{part.path}: {key} is {part.values.get(key)!r} and should be {expected!r}: it is a "
                    "part of another checkpoint; fetch all parts of one"
                )
        for key in part.values.keys() & parts[0].values.keys():
            if part.values[key] != parts[0].values[key] and not key.startswith(_OWN):
                raise ModelFileError(
                    f"{part.path}: {key} is not that of {parts[0].path.name}: it is a part of another "
                    "checkpoint; fetch all parts of one"
                )
    return parts
