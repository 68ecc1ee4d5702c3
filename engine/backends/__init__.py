"""The three backends of one program: `native` (C), `numba`, `numpy`; and the choice among them.

Importing this package imports none of them: `layout` reads its constants from `_abi`, which stands here.
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
    """The backend to use, and, when `auto` could not have the quickest, the reason with its remedy."""
    if backend != "auto":
        if backend not in NAMES:
            raise UnsupportedModelError(f"there is no backend {backend!r}; there are: {', '.join(NAMES)}")
        return backend, None
    from . import native

    reason = native.available()
    if reason is None:
        return "native", None
    return ("numba" if find_spec("numba") else "numpy"), reason


def open_backend(backend: str = "auto", isa: str = "auto", threads: int = 1) -> Backend:
    """A backend with its threads. MissingDependencyError: the backend or instruction set asked for is not
    there."""
    name, _ = choose(backend)
    if name == "native":
        from .native import NativeBackend

        return NativeBackend(threads, isa)
    if isa != "auto":
        raise MissingDependencyError(
            f"only the native backend has instruction sets to choose from, and {name} would run: leave out "
            f"--isa {isa}, or take --backend native"
        )
    if name == "numba":
        from .numba_backend import NumbaExecutor

        return _Plain(name, lambda bound: NumbaExecutor(bound, threads))
    from .numpy_backend import NumpyExecutor

    return _Plain(name, NumpyExecutor)


@dataclass(frozen=True, slots=True)
class _Plain:
    """A backend that has nothing beside its executors."""

    name: str
    executor: Callable[[BoundProgram], Executor]
    exact: bool = False

    def close(self) -> None:
        """Nothing to give up."""
