"""Imports without garbage collection, and without modules that are not used."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = """import sys
from shoal.imports import quick_imports
with quick_imports("ssl", "idna"):
    import trio
"""


def said(code: str, head: str = HEAD) -> str:
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_trio_works_without_loading_either() -> None:
    code = """
async def main():
    listener, = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await trio.open_tcp_stream(*listener.socket.getsockname())
trio.run(main)
print("_ssl" in sys.modules, "idna.core" in sys.modules)
"""
    assert said(code) == "False False"


def test_a_node_loads_neither_with_its_command() -> None:
    code = """
code = shoal.cli.main(["node", "no-model"])
print(code, *(name in sys.modules for name in ("shoal.net.node", "trio", "_ssl", "idna.core")))
"""
    assert said(code, "import sys, shoal.cli\n") == "3 True True False False"


def test_a_node_loads_nothing_of_a_coordinator_nor_a_command_the_others() -> None:
    code = """
shoal.cli.main(["node", "no-model"])
print(*(name for name in sys.modules if name.startswith("shoal.commands.")))
for name in ("net.events", "net.members", "net.placement", "net.coordinator", "planner.solve", "decimal"):
    if name in sys.modules or f"shoal.{name}" in sys.modules:
        print(name)
"""
    assert said(code, "import sys, shoal.cli\n") == "shoal.commands.node"


def test_garbage_is_collected_again_after_the_imports() -> None:
    code = """
import gc
with quick_imports():
    print(gc.isenabled(), end=" ")
print(gc.isenabled(), end=" ")
gc.disable()
with quick_imports():
    pass
print(gc.isenabled())
"""
    assert said(code) == "False True False"


def test_who_kept_a_stand_in_gets_the_module_when_it_uses_it() -> None:
    code = """
import trio._ssl, trio._socket
print(trio._socket._idna.encode("b\u00fccher.example", uts46=True).decode(), end=" ")
import ssl, idna
first = trio._ssl._stdlib_ssl.create_default_context()
print(type(first) is ssl.SSLContext, trio._socket._idna.encode is idna.encode)
"""
    assert said(code) == "xn--bcher-kva.example True True"


def test_afterwards_an_import_is_an_import() -> None:
    code = """
import idna.core, ssl, importlib
importlib.reload(ssl)
print(ssl is sys.modules["ssl"], idna.core.encode is idna.encode, "_ssl" in sys.modules)
"""
    assert said(code) == "True True True"


def test_threads_that_use_it_at_once_all_get_it() -> None:
    code = """
import threading, trio._ssl
sys.setswitchinterval(1e-6)
found = []
def use():
    found.append(trio._ssl._stdlib_ssl.PROTOCOL_TLS_CLIENT)
threads = [threading.Thread(target=use) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
import ssl
print(found == 8 * [ssl.PROTOCOL_TLS_CLIENT])
"""
    assert said(code) == "True"


@pytest.mark.parametrize("name", ["json", "no_such_module"])
def test_a_module_that_is_there_or_nowhere_is_left_alone(name: str) -> None:
    code = f"""
import json
before = sys.modules.get({name!r})
with quick_imports({name!r}):
    print(sys.modules.get({name!r}) is before, end=" ")
print(sys.modules.get({name!r}) is before)
"""
    assert said(code) == "True True"


def test_what_cannot_be_imported_says_so_at_its_use(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "broken.py").write_text("import no_such_module\n")
    code = f"""
sys.path.insert(0, {str(folder)!r})
with quick_imports("broken"):
    import broken
try:
    broken.anything
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert said(code) == "no_such_module"
