"""The library's SHA-256 beside hashlib's."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.backends._abi import ffi

from .harness import library


def sha256(data: bytes) -> str:
    found = ffi.new("char[65]")
    library().shoal_sha256(data, len(data), found)
    return str(ffi.string(found).decode())


@pytest.mark.parametrize("size", [0, 1, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 1000])
def test_at_the_edges_of_blocks(size: int) -> None:
    data = bytes(i * 7 % 256 for i in range(size))
    assert sha256(data) == hashlib.sha256(data).hexdigest()


@given(st.binary(max_size=300))
def test_of_any_bytes(data: bytes) -> None:
    assert sha256(data) == hashlib.sha256(data).hexdigest()
