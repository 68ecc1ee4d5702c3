"""The C backend: one cffi call runs all ops of a range of units (csrc/). It is exact: the same bits on every
kernel set."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arrays import F32
from ..batch import Logprobs
from ..errors import CancelledRunError, MissingDependencyError, ShoalError
from ..host import big_cores
from ..source_hash import source_hash
from ._abi import ffi
from .base import CANCELLED, BoundProgram, Outcome, SequenceRows
from .native_program import ENUMS, describe, keep_buffer

_ERROR_BYTES = 512
_ISA: dict[str, int] = {
    name.removeprefix("SHOAL_ISA_").lower(): value
    for name, value in ffi.typeof("enum shoal_isa").relements.items()
}


def library_path() -> Path:
    """The path of the C library, which the build puts into the package's directory."""
    return Path(__file__).parents[2] / "libshoal.so"


@cache
def library() -> Any:
    """The C library. MissingDependencyError: it is missing, cannot be loaded, or is older than its
    sources."""
    path = library_path()
    if not path.exists():
        raise MissingDependencyError(
            "the C library is missing: install a C compiler and run `pip install --force-reinstall shoal` "
            "(in a checkout: `make lib`), or use --backend numba or numpy"
        )
    try:
        lib = ffi.dlopen(str(path))
    except OSError as e:
        raise MissingDependencyError(
            f"the C library cannot be loaded ({e}): build it again with `make lib`"
        ) from e
    sources = source_hash()
    if sources is not None and _built_from(lib) != sources:
        raise MissingDependencyError("the C library is older than the sources in csrc/: run `make lib`")
    return lib


def build_hash() -> str:
    """Hash of the C sources that the library was built from. Errors: see `library`."""
    return _built_from(library())


def _built_from(lib: Any) -> str:
    return str(ffi.string(lib.shoal_source_hash()).decode())


def available() -> str | None:
    """None if the library can be used, else the reason why not, with the remedy."""
    try:
        library()
    except MissingDependencyError as e:
        return str(e)
    return None


def isa_names() -> list[str]:
    """Names of the kernel sets that this build and CPU support, in the order of the enum."""
    lib = library()
    ordered = sorted(_ISA.items(), key=lambda item: item[1])
    return [name for name, value in ordered if value != _ISA["auto"] and lib.shoal_isa_available(value)]


@contextmanager
def pinned(cores: Collection[int]) -> Iterator[None]:
    """A context in which the calling thread runs on these CPUs only, where the system allows it."""
    try:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores)
    except (AttributeError, OSError):  # not Linux, or an Android that forbids it
        yield
        return
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def open_pool(threads: int) -> Any:
    """A pool of C threads. They end when the object is collected, or by `ffi.release`. ShoalError: the system
    cannot start so many threads."""
    lib = library()
    pool = lib.shoal_pool_open(threads)
    if pool == ffi.NULL:
        raise ShoalError(f"cannot start {threads} threads: ask for fewer with --threads")
    return ffi.gc(pool, lib.shoal_pool_close)


class NativeBackend:
    """A kernel set and a pool of threads. See base.Backend."""

    exact = True

    def __init__(self, threads: int = 1, isa: str = "auto") -> None:
        lib = library()
        if isa not in _ISA or (isa != "auto" and not lib.shoal_isa_available(_ISA[isa])):
            raise MissingDependencyError(
                f"this CPU or build has no {isa!r} kernels: choose one of {', '.join(isa_names())}"
            )
        self.name = f"native ({ffi.string(lib.shoal_isa_name(_ISA[isa] or lib.shoal_isa_best())).decode()})"
        self._isa = _ISA[isa]
        with pinned(big_cores()):  # threads inherit the CPU affinity of the thread that starts them
            self._pool = open_pool(threads)

    def executor(self, bound: BoundProgram) -> NativeExecutor:
        """See base.Backend."""
        return NativeExecutor(bound, self._pool, self._isa)

    def close(self) -> None:
        """See base.Backend."""
        ffi.release(self._pool)


class NativeExecutor:
    """A C executor for a bound range of units, which uses the backend's threads."""

    def __init__(self, bound: BoundProgram, pool: Any, isa: int) -> None:
        self._lib = lib = library()
        self._bound, self._pool = bound, pool
        self._error = ffi.new("char[]", _ERROR_BYTES)
        self._keep: list[Any] = []  # objects that C has pointers to
        handle = ffi.new("shoal_executor **")
        program = describe(bound, self._keep)
        self._check(lib.shoal_open(program, pool, isa, handle, self._error, _ERROR_BYTES))
        self._executor = ffi.gc(handle[0], lib.shoal_close)
        self.workspace_bytes = int(lib.shoal_workspace_bytes(self._executor))
        self._batch = ffi.new("shoal_batch *")
        self._cut = [bound.program.buffer(name).cols for name in bound.program.cut]
        self._inputs = ffi.new("float *[]", len(self._cut))
        self._outputs = ffi.new("float *[]", len(self._cut) if not bound.last else 2)
        # The tables of a batch are reused: new objects would be cache misses, since a step evicts Python's
        # memory from the caches.
        self._described = ffi.new("shoal_sequence[]", bound.max_rows)
        self._tokens = np.zeros(bound.max_rows, np.int32)
        self._drawn = np.zeros(max(bound.max_wanted, 1), np.int32)
        self._batch.sequences = self._described
        self._batch.tokens = keep_buffer(self._keep, "int32_t[]", self._tokens)
        self._batch.drawn = keep_buffer(self._keep, "int32_t[]", self._drawn)
        self._batch.inputs = ffi.cast("const float *const *", self._inputs)
        self._batch.outputs = self._outputs

    def clock_ops(self) -> NDArray[np.uint64]:
        """Starts timing ops. Each run updates the returned array `[ops]`: nanoseconds by `bound.ops`."""
        taken = np.zeros(len(self._bound.ops), np.uint64)
        self._batch.op_ns = keep_buffer(self._keep, "uint64_t[]", taken)
        return taken

    def close(self) -> None:
        """See base.Executor.close."""
        ffi.release(self._executor)

    def run(
        self,
        sequences: Sequence[SequenceRows],
        hidden: F32 | None,
        want_logits: bool,
        cancel: NDArray[np.int32],
    ) -> Outcome:
        """See base.Executor.run."""
        bound, batch, described = self._bound, self._batch, self._described
        keep: list[Any] = []
        row = wanted = 0
        for item, s in zip(described, sequences):  # noqa: B905 the table has room for more
            pages, history = ffi.from_buffer("void *[]", s.kv.table), ffi.from_buffer("int32_t[]", s.history)
            keep += [pages, history]
            item.rows, item.first, item.wanted, item.sample = s.rows, s.first, s.wanted, s.sample
            item.pages, item.pages_stride, item.history = pages, s.kv.table.shape[1], history
            item.sampling = _sampling(s, keep)
            item.reported = 0 if s.report is None else 1 + s.report
            item.given = ffi.NULL if s.given is None else keep_buffer(keep, "int32_t[]", s.given)
            self._tokens[row : row + s.rows] = s.history[s.first : s.first + s.rows]
            row, wanted = row + s.rows, wanted + s.wanted
        if hidden is not None:
            for i, part in enumerate(self._parts(hidden)):
                self._inputs[i] = keep_buffer(keep, "float[]", np.ascontiguousarray(part, np.float32))
        logits = output = None
        outs: list[F32 | None] = []
        if not bound.last:
            outs += [np.empty((row, cols), np.float32) for cols in self._cut]
        else:
            if want_logits:
                logits = np.empty((wanted, bound.program.logit_cols), np.float32)
            if any(s.output for s in sequences):
                output = np.empty((row, bound.program.output_cols), np.float32)
            outs += [logits, output]
        for i, out in enumerate(outs):
            self._outputs[i] = ffi.NULL if out is None else keep_buffer(keep, "float[]", out)
        batch.n_sequences, batch.cancel = len(sequences), keep_buffer(keep, "int32_t[]", cancel)
        most = batch.most_reported = max(item.reported for item in described[0 : len(sequences)])
        reports, logprobs = np.empty((2, wanted, most), np.int32)
        if most:
            batch.reports = keep_buffer(keep, "int32_t[]", reports)
            batch.logprobs = ffi.cast("float *", keep_buffer(keep, "int32_t[]", logprobs))
        self._check(self._lib.shoal_run(self._executor, batch, self._error, _ERROR_BYTES))
        drawn = self._drawn[:wanted].copy()
        if bound.last:
            told = _reported(sequences, reports, logprobs.view(np.float32)) if most else {}
            return Outcome(None, logits, drawn, told, output)
        cut = [out for out in outs if out is not None]
        return Outcome(cut[0] if len(cut) == 1 else np.concatenate(cut, axis=1), None, drawn)

    def _parts(self, hidden: F32) -> list[F32]:
        """A hidden row's columns, split by the buffers of the cut."""
        return [hidden] if len(self._cut) == 1 else np.split(hidden, np.cumsum(self._cut)[:-1], axis=1)

    def _check(self, status: int) -> None:
        if status == ENUMS["SHOAL_OK"]:
            return
        message = ffi.string(self._error).decode(errors="replace")
        if status == ENUMS["SHOAL_E_CANCELLED"]:
            raise CancelledRunError(CANCELLED)
        if status == ENUMS["SHOAL_E_NONFINITE"]:
            raise FloatingPointError(message)
        if status == ENUMS["SHOAL_E_MEMORY"]:
            raise ShoalError(f"out of memory ({message}): close other programs, or run fewer layers here")
        raise ShoalError(f"the C library refused the program or batch: {message}")


def _reported(
    sequences: Sequence[SequenceRows], tokens: NDArray[np.int32], values: F32
) -> dict[int, Logprobs]:
    """The log-probabilities of rows that have a token, from the tables `[wanted, most reported]`."""
    found, end = {}, 0
    for s in sequences:
        end += s.wanted
        if s.report is None:
            continue
        for row in range(end - (s.sample if s.given is None else s.wanted), end):
            (_, own), *likeliest = zip(
                tokens[row, : 1 + s.report].tolist(), values[row, : 1 + s.report].tolist(), strict=True
            )
            found[row] = Logprobs(own, tuple(likeliest))
    return found


def _sampling(s: SequenceRows, keep: list[Any]) -> Any:
    p = s.sampling
    biased = biases = allowed = ffi.NULL
    if p.bias:
        biased = keep_buffer(keep, "int32_t[]", np.array([token for token, _ in p.bias], np.int32))
        biases = keep_buffer(keep, "float[]", np.array([value for _, value in p.bias], np.float32))
    if s.allowed is not None:
        allowed = keep_buffer(keep, "uint8_t[]", s.allowed)
    return (
        *(p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, p.seed),
        *(p.presence_penalty, p.frequency_penalty, len(p.bias), biased, biases, allowed),
    )
