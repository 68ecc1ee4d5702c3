"""The page for people, made of the files of src/shoal/page. It is sent whole: its script and style run by
their hashes, and it loads nothing else."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import AsyncGenerator
from hashlib import sha256
from importlib.resources import files

from .served import Call, Part, Reply

SCRIPTS = ("tools.js", "api.js", "markdown.js", "chat.js", "answers.js", "house.js", "start.js")
"""The parts of the script, in the order in which they follow each other; they share one scope."""


class Page:
    """The page with its headers."""

    def __init__(self) -> None:
        body = assembled()
        headers = (
            ("Content-Security-Policy", policy(body)),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-cache"),  # it may be kept, and is asked for by its ETag each time
            ("ETag", f'"{sha256(body).hexdigest()[:32]}"'),
        )
        self._reply = Reply(body, "text/html; charset=utf-8", headers)

    async def show(self, call: Call) -> AsyncGenerator[Part, None]:
        """GET /."""
        yield self._reply


def assembled() -> bytes:
    """index.html with style.css and the scripts inside."""
    place = files("shoal").joinpath("page")
    page, style = (place.joinpath(name).read_bytes() for name in ("index.html", "style.css"))
    script = b'"use strict";\n' + b"\n".join(place.joinpath(name).read_bytes() for name in SCRIPTS)
    for start, content in ((b"<style>\n", style), (b"<script>\n", script)):
        before, after = page.split(start)
        page = before + start + content + after
    return page


def policy(page: bytes) -> str:
    """The Content-Security-Policy of a page: it connects to its own server only, runs only the script and the
    style that are in it, turns no text into markup, and is shown in no frame."""
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {_hashes(page, b'script')}",
            f"style-src {_hashes(page, b'style')}",
            "img-src data:",  # its icon
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    )


def _hashes(page: bytes, tag: bytes) -> str:
    found = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(one).digest()).decode()}'" for one in found)
