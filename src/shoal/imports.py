"""Imports of a command at its start: quick, and without modules that it does not use."""

from __future__ import annotations

import gc
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
def quick_imports(*unused: str) -> Iterator[None]:
    """Imports inside the block run without garbage collection, which would take 10 ms to find nothing.

    Importing one of the modules `unused` gives a placeholder that loads the real module on first access to an
    attribute. Modules that are loaded already, or missing, are left alone, and after the block an import is
    an ordinary one again. (importlib.util.LazyLoader does not serve here: in Python 3.11 the second `import`
    statement loads what the first put off.)
    """
    placeholders = {name: module for name in unused if (module := _placeholder(name)) is not None}
    sys.modules.update(placeholders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        for name, module in placeholders.items():
            _remove(name, module)


def _placeholder(name: str) -> ModuleType | None:
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return None
    placeholder = importlib.util.module_from_spec(spec)

    def load(attribute: str) -> Any:
        _remove(name, placeholder)
        module = importlib.import_module(name)
        vars(placeholder).update(vars(module))
        return getattr(module, attribute)

    vars(placeholder)["__getattr__"] = load
    return placeholder


def _remove(name: str, placeholder: ModuleType) -> None:
    with _loading:  # another thread may have just loaded the real module
        if sys.modules.get(name) is placeholder:
            del sys.modules[name]
