"""The strict reader against hostile files, and the aligned writer against the upstream library."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.errors import ModelFileError
from shoal.engine.safetensors_file import DTYPES, PAD, TensorInfo, open_file, parse_header, write


def put(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = entry("F32", [2, 2], 0, 16)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "does not start with {"),
        (b" {}", b"", "does not start with {"),
        (b"{", b"", "not valid JSON"),
        (b'{"a": 1}\xff', b"", "not valid JSON"),
        (b"[1]", b"", "does not start with {"),
        (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":1}', b"x", "duplicate key"),
        (b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x", "duplicate key"),
        ({"__metadata__": {"a": 1}}, b"", "does not map strings to strings"),
        ({"__metadata__": []}, b"", "does not map strings to strings"),
        ({"a": 5}, b"", "'a' does not have exactly"),
        ({"a": {**GOOD, "extra": 1}}, b"x" * 16, "'a' does not have exactly"),
        ({"a": {"dtype": "F32", "shape": []}}, b"", "'a' does not have exactly"),
        ({"a": entry("F33", [4], 0, 16)}, b"x" * 16, "unknown type 'F33'"),
        ({"a": {**GOOD, "dtype": ["F32"]}}, b"x" * 16, "unknown type"),
        ({"a": entry("F32", [-2, -2], 0, 16)}, b"x" * 16, "not a list of non-negative integers"),
        ({"a": {**GOOD, "shape": [2.0, 2]}}, b"x" * 16, "not a list of non-negative integers"),
        ({"a": {**GOOD, "shape": [True, 4]}}, b"x" * 16, "not a list of non-negative integers"),
        ({"a": {**GOOD, "shape": "22"}}, b"x" * 16, "not a list of non-negative integers"),
        ({"a": {**GOOD, "shape": [1] * 100}}, b"x" * 16, "not a list of non-negative integers"),
        ({"a": entry("F32", [1 << 40, 1 << 40], 0, 16)}, b"x" * 16, "impossible shape"),
        ({"a": entry("U8", [1 << 32, 1 << 32], 0, 0)}, b"", "impossible shape"),
        ({"a": entry("F32", [0, 1 << 62], 0, 0)}, b"", "impossible shape"),
        ({"a": entry("F32", [0, 1 << 40, 1 << 40], 0, 0)}, b"", "impossible shape"),
        ({"a": entry("F32", [3], 0, 16)}, b"x" * 16, "has 16 bytes, but F32 \\[3\\] needs 12"),
        ({"a": entry("F32", [4], 16, 0)}, b"x" * 16, "not two ascending non-negative integers"),
        ({"a": {**GOOD, "data_offsets": [0, 16, 32]}}, b"x" * 16, "not two ascending non-negative integers"),
        ({"a": {**GOOD, "data_offsets": [-16, 0]}}, b"x" * 16, "not two ascending non-negative integers"),
        ({"a": {**GOOD, "data_offsets": [0, 1 << 80]}}, b"x" * 16, "not two ascending non-negative integers"),
        ({"a": GOOD, "b": entry("F32", [2], 8, 16)}, b"x" * 16, "'b' overlaps"),
        ({"a": GOOD, "b": GOOD}, b"x" * 16, "'b' overlaps"),
        ({"a": GOOD, "b": entry("U8", [1], 17, 18)}, b"x" * 18, "'b' leaves a hole"),
        ({"a": entry("U8", [4], 4, 8)}, b"x" * 8, "'a' leaves a hole"),
        ({"a": GOOD}, b"x" * 15, "is truncated"),
        ({"a": GOOD}, b"", "is truncated"),
        ({"a": GOOD}, b"x" * 17, "belong to no tensor"),
    ],
)
def test_a_lying_header_is_refused_and_named(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    path = put(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ModelFileError, match=message) as error:
        open_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (3, "not valid JSON"),
        (1 << 20, "is truncated"),
        ((1 << 64) - 1, "its header length is"),
    ],
)
def test_a_lying_header_length_is_refused(tmp_path: Path, length: int, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        open_file(put(tmp_path / "bad", {"a": GOOD}, b"x" * 16, length=length))


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_stub_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "stub").write_bytes(bytes(size))
    with pytest.raises(ModelFileError, match="is truncated"):
        open_file(tmp_path / "stub")
    with pytest.raises(ModelFileError, match="is missing"):
        open_file(tmp_path / "none")


@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_header_gives_tensors_or_the_error(header: bytes, size: int) -> None:
    try:
        tensors = parse_header(header, size, "file")
    except ModelFileError:
        return
    assert sum(info.nbytes for info in tensors.values()) == size - 8 - len(header)


SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
KINDS = st.sampled_from(sorted(set(DTYPES) - {"BF16", "F8_E4M3", "F8_E5M2", "BOOL"}))


@pytest.mark.slow
@given(st.lists(st.tuples(KINDS, SHAPES), max_size=6), st.integers(0, 1 << 30))
def test_the_upstream_library_reads_what_we_write(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, tuple[int, ...]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    infos = [TensorInfo(f"t{i}", kind, shape) for i, (kind, shape) in enumerate(kinds)]
    arrays = [rng.integers(0, 100, i.shape).astype(DTYPES[i.dtype]) for i in infos]
    path = tmp_path_factory.mktemp("written") / "file"
    size, digest = write(path, infos, iter(arrays))
    data = path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
    assert not path.with_name("file.part").exists()
    upstream = safetensors.numpy.load_file(path)
    ours = open_file(path)
    for info, array in zip(infos, arrays, strict=True):
        for read in (upstream[info.name], ours.tensor(info.name)):
            assert read.dtype == array.dtype
            np.testing.assert_array_equal(read, array)
        assert ours.tensors[info.name].begin % 64 == 0 or array.nbytes == 0
        assert not ours.tensor(info.name).flags.writeable
    assert {name for name in upstream if not name.startswith(PAD)} == {i.name for i in infos}
    assert (8 + int.from_bytes(data[:8], "little")) % 16384 == 0


def test_we_read_what_the_upstream_library_writes(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float16([1.5]), "c": np.int64(7)}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "file", metadata={"format": "np"})
    file = open_file(tmp_path / "file")
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.tensor(name), array)
    with pytest.raises(ModelFileError, match="tensor 'd' is missing"):
        file.tensor("d")


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    info = TensorInfo("a", "F32", (2,))
    wrong: list[list[np.ndarray[Any, Any]]] = [
        [np.zeros(3, np.float32)],
        [np.zeros(2, np.float64)],
        [np.zeros(2, np.float32)] * 2,
    ]
    for arrays in wrong:
        with pytest.raises(ValueError, match=r"which is not TensorInfo|more arrays"):
            write(tmp_path / "file", [info], arrays)
        assert not (tmp_path / "file").exists()
