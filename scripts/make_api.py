"""Writes docs/api.md from the docstrings and signatures of the names in `shoal.__all__`.

    python scripts/make_api.py [OUTPUT]

The result is committed; tests/repo/test_api_page.py compares it with a fresh one. The sources are read and
not imported, so that signatures stand here as they are written there.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import shoal

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
WIDTH = 90
GROUPS = {
    "Models that answer": ("llm", "chat_session", "answer_text", "results", "async_llm"),
    "The engine": tuple(
        name for name in shoal._NAMES if name.startswith("engine.") and name != "engine.errors"
    ),
    "Errors": ("engine.errors", "net.errors"),
}
RETURNED = {"AsyncChatSession", "AsyncStream", "ChatSession", "Stream"}
"""Classes that only methods of LLM make."""
HEAD = """# Reference

<!-- scripts/make_api.py writes this page from the docstrings: `make api` after a change. -->

Every public name of `shoal`. [The library, name by name](library.md) tells how they belong together, and
[ten tasks](cookbook.md) shows them at work.
"""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def page() -> str:
    """The text of the page."""
    missing = set(shoal._NAMES) - {module for group in GROUPS.values() for module in group}
    assert not missing, f"scripts/make_api.py has no group for {sorted(missing)}"
    parts = [HEAD]
    for title, modules in GROUPS.items():
        parts.append(f"## {title}\n")
        for module in modules:
            parts += [entry(node) for node in definitions(module)]
    return "\n".join(parts)


def definitions(module: str) -> Iterator[Definition]:
    """The public definitions of a module of shoal, in the order in which `shoal` names them."""
    path = ROOT / "src" / "shoal" / Path(*module.split(".")).with_suffix(".py")
    body = ast.parse(path.read_text(encoding="utf-8")).body
    found = {node.name: node for node in body if isinstance(node, Definition)}
    yield from (found[name] for name in shoal._NAMES[module])


def entry(node: Definition) -> str:
    """A name of shoal and what it has."""
    if not isinstance(node, ast.ClassDef):
        return f"### {node.name}\n\n{code([signature(node, node.name)])}\n{told(node)}"
    bases = [ast.unparse(base) for base in node.bases]
    of = f"\n`{node.name}({', '.join(bases)})`\n" if bases else ""
    return f"### {node.name}\n{of}\n{constructor(node)}{told(node)}{fields(node)}{methods(node)}"


def constructor(node: ast.ClassDef) -> str:
    """How one is made, where that is up to the user."""
    found = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
    if node.name in RETURNED:
        return ""
    return "".join(f"{code([signature(one, node.name)])}\n" for one in found)


def fields(node: ast.ClassDef) -> str:
    """The fields of a dataclass, a typed dictionary, or the members of an enumeration."""
    lines = []
    for at, one in enumerate(node.body):
        if isinstance(one, ast.AnnAssign):
            name, value = one.target, f": {ast.unparse(one.annotation)}"
            value += f" = {ast.unparse(one.value)}" if one.value else ""
        elif isinstance(one, ast.Assign) and isinstance(one.value, ast.Constant):
            name, value = one.targets[0], f" = {ast.unparse(one.value)}"
        else:
            continue
        if ast.unparse(name).startswith("_"):
            continue
        after = node.body[at + 1] if at + 1 < len(node.body) else None
        says = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            says = " " + " ".join(inspect.cleandoc(str(after.value.value)).split())
        lines.append(f"- `{ast.unparse(name)}{value}`{says}")
    return "\n".join(lines) + "\n\n" if lines else ""


def methods(node: ast.ClassDef) -> str:
    """The public methods and properties, each with all its signatures."""
    parts, overloads = [], list[str]()
    for one in node.body:
        if not isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef) or one.name.startswith("_"):
            continue
        marks = {ast.unparse(mark) for mark in one.decorator_list}
        title = f"#### {node.name}.{one.name}\n\n"
        if "overload" in marks:
            overloads.append(signature(one, one.name))
        elif marks & {"property", "cached_property"}:
            kind = ast.unparse(one.returns) if one.returns else ""
            parts.append(f"{title}{code([f'{one.name}: {kind}'])}\n{told(one)}")
        else:
            lines = overloads or [signature(one, one.name)]
            lines = [f"@{mark}\n{line}" if mark else line for line in lines for mark in [kind_of(marks)]]
            parts.append(f"{title}{code(lines)}\n{told(one)}")
            overloads = []
    return "".join(parts)


def kind_of(marks: set[str]) -> str:
    """What a method is called on, unless on an object."""
    return next((mark for mark in ("classmethod", "staticmethod") if mark in marks), "")


def told(node: Definition) -> str:
    """The docstring."""
    text = ast.get_docstring(node)
    assert text, f"{node.name} has no docstring"
    return f"{text}\n\n"


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> str:
    """As in the source, on one line if that is short enough."""
    prefix = "await " if isinstance(node, ast.AsyncFunctionDef) and not yields(node) else ""
    result = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    given = parameters(node)
    line = f"{prefix}{name}({', '.join(given)}){result}"
    if len(line) <= WIDTH:
        return line
    inner = ",\n".join(f"    {one}" for one in given)
    return f"{prefix}{name}(\n{inner},\n){result}"


def yields(node: ast.AST) -> bool:
    return any(isinstance(one, ast.Yield) for one in ast.walk(node))


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The parameters as in the source, without `self`."""
    given, found = node.args, list[str]()
    plain: Sequence[ast.arg] = [*given.posonlyargs, *given.args]
    values = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    found += [parameter(one, value) for one, value in zip(plain, values, strict=True)]
    if plain and plain[0].arg in ("self", "cls"):
        found = found[1:]
    if given.vararg:
        found.append(f"*{parameter(given.vararg, None)}")
    elif given.kwonlyargs:
        found.append("*")
    found += [parameter(one, value) for one, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return [*found, f"**{parameter(given.kwarg, None)}"] if given.kwarg else found


def parameter(one: ast.arg, value: ast.expr | None) -> str:
    kind = f": {ast.unparse(one.annotation)}" if one.annotation else ""
    equals = " = " if one.annotation else "="
    return f"{one.arg}{kind}{equals}{ast.unparse(value)}" if value is not None else f"{one.arg}{kind}"


def code(lines: Sequence[str]) -> str:
    return "\n".join(("```text", *lines, "```\n"))


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
