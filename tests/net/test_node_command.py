"""`shoal node` as a process: what it prints, what it refuses, and how it ends."""

import argparse
import dataclasses
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.patience import LIMIT

from shoal.arguments import build_parser
from shoal.cli import main
from shoal.commands import node
from shoal.engine.errors import ShoalError
from shoal.engine.host import Ram
from shoal.engine.measure import stopwatch
from shoal.net.errors import NetError
from shoal.node_process import StageOpener, _offer, promised_bytes

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"


def parse(line: str) -> argparse.Namespace:
    return build_parser().parse_args(["node", *line.split()])


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.20", "[::]", "example.org"])
def test_an_address_that_others_reach_needs_a_word_of_consent(host: str) -> None:
    with pytest.raises(NetError, match="--insecure"):
        node.run(parse(f"nowhere --listen {host}:0"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "[::1]"])
def test_loopback_needs_none(host: str, tmp_path: Path) -> None:
    with pytest.raises(ShoalError) as caught:
        node.run(parse(f"{tmp_path}/nowhere --listen {host}:0"))
    assert "nowhere" in str(caught.value)


def test_a_name_is_judged_by_all_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    def both(*_: object, **__: object) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in ("127.0.0.1", "192.168.1.20")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with pytest.raises(NetError, match=r"other devices can reach box \(192\.168\.1\.20\).*--insecure"):
        node.run(parse("nowhere --listen box:0"))
    with pytest.raises(ShoalError, match="nowhere"):
        node.run(parse("nowhere --listen box:0 --insecure"))


def test_a_factor_below_one_is_refused() -> None:
    with pytest.raises(ShoalError, match=r"--slow 0\.5 is not a slow factor: give a number from 1"):
        node.run(parse("nowhere --slow 0.5"))


GB = 1 << 30
CONTAINER = Ram(400 << 20, 300 << 20, "that this container may use (the memory limit of its control group)")


@pytest.mark.parametrize(
    ("ram", "promised"),
    [
        (Ram(16 * GB, 8 * GB), 6 * GB + 50),
        (CONTAINER, (225 << 20) + 50),
        (Ram(16 * GB, 0), 50),
        (Ram(40, 40), 40),  # its files are in memory that is counted elsewhere
        (Ram(16 * GB, None), 4 * GB + 50),
    ],
)
def test_a_node_offers_a_share_of_what_is_available(
    ram: Ram, promised: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert promised_bytes(None, 50, ram) == pytest.approx(promised, abs=1)
    said = capsys.readouterr().err
    assert ("a third of the 17180 MB that this machine has is assumed" in said) is (ram.available is None)


def test_a_node_that_knows_nothing_asks() -> None:
    with pytest.raises(ShoalError, match=r"how much this node may use with --ram MB"):
        promised_bytes(None, 50, Ram(None, None))
    assert promised_bytes(300, 50, Ram(None, None)) == 300_000_000


def test_a_promise_that_would_get_the_node_killed_is_refused() -> None:
    assert promised_bytes(420, 50, CONTAINER) == 420_000_000  # a limit in whole pages may be below
    with pytest.raises(ShoalError, match=r"--ram 421 is more than the 419 MB that this container may use"):
        promised_bytes(421, 50, CONTAINER)
    with pytest.raises(ShoalError, match=r"--ram 17181 is more than the 17180 MB that this machine has"):
        promised_bytes(17181, 50, Ram(16 * GB, None))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("node") / "tiny"
    assert main(["convert", str(TINY), str(path), "--dtype", "f32"]) == 0
    return path


@pytest.fixture
def started(model: Path, tmp_path: Path) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A node that listens, and its address."""
    port_file = tmp_path / "port"
    process = start(model, "--port-file", str(port_file), "--name", "tiny", "--ram", "300")
    try:
        until = time.monotonic() + LIMIT
        while not port_file.exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        yield process, port_file.read_text(encoding="ascii").strip()
    finally:
        process.kill()
        process.communicate()


def start(model: Path, *options: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "shoal", "node", str(model), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(err: str) -> list[str]:
    """The lines of a node, without the engine's word on a library that wants compiling again."""
    return [line for line in err.splitlines() if "C library" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_node_says_where_it_listens_and_ends_cleanly(
    started: tuple["subprocess.Popen[str]", str], number: signal.Signals
) -> None:
    process, address = started
    process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, said(err)) == (0, [])
    assert out.startswith(f"listening on {address} as tiny: ")
    assert out.endswith(", 300 MB\n") and out.count("\n") == 1


@pytest.mark.slow
def test_a_port_in_use_has_an_exit_code_of_its_own(
    started: tuple["subprocess.Popen[str]", str], model: Path
) -> None:
    process, address = started
    second = start(model, "--listen", address)
    out, err = second.communicate(timeout=LIMIT)
    assert (second.returncode, out) == (8, "")
    (line,) = said(err)
    assert f"port {address.rpartition(':')[2]} of 127.0.0.1 is in use" in line
    assert process.poll() is None


@pytest.mark.slow
def test_garbage_is_answered_logged_and_survived(started: tuple["subprocess.Popen[str]", str]) -> None:
    process, address = started
    host, _, port = address.partition(":")
    for _ in range(2):
        with socket.create_connection((host, int(port)), timeout=LIMIT) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"does not speak shoal's protocol" in stranger.recv(4096)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert err.count("it does not speak shoal's protocol: check the port\n") == 2


@pytest.mark.slow
def test_stages_stay_within_the_promised_ram(model: Path) -> None:
    from shoal.engine.costs import constant_bytes, unit_cost
    from shoal.engine.errors import NoPlanError
    from shoal.engine.model_directory import Model
    from shoal.engine.stage import StageOptions
    from shoal.net.inbox import most_bytes
    from shoal.net.work import PORTION_BYTES
    from shoal.planner import Device
    from shoal.planning import message_bytes, workspace_bytes

    opened = Model.open(model)

    def device(ram: int) -> Device:
        return Device("any", ram, 1e9, 1e9, 10**6)

    with pytest.raises(NoPlanError, match=r"of 1 MB promised: \d+ MB are missing"):
        StageOpener(opened, StageOptions(), device(10**6))(0, 2)
    with StageOpener(opened, StageOptions(), device(10**8))(0, 2) as stage:
        left = stage.options.kv_bytes
    taken = sum(unit_cost(opened, u).bytes for u in range(2)) + constant_bytes(opened.program)
    taken += workspace_bytes(opened, StageOptions(), 0, 2) + message_bytes(opened, StageOptions())
    given = message_bytes(opened, StageOptions()) - most_bytes(256, opened.program.cut_cols)
    assert given == PORTION_BYTES  # keys and values on their way to other nodes
    assert left == 10**8 - 10**6 - taken > 0


def test_a_range_that_is_prepared_takes_the_weights_that_it_does_not_share(model: Path) -> None:
    from shoal.engine.costs import unit_cost
    from shoal.engine.errors import NoPlanError
    from shoal.engine.model_directory import Model
    from shoal.engine.stage import StageOptions
    from shoal.planner import Device

    opened = Model.open(model)
    bytes_of = [unit_cost(opened, u).bytes for u in range(opened.n_units)]
    room = StageOpener(opened, StageOptions(), Device("any", 10**8, 1e9, 1e9, 10**6)).kv_bytes
    assert room(1, 3, range(0)) == room(1, 3)
    assert room(1, 3, range(2, 3)) == room(1, 3)
    assert room(1, 3, range(2)) == room(1, 3) - bytes_of[0]
    just = 10**8 - room(1, 3)
    with pytest.raises(NoPlanError, match=r"units \[1, 3\) beside \[0, 2\) need"):
        StageOpener(opened, StageOptions(), Device("any", just + 1, 1e9, 1e9, 10**6)).kv_bytes(1, 3, range(2))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 8])
def test_a_plan_that_just_fits_opens_whatever_the_threads(model: Path, threads: int) -> None:
    """Plans are made from rows of one thread; what more threads take is in what the node says of itself."""
    from shoal import planner
    from shoal.engine.model_directory import Model
    from shoal.engine.stage import StageOptions
    from shoal.planner.cost import range_ram_bytes
    from shoal.planning import planner_model

    opened, options = Model.open(model), StageOptions(threads=threads)
    args = parse(f"{model} --ram 300 --measure-seconds 0.01")
    offered = _offer(args, opened, options, 10**6, 300 * 10**6, 0.0, (stopwatch, None)).device
    rows = planner_model(opened, StageOptions())
    needed = range_ram_bytes(rows, offered, planner.Workload(context=128), 0, opened.n_units)
    opener = StageOpener(opened, options, dataclasses.replace(offered, ram_bytes=needed))
    with opener(0, opened.n_units) as stage:
        held = sum(unit.kv_bytes_per_token for unit in rows.units) * 128
        assert stage.options.kv_bytes is not None and stage.options.kv_bytes >= held
