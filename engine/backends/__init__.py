"""The backends that run programs: `native` (C), `numba` and `numpy`; and the choice among them.

Importing this package imports no backend, because `layout` reads its constants from `_abi` in this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..errors import MissingDependencyError, UnsupportedModelError

if TYPE_CHECKING:
    from .base import Backend, BoundProgram, Executor

NAMES = ("native", "numba", "numpy")


def choose(backend: str = "auto") -> tuple[str, str | None]:
    """The backend to use, and, if `auto` cannot use the fastest, the reason with its remedy, else None.
    UnsupportedModelError: there is no such backend."""
    if backend != "auto":
        if backend not in NAMES:
            raise UnsupportedModelError(f"there is no backend {backend!r}: choose one of {', '.join(NAMES)}")
        return backend, None
    from . import native

    reason = native.available()
    if reason is None:
        return "native", None
    return ("numba" if find_spec("numba") else "numpy"), reason


def open_backend(backend: str = "auto", isa: str = "auto", threads: int = 1) -> Backend:
    """Opens a backend with its threads. MissingDependencyError: the requested backend or kernel set is not
    available."""
    name, _ = choose(backend)
    if name == "native":
        from .native import NativeBackend

        return NativeBackend(threads, isa)
    if isa != "auto":
        raise MissingDependencyError(
            f"the {name} backend has no kernel sets to choose from: omit --isa {isa}, or use --backend native"
        )
    if name == "numba":
        from .numba_backend import NumbaExecutor

        return _Plain(name, lambda bound: NumbaExecutor(bound, threads))
    from .numpy_backend import NumpyExecutor

    return _Plain(name, NumpyExecutor)


@dataclass(frozen=True, slots=True)
class _Plain:
    """A backend without resources other than its executors."""

    name: str
    executor: Callable[[BoundProgram], Executor]
    exact: bool = False

    def close(self) -> None:
        """Does nothing: there is nothing to free."""
