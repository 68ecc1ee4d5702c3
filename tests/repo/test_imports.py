"""What can be imported, under which name, and what it drags in."""

import subprocess
import sys
from pathlib import Path

import pytest

import shoal
from shoal.arguments import build_parser
from shoal.engine.errors import ShoalError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {
    "gguf",
    "highspy",
    "huggingface_hub",
    "jinja2",
    "numba",
    "numpy",
    "pulp",
    "rich",
    "safetensors",
    "tokenizers",
    "trio",
}


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def loaded(code: str) -> set[str]:
    """Top-level names in sys.modules after the code ran in a fresh interpreter."""
    report = "import sys; print('loaded', *{name.split('.')[0] for name in sys.modules})"
    result = python(f"{code}\n{report}")
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-1].split()
    assert last[0] == "loaded"
    return set(last[1:])


@pytest.mark.parametrize("name", ["engine", "net", "planner"])
def test_bare_names_do_not_import(name: str) -> None:
    result = python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}")
    assert result.returncode == 1
    assert f"import this package as shoal.{name}" in result.stderr


def test_import_shoal_loads_nothing_heavy() -> None:
    modules = loaded("import shoal")
    assert "shoal" in modules
    assert modules & HEAVY == set()


def test_an_answer_of_this_process_loads_no_network_and_no_planner() -> None:
    run = "from shoal.cli import main; assert main(['run', 'no-such-model', 'text']) == 3"
    modules = loaded(f"{run}; import shoal.answering, shoal.engine.backends.native")
    assert modules & HEAVY == {"numpy"}


def test_a_node_needs_the_core_dependencies_only() -> None:
    modules = loaded("import shoal.node_process, shoal.engine.backends.native")
    assert modules & HEAVY == {"numpy", "trio"}


def test_a_node_loads_neither_the_planners_searches_nor_a_head() -> None:
    code = "import sys, shoal.node_process; print(*sys.modules)"
    modules = set(python(code).stdout.split())
    assert {"shoal.net.node", "shoal.planner.cost"} <= modules
    assert not modules & {"shoal.planner.solve", "shoal.planner.milp", "shoal.net.coordinator"}


def test_the_planners_names_are_there_when_asked_for() -> None:
    from shoal import planner

    assert {name for name in planner.__all__ if getattr(planner, name, None) is None} == set()
    with pytest.raises(AttributeError, match=r"module 'shoal.planner' has no attribute 'nothing'"):
        _ = planner.nothing


def test_help_loads_nothing_heavy() -> None:
    code = """
from shoal.cli import main
for words in ([], ["--help"], *([name, "--help"] for name in {commands!r})):
    try:
        main(words)
    except SystemExit as end:
        assert end.code == 0
"""
    assert loaded(code.format(commands=commands())) & HEAVY == set()


def commands() -> list[str]:
    (subparsers,) = (action for action in build_parser()._actions if action.dest == "command")
    assert subparsers.choices is not None
    return list(subparsers.choices)


def test_every_public_name_loads() -> None:
    assert {name for name in shoal.__all__ if getattr(shoal, name, None) is None} == set()
    assert set(shoal.__all__) <= set(dir(shoal))
    assert shoal.ShoalError is ShoalError


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'shoal' has no attribute 'nothing'"):
        _ = shoal.nothing
