"""`shoal pull`: downloads a checkpoint and converts it into the cache, unless that is done already."""

from __future__ import annotations

import argparse
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import Commands, add_command, add_types
from ..engine.errors import ModelFileError, ShoalError, UnsupportedModelError
from ..imports import quick_imports

if TYPE_CHECKING:
    from ..sources import Source


def add_parser(commands: Commands) -> None:
    parser = add_command(
        commands,
        "pull",
        "download a model and convert it",
        "An interrupted download is resumed. A model whose source has changed is converted again.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="smollm2-135m; or hf:ORG/NAME, a repository on Hugging Face; or hf:ORG/NAME:TYPE or "
        "hf:ORG/NAME:FILE, one of its GGUF files; or a local directory or .gguf file",
    )
    add_types(parser)
    parser.add_argument("--name", help="name of the model in `shoal ls` (default: from SOURCE)")


def run(args: argparse.Namespace) -> int:
    """Prints where the model is. A second run does no work and needs no network."""
    target = pull(
        args.source,
        args.dtype,
        args.name,
        head_dtype=args.head_dtype,
        has_min=args.has_min,
        kv_dtype=args.kv_dtype,
        refresh=True,
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
    refresh: bool = False,
) -> Path:
    """The model directory of a source in the cache. It is made if it is missing, and made again if the source
    has changed since. With `refresh`, a repository on Hugging Face is asked whether it has changed.

    ShoalError: another model has that name. DownloadError: the source is unknown, or there is no network."""
    with quick_imports():
        from ..engine.convert import convert
        from ..engine.index import KV_DTYPES
        from ..engine.memory import return_large_frees
        from ..engine.temporary import remove_leavings
        from ..origin import Origin, options_of
        from ..progress import Progress
        from ..sources import source_of
        from ..store import is_model, locked, model_path

    wanted = source_of(source, refresh=refresh)
    options = options_of(dtype, head_dtype, has_min, kv_dtype)
    head_dtype = None if head_dtype == dtype else head_dtype
    kv_dtype = None if kv_dtype == KV_DTYPES.get(dtype) else kv_dtype
    target = model_path(name or default_name(source, dtype, head_dtype, has_min, kv_dtype))
    if _is_current(target, wanted, options):
        return target
    with locked(target.name):
        if _is_current(target, wanted, options):  # another process has made it meanwhile
            return target
        if is_model(target):
            print(f"{wanted.where} has changed: converting {target.name} again", file=sys.stderr)
        remove_leavings(target.parent)
        return_large_frees()
        fetched = wanted.fetch()

        def finish(directory: Path) -> None:
            wanted.check()
            Origin(wanted.where, fetched.content, options, wanted.stamps).write(directory)

        with Progress(f"converting {target.name}", unit="units") as bar:
            convert(
                fetched.path,
                target,
                dtype=dtype,
                head_dtype=head_dtype,
                has_min=has_min,
                kv_dtype=kv_dtype,
                origin=fetched.index_source,
                replace=is_model(target),
                finish=finish,
                progress=bar.update,
                warn=bar.warn,
            )
    return target


def _is_current(target: Path, wanted: Source, options: dict[str, object]) -> bool:
    """Whether the model of this name is the one that is wanted. False: it is missing, or its source has
    changed. ShoalError: the name belongs to another model."""
    from ..engine.index import INDEX, read_index
    from ..origin import Origin, read_origin
    from ..store import is_model

    if not is_model(target):
        return False
    remedy = f"choose another name with --name, or remove that model with `shoal rm {target.name}`"
    try:
        index, _ = read_index(target / INDEX)
    except (ModelFileError, UnsupportedModelError) as e:
        raise type(e)(f"{e}; `shoal rm {target.name}` removes it") from e
    known = read_origin(target, index)
    if known is None:
        raise ShoalError(
            f"the name {target.name} is taken by a model of {index.source!r}, and it is unknown which one: "
            f"{remedy}"
        )
    if known.options != options:
        had, has = (
            ", ".join(f"{key} {value}" for key, value in given.items() if value not in (None, False))
            for given in (known.options, options)
        )
        raise ShoalError(f"the name {target.name} is taken by a model with {had}, not with {has}: {remedy}")
    content = wanted.content(known)
    if content == known.content:
        if known.where == wanted.where and wanted.stamps and wanted.stamps != known.stamps:
            with suppress(OSError):  # it only saves reading the files again
                Origin(known.where, content, known.options, wanted.stamps).write(target)
        return True
    if known.where != wanted.where:
        raise ShoalError(f"the name {target.name} is taken by a model made from {known.where}: {remedy}")
    return False


def default_name(
    source: str, dtype: str, head_dtype: str | None = None, has_min: bool = False, kv_dtype: str | None = None
) -> str:
    """The name of a source's model: the last part of the source, and the types that are not the default."""
    from ..sources import HUGGING_FACE

    path = Path(source.removeprefix(HUGGING_FACE))
    if path.name in ("", ".."):  # the current directory
        path = path.resolve()
    stem = path.name.removesuffix(".gguf")
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)  # a part of a split checkpoint
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip(".-_").lower() or "model"
    types = (
        dtype if dtype != "int8" else None,
        "min" if has_min else None,
        f"head-{head_dtype}" if head_dtype else None,
        f"kv-{kv_dtype}" if kv_dtype else None,
    )
    return "-".join([stem, *filter(None, types)])
