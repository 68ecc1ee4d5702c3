"""Checkpoints in repositories on Hugging Face: which files of a repository belong to one, and their
download."""

from __future__ import annotations

import glob
import io
import json
import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .engine.checkpoint.files import BESIDE_WEIGHTS, INDEX, SINGLE
from .engine.checkpoint.gguf_names import models_of
from .engine.checkpoint.hugging_face import shard_names
from .engine.errors import DownloadError, MissingDependencyError
from .engine.files import is_inside
from .engine.os_errors import translated


def fetch_hugging_face(source: str) -> tuple[Path, str]:
    """The checkpoint of a repository, in the cache of huggingface_hub, and its revision.

    `source` is ORG/NAME, or ORG/NAME:CHOICE for one of several GGUF files, by its file name or its type
    (Q4_K_M). The path is a directory or a GGUF file (the first part of a split one).

    MissingDependencyError: huggingface_hub is not installed. DownloadError: there is no network, no such
    repository, or no checkpoint in it that can be converted."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError as e:
        raise MissingDependencyError(
            f"hf: models need the huggingface_hub package ({e}): pip install huggingface_hub"
        ) from e
    repository, _, choice = source.partition(":")

    def snapshot(patterns: list[str], revision: str | None, bar: Any) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=patterns, tqdm_class=bar
            )
        )

    try:
        listing, unlisted = None, None
        try:
            listing = huggingface_hub.HfApi().model_info(repository, revision="main")
        except HFValidationError:
            raise
        except Exception as e:  # the exception depends on the library's version: requests or httpx
            unlisted = e
        directory = snapshot([*BESIDE_WEIGHTS], None, _silent(tqdm))
        revision = directory.name
        if listing is None:
            names = [str(path.relative_to(directory)) for path in directory.rglob("*")]
        elif listing.sha == revision:
            names = [file.rfilename for file in listing.siblings or ()]
        else:
            raise DownloadError(f"hf:{repository} changed during the download: repeat the command")
        try:
            weights = weight_files(repository, names, choice, directory)
        except DownloadError:
            if unlisted is not None:
                raise _failed(repository, unlisted) from unlisted
            raise
        bar = tqdm if sys.stderr.isatty() else _lines(tqdm)
        snapshot([glob.escape(name) for name in weights], revision, bar)
    except HFValidationError as e:
        raise DownloadError(f"hf:{repository} is not a repository: use hf:ORG/NAME") from e
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        refused = translated(e) if type(e).__module__ == "builtins" else None  # the disk, not the network
        raise refused or _failed(repository, e) from e
    return (directory / weights[0] if weights[0].endswith(".gguf") else directory), revision


def newest_revision(source: str) -> str | None:
    """The current revision of a repository (ORG/NAME or ORG/NAME:CHOICE). None: it cannot be found out."""
    try:
        import huggingface_hub

        repository = source.partition(":")[0]
        revision = huggingface_hub.HfApi().model_info(repository, revision="main", timeout=10).sha
    except Exception:  # no package, network or repository; requests, httpx and the library have their own
        return None
    return revision if isinstance(revision, str) else None


def _failed(repository: str, error: Exception) -> DownloadError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DownloadError(
        f"hf:{repository} could not be downloaded: {reason}; check the name and the network "
        "(models behind a licence need `hf auth login`), and repeat the command"
    )


def weight_files(repository: str, names: Collection[str], choice: str, directory: Path) -> list[str]:
    """The weight files to download. `directory` has the index of the weights, if the repository has one."""
    if not choice and SINGLE in names:
        return [SINGLE]
    if not choice and INDEX in names:
        shards = _shards(directory / INDEX)
        if missing := [name for name in shards if name not in names]:
            raise DownloadError(f"hf:{repository} has no {missing[0]}, which its {INDEX} lists")
        return shards
    return choose_gguf(repository, names, choice)


def _shards(index: Path) -> list[str]:
    try:
        return shard_names(json.loads(index.read_text(encoding="utf-8")), str(index))
    except (ValueError, RecursionError) as e:
        raise DownloadError(f"{index} cannot be read as JSON: {e}") from e


def choose_gguf(repository: str, names: Collection[str], choice: str) -> list[str]:
    """The GGUF file, in all its parts, that `choice` names. With "", it is the only one.

    DownloadError: there is none, or there are several."""
    models = models_of(filter(is_inside, names))
    listed = ", ".join(
        first if len(parts) == 1 else f"{first} ({len(parts)} parts)" for first, parts in models.items()
    )
    if not models:
        raise DownloadError(
            f"hf:{repository} has no checkpoint: neither {SINGLE} nor {INDEX} nor a GGUF file of a model"
        )
    found = [parts for parts in models.values() if not choice or _is_named(parts, choice)]
    found = found or [parts for parts in models.values() if _has_type(parts[0], choice)]
    if len(found) != 1:
        what = f"{len(found) or 'no'} GGUF files" + (f" that match {choice!r}" if choice else "")
        raise DownloadError(
            f"hf:{repository} has {what}; name one, as in hf:{repository}:{next(iter(models))}; it has "
            f"{listed}"
        )
    if missing := [name for name in found[0] if name not in names]:
        raise DownloadError(f"hf:{repository} has {found[0][0]} in parts, and {missing[0]} is not among them")
    return found[0]


def _is_named(parts: list[str], choice: str) -> bool:
    """Whether `choice` is a model's name: its path, its file name, or the common beginning of its parts'
    names."""
    known = {*parts, re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", parts[0])}
    known |= {name.rsplit("/", 1)[-1] for name in known}
    return choice.lower().removesuffix(".gguf") in {name.lower().removesuffix(".gguf") for name in known}


def _has_type(name: str, choice: str) -> bool:
    """Whether a path contains the type `choice` as a word: Q4_K in …-Q4_K.gguf, but not in …-Q4_K_M.gguf."""
    return re.search(rf"(?<![a-z0-9]){re.escape(choice.lower())}(?![a-z0-9_])", name.lower()) is not None


def _silent(tqdm: Any) -> Any:
    """A tqdm that prints nothing, for small files."""

    class Silent(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    return Silent


def _lines(tqdm: Any) -> Any:
    """A tqdm that prints a line for every 10 % of the bytes instead of a bar."""

    class Lines(tqdm):  # type: ignore[misc]
        tenth = -1

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.unit == "B" and self.total and 10 * self.n // self.total > self.tenth:
                self.tenth = 10 * self.n // self.total
                amount = f"{self.n / 1e6:.1f}/{self.total / 1e6:.1f} MB"
                print(f"{self.desc}: {100 * self.n // self.total:3d} %  {amount}", file=sys.stderr)

    return Lines
