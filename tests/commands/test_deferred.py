"""Imports that are put off until something of the module is used."""

from __future__ import annotations

import subprocess
import sys

HEAD = "import sys; from shoal.deferred import defer; defer('ssl')\n"


def said(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", HEAD + code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_trio_works_without_loading_ssl() -> None:
    assert said("import trio; trio.run(trio.sleep, 0); print('_ssl' in sys.modules)") == "False"


def test_what_is_used_is_the_module_itself() -> None:
    assert (
        said(
            "import trio, ssl; first = ssl.create_default_context()\n"
            "from ssl import SSLContext; import ssl as again\n"
            "print(type(first) is SSLContext is again.SSLContext is ssl.SSLContext)"
        )
        == "True"
    )


def test_looking_for_it_or_for_what_it_lacks_is_answered_as_ever() -> None:
    assert (
        said("import importlib.util, ssl; print(importlib.util.find_spec('ssl').name, '_ssl' in sys.modules)")
        == "ssl False"
    )
    assert said("import ssl; print(hasattr(ssl, 'nothing'))") == "False"


def test_a_module_that_is_there_or_nowhere_is_left_alone() -> None:
    assert (
        said(
            "import json; defer('json'); defer('no_such_module')\n"
            "print(json is sys.modules['json'], 'no_such_module' in sys.modules)"
        )
        == "True False"
    )
