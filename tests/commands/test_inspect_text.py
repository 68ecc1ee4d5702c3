"""`shoal inspect` shows tokenizer, special tokens and template as `shoal run` uses them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.weights.gguf_files import write_tiny
from tests.weights.small_vocabulary import TURNS, metadata

from shoal.cli import main
from shoal.engine.convert import convert
from shoal.engine.model_directory import Model

EXAMPLE = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], Any]:
    """The lines before the model's hash, and the JSON about text."""
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.split("\nmodel hash")[0].splitlines()[3:]
    assert main(["inspect", str(path), "--json"]) == 0
    return lines, json.loads(capsys.readouterr().out)["text"]


def converted(path: Path, templates: dict[str, str], **tokenizer: Any) -> Path:
    source = write_tiny(path / "x.gguf", tokenizer=metadata(**tokenizer), templates=templates)
    convert(source, path / "m", dtype="f32")
    return path / "m"


def test_a_chat_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, values = shown(
        converted(tmp_path, {"": TURNS}, add_bos_token=True, eot_token_id=3, add_eos_token=False), capsys
    )
    assert lines == [
        "tokenizer: BPE over bytes, 261 tokens, 4 of them added; around raw text: '</s>' (1)",
        "bos token: '</s>' (1); end tokens: '<|im_start|>' (2), '<|im_end|>' (3)",
        f"chat template chat_template.jinja: {EXAMPLE!r}, 21 tokens",
    ]
    assert values == {
        "tokenizer": {"kind": "BPE over bytes", "tokens": 261, "added": 4},
        "around_raw_text": [{"id": 1, "token": "</s>", "special": True}],
        "bos": {"id": 1, "token": "</s>", "special": True},
        "end": [
            {"id": 2, "token": "<|im_start|>", "special": True},
            {"id": 3, "token": "<|im_end|>", "special": True},
        ],
        "chat_template": {
            "file": "chat_template.jinja",
            "example": EXAMPLE,
            "example_tokens": 21,
        },
    }


def test_a_base_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, values = shown(converted(tmp_path, {}), capsys)
    assert lines[2] == "no chat template: messages are plain text"
    assert values["chat_template"] is None and values["around_raw_text"] == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no') }}", "the model's chat template refuses these messages: no"),
        ("{% for %}", "the model's chat template does not compile"),
    ],
)
def test_a_template_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, message: str
) -> None:
    lines, values = shown(converted(tmp_path, {"": template}), capsys)
    assert message in lines[-1]
    assert message in (values.get("error") or values["chat_template"]["error"])


def test_without_a_tokenizer_or_its_package(
    tiny_llama: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shown(tiny_llama.path, capsys) == (["no tokenizer: prompts and answers are token ids"], None)
    model = converted(tmp_path, {"": TURNS})
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    lines, values = shown(model, capsys)
    assert "pip install tokenizers" in lines[0] and values == {"error": lines[0]}
