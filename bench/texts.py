"""Text to measure quality on: the excerpt of the English Wikipedia that the gensim wheel carries (PyPI).

The wheel is fetched once, without its dependencies, into the directory given; only text is taken out of it.
"""

from __future__ import annotations

import bz2
import html
import re
import subprocess
import sys
import zipfile
from pathlib import Path

GENSIM = "gensim==4.4.0"
_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def enwiki(cache: Path, characters: int) -> str:
    """The first `characters` characters of prose of the excerpt. RuntimeError: the wheel cannot be
    fetched."""
    cache.mkdir(parents=True, exist_ok=True)
    plain = cache / "enwiki.txt"
    if not plain.exists():
        raw = bz2.decompress(zipfile.ZipFile(_wheel(cache)).read(_MEMBER)).decode("utf-8")
        part = plain.with_suffix(".part")
        part.write_text(_prose(raw, 2_000_000), encoding="utf-8")
        part.rename(plain)
    return plain.read_text(encoding="utf-8")[:characters]


def _wheel(cache: Path) -> Path:
    if not list(cache.glob("gensim-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", str(cache), GENSIM], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{GENSIM} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return next(cache.glob("gensim-*.whl"))


def _prose(xml: str, limit: int) -> str:
    """Paragraphs of articles, without markup."""
    kept: list[str] = []
    size = 0
    for match in re.finditer(r"<text[^>]*>(.*?)</text>", xml, re.DOTALL):
        for line in _plain(html.unescape(match.group(1))).splitlines():
            if len(line) > 200 and not line.startswith(("|", "*", "!", "#", ":", "{", "=", ";")):
                kept.append(line.strip())
                size += len(line)
        if size > limit:
            break
    return "\n\n".join(kept)


def _plain(wiki: str) -> str:
    wiki = re.sub(
        r"<!--.*?-->|<ref[^>]*/>|<ref.*?</ref>|<(math|gallery|table|pre).*?</\1>", "", wiki, flags=re.DOTALL
    )
    for _ in range(4):  # templates and tables stand in each other
        wiki = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", wiki)
    wiki = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", wiki)
    wiki = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]", r"\1", wiki)
    wiki = re.sub(r"\[https?:\S+ ?([^\]]*)\]", r"\1", wiki)
    return re.sub(r"'{2,}|<[^>]+>", "", wiki)
