"""Writes what a program in C needs to run a model with libshoal alone: the model's tables as C source, the
library's interface as a header, and the files of weights as they are in the model directory.

The tables are those that the native backend passes to the library (`native_program.describe`), and they are
written field by field, so that they always fit kernels.h. Weights stay in their files, which a program maps:
a table says in which file each one is, and where."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from .backends._abi import ffi
from .backends.base import BoundProgram
from .backends.native import build_hash
from .backends.native_program import describe
from .errors import ShoalError
from .files import read_text
from .index import CHAT_TEMPLATE, COMMON, SPECIAL_TOKENS, TOKENIZER
from .kv_page import page_bytes
from .layout import LAYOUT_VERSION, NUMERICS_VERSION
from .model_directory import Model, tensors_of
from .os_errors import translated
from .stage import Stage, StageOptions
from .temporary import new_directory

KERNELS = Path(__file__).parents[1] / "kernels.h"
"""Part of the package, since there are no sources beside an installed one."""
HEADER, SOURCE, INTERFACE = "model.h", "model.c", "shoal.h"
_ENUM_OF = {"kind": "op_kind", "type": "type", "domain": "domain", "activation": "activation"}
"""The enums that fields of tables have their values from."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a weight is: the number of its file in the table of files, and offsets there, in bytes; 0: it
    has none."""

    file: int
    data: int
    scales: int = 0
    mins: int = 0


def export_c(model: Model, target: Path, options: StageOptions = StageOptions()) -> None:
    """Writes the directory `target`. Files of weights are hard links where the file system allows, else
    copies. `options` give the most rows of a batch.

    ShoalError: `target` exists. UnsupportedModelError: the model has no LM head. ModelFileError: a file is
    missing or damaged. MissingDependencyError: there is no C library, which checks the tables.
    OperatingSystemError: `target` cannot be written."""
    if target.exists():
        raise ShoalError(f"{target} already exists: remove it, or choose another name")
    model.check_generates()
    names = list(dict.fromkeys(chain(*(unit.files for unit in model.index.units), model.index.common)))
    texts = [name for name in (TOKENIZER, CHAT_TEMPLATE, SPECIAL_TOKENS) if name in model.index.files]
    options = StageOptions(
        "native", threads=1, max_rows=options.max_rows, max_wanted=options.max_wanted, resident=False
    )
    with Stage(model, 0, model.n_units, options) as stage:  # checks the files, and opens the program
        source = _source(model, stage.bound, names)
    try:
        with new_directory(target) as part:
            (part / INTERFACE).write_text(_interface(), encoding="utf-8")
            (part / HEADER).write_text(_header(model, names), encoding="utf-8")
            (part / SOURCE).write_text(source, encoding="utf-8")
            for name in (*names, *texts):
                _link(model.path / name, part / name)
    except OSError as e:
        refused = translated(e, target, "could not be written")
        if refused is None:
            raise
        raise refused from e


def _link(source: Path, target: Path) -> None:
    """Makes a hard link to a file, or a copy where there can be no link."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _interface() -> str:
    """kernels.h as a header for C and C++."""
    return (
        '#ifndef SHOAL_H\n#define SHOAL_H\n#include <stdint.h>\n#ifdef __cplusplus\nextern "C" {\n#endif\n\n'
        f"{read_text(KERNELS)}\n#ifdef __cplusplus\n}}\n#endif\n#endif\n"
    )


def _header(model: Model, files: Sequence[str]) -> str:
    """The text of model.h: the hash of the model, and the sizes that programs need."""
    return _HEADER.format(
        context=model.config.context,
        vocabulary=model.program.vocab,
        files=len(files),
        states=sum(len(unit.states) for unit in model.program.units),
        outputs=1 if model.program.output is None else 2,
        hidden=model.program.cut_cols,
        ends=len(model.config.eos),
        hash=model.hash,
        sources=build_hash(),
    )


def _source(model: Model, bound: BoundProgram, files: Sequence[str]) -> str:
    """model.c."""
    keep: list[Any] = []
    program = describe(bound, keep)
    entries, places = model.index.files, _places(model, files)
    unit_names = {-1: "start", **{u: unit.name for u, unit in enumerate(model.program.units)}}
    pages = (page_bytes(state, bound.kv_type) for _, state in bound.states)
    tables = (
        _table(
            "const model_file model_files[]",
            (f'{{"{name}", {entries[name].size}u, "{entries[name].sha256}"}}' for name in files),
        ),
        _table("const int32_t model_ends[]", map(str, sorted(model.config.eos) or [-1])),
        _table("const uint64_t model_page_bytes[]", (f"{size}u" for size in pages)),
        _table(
            "static const shoal_op ops[]",
            _rows(program.ops, program.n_ops),
            [unit_names[unit] for unit, _ in bound.ops],
        ),
        _table(
            "static const shoal_buffer buffers[]",
            _rows(program.buffers, program.n_buffers),
            [buffer.name for buffer in bound.program.buffers],
        ),
        _table(
            "static shoal_weight weights[]",
            _rows(program.weights, program.n_weights),
            [f"{unit_names[unit]}: {name}" for unit, name in bound.weights],
        ),
        _table(
            _PLACES, ("{" + ", ".join(f"{n}u" for n in astuple(places[key])) + "}" for key in bound.weights)
        ),
        _table("static const shoal_state states[]", _rows(program.states, program.n_states)),
        _table("static const int32_t outputs[]", (str(program.outputs[i]) for i in range(program.n_outputs))),
    )
    return _SOURCE.format(
        layout=LAYOUT_VERSION,
        numerics=NUMERICS_VERSION,
        tables="\n".join(tables),
        sizes=_fields(program[0]),
    )


def _places(model: Model, files: Sequence[str]) -> Mapping[tuple[int, str], _Place]:
    """Where each weight is, by (unit, name); constants have unit -1."""
    number = {name: i for i, name in enumerate(files)}
    headers = {name: model.open_file(name).tensors for name in files}
    found = {
        (-1, name): _Place(number[COMMON], headers[COMMON][name].begin) for name, _ in model.program.constants
    }
    for u, (unit, entry) in enumerate(zip(model.program.units, model.index.units, strict=True)):
        for weight in unit.weights:
            name = entry.files[weight.name in unit.tied]
            offsets = (headers[name][info.name].begin for info in tensors_of(weight))
            found[u, weight.name] = _Place(number[name], *offsets)
    return found


def _table(declaration: str, rows: Iterable[str], comments: Sequence[str] = ()) -> str:
    """A table as C; `comments` stand behind its rows."""
    lines = (
        f"  {row},{f' /* {comment} */' if comment else ''}\n" for row, comment in zip_longest(rows, comments)
    )
    return f"{declaration} = {{\n{''.join(lines)}}};\n"


def _rows(table: Any, count: int) -> Iterator[str]:
    """The rows of a table as initialisers in C."""
    for i in range(count):
        yield f"{{{_fields(table[i])}}}"


def _fields(row: Any) -> str:
    """The fields of a struct as designated initialisers. Pointers are left out, and numbers that are 0 unless
    they stand for a kind or type."""
    found = []
    for name, field in ffi.typeof(row).fields:
        if field.type.kind == "pointer":
            continue
        value = getattr(row, name)
        if field.type.kind == "array":
            numbers = ", ".join(map(str, value))
            if any(value):
                found.append(f".{name} = {{{numbers}}}")
        elif name in _ENUM_OF and (value or name in ("kind", "type")):
            found.append(f".{name} = {ffi.typeof(f'enum shoal_{_ENUM_OF[name]}').elements[value]}")
        elif value:
            found.append(f".{name} = {_float(value) if isinstance(value, float) else value}")
    return ", ".join(found)


def _float(value: float) -> str:
    """A number of type float, exactly, in C."""
    digits, _, exponent = value.hex().partition("p")
    return f"{digits.rstrip('0')}p{exponent}f"


_PLACES = "static const struct {\n  uint32_t file;\n  uint64_t data, scales, mins;\n} places[]"

_HEADER = """\
/* A model for libshoal, written by `shoal export-c`. What is here and how it is used: docs/embedding-c.md. */
#ifndef MODEL_H
#define MODEL_H
#include "shoal.h"

enum {{
  MODEL_CONTEXT = {context}, /* the most positions of a sequence */
  MODEL_VOCABULARY = {vocabulary}, /* how many tokens there are */
  MODEL_FILES = {files}, /* files of weights */
  MODEL_STATES = {states}, /* layers with keys and values */
  MODEL_OUTPUTS = {outputs}, /* of a batch: logits, and the final norm's rows of {hidden} columns */
  MODEL_ENDS = {ends} /* tokens that end an answer */
}};
#define MODEL_HASH "{hash}" /* of the model directory */
#define MODEL_SOURCES "{sources}" /* what shoal_source_hash() says of a library that fits */

/* A file of weights: its name in this directory, its size, and what shoal_sha256 says of it. */
typedef struct {{
  const char *name;
  uint64_t bytes;
  const char *sha256;
}} model_file;

#ifdef __cplusplus
extern "C" {{
#endif
extern const model_file model_files[MODEL_FILES];
extern const int32_t model_ends[]; /* MODEL_ENDS token ids */
extern const uint64_t model_page_bytes[MODEL_STATES]; /* of a page of keys and values, by state */

/* The program, for shoal_open. data[i] is where the file model_files[i] is in memory; it must stay there. */
const shoal_program *model_program(const char *const data[MODEL_FILES]);
#ifdef __cplusplus
}}
#endif
#endif
"""

_SOURCE = """\
/* The tables of a model, written by `shoal export-c`: see model.h and shoal.h. */
#include "model.h"

#include <stddef.h>

_Static_assert(SHOAL_LAYOUT == {layout} && SHOAL_NUMERICS == {numerics}, "shoal.h is of another version");

{tables}
_Static_assert(sizeof outputs / sizeof *outputs == MODEL_OUTPUTS, "model.h is of another model");

static shoal_program program = {{
  .ops = ops, .buffers = buffers, .weights = weights, .states = states, .outputs = outputs,
  {sizes}
}};

const shoal_program *model_program(const char *const data[MODEL_FILES]) {{
  for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {{
    const char *file = data[places[i].file];
    weights[i].data = file + places[i].data;
    if (places[i].scales) weights[i].scales = (const uint16_t *)(const void *)(file + places[i].scales);
    if (places[i].mins) weights[i].mins = (const uint16_t *)(const void *)(file + places[i].mins);
  }}
  return &program;
}}
"""
