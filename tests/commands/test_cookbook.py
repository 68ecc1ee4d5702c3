"""The examples of the documentation: the ten tasks give the same output in one process and over three nodes,
and type checkers find nothing in any Python of a page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.models import smollm2_dir

from shoal.processes import NodeSpec, nodes

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "docs/library.md", "docs/cookbook.md"]


def program(page: str) -> str:
    """The Python of a page, as one program."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


def output(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def on(code: str, model: list[str], other: list[str]) -> str:
    """The program with models on these nodes, if there are any."""
    for name, addresses in (("model", model), ("other", other)):
        given = repr(str(smollm2_dir())) + (f", nodes={addresses}" if addresses else "")
        assert code.count(f'"path/to/{name}"') >= 1
        code = code.replace(f'"path/to/{name}"', given)
    return code


@pytest.mark.slow
def test_the_ten_tasks_give_the_same_over_three_nodes(tmp_path: Path) -> None:
    whole = output(on(program("docs/cookbook.md"), [], []))
    assert len(re.findall(r"^## ", (ROOT / "docs/cookbook.md").read_text(), re.MULTILINE)) == 10
    assert len(whole.splitlines()) > 20
    assert all(
        part in whole for part in ("cancelled", "Paris", "the context holds 1024", "facts fit", "not in time")
    )
    options = ("--measure-seconds", "0.05")
    specs = [NodeSpec(f"n{i}", ram_mb=ram, options=options) for i, ram in enumerate((150, 150, 150, 600))]
    with nodes(smollm2_dir(), specs, tmp_path) as running:
        *three, one = ["{}:{}".format(*node.address) for node in running]
        far = on(program("docs/cookbook.md"), three, [one])
        assert output(far) == whole
        cut = f"{far.split('llm.chat')[0].removesuffix('for piece in ')}print(len(llm._engine.plan.stages))"
        assert output(cut) == "3\n"


WRONG = "\nllm.chat(7)\n"
"""A mistake that a type checker finds."""


@pytest.mark.slow
def test_mypy_finds_nothing_in_the_examples(tmp_path: Path) -> None:
    for page in PAGES:
        (tmp_path / f"{Path(page).stem}.py").write_text(program(page))
        (tmp_path / f"{Path(page).stem}_wrong.py").write_text(program(page) + WRONG)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"]
    done = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert sorted(Path(line.split(":")[0]).stem for line in errors) == sorted(
        f"{Path(page).stem}_wrong" for page in PAGES
    )
    assert all('No overload variant of "chat"' in line for line in errors)
    assert done.stderr == ""


@pytest.mark.slow
def test_pyright_finds_nothing_in_the_examples(tmp_path: Path) -> None:
    """basedpyright is pyright with its JavaScript and a node in one package of PyPI: it downloads nothing."""
    settings = {"typeCheckingMode": "standard", "pythonVersion": "3.11", "include": ["."]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    for page in PAGES:
        (tmp_path / f"{Path(page).stem}.py").write_text(program(page))
    wrong = program("README.md") + WRONG
    (tmp_path / "wrong.py").write_text(wrong)
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, "-p", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    told = [
        f"{Path(one['file']).name}:{one['range']['start']['line'] + 1} {one['message']}"
        for one in json.loads(done.stdout)["generalDiagnostics"]
        if one["severity"] == "error"
    ]
    assert {line.split()[0] for line in told} == {f"wrong.py:{wrong.count(chr(10))}"}, told
