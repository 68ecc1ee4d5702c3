"""What is between the devices: delays every connection, and outlives the lab to clean up after it.

    python -m bench.lab.air STATE

STATE is a JSON object (`Air`). Commands are JSON lines on standard input (`change`, COUNT); its end means
that the lab has ended, or was killed, and everything that it laid out is removed. For every device there is a
listener; who connects there reaches the device's node, and each byte arrives as much later as the two devices
are apart: kernels without netem cannot do that. Bytes keep their order.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import count

from . import ground
from .hello import frame_bytes, said

CHUNK = 64 * 1024
MOST_WAITING = 1024 * 1024
"""Bytes on their way in one direction of a connection; then its sender has to wait."""


@dataclass(slots=True)
class Place:
    """One device: where its listener and its node are, which source addresses are its own, and how far it is
    from the access point. A device that has two ranges is two places of one name."""

    name: str
    listen: tuple[str, int]
    target: tuple[str, int]
    sources: list[str]
    delay_s: float
    jitter_s: float


@dataclass(slots=True)
class Air:
    """All devices. Whoever connects from an address of `free` has no delay of its own; from an unknown one,
    the same as the device that it connects to. `ground`: what is to be removed in the end."""

    places: list[Place]
    free: list[str]
    ground: ground.Ground

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Air:
        """What `to_json` gave."""
        body = json.loads(text)
        places = [Place(**row) for row in body["places"]]
        for place in places:  # JSON has no tuples
            place.listen, place.target = (*place.listen,), (*place.target,)
        return cls(places, body["free"], ground.Ground(**body["ground"]))


def change(name: str, delay_s: float, jitter_s: float) -> bytes:
    """The command that moves a device nearer or further away."""
    return json.dumps({"name": name, "delay_s": delay_s, "jitter_s": jitter_s}).encode() + b"\n"


COUNT = b'{"count": true}\n'
"""The command to write, as one JSON line, how many bytes were sent so far by those who connected, for each
purpose: those on the way are among them."""


@dataclass(slots=True, eq=False)
class _Purpose:
    """What a connection is for. It is known when all of its first frame, which is a Hello, has been read."""

    name: str = ""
    hello: bytes = b""

    def read(self, data: bytes) -> str:
        """The purpose of the connection, as far as it is known with these bytes; else ""."""
        if not self.name:
            self.hello += data
            if len(self.hello) >= frame_bytes(self.hello):
                self.name, self.hello = _said(self.hello), b""
        return self.name


@dataclass(slots=True, eq=False)
class _Flow:
    """One direction of a connection: what was read and when it is due. An empty chunk is the sender's end.
    `purpose` is there in the direction of who has connected."""

    source: socket.socket
    sink: socket.socket
    ends: tuple[Place, ...]
    purpose: _Purpose | None = None
    chunks: deque[tuple[float, bytes]] = field(default_factory=deque)
    waiting: int = 0
    last: float = 0.0
    ended: bool = False

    def delay(self, rng: random.Random) -> float:
        return sum(end.delay_s + rng.uniform(-end.jitter_s, end.jitter_s) for end in self.ends)

    def read(self, now: float, rng: random.Random) -> bytes:
        """What has arrived. OSError: the connection broke."""
        data = self.source.recv(CHUNK)
        self.ended = not data
        self.waiting += len(data)
        self.last = max(self.last, now + self.delay(rng))  # never before what was sent before it
        self.chunks.append((self.last, data))
        return data

    def write(self, now: float) -> bool:
        """Hands over what is due; whether something is due that the sink does not take now."""
        while self.chunks and self.chunks[0][0] <= now:
            due, data = self.chunks[0]
            if not data:
                self.sink.shutdown(socket.SHUT_WR)
                self.chunks.popleft()
                return False
            try:
                sent = self.sink.send(data)
            except BlockingIOError:
                return True
            self.waiting -= sent
            if sent == len(data):
                self.chunks.popleft()
            else:
                self.chunks[0] = (due, data[sent:])
        return False


class Delays:
    """The loop over all connections."""

    def __init__(self, places: Sequence[Place], free: Sequence[str]) -> None:
        self._free = free
        self._sources = {source: place for place in places for source in place.sources}
        self._listeners = {_listener(place): place for place in places}
        self._flows: dict[socket.socket, _Flow] = {}  # by source
        self._connecting: dict[socket.socket, tuple[socket.socket, tuple[Place, ...]]] = {}
        self._blocked: dict[socket.socket, _Flow] = {}  # by sink
        self._due: list[tuple[float, int, _Flow]] = []
        self._numbers = count()  # two chunks may be due at one time
        self._rng = random.Random(0)
        self._input = b""
        self._sent: Counter[str] = Counter()

    def run(self) -> None:
        """Until standard input ends."""
        while True:
            reading = [s for s, flow in self._flows.items() if not flow.ended and flow.waiting < MOST_WAITING]
            wait = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            readable, writable, _ = select.select(  # microseconds, where epoll has milliseconds
                [sys.stdin, *self._listeners, *reading],
                [*self._connecting, *self._blocked],
                [],
                wait,
            )
            for ready in readable:
                if ready is sys.stdin:
                    if not self._command():
                        return
                elif ready in self._listeners:
                    self._accept(ready)
                elif ready in self._flows:
                    self._read(self._flows[ready])
            for ready in writable:
                if ready in self._connecting:
                    self._connected(ready)
                elif ready in self._blocked:
                    self._write(self._blocked.pop(ready))
            now = time.monotonic()
            while self._due and self._due[0][0] <= now:
                self._write(heapq.heappop(self._due)[2])

    def _command(self) -> bool:
        data = os.read(sys.stdin.fileno(), CHUNK)
        self._input += data
        *lines, self._input = self._input.split(b"\n")
        for line in lines:
            command = json.loads(line)
            if "count" in command:
                print(json.dumps(self._sent), flush=True)
                continue
            for place in self._listeners.values():
                if place.name == command["name"]:
                    place.delay_s, place.jitter_s = command["delay_s"], command["jitter_s"]
        return bool(data)

    def _accept(self, listener: socket.socket) -> None:
        client, address = listener.accept()
        place = self._listeners[listener]
        source = self._sources.get(address[0])
        ends: tuple[Place, ...] = (place, place if source is None else source)
        if address[0] in self._free:
            ends = (place,)
        elif source is not None and source.name == place.name:  # within one device
            ends = ()
        _prepare(client)
        node = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        _prepare(node)
        node.connect_ex(place.target)  # in progress; the loop hears how it went
        self._connecting[node] = (client, ends)

    def _connected(self, node: socket.socket) -> None:
        client, ends = self._connecting.pop(node)
        if node.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            client.close()
            node.close()
            return
        self._flows[client] = _Flow(client, node, ends, _Purpose())
        self._flows[node] = _Flow(node, client, ends)

    def _read(self, flow: _Flow) -> None:
        try:
            data = flow.read(time.monotonic(), self._rng)
        except BlockingIOError:
            return
        except OSError:
            self._drop(flow)
            return
        if flow.purpose is not None:
            self._sent[flow.purpose.read(data)] += len(data)
        heapq.heappush(self._due, (flow.last, next(self._numbers), flow))

    def _write(self, flow: _Flow) -> None:
        if self._flows.get(flow.source) is not flow:
            return  # dropped meanwhile
        try:
            if flow.write(time.monotonic()):
                self._blocked[flow.sink] = flow
        except OSError:
            self._drop(flow)
            return
        back = self._flows[flow.sink]
        if flow.ended and back.ended and not flow.chunks and not back.chunks:
            self._drop(flow)

    def _drop(self, flow: _Flow) -> None:
        """Ends a connection in both directions: whatever broke one side, the other is to hear of it."""
        for end in (flow.source, flow.sink):
            self._flows.pop(end, None)
            self._blocked.pop(end, None)
            end.close()


def _said(hello: bytes) -> str:
    """The purpose in a first frame; "other" if it is none of ours."""
    try:
        return said(hello)[0]
    except (ValueError, KeyError, TypeError):
        return "other"


def _listener(place: Place) -> socket.socket:
    listener = socket.create_server(place.listen, backlog=64)
    listener.setblocking(False)
    return listener


def _prepare(end: socket.socket) -> None:
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def main(arguments: Sequence[str]) -> int:
    """Says "ready" once all listeners are there."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the lab ends first, and its end is the end of standard input
    air = Air.from_json(arguments[0])
    try:
        delays = Delays(air.places, air.free)
        print("ready", flush=True)
        delays.run()
    finally:
        air.ground.remove()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
