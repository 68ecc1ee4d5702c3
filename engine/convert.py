"""Converts a checkpoint to a model directory: an index, and one file per unit in the layout of the kernels.

The tensors of one unit are in memory at a time. The directory appears under its name only when complete."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import families
from .arrays import F32, F64
from .calibrate import TEXT, Calibration, pseudo_tokens
from .chat_check import chat_parts
from .checkpoint import Checkpoint, open_checkpoint
from .config import Config, parse_config
from .equalise import equalise as equalise_unit
from .errors import ModelFileError, ShoalError, UnsupportedModelError, Warn, ignore
from .hash_cache import HashCache, file_sha256
from .host import ram
from .index import (
    CHAT_TEMPLATE,
    COMMON,
    CONFIG,
    INDEX,
    KEEP,
    KV_DTYPES,
    LOCAL,
    SPECIAL_TOKENS,
    TOKENIZER,
    FileEntry,
    Index,
    numerics_version,
)
from .kept import held_in, kept_types
from .kv_page import KV_TYPES
from .layout import GROUP, PANEL, round_up
from .model_directory import tensors_of, unit_file, units_of
from .os_errors import check_space, translated
from .packing import pack_exactly, pack_q4, pack_q8, unpack_q4
from .program import Program, Unit, Weight
from .quantise_int4 import quantise_q4
from .safetensors_file import TensorInfo, write
from .temporary import new_directory, remove_leavings
from .tokenizer import Tokenizer
from .typed import typed

_WITH_HEAD = ("ForCausalLM", "LMHeadModel")  # suffixes of transformers' classes with an LM head

Progress = Callable[[int, int], None]
"""A callback with the number of finished units and the number of all units."""


_BESIDE_BYTES = 40_000_000
"""Bytes of memory in addition to a unit's weights: for a tokenizer and the activations of the calibration."""


@dataclass(frozen=True, slots=True)
class _Options:
    """Options of a conversion; see `convert`."""

    dtype: str
    head_dtype: str | None
    has_min: bool
    kv_dtype: str | None
    equalise: bool
    origin: str
    keep: bool


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str = "int8",
    head_dtype: str | None = None,
    has_min: bool = False,
    kv_dtype: str | None = None,
    equalise: bool = True,
    origin: str | None = None,
    replace: bool = False,
    finish: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
    warn: Warn = ignore,
) -> None:
    """Writes the model directory `target` from the checkpoint at `source`. With dtype int4 the LM head may
    be int8 (`head_dtype`), and groups may have minima (`has_min`). With dtype "keep" the types are those that
    hold the file's quantised values exactly (`kept`). `kv_dtype` is f16 by default (f32 with f32 weights).

    `origin` is the index's `source` (default: local); equal origins, checkpoints and options give equal model
    hashes. `replace`: an existing `target` is replaced. `finish` is called with the directory before it gets
    its name. `warn` is called for each oddity of the checkpoint that does not prevent the conversion.
    ShoalError: `target` exists, options contradict each other, or RAM is too small. ModelFileError: the
    checkpoint is damaged. UnsupportedModelError: the checkpoint's kind is not supported.
    OperatingSystemError: the disk is full, or `target` cannot be written."""
    if dtype not in (*KV_DTYPES, KEEP):
        raise ValueError(f"dtype must be one of {', '.join(KV_DTYPES)}, {KEEP}, not {dtype!r}")
    if dtype == KEEP and (head_dtype or has_min):
        raise ShoalError("--dtype keep takes the types from the file: omit --head-dtype and --min")
    head_dtype = None if head_dtype == dtype else head_dtype
    if head_dtype not in (None, "int8") or ((head_dtype or has_min) and dtype != "int4"):
        raise ShoalError("--head-dtype int8 and --min need --dtype int4: add it, or omit them")
    if kv_dtype not in (None, *KV_TYPES):
        raise ValueError(f"kv_dtype must be one of {', '.join(KV_TYPES)}, not {kv_dtype!r}")
    options = _Options(dtype, head_dtype, has_min, kv_dtype, equalise, origin or LOCAL, dtype == KEEP)
    if target.exists() and not replace:
        raise ShoalError(f"{target} already exists: remove it, or choose another name")
    warn = _once(warn)
    checkpoint = open_checkpoint(source, warn)
    try:
        remove_leavings(target.parent, target.name)
        with new_directory(target, replace=replace) as part:
            _write_directory(checkpoint, part, options, progress, warn)
            if finish is not None:
                finish(part)
    except OSError as e:
        refused = translated(e, target, "could not be written")
        if refused is None:
            raise
        raise refused from e


def _once(warn: Warn) -> Warn:
    """A `Warn` that passes each message on once, since a checkpoint's properties may be read several
    times."""
    said: set[str] = set()

    def once(message: str) -> None:
        if message not in said:
            said.add(message)
            warn(message)

    return once


def _write_directory(
    checkpoint: Checkpoint, part: Path, options: _Options, progress: Progress | None, warn: Warn
) -> None:
    config = parse_config(checkpoint.config, str(checkpoint.path), warn)
    program = families.build(config)
    config = config.within(program.window)
    if config.limit:
        warn(f"{checkpoint.path}: the model's context is {config.context} tokens{config.limit}")
    _check_names(checkpoint, program)
    if program.labels and options.head_dtype:
        raise ShoalError(f"{checkpoint.path} has a classification head, which stays f32: omit --head-dtype")
    if options.keep:
        options = replace(options, **asdict(kept_types(checkpoint, program, warn)), equalise=False)
    kv_dtype = options.kv_dtype or KV_DTYPES[options.dtype]
    index = Index(
        dtype=options.dtype,
        family=config.family,
        source=options.origin,
        license=checkpoint.license,
        files={},
        common=(COMMON,),
        units=units_of(program),
        kv_dtype=kv_dtype,
        has_min=options.has_min,
        head_dtype=options.head_dtype,
        numerics_version=numerics_version(kv_dtype),
    )
    program = typed(program, *index.types)
    _check_room(checkpoint, program)
    check_space(part, _bytes(program), "the model")
    files = index.files

    def put(name: str, data: bytes | None) -> None:
        if data is not None:
            (part / name).write_bytes(data)
            files[name] = FileEntry(len(data), file_sha256(part / name))

    chat = chat_parts(checkpoint, config, warn)
    values = dict(checkpoint.config)
    if (chat.bos, chat.eos) != (config.bos, config.eos):
        values |= {"bos_token_id": chat.bos, "eos_token_id": list(chat.eos)}
    put(CONFIG, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())
    put(TOKENIZER, chat.tokenizer)
    put(CHAT_TEMPLATE, None if chat.template is None else chat.template.encode())
    put(SPECIAL_TOKENS, chat.special)
    constants = {name: np.array(values, np.float64) for name, values in program.constants}
    infos = [TensorInfo(name, "F64", values.shape) for name, values in constants.items()]
    files[COMMON] = FileEntry(*write(part / COMMON, infos, constants.values()))
    calibrated = options.dtype == "int8" and options.equalise
    if options.dtype == "int4" and not options.keep:
        calibrated = not all(_copied(checkpoint, unit) for unit in program.units)
    calibration = _calibration(checkpoint, config, chat.tokenizer) if calibrated else None
    written = _write_units(checkpoint, program, part, options, calibration, warn)
    for done, (u, entry) in enumerate(written, 1):
        files[unit_file(u)] = entry
        if progress is not None:
            progress(done, len(program.units))
    (part / INDEX).write_bytes(index.to_json())
    HashCache(part).trust(files)


def _bytes(program: Program) -> int:
    """Bytes of all weights; a shared table counts once."""
    own = (weight for unit in program.units for weight in unit.weights if weight.name not in unit.tied)
    return sum(info.nbytes for weight in own for info in tensors_of(weight))


def _write_units(
    checkpoint: Checkpoint,
    program: Program,
    part: Path,
    options: _Options,
    calibration: Calibration | None,
    warn: Warn,
) -> Iterator[tuple[int, FileEntry]]:
    """Writes the units' files; yields each unit and its index entry. An embedding that the LM head shares is
    written last, because the sizes of the activations that it multiplies are known only then."""
    last = len(program.units) - 1
    shared = bool(program.units[last].tied)
    sizes: dict[str, F64] = {}

    def write_unit(u: int, weights: dict[str, F32], changed: Collection[str] = ()) -> tuple[int, FileEntry]:
        own = [weight for weight in program.units[u].weights if weight.name in weights]
        infos = [info for weight in own for info in tensors_of(weight)]
        for weight in own:
            if not weight.vector and weight.name not in changed and held_in(checkpoint, weight):
                del weights[weight.name]  # _arrays copies missing weights from the checkpoint
        said = warn if options.keep else ignore
        arrays = _arrays(checkpoint, own, weights, sizes, program.units[last].tied, said)
        return u, FileEntry(*write(part / unit_file(u), infos, arrays))

    for u in range(last + 1):
        weights, changed = _load(checkpoint, program.units[u]), frozenset[str]()
        if calibration is not None:
            measured = calibration.run(u, weights)
            # The last unit is left as it is: no unit follows it, and its table is often the embedding's.
            even = options.has_min and _on_even_steps(weights)
            copied = options.dtype == "int4" and _copied(checkpoint, program.units[u])
            if options.equalise and u < last and not (even or copied):
                changed = equalise_unit(calibration.program.units[u], weights, measured)
            sizes.update((name, size) for names, size in measured.items() for name in names)
        if u > 0 or not shared:
            yield write_unit(u, weights, changed)
    if shared:
        yield write_unit(0, _load(checkpoint, program.units[0]))


def _calibration(checkpoint: Checkpoint, config: Config, tokenizer: bytes | None) -> Calibration:
    """A calibration with the text in this model's tokens."""
    if tokenizer is None:
        tokens = pseudo_tokens(config.vocab)
    else:
        tokens = Tokenizer.parse(tokenizer, f"{checkpoint.path}: its tokenizer").encode(TEXT)
        if max(tokens, default=0) >= config.vocab:
            raise ModelFileError(
                f"{checkpoint.path}: its tokenizer has more tokens than its embedding: the files are of "
                "different models; fetch the checkpoint again"
            )
    return Calibration(families.build(config), tokens[: config.context])


def _load(checkpoint: Checkpoint, unit: Unit) -> dict[str, F32]:
    """The weights by name of a unit's own file. ModelFileError: a shape differs from the program's, or a
    value is not finite."""
    weights = {}
    for weight in unit.weights:
        if weight.name in unit.tied:
            continue
        values = weights[weight.name] = checkpoint.tensor(weight.source)
        expected = (weight.cols,) if weight.vector else (weight.rows, weight.cols)
        if values.shape != expected:
            raise ModelFileError(
                f"{checkpoint.path}: tensor {weight.source!r} has the shape {values.shape}, and "
                f"{expected} by the configuration: they are of different models; fetch the checkpoint again"
            )
        if not np.isfinite(values).all():
            raise ModelFileError(
                f"{checkpoint.path}: tensor {weight.source!r} holds NaN or infinity: the file was damaged in "
                "transit (fetch it again), or the training failed"
            )
    return weights


def _arrays(
    checkpoint: Checkpoint,
    own: list[Weight],
    weights: dict[str, F32],
    sizes: dict[str, F64],
    tables: tuple[str, ...],
    warn: Warn,
) -> Iterator[NDArray[Any]]:
    """The arrays of a unit file in order; each weight is freed once it is packed. A weight missing in
    `weights` is copied from the checkpoint's quantised values; `warn` is called if these must be rounded.
    `sizes` has, by weight, the root mean squares of the activations that its columns multiply, if known.
    `tables` names the matrices whose rows are also looked up as embeddings."""
    for weight in own:
        values = weights.pop(weight.name, None)
        if values is None:
            held = checkpoint.quantised(weight.source)
            exact = None if held is None else pack_exactly(held, weight.type)
            if exact is not None:
                yield from exact
                continue
            warn(
                f"{checkpoint.path}: {weight.source} is {checkpoint.type_of(weight.source)} with values that "
                "the kernels cannot multiply, such as -128, so it is rounded; other tensors are kept"
            )
            values = checkpoint.tensor(weight.source)
        if weight.type == "f32":
            yield values
            continue
        try:
            if weight.type == "q8":
                yield from pack_q8(values)
            else:
                size, has_min = sizes.get(weight.name), weight.type == "q4_min"
                yield from _packed_q4(values, size, table=weight.name in tables, has_min=has_min)
        except ValueError as e:
            raise UnsupportedModelError(f"{checkpoint.path}: tensor {weight.source!r} {e}") from e


def _copied(checkpoint: Checkpoint, unit: Unit) -> bool:
    """Whether all matrices of a unit's own can be copied exactly."""
    own = (weight for weight in unit.weights if not weight.vector and weight.name not in unit.tied)
    return all(held_in(checkpoint, weight) for weight in own)


def _on_even_steps(weights: dict[str, F32]) -> bool:
    """Whether int4 with minima can hold the matrices exactly, as those from a Q4_1 file; equalisation would
    prevent that. Tests one panel of each."""
    for values in weights.values():
        if values.ndim == 2:
            rows = values[:PANEL]
            packed = pack_q4(rows, lambda part: quantise_q4(part, has_min=True))
            if np.abs(unpack_q4(*packed, *rows.shape) - rows).max() > 1e-5 * np.abs(rows).max():
                return False
    return True


def _packed_q4(values: F32, size: F64 | None, *, table: bool, has_min: bool) -> Iterator[NDArray[Any]]:
    """The packed values, scales and minima of an int4 matrix. `size`: root mean squares of the activations
    that its columns multiply. `table`: rows are also looked up, where all columns are equally important."""
    importance = np.zeros(round_up(values.shape[1], GROUP))
    importance[: values.shape[1]] = 1 if size is None else size * size / np.mean(size * size) + table
    packed, scales, mins = pack_q4(values, lambda rows: quantise_q4(rows, importance, has_min=has_min))
    yield from (packed, scales)
    if mins is not None:
        yield mins


def _check_room(checkpoint: Checkpoint, program: Program) -> None:
    """ShoalError: less RAM is available than the conversion needs. Without this check the system might kill
    the process later."""
    counts = [[w.rows * w.cols for w in unit.weights if w.name not in unit.tied] for unit in program.units]
    # A unit as float32, and its largest matrix packed.
    needed = max(sum(unit) * 4 + max(unit, default=0) for unit in counts) + _BESIDE_BYTES
    found = ram()
    if found.total is not None and found.available is not None and found.available < needed:
        takes, here, all_of_it = (f"{n / 1e6:.0f} MB" for n in (needed, found.available, found.total))
        raise ShoalError(
            f"converting {checkpoint.path} needs {takes} of RAM, and {here} are available of the {all_of_it} "
            f"{found.bound}: convert it on a device with more, and copy the model directory"
        )


def _check_names(checkpoint: Checkpoint, program: Program) -> None:
    """ModelFileError: the checkpoint lacks a tensor of the program. UnsupportedModelError: the program does
    not use one of its tensors, so that answers would be wrong."""
    used = {weight.source for unit in program.units for weight in unit.weights}
    missing = sorted(used - set(checkpoint.names))
    if missing:
        raise ModelFileError(
            f"{checkpoint.path}: the tensor {missing[0]!r} is missing ({len(missing)} in all): "
            f"{_why_missing(missing, checkpoint.config)}"
        )
    for name in sorted(set(checkpoint.names) - used):
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in program.ignored):
            raise UnsupportedModelError(
                f"{checkpoint.path}: the tensor {name!r} is not used by this family's program, so "
                "answers would be wrong; this variant of the family is not supported"
            )


def _why_missing(names: list[str], config: dict[str, Any]) -> str:
    if names != ["lm_head.weight"]:
        return "the checkpoint is incomplete, or its configuration is another model's"
    kinds = config.get("architectures")
    if isinstance(kinds, list) and kinds and not any(str(kind).endswith(_WITH_HEAD) for kind in kinds):
        return f"its architecture is {kinds[0]}, which has no LM head and generates no text"
    return (
        "its configuration does not tie the LM head to the embedding; if the two are one table, set "
        "tie_word_embeddings to true in config.json; otherwise the checkpoint is incomplete"
    )
