"""The Hello at the start of a connection, read by what is in between: it says what the connection is for."""

from __future__ import annotations

import json

_HEADER_BYTES, _LENGTH_AT = 12, 8


def frame_bytes(data: bytes) -> int:
    """The length of a first frame that begins with `data`; while its header is incomplete, that of the
    header."""
    if len(data) < _HEADER_BYTES:
        return _HEADER_BYTES
    return _HEADER_BYTES + int.from_bytes(data[_LENGTH_AT:_HEADER_BYTES], "little")


def said(frame: bytes) -> tuple[str, str]:
    """The purpose and the name in a Hello. ValueError, KeyError or TypeError: it is none."""
    body = json.loads(frame[_HEADER_BYTES : frame_bytes(frame)])
    return body["purpose"], body["name"]
