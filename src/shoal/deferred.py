"""Modules that others import without need."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any


def defer(name: str) -> None:
    """From now on `import name` gives a stand-in, which imports the module once something of it is used; it
    changes nothing if the module is there already, or is nowhere.

    (importlib.util.LazyLoader is no such thing: in Python 3.11 the second `import` loads what the first put
    off.)"""
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None:
        return
    stand_in = importlib.util.module_from_spec(spec)

    def load(attribute: str) -> Any:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        module = importlib.import_module(name)
        vars(stand_in).update(vars(module))
        return getattr(module, attribute)

    vars(stand_in)["__getattr__"] = load
    sys.modules[name] = stand_in
