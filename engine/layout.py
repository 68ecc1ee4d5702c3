"""Layout constants, read from csrc/kernels.h through the generated cffi module, which works without the C
library.
"""

from __future__ import annotations

from .backends._abi import ffi

_LAYOUT: dict[str, int] = ffi.typeof("enum shoal_layout").relements

NUMERICS_VERSION = _LAYOUT["SHOAL_NUMERICS"]
LAYOUT_VERSION = _LAYOUT["SHOAL_LAYOUT"]
PANEL = _LAYOUT["SHOAL_PANEL"]
QUAD = _LAYOUT["SHOAL_QUAD"]
GROUP = _LAYOUT["SHOAL_GROUP"]
PAGE = _LAYOUT["SHOAL_PAGE"]
CHUNK = _LAYOUT["SHOAL_CHUNK"]
MAX_HEAD_DIM = _LAYOUT["SHOAL_MAX_HEAD_DIM"]
PART_BYTES = _LAYOUT["SHOAL_PART_BYTES"]


def round_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is >= n."""
    return -(-n // multiple) * multiple
