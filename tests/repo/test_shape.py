"""The shape of the repository: how long files are, and which way imports run."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 700
OURS = {"engine", "net", "planner", "shoal"}
# What each top package may import of ours.
MAY_IMPORT = {
    "engine": {"shoal.engine"},
    "planner": {"shoal.planner"},
    "net": {"shoal.net", "shoal.engine", "shoal.planner"},
}
# The files that carry decisions out; everything else is pure.
WITH_TRIO = [
    "net/admission.py",
    "net/assignment.py",
    "net/carry.py",
    "net/stage_loop.py",
    "net/chain.py",
    "net/connection.py",
    "net/control.py",
    "net/coordinator.py",
    "net/dial.py",
    "net/connection_limits.py",
    "net/fetching.py",
    "net/file_server.py",
    "net/epochs.py",
    "net/house_list.py",
    "net/stage_manager.py",
    "net/relay.py",
    "net/listen.py",
    "net/node.py",
    "net/probe.py",
    "net/reachable.py",
    "net/reverse.py",
    "net/session.py",
    "net/tls.py",
    "net/watch.py",
    "src/shoal/chain_benchmark.py",
    "src/shoal/cluster_view.py",
    "src/shoal/nodes.py",
    "src/shoal/portal.py",
    "src/shoal/policy_enforcer.py",
    "src/shoal/commands/invite.py",
    "src/shoal/commands/join.py",
    "src/shoal/node_process.py",
    "src/shoal/pairing.py",
    "src/shoal/house_node.py",
    "src/shoal/nearby.py",
    "src/shoal/skeletons.py",
    "src/shoal/own_node.py",
    "src/shoal/up.py",
    "src/shoal/up_first.py",
    "src/shoal/up_http.py",
    "src/shoal/server/app.py",
    "src/shoal/server/asking.py",
    "src/shoal/server/chats.py",
    "src/shoal/server/house.py",
    "src/shoal/server/http.py",
    "src/shoal/server/opening.py",
    "src/shoal/server/limiter.py",
    "src/shoal/server/run.py",
    "src/shoal/server/served.py",
]
# The GGUF format calls some of its tokenizers and tensors after families; its names are kept in one table.
NAMES_OF_GGUF = Path("engine/checkpoint/gguf_names.py")


def tracked(*suffixes: str) -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    paths = [Path(name) for name in listing.stdout.split("\0") if name.endswith(suffixes)]
    return [path for path in paths if (ROOT / path).is_file()]


def text(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def package_of(path: Path) -> tuple[str, ...]:
    """The package that a source file belongs to: of engine/stage.py it is ("shoal", "engine")."""
    folder = path.parent.parts
    return folder[1:] if folder[0] == "src" else ("shoal", *folder)


def imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything that source imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, node.module) if node.module else base)
            # `from . import x` names the module x itself.
            names = [stem] if node.module else [f"{stem}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names)


def library_files() -> list[Path]:
    return [path for path in tracked(".py") if path.parts[0] in {"engine", "net", "planner", "src"}]


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_no_file_is_too_long() -> None:
    lengths = {
        path: len(text(path).splitlines())
        for path in tracked(".py", ".c", ".h", ".inc", ".js", ".css", ".html")
    }
    assert {path: n for path, n in lengths.items() if n > MAX_LINES} == {}
    assert Path("setup.py") in lengths


def test_imports_run_one_way() -> None:
    wrong = []
    for path in library_files():
        allowed = MAY_IMPORT[package_of(path)[1]] if path.parts[0] != "src" else {"shoal"}
        for line, name in imports(text(path), package_of(path)):
            if name.split(".")[0] in OURS and not within(name, allowed):
                wrong.append(f"{path}:{line} imports {name}")
    assert wrong == []


def test_only_the_files_that_act_import_trio() -> None:
    wrong = []
    for path in library_files():
        acts = any(path.match(pattern) for pattern in WITH_TRIO)
        found = imports(text(path), package_of(path))
        wrong += [f"{path}:{line}" for line, name in found if within(name, {"trio"}) and not acts]
    assert wrong == []


def test_every_module_says_why_it_exists() -> None:
    modules = [path for path in tracked(".py") if path.name != "_abi.py" and text(path).strip()]
    assert [path for path in modules if not ast.get_docstring(ast.parse(text(path)))] == []


def names_and_strings(source: str) -> Iterator[tuple[int, str]]:
    """What a Python file says to the interpreter: identifiers and string constants, without docstrings."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(words)) if id(node) not in prose:
                yield node.lineno, words
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
                yield node.lineno, word
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word):
                yield node.lineno, word


def test_only_families_name_a_family() -> None:
    families = {path.stem for path in tracked(".py") if path.parent == Path("engine/families")} - {"__init__"}
    assert families
    wrong = [
        f"{path}:{line} says {words!r}"
        for path in library_files()
        if path.parent != Path("engine/families") and path != NAMES_OF_GGUF
        for line, words in names_and_strings(text(path))
        if families & set(re.findall("[a-z0-9]+", words.lower()))
    ]
    assert wrong == []


def test_the_architecture_page_names_the_modules_that_there_are() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:[\w/]+/)?(\w+)`", page))
    paths = [*library_files(), *tracked(".c", ".h", ".inc", ".html")]
    core = {path.stem for path in library_files() if path.parent in (Path("net"), Path("planner"))}
    assert core - {"__init__"} - named == set(), "modules that docs/architecture.md does not name"
    known = {str(part) for path in paths for part in (path.with_suffix(""), path, *path.parents)}
    known |= {name.removeprefix("src/shoal/") for name in known}
    places = {name.rstrip("/") for name in re.findall(r"`((?:net|engine|planner|csrc|src)/[\w./]*)`", page)}
    assert len(places) > 30 and places - known == {"engine/families/NAME.py"}, "files that there are not"


def test_the_import_reader_sees_every_form() -> None:
    source = """
import trio.abc
def late():
    from . import sibling
    from .deep import name
    from ..engine.errors import ShoalError
    from shoal.planner import cost
"""
    assert {name for _, name in imports(source, ("shoal", "net"))} == {
        "trio.abc",
        "shoal.net.sibling",
        "shoal.net.deep",
        "shoal.engine.errors",
        "shoal.planner",
    }


def test_make_leaves_out_the_tiers_that_pytest_leaves_out() -> None:
    """`make test` names the usual tests twice, with those that run alone and without them."""
    (usual,) = re.findall(r"^USUAL := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"-m={usual}" in settings["tool"]["pytest"]["ini_options"]["addopts"]
