"""A phone by the two commands of docs/phones.md, with stand-ins: Debian's Pythons for arm64 under qemu, which
call themselves Android as Termux's do; wheels for Linux in place of what `pkg` gives; a C library with
bionic's names. The second command is run as the page has it, and then the phone joins a house and answers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.e2e.test_home import Device
from tests.models import tiny_chat_checkpoint

from shoal.engine.convert import convert
from shoal.processes import end

from .arm64 import Arm64, unpacked
from .conftest import DIST, ROOT

pytestmark = [pytest.mark.dist, pytest.mark.slow]

CPU = "max,pauth-impdef=on"
CRYPTOGRAPHY = {"3.13": "48.0.1", "3.14": "50.0.0"}
PIP = {"3.13": "26.1.2", "3.14": "26.2.1"}
ANDROID = {"ANDROID_ROOT": "/system"}


def provided(version: str) -> dict[str, list[str]]:
    """What Python finds of each package of the first command: in June 2026, when Termux had 3.13 last, and in
    August 2026. `pkg` itself runs pip for what cryptography needs, so clang compiles cffi there."""
    return {
        "python": [],
        "python-pip": [f"pip=={PIP[version]}"],
        "python-numpy": ["numpy==2.4.4"],
        "python-cryptography": [f"cryptography=={CRYPTOGRAPHY[version]}", "cffi"],
        "clang": [],
        "libffi": [],
    }


def commands() -> tuple[list[str], list[str]]:
    """The words of the two commands of the page."""
    page = (ROOT / "docs" / "phones.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"\n## Install\n.*?\n\n((?: {4}[^\n]+\n)+)", page, re.DOTALL)
    first, second = map(shlex.split, block.splitlines())
    return first, second


@dataclass(frozen=True, slots=True)
class Phone:
    """An emulated phone on which both commands were run. `taken`: the files that pip installed."""

    python: Arm64
    installed: Path
    taken: tuple[str, ...]

    def command(self, like_bionic: Path) -> list[str]:
        """What `shoal` is there."""
        prefix = self.python.command(CPU, self.installed, libraries=like_bionic)
        return [*prefix, str(next(self.installed.parents[2].rglob("bin/shoal")))]


@pytest.fixture(scope="module", params=["3.13", "3.14"])
def phone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Phone:
    version: str = request.param
    place = tmp_path_factory.mktemp("phone")
    (pkg, install, *packages), (pip, *arguments) = commands()
    assert (pkg, install, pip) == ("pkg", "install", "pip")
    given = provided(version)
    assert packages == list(given)
    requirements = [requirement for package in packages for requirement in given[package]]
    python = unpacked(version, place / "pkg", requirements)
    shutil.copy(Path(__file__).with_name("like_termux.py"), place / "pkg" / "sitecustomize.py")
    report = place / "report.json"
    settings = {
        **ANDROID,
        "PIP_ONLY_BINARY": ":all:",  # nothing is compiled
        "PIP_PREFIX": str(place / "installed"),
        "PIP_REPORT": str(report),
        "PIP_BREAK_SYSTEM_PACKAGES": "1",  # Debian's Python asks for it, Termux's does not
    }
    done = subprocess.run(
        [*python.command(CPU), "-m", "pip", *arguments],
        cwd=DIST,
        env={**{k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    taken = json.loads(report.read_text(encoding="utf-8"))["install"]
    (package,) = (place / "installed").rglob("shoal/__init__.py")
    files = tuple(one["download_info"]["url"].rpartition("/")[2] for one in taken)
    return Phone(python, package.parents[1], files)


def test_pip_takes_the_wheel_for_android_and_else_only_pure_python(phone: Phone) -> None:
    ours, *others = phone.taken
    assert ours == commands()[1][-1]
    assert ours.endswith("-py3-none-android_24_arm64_v8a.whl")
    assert "trio" in {name.partition("-")[0] for name in others}
    assert [name for name in others if not name.endswith("-none-any.whl")] == []


@pytest.fixture
def places(phone: Phone, like_bionic: Path, tmp_path: Path) -> tuple[Device, Device]:
    """A laptop, and the phone."""
    return Device(tmp_path, "laptop"), Device(tmp_path, "phone", phone.command(like_bionic))


@pytest.fixture
def house(places: tuple[Device, Device], tmp_path: Path) -> Iterator[tuple[Device, str]]:
    """A laptop whose phone holds all layers, and its model."""
    laptop, device = places
    device.environ.update(ANDROID)
    model = str(tmp_path / "model")
    convert(tiny_chat_checkpoint(tmp_path / "checkpoint"), Path(model))
    running = [laptop.starts("up", model, "--no-layers", "--no-http", "--listen", "127.0.0.1:0")]
    try:
        running[0].says("devices connect to 127.0.0.1:")
        running.append(laptop.starts("invite", "--no-qr"))
        token = running[1].says("shoal join SHOAL1-").split()[-1]
        node = ("--listen", "127.0.0.1:0", "--measure-seconds", "0.1", "--policy", "none")
        running.append(device.starts("join", token, "--name", "phone", *node))
        running[2].says("listening on", "as phone", "native (neon_i8mm)")
        running[0].says("ready:", "phone: embedding + layers")
        yield laptop, model
        assert running[2].stop() == 0, running[2].said
    finally:
        end([program.process for program in running])


def test_the_phone_joins_a_house_and_its_answer_is_that_of_one_process(house: tuple[Device, str]) -> None:
    laptop, model = house
    answers = [laptop.does("run", model, "Hello", "-n", "16", *how) for how in ((), ("--alone",))]
    assert [code for code, _, _ in answers] == [0, 0], answers
    assert answers[0][1] == answers[1][1] != ""
