"""A house on one machine: `shoal up` and three `shoal join` in four network namespaces.

python -m bench.house [--scenes start,again,firewall,address,death,sleep,moved] [--model smollm2-135m]

Needs root (ip, tc, and for `firewall` nft). Each device has a namespace with a link of its own, a speed, a
memory promise with room for less than a third of the model, and caches, which are empty at the start. A table
of what was measured is printed at the end.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import shoal
from shoal.engine.errors import ShoalError
from shoal.local.client import connect
from shoal.local.unix_socket import SOCKET
from shoal.planning import MB
from shoal.processes import end
from shoal.store import resolve
from shoal.text_table import table

from .lab import ground
from .lab.lab import caps_mb
from .lab.spec import DeviceSpec, LabSpec, LinkSpec

PORT = 7077
PROMPT = "Explain in three sentences why the sky is blue."
TOKENS, LONG = 48, 200
ELSEWHERE = 100
"""What is added to the number of a device whose address has changed."""
SECONDS = 180.0
"""How long anything may take before it counts as lost."""
DEVICES = (
    DeviceSpec("laptop", 0.6, LinkSpec(bytes_per_s=50e6), cap_layers=9),
    DeviceSpec("phone_a", 0.4, LinkSpec(bytes_per_s=12.5e6), cap_layers=9),
    DeviceSpec("phone_b", 0.3, LinkSpec(bytes_per_s=10e6), cap_layers=9),
    DeviceSpec("phone_c", 0.2, LinkSpec(bytes_per_s=5e6), cap_layers=9),
)


@dataclass(slots=True)
class Device:
    """A device: its number, its spec, its directories, and its long-lived process once it runs."""

    number: int
    spec: DeviceSpec
    ram_mb: int
    directory: Path
    laid: ground.Ground
    process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Its own house, caches and runtime files."""
        own = {
            f"XDG_{kind}_HOME": str(self.directory / kind.lower()) for kind in ("CONFIG", "CACHE", "STATE")
        }
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        return {**inherited, **own, "XDG_RUNTIME_DIR": str(self.directory / "run")}

    @property
    def log(self) -> str:
        """What its long-lived process has printed."""
        return (self.directory / "log").read_text(encoding="utf-8", errors="replace")

    def start(self, *arguments: str) -> None:
        """Starts its long-lived process."""
        (self.directory / "run").mkdir(mode=0o700, exist_ok=True)
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shoal", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                preexec_fn=ground.enter(self.number, self.laid, ""),
            )

    def call(self, *arguments: str, seconds: float = SECONDS) -> str:
        """The output of a command on it. ShoalError: it failed."""
        done = subprocess.run(
            [sys.executable, "-m", "shoal", *arguments],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=seconds,
            check=False,
            preexec_fn=ground.enter(self.number, self.laid, ""),
        )
        if done.returncode:
            raise ShoalError(
                f"`shoal {arguments[0]}` on {self.spec.name} ended with {done.returncode}: "
                f"{done.stderr[-800:]}"
            )
        return done.stdout

    def stop(self) -> None:
        """Ends its long-lived process as Ctrl-C does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)
            self.process = None


@dataclass(slots=True)
class House:
    """Four devices in an open lab's namespaces; what was measured so far."""

    devices: list[Device]
    model: Path
    rows: list[list[str]] = field(default_factory=list)
    invites: list[subprocess.Popen[str]] = field(default_factory=list)
    expected: str = ""
    expected_long: str = ""

    @property
    def head(self) -> Device:
        return self.devices[0]

    @property
    def phones(self) -> list[Device]:
        return self.devices[1:]

    def note(self, what: str, value: str, bound: str = "") -> None:
        """Adds a line to the table, and prints it."""
        self.rows.append([what, value, bound])
        print(f"{what}: {value}{f' (bound {bound})' if bound else ''}", flush=True)

    def status(self) -> dict[str, Any]:
        """What `shoal top --json` says on the head. It is asked in this process: a command for each question
        would take half a core from the devices that start meanwhile. ShoalError: no head runs."""
        head = connect(Path(self.head.environment["XDG_RUNTIME_DIR"]) / "shoal" / SOCKET)
        if head is None:
            raise ShoalError("no head runs yet")
        with closing(head):
            return asdict(head.status())

    def answer(self) -> str:
        """The answer of the house to PROMPT."""
        return self.head.call("run", str(self.model), PROMPT, "--max-tokens", str(TOKENS))

    def up(self) -> None:
        """Starts the head, and waits until clients are served."""
        self.start_head()
        wait("the head", lambda: _quiet(self.status) is not None, self.head)

    def start_head(self, number: int = 0) -> None:
        """Starts the head, which listens at its address of that number."""
        head = self.head
        listen = f"{ground.address(number)}:{PORT}"
        head.start("up", str(self.model), "--listen", listen, "--name", head.spec.name,
                   "--ram", str(head.ram_mb), "--context", "512")  # fmt: skip

    def invite(self) -> str:
        """A token of a new invite, which waits until it is used."""
        command = [sys.executable, "-m", "shoal", "invite", "--no-qr", "--listen", f"{ground.address(0)}:0"]
        inviting = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=self.head.environment,
            preexec_fn=ground.enter(0, self.head.laid, ""),
        )
        self.invites.append(inviting)
        assert inviting.stdout is not None
        for line in inviting.stdout:
            if found := re.search(r"shoal join (\S+)", line):
                return found[1]
        raise ShoalError("`shoal invite` printed no token")

    def end_invites(self) -> None:
        """Ends those that nobody has used."""
        for inviting in self.invites:
            inviting.terminate()
            inviting.communicate()

    def join(self, phone: Device, token: str) -> None:
        """Pairs a phone, which stays as a node."""
        phone.start("join", token, "--name", phone.spec.name, *self.as_node(phone))

    def as_node(self, phone: Device) -> list[str]:
        """The options of a phone's node."""
        return ["--ram", str(phone.ram_mb), "--threads", "1", "--slow", str(phone.spec.slow)]

    def alone(self) -> str:
        """The answer of one process, computed once."""
        if not self.expected:
            self.expected = self.head.call(
                "run", str(self.model), PROMPT, "--max-tokens", str(TOKENS), "--alone"
            )
        return self.expected

    def fetched(self) -> list[int]:
        """The bytes of weights on the disk of each phone."""
        return [
            sum(file.stat().st_size for file in phone.directory.glob("cache/**/unit-*.safetensors"))
            for phone in self.phones
        ]

    def disturbed(self, change: Callable[[], object]) -> float:
        """The longest wait for a piece of an answer, in seconds, after something has happened to the house.
        ShoalError: it is not the answer of one process."""
        command = [sys.executable, "-m", "shoal", "run", str(self.model), PROMPT, "--max-tokens", str(LONG)]
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.head.environment,
            preexec_fn=ground.enter(0, self.head.laid, ""),
        )  # fmt: skip
        assert running.stdout is not None and running.stderr is not None
        lost = threading.Timer(SECONDS, running.kill)
        lost.daemon = True
        lost.start()
        text, longest, last, changed = b"", 0.0, time.monotonic(), False
        while piece := os.read(running.stdout.fileno(), 4096):
            now = time.monotonic()
            if changed:
                longest = max(longest, now - last)
            text, last = text + piece, now
            if not changed and len(text) > 40:
                change()
                changed = True
        if running.wait() or text.decode() != self.long_alone():
            raise ShoalError(
                f"not the answer of one process: {text.decode()} {running.stderr.read().decode()}"
            )
        return longest

    def long_alone(self) -> str:
        """The long answer of one process, computed once."""
        if not self.expected_long:
            arguments = ("run", str(self.model), PROMPT, "--max-tokens", str(LONG), "--alone")
            self.expected_long = self.head.call(*arguments)
        return self.expected_long

    def holders(self) -> list[str]:
        """The devices that hold layers, in the order of the chain."""
        devices = (_quiet(self.status) or {"devices": ()})["devices"]
        return [device["name"] for device in devices if device["layers"]]


def wait(what: str, there: Callable[[], bool], device: Device, seconds: float = SECONDS) -> float:
    """Waits until something is there; the seconds that it took. ShoalError: it does not come."""
    start = time.monotonic()
    while not there():
        if time.monotonic() - start > seconds:
            raise ShoalError(
                f"{what} did not come within {seconds:g} s; {device.spec.name} says: {device.log[-2000:]}"
            )
        if device.process is not None and device.process.poll() is not None:
            raise ShoalError(
                f"{device.spec.name} has ended with {device.process.returncode}: {device.log[-2000:]}"
            )
        time.sleep(0.1)
    return time.monotonic() - start


def _quiet(call: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return call()
    except ShoalError:
        return None


@contextmanager
def opened(model: Path) -> Iterator[House]:
    """The devices in their namespaces, without a house yet. Everything is removed at the end."""
    if (lack := ground.lacks_namespaces()) is not None:
        raise ShoalError(f"a house on one machine needs root on Linux, and this machine lacks {lack}")
    with ExitStack() as stack:
        stack.callback(os.close, ground.locked())
        directory = Path(tempfile.mkdtemp(prefix="shoal-house-"))
        laid = ground.lay_out(len(DEVICES), directory, namespaces=True, cgroups=False)
        stack.callback(laid.remove)
        caps = caps_mb(LabSpec(DEVICES), model, 512)
        devices = []
        for i, (spec, cap) in enumerate(zip(DEVICES, caps, strict=True)):
            ground.set_rate(i, spec.link.bytes_per_s)
            assert cap is not None
            (directory / spec.name).mkdir()
            devices.append(Device(i, spec, cap, directory / spec.name, laid))
        stack.callback(lambda: end([device.process for device in devices if device.process is not None]))
        _compile(devices[0].environment)
        house = House(devices, model)
        stack.callback(house.end_invites)
        yield house


def _compile(environment: dict[str, str]) -> None:
    """Compiles shoal, as pip does on a device, so that no start is slower by that."""
    package = Path(shoal.__file__).parent
    parts = [package, *(package / name for name in ("engine", "net", "planner"))]  # symlinks in a checkout
    command = [sys.executable, "-m", "compileall", "-q", *map(str, parts)]
    subprocess.run(command, env=environment, check=True)


# --- scenes


def start(house: House) -> None:
    """From empty caches to an answer over all devices."""
    begun = time.monotonic()
    house.up()
    house.note("shoal up, until it answers clients", f"{time.monotonic() - begun:.1f} s")
    for phone in house.phones[:-1]:
        house.join(phone, house.invite())
    last, token = house.phones[-1], house.invite()
    begun = time.monotonic()
    house.join(last, token)
    text = house.answer()
    took = time.monotonic() - begun
    wait("layers on all devices", lambda: len(house.holders()) == len(DEVICES), house.head)
    everywhere = time.monotonic() - begun
    sizes = house.fetched()
    needs = max(
        max(size / phone.spec.link.bytes_per_s for phone, size in zip(house.phones, sizes, strict=True)),
        sum(sizes) / house.head.spec.link.bytes_per_s,
    )
    house.note("bytes fetched", ", ".join(f"{size / MB:.0f}" for size in sizes) + " MB")
    house.note("from the last join to the first answer", f"{took:.1f} s")
    house.note("from the last join to layers on all four", f"{everywhere:.1f} s", f"{needs:.1f} + 5 s")
    house.note("the answer is that of one process", str(text == house.alone()))


def again(house: House) -> None:
    """A second start of everything, at the same time, moves no byte of weights."""
    before = house.fetched()
    for device in house.devices:
        device.stop()
    begun = time.monotonic()
    house.start_head()
    for phone in house.phones:
        phone.start("node", "--name", phone.spec.name, *house.as_node(phone))
    wait("layers on all devices", lambda: len(house.holders()) == len(DEVICES), house.head)
    house.note("second start, until layers are on all four", f"{time.monotonic() - begun:.1f} s", "3 s")
    house.note("bytes of weights moved by it", str(sum(house.fetched()) - sum(before)), "0")
    house.note("the answer is that of one process", str(house.answer() == house.alone()))


def firewall(house: House) -> None:
    """A phone that lets nothing in: everything goes through connections that it has opened, and the head."""
    phone = house.phones[1]
    rules = "add table inet t; add chain inet t in { type filter hook input priority 0; policy drop; }; "
    rules += "add rule inet t in ct state established,related accept; add rule inet t in iif lo accept"
    command = ("ip", "netns", "exec", ground.namespace(phone.number), "nft")
    subprocess.run([*command, rules], check=True)
    try:
        phone.stop()
        wait("the loss of the phone", lambda: not _works(house, phone), house.head)
        phone.start("node", "--name", phone.spec.name, *house.as_node(phone))
        seconds = wait("the phone", lambda: _works(house, phone), house.head)
        house.note("a phone behind a firewall has layers after", f"{seconds:.1f} s")
        house.note("the answer is that of one process", str(house.answer() == house.alone()))
    finally:
        subprocess.run([*command, "flush ruleset"], check=True)


def address(house: House) -> None:
    """A phone's address changes while an answer is computed."""
    phone = house.phones[0]
    house.note(
        "an address changes: longest wait for a token",
        f"{house.disturbed(lambda: move(phone)):.1f} s",
        "3 s",
    )


def move(device: Device) -> None:
    """Gives a device another address instead of its own."""
    inside = ("ip", "-n", ground.namespace(device.number), "addr")
    old, new = ground.address(device.number), ground.address(device.number + ELSEWHERE)
    subprocess.run([*inside, "add", f"{new}/24", "dev", "eth0"], check=True)
    subprocess.run([*inside, "del", f"{old}/24", "dev", "eth0"], check=True)
    if not subprocess.run([*inside, "show", "to", new], capture_output=True, check=True).stdout:
        subprocess.run([*inside, "add", f"{new}/24", "dev", "eth0"], check=True)


def moved(house: House) -> None:
    """The head has another address when it starts again, which nobody knows but by mDNS."""
    before = [len(phone.log) for phone in house.phones]
    house.head.stop()
    for phone, said in zip(house.phones, before, strict=True):
        wait("the phone's loss of its head", partial(_says, phone, said, "trying again"), phone)
    move(house.head)
    house.start_head(ELSEWHERE)
    where = f"{ground.address(ELSEWHERE)}:{PORT}"
    wait("the head", lambda: f"devices connect to {where}" in house.head.log, house.head)
    begun = time.monotonic()
    for phone, said in zip(house.phones, before, strict=True):
        wait("the phone", partial(_says, phone, said, "the head of the house is there again"), phone)
        if not _says(phone, said, f"the head of the house is at {where}, found by mDNS"):
            raise ShoalError(f"{phone.spec.name} has found the head in another way: {phone.log[said:]}")
    house.note("the head has another address: all are back after", f"{time.monotonic() - begun:.1f} s", "3 s")
    house.note("the answer is that of one process", str(house.answer() == house.alone()))


def _says(device: Device, after: int, what: str) -> bool:
    return what in device.log[after:]


def sleep(house: House) -> None:
    """A phone sleeps for a minute while an answer is computed, which waits for it: the others cannot hold the
    model."""
    phone, seconds = house.phones[2], 60.0
    assert phone.process is not None
    process = phone.process
    wakes = threading.Timer(seconds, process.send_signal, (signal.SIGCONT,))
    wakes.daemon = True

    def change() -> None:
        process.send_signal(signal.SIGSTOP)
        wakes.start()

    late = house.disturbed(change) - seconds
    house.note("a phone wakes after 60 s: the answer goes on after", f"{late:.1f} s", "3 s")


def death(house: House) -> None:
    """A phone is killed in mid-answer, and started again. The others cannot hold the model."""
    phone = house.phones[0]

    def change() -> None:
        assert phone.process is not None
        phone.process.kill()
        phone.process.wait()
        phone.start("node", "--name", phone.spec.name, *house.as_node(phone))

    what = "a phone is killed and started again: longest wait for a token"
    house.note(what, f"{house.disturbed(change):.1f} s")


def _works(house: House, device: Device) -> bool:
    """Whether a device is there, and all have layers."""
    devices = house.status()["devices"]
    states = [d["state"] for d in devices if d["name"] == device.spec.name]
    return states[-1:] in (["ready"], ["working"]) and len(house.holders()) == len(DEVICES)


SCENES = {scene.__name__: scene for scene in (start, again, firewall, address, death, sleep, moved)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.house", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--scenes", default=",".join(SCENES), help="`start` comes first (default: all)")
    args = parser.parse_args()
    with opened(resolve(args.model)) as house:
        try:
            for name in args.scenes.split(","):
                print(f"--- {name}", flush=True)
                SCENES[name](house)
        finally:
            print(table(("what", "measured", "bound"), house.rows))
            for device in house.devices:
                if (device.directory / "log").exists():
                    print(f"--- {device.spec.name}\n{device.log[-12000:]}", file=sys.stderr)


if __name__ == "__main__":
    main()
