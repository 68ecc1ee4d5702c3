"""Modules that others import without need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_loading = threading.RLock()


@contextmanager
def deferred(*names: str) -> Iterator[None]:
    """What is imported within finds stand-ins for these modules (unless they are there already, or nowhere):
    a module that keeps one loads the real module once it uses something of it. Afterwards an import is an
    import again.

    (importlib.util.LazyLoader is no such thing: in Python 3.11 the second `import` loads what the first put
    off.)"""
    stand_ins = {name: stand_in for name in names if (stand_in := _stand_in(name)) is not None}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            _remove(name, stand_in)


def _stand_in(name: str) -> ModuleType | None:
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return None
    stand_in = importlib.util.module_from_spec(spec)

    def load(attribute: str) -> Any:
        _remove(name, stand_in)
        module = importlib.import_module(name)
        vars(stand_in).update(vars(module))
        return getattr(module, attribute)

    vars(stand_in)["__getattr__"] = load
    return stand_in


def _remove(name: str, stand_in: ModuleType) -> None:
    with _loading:  # or the module that another thread has just put there might go
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
