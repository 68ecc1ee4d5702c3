"""docs/api.md is what scripts/make_api.py writes, and has every public name."""

import re
import subprocess
import sys
from pathlib import Path

import shoal

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "api.md"


def test_the_reference_is_current(tmp_path: Path) -> None:
    made = tmp_path / "api.md"
    subprocess.run([sys.executable, ROOT / "scripts" / "make_api.py", made], check=True)
    assert made.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8"), "run make api"


def test_the_reference_has_every_public_name_and_method() -> None:
    text = PAGE.read_text(encoding="utf-8")
    titles = re.findall(r"^####? (.*)$", text, re.MULTILINE)
    assert {name for name in shoal.__all__ if name.isidentifier() and not name.startswith("_")} <= {*titles}
    for cls in (shoal.LLM, shoal.AsyncLLM, shoal.ChatSession, shoal.Stage):
        public = {f"{cls.__name__}.{name}" for name in vars(cls) if not name.startswith("_")}
        assert public <= {*titles}
    assert len(titles) == len(set(titles))
