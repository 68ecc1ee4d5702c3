"""What the README tells a reader to type works as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.models import smollm2_dir

from shoal.arguments import build_parser
from shoal.planning import read_devices

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_program_for_embedding_runs() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert '"path/to/model"' in program
    program = program.replace('"path/to/model"', repr(str(smollm2_dir())))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.split()) > 10


def test_the_devices_can_be_read(tmp_path: Path) -> None:
    (devices,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "devices.toml"
    path.write_text(devices)
    assert [device.name for device in read_devices(path).devices] == ["laptop", "phone"]


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_every_command_line_parses() -> None:
    lines = [line.strip() for line in README.splitlines() if line.startswith("    shoal ")]
    assert len(lines) >= 5
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        assert build_parser().parse_args(words).command == words[0]


def test_every_make_target_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:`|    )make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
