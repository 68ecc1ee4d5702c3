"""docs/models.md: every test that it names as a proof is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def functions_of(path: str) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name[:5] == "test_"
    }


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`([^`\s]+\.py)::([^`\s]+)`", PAGE)
    assert len(named) > 20
    assert [f"{path}::{name}" for path, name in named if name not in functions_of(path)] == []


def test_every_row_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("|")]
    bare = [row for row in rows if ".py::" not in row and not re.search(r"\|---|\| test \|$", row)]
    assert bare == []
