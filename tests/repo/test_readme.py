"""What the README tells a reader to type works as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tests.models import smollm2_dir

import shoal
from shoal.arguments import build_parser
from shoal.device_files import read_devices

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    program = "\n".join(blocks)
    model = '"smollm2-135m"' if page == "README.md" else '"path/to/model"'
    assert program.count(model) == 1
    program = program.replace(model, repr(str(smollm2_dir())))
    command = [sys.executable, "-W", "error", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(result.stdout.split()) >= 6


def test_the_library_page_tells_of_every_public_name() -> None:
    page = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    names = [name for name in shoal.__all__ if name.isidentifier() and not name.endswith(("Error", "__"))]
    assert [name for name in names if not re.search(rf"^##.*\b{name}\b", page, re.MULTILINE)] == []


def test_the_devices_can_be_read(tmp_path: Path) -> None:
    (devices,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "devices.toml"
    path.write_text(devices)
    assert [device.name for device in read_devices(path).devices] == ["laptop", "phone"]


@pytest.mark.parametrize("page", ["README.md", "docs/library.md", "docs/cookbook.md", "docs/api.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert len(links) >= 2
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).is_file()] == []


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
