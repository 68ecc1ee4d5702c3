"""The command line: what it accepts, what it says, and the code it exits with."""

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import LIMIT

from shoal import __version__
from shoal.arguments import ISAS, build_parser, module_name
from shoal.cli import main
from shoal.commands import ls
from shoal.engine.backends._abi import ffi
from shoal.engine.errors import ContextError, ModelFileError, ShoalError

COMMANDS = [
    "pull",
    "ls",
    "rm",
    "convert",
    "verify",
    "inspect",
    "run",
    "score",
    "classify",
    "embed",
    "plan",
    "profile",
    "bench",
    "node",
    "demo",
]


def parse(line: str) -> argparse.Namespace:
    return build_parser().parse_args(line.split())


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `shoal ls` fail with the error."""

    def run(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr(ls, "run", run)


def test_shoal_alone_prints_help_with_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert [name for name in COMMANDS if f"\n    {name} " not in printed] == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"shoal {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_and_has_a_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"usage: shoal {name}" in capsys.readouterr().out
    assert importlib.util.find_spec(f"shoal.commands.{module_name(name)}") is not None


def test_run_arguments() -> None:
    args = parse("run m hello --nodes 10.0.0.2:7000,[::1]:7001 -n 5 --stop a --stop b --top-p 0.9 --seed 7")
    assert (args.model, args.prompt) == ("m", "hello")
    assert args.nodes == (("10.0.0.2", 7000), ("::1", 7001))
    assert (args.max_tokens, args.stop, args.top_p, args.seed) == (5, ["a", "b"], 0.9, 7)
    quiet = parse("run m")
    assert (quiet.prompt, quiet.nodes, quiet.temperature, quiet.max_tokens) == (None, (), 0.0, 512)
    assert (quiet.threads, quiet.backend, quiet.isa, quiet.stop) == (None, "auto", "auto", [])


def test_other_arguments() -> None:
    assert parse("pull hf:a/b --dtype f32 --name c").source == "hf:a/b"
    assert parse("convert a b").equalise is True
    assert parse("convert a b --no-equalise").equalise is False
    assert parse("plan m --devices d.toml").devices == Path("d.toml")
    assert parse("node m --listen 0.0.0.0:0").listen == ("0.0.0.0", 0)
    assert parse("node m").listen is None, "which depends on whether this device is paired"


def test_options_of_the_lab_are_described_in_its_page_and_not_in_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (action,) = build_parser()._subparsers._group_actions  # type: ignore[union-attr]
    hidden = [
        (name, option.option_strings[0])
        for name, parser in action.choices.items()  # type: ignore[union-attr]
        for option in parser._actions
        if option.help == argparse.SUPPRESS and option.dest != "traceback"
    ]
    assert [name for name, _ in hidden] == ["node"] * 6 + ["join"] * 6
    page = (Path(__file__).resolve().parents[2] / "docs/lab.md").read_text(encoding="utf-8")
    assert [option for _, option in hidden if f"\n| `{option} " not in page] == []
    with pytest.raises(SystemExit):
        main(["node", "--help"])
    printed = capsys.readouterr().out
    assert [option for _, option in hidden if option in printed] == []


def test_the_instruction_sets_offered_are_those_of_the_library() -> None:
    names = {name.removeprefix("SHOAL_ISA_").lower() for name in ffi.typeof("enum shoal_isa").relements}
    assert set(ISAS) == names


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run", "required: MODEL"),
        ("run m --nodes nowhere", "'nowhere' is not HOST:PORT"),
        ("run m --nodes a:70000", "'a:70000' is not HOST:PORT"),
        ("run m --nodes a:1,", "'' is not HOST:PORT"),
        ("run m -n 0", "'0' is not a whole number above 0"),
        ("run m --top-p 1.5", "'1.5' is not a number from 0 to 1"),
        ("run m --temperature nan", "'nan' is not a number from 0 up"),
        ("run m --repeat-penalty 0", "'0' is not a number above 0"),
        ("run m --top-k -1", "'-1' is not a whole number"),
        ("run m --backend gpu", "invalid choice: 'gpu'"),
        ("plan m", "one of the arguments --devices --nodes is required"),
        ("plan m --devices d --nodes a:1", "not allowed with argument"),
        ("fly", "invalid choice: 'fly'"),
    ],
)
def test_wrong_usage_exits_with_2_and_says_why(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ShoalError("no luck"), 1, "shoal: error: no luck\n"),
        (ModelFileError("a.bin is short"), 3, "shoal: error: a.bin is short\n"),
        (ExceptionGroup("nursery", [ContextError("too long")]), 5, "shoal: error: too long\n"),
        (
            ExceptionGroup("outer", [ExceptionGroup("inner", [ContextError("x")]), ContextError("x")]),
            5,
            "shoal: error: x\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("nursery", [KeyboardInterrupt(), ShoalError("lost")]), 130, ""),
    ],
)
def test_an_error_becomes_a_line_and_an_exit_code(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raising(monkeypatch, error)
    assert main(["ls"]) == code
    assert capsys.readouterr().err == message


def test_mistakes_of_ours_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ExceptionGroup("nursery", [ShoalError("meant"), KeyError("a bug")]))
    with pytest.raises(ExceptionGroup):
        main(["ls"])


def test_traceback_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ShoalError("no luck"))
    with pytest.raises(ShoalError, match="no luck"):
        main(["--traceback", "ls"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = """
import sys
from shoal.cli import main
from shoal.commands import ls
from shoal.engine.backends._abi import ffi
ls.run = lambda args: print("a line", input())
sys.exit(main(["ls"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(b"\n", timeout=LIMIT)
    assert (process.returncode, errors) == (141, b"")
