"""The order of a command line's words: any is understood, by every Python that shoal supports."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from shoal.arguments import build_parser

SRC = Path(__file__).parents[2] / "src"
LINES: list[tuple[list[str], dict[str, object]]] = [
    (["run", "M", "-n", "4", "Hello"], {"prompt": "Hello", "max_tokens": 4}),
    (["run", "-n", "4", "M", "Hello"], {"model": "M", "prompt": "Hello"}),
    (["run", "--raw", "M", "--seed", "7", "Hello", "--stats"], {"prompt": "Hello", "seed": 7, "stats": True}),
    (["run", "M", "-n4", "Hello"], {"prompt": "Hello", "max_tokens": 4}),
    (["run", "M", "-n=4", "Hello"], {"prompt": "Hello", "max_tokens": 4}),
    (["run", "M", "--max-tokens=4", "Hello"], {"prompt": "Hello", "max_tokens": 4}),
    (["run", "M", "--max", "4", "Hello"], {"prompt": "Hello", "max_tokens": 4}),  # an abbreviation
    (["run", "M", "--min-p", "0.1", "--no-resident", "Hello"], {"prompt": "Hello", "resident": False}),
    (["run", "M", "-n", "4"], {"prompt": None, "max_tokens": 4}),
    (["run", "M", "-n", "4", "--", "--Hello"], {"prompt": "--Hello", "max_tokens": 4}),
    (["run", "--", "M", "-n"], {"model": "M", "prompt": "-n", "max_tokens": 512}),
    (["run", "M", "Hello", "--"], {"prompt": "Hello"}),
    (["run", "M", "--", "--"], {"model": "M", "prompt": "--"}),
    (["run", "--", "--", "-n"], {"model": "--", "prompt": "-n"}),
    (["run", "M", "--raw", "--", "Hello"], {"prompt": "Hello", "raw": True}),
    (["run", "M", "--seed", "7", "-5"], {"prompt": "-5"}),
    (["run", "M", "--seed", "7", "-1.5e-3"], {"prompt": "-1.5e-3"}),
    (["run", "M", "--seed", "7", "- a list"], {"prompt": "- a list"}),
    (["run", "M", "--seed", "7", "--a list\nof two"], {"prompt": "--a list\nof two"}),
    (["run", "M", "--seed", "7", "-"], {"prompt": "-"}),
    (["run", "M", "--seed", "7", ""], {"prompt": ""}),
    (["run", "M", "--stop", "- a", "--stop", "-", "--stop", "-1", "x"], {"stop": ["- a", "-", "-1"]}),
    (["run", "M", "--stop=--", "--stop=-n", "--stop=", "x"], {"stop": ["--", "-n", ""], "prompt": "x"}),
    (["run", "M", "--system", "a=b -n 4", "x"], {"system": "a=b -n 4", "prompt": "x", "max_tokens": 512}),
    (["run", "M", "a=b", "--nodes", "[::1]:7,h:8"], {"prompt": "a=b", "nodes": [["::1", 7], ["h", 8]]}),
    (["run", "--traceback", "M", "x"], {"traceback": True, "prompt": "x"}),
    (["--traceback", "run", "M", "--raw", "x"], {"traceback": True, "prompt": "x"}),
    (["run", "M", "--raw", "x"], {"traceback": False}),
    (["convert", "--no-equalise", "a", "--dtype", "f32", "b"], {"source": "a", "destination": "b"}),
    (["bench", "-t", "1,2", "M", "-o", "json"], {"model": "M", "threads": [1, 2], "output": "json"}),
    (["plan", "--layers", "1,0,2", "M", "--devices", "d"], {"model": "M", "layers": [1, 0, 2]}),
]
REFUSED = [
    (["run", "M", "x", "--top-k", "-1"], "argument --top-k: '-1' is not a whole number"),
    (["run", "M", "x", "--temperature", "-1e-3"], "argument --temperature: '-1e-3' is not"),
    (["run", "M", "--seed", "1", "x", "y"], "unrecognized arguments: y"),
    (["run", "M", "--sede", "1", "x"], "unrecognized arguments: --sede"),
    (["run", "M", "-n", "--raw", "x"], "argument -n/--max-tokens: expected one argument"),
    (["run", "M", "x", "-n"], "argument -n/--max-tokens: expected one argument"),
    (["run", "M", "-n", "--", "4"], "argument -n/--max-tokens: expected one argument"),
    (["run", "M", "--t", "1", "x"], "ambiguous option: --t could match"),
    (["run", "-n", "4"], "the following arguments are required: MODEL"),
    (["run", "M", "x", "--backend=--"], "argument --backend: invalid choice: '--'"),
]
PROGRAM = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
from shoal.arguments import build_parser
out = []
for line in json.load(sys.stdin):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            out.append(vars(build_parser().parse_args(line)))
        except SystemExit as end:
            out.append([end.code, errors.getvalue()])
print(json.dumps(out, default=str))
"""


def pythons() -> list[str]:
    """The interpreters of this machine that shoal supports, of different versions."""
    places = [*Path.home().glob(".pyenv/versions/3.1[1-4].*/bin/python"), Path("/usr/bin/python3")]
    named = [shutil.which(f"python3.{minor}") for minor in range(11, 15)]
    found = {}
    for path in [*map(str, places), *filter(None, named)]:
        code = "import sys; print(*sys.version_info[:3])"
        asked = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        version = tuple(map(int, asked.stdout.split()))
        if (3, 11) <= version < (3, 15):
            found[version] = path
    return list(found.values())


@pytest.mark.parametrize(("line", "expected"), LINES, ids=lambda x: " ".join(x) if type(x) is list else "")
def test_any_order(line: list[str], expected: dict[str, object]) -> None:
    args = vars(build_parser().parse_args(line))
    assert json.loads(json.dumps({key: args[key] for key in expected}, default=str)) == expected


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=lambda x: " ".join(x) if type(x) is list else "")
def test_wrong_lines_are_refused(line: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args(line)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_every_python_of_this_machine_agrees() -> None:
    lines = [line for line, _ in [*LINES, *REFUSED]]
    for python in pythons():
        done = subprocess.run(
            [python, "-c", PROGRAM, str(SRC)],
            input=json.dumps(lines),
            capture_output=True,
            text=True,
            check=True,
        )
        for (line, expected), got in zip(LINES, json.loads(done.stdout), strict=False):
            assert isinstance(got, dict), (python, line, got)
            assert {key: got[key] for key in expected} == expected, (python, line)
        for (line, message), got in zip(REFUSED, json.loads(done.stdout)[len(LINES) :], strict=True):
            assert got[0] == 2 and message in got[1], (python, line, got)


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    assert parser._subparsers is not None
    choices: Any = parser._subparsers._group_actions[0].choices
    return dict(choices)


@pytest.mark.parametrize("name", commands())
def test_argparse_gets_the_options_first(name: str) -> None:
    """Whatever else differs among versions of argparse: none misreads such a line."""
    parser: Any = commands()[name]
    positionals = ["a", "b", "c"][: len(parser._get_positional_actions())]
    for action in parser._get_optional_actions():
        flag, full = action.option_strings[0], max(action.option_strings, key=len)
        option = [flag] if action.nargs == 0 else [flag, "1"]
        for place in range(len(positionals) + 1):
            line = [*positionals[:place], *option, *positionals[place:]]
            got = [flag] if action.nargs == 0 else [f"{full}=1"]
            assert parser._options_first(line) == [*got, *(["--", *positionals] if positionals else [])]


def test_each_option_has_one_value_or_none() -> None:
    """What Parser counts on."""
    counts = {
        (name, action.dest): action.nargs
        for name, parser in commands().items()
        for action in parser._get_optional_actions()
    }
    assert set(counts.values()) <= {None, 0}
