"""`shoal demo --page`: the page of `shoal serve` over the demo's nodes. On the terminal, devices are heated,
killed and started again."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ..engine.errors import ShoalError
from ..engine.model_directory import Model
from ..http_arguments import HOST, PORT
from ..net.errors import AddressInUseError
from ..net.identity import host_port
from ..net.slow import set_factor
from ..nodes import Nodes, open_nodes
from ..plan_report import render
from ..planning import default_workload
from ..portal import logging_thread
from ..processes import RunningNode, start
from ..server.app import Options, serve_app
from ..server.http import Limits
from ..server.opening import Listeners, hosts_of, open_listeners
from ..server.run import run
from .demo import DEVICES, HOTTER, busiest
from .run import tell

Log = Callable[[str], object]
CONTEXT = 2048
_KEYS = "h: the busiest device gets hot, c: it cools, k: it dies, s: it starts again (each with Enter)"


def serve(model: Model, running: list[RunningNode], directory: Path) -> None:
    """Serves until Ctrl-C."""
    with ExitStack() as stack:
        log = stack.enter_context(logging_thread(tell))
        addresses = [node.address for node in running]
        workload = default_workload(CONTEXT, given=True)
        engine = stack.enter_context(open_nodes(model, addresses, workload, log=log))
        print(f"\n3. The plan, from the nodes' measurements:\n\n{render(engine.plan)}")
        listeners = _listeners()
        options = Options(hosts=hosts_of(HOST))
        app = serve_app(engine, model, CONTEXT, options, log, status=engine.status)
        address = f"http://{HOST}:{listeners[0].socket.getsockname()[1]}/#house"
        print(f"4. The page, until Ctrl-C: {address}\n\n   {_KEYS}\n", flush=True)
        devices = _Devices(model, engine, running, directory, log)
        threading.Thread(target=devices.obey, name="shoal keys", daemon=True).start()
        if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            webbrowser.open(address)
        run(app, listeners, None, Limits(grace=2.0), log)


def _listeners() -> Listeners:
    try:
        return open_listeners(HOST, PORT)
    except AddressInUseError:
        return open_listeners(HOST, 0)


class _Devices:
    """What letters on the terminal do to the busiest device. A node that was started again takes its place in
    `running`, whose nodes the caller ends."""

    def __init__(
        self, model: Model, engine: Nodes, running: list[RunningNode], directory: Path, log: Log
    ) -> None:
        self._model, self._engine, self._directory, self._log = model, engine, directory, log
        self._running = running
        self._dead: int | None = None

    def obey(self) -> None:
        """Reads a letter a line, until there are no more. It never returns: a node that it has started ends
        with its thread (processes.end_with_parent)."""
        actions = {"h": self._heat, "c": self._cool, "k": self._kill, "s": self._start}
        for line in sys.stdin:
            try:
                actions.get(line.strip().lower(), self._help)()
            except ShoalError as error:
                self._log(str(error))
        threading.Event().wait()

    def _help(self) -> None:
        self._log(_KEYS)

    def _heat(self) -> None:
        name, slow = busiest(self._engine.plan.assignments)
        set_factor(self._directory / f"{name}.slow", HOTTER * slow)
        self._log(f"{name} gets hot: each of its steps takes {HOTTER:g} times as long")

    def _cool(self) -> None:
        for name, slow, _ in DEVICES:
            set_factor(self._directory / f"{name}.slow", slow)
        self._log("all devices are cool")

    def _kill(self) -> None:
        if self._dead is not None:
            self._log("the others can go on without one device, not without two: s starts it again")
            return
        name, _ = busiest(self._engine.plan.assignments)
        self._dead = [node.spec.name for node in self._running].index(name)
        self._running[self._dead].process.kill()
        self._log(f"{name} dies")

    def _start(self) -> None:
        if self._dead is None:
            self._log("no device is dead")
            return
        node = self._running[self._dead]
        node.process.wait()
        (self._directory / f"{node.spec.name}.port").unlink(missing_ok=True)
        spec = replace(node.spec, listen=host_port(*node.address))
        self._running[self._dead] = start(self._model.path, spec, self._directory)
        self._dead = None
