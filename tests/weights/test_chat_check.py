"""Checkpoints whose sources disagree about tokens and templates: what is kept, warned of or refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.weights.conftest import TINY
from tests.weights.gguf_files import write_tiny
from tests.weights.small_vocabulary import TURNS, metadata, tokenizer_file

from shoal.cli import main
from shoal.engine.chat import Chat, Message
from shoal.engine.convert import convert
from shoal.engine.errors import ModelFileError, UnsupportedModelError
from shoal.engine.index import SPECIAL_TOKENS
from shoal.engine.model_directory import Model

NAMED = "{{ bos_token }}[{{ messages[0].content }}]{{ messages[-1].content if messages[1:] }}{{ eos_token }}"


Write = Callable[..., Path]


@pytest.fixture
def write(checkpoint_dir: Path) -> Write:
    """Adds files to a copy of the tiny checkpoint: `settings` are those of tokenizer_config.json, `config`
    changes config.json, and `files` are texts or JSON by file name (None: no such file)."""

    def write(
        settings: Mapping[str, Any] | None = None, config: Mapping[str, Any] | None = None, **files: Any
    ) -> Path:
        (checkpoint_dir / "tokenizer.json").write_bytes(tokenizer_file())
        if settings is not None:
            files["tokenizer_config.json"] = settings
        path = checkpoint_dir / "config.json"
        values = {**json.loads(path.read_text()), "bos_token_id": 0, "eos_token_id": 3, **(config or {})}
        path.write_text(json.dumps(values))
        for name, content in files.items():
            file = checkpoint_dir / name
            file.parent.mkdir(exist_ok=True)
            if content is None:
                file.unlink()
            else:
                file.write_text(content if isinstance(content, str) else json.dumps(content))
        return checkpoint_dir

    return write


def converted(source: Path, target: Path) -> tuple[Chat, tuple[int, ...], list[str]]:
    """The chat of the converted model, its end tokens, and the warnings."""
    said: list[str] = []
    convert(source, target, dtype="f32", warn=said.append)
    return Chat.open(target), Model.open(target).config.eos, said


@pytest.mark.parametrize("bos", [0, None, 2, 1])
@pytest.mark.parametrize("as_object", [False, True])
def test_a_template_gets_the_tokens_that_the_tokenizer_names(
    write: Write, tmp_path: Path, bos: int | None, as_object: bool
) -> None:
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": None}
    given = {
        key: {"content": token, "special": True} if as_object and token else token
        for key, token in names.items()
    }
    source = write({**given, "chat_template": NAMED}, {"bos_token_id": bos, "eos_token_id": 1})
    chat, eos, said = converted(source, tmp_path / "m")
    assert chat.render([Message("user", "hi")]) == "<s>[hi]<|im_end|>"
    assert chat.encode([Message("user", "hi")])[0] == 0
    assert eos == (3, 1)
    assert said == []
    assert (tmp_path / "m" / SPECIAL_TOKENS).exists() == (bos != 0)


def test_a_token_that_the_tokenizer_says_it_lacks_is_not_taken_from_the_ids(
    write: Write, tmp_path: Path
) -> None:
    template = "{% if bos_token is defined %}{{ bos_token }}{% endif %}" + TURNS
    chat, _, said = converted(write({"bos_token": None, "chat_template": template}), tmp_path / "m")
    assert chat.render([Message("user", "a")], generation_prompt=False) == "<|im_start|>user\na<|im_end|>\n"
    assert said == []


def test_other_special_tokens_that_a_template_names_are_kept(write: Write, tmp_path: Path) -> None:
    settings = {
        "cls_token": "<s>",
        "image_token": {"content": "</s>"},
        "add_bos_token": True,
        "chat_template": "x",
    }
    settings["chat_template"] = "{{ cls_token }}{{ image_token }}{{ add_bos_token }}" + TURNS
    chat, _, _ = converted(write(settings), tmp_path / "m")
    assert chat.encode([Message("user", "")])[:3] == [0, 1, 2]
    assert json.loads((tmp_path / "m" / SPECIAL_TOKENS).read_text()) == {
        "cls_token": "<s>",
        "image_token": "</s>",
    }


@pytest.mark.parametrize(("decoder", "expected"), [({}, "</s>"), ({"added_tokens_decoder": {}}, "<s>")])
def test_the_map_of_special_tokens_counts_where_the_settings_list_no_tokens(
    write: Write, tmp_path: Path, decoder: dict[str, Any], expected: str
) -> None:
    settings = {"bos_token": "<s>", **decoder, "chat_template": "{{ bos_token }}" + TURNS}
    source = write(settings, **{"special_tokens_map.json": {"bos_token": {"content": "</s>"}}})
    chat, _, _ = converted(source, tmp_path / "m")
    assert chat.render([Message("user", "a")]).startswith(f"{expected}<|im_start|>")


@pytest.mark.parametrize("listed", [[3, 7], 3])
def test_the_end_token_of_the_tokenizer_is_an_end_token(write: Write, tmp_path: Path, listed: Any) -> None:
    _, eos, said = converted(
        write({"eos_token": "</s>", "chat_template": TURNS}, {"eos_token_id": listed}), tmp_path / "m"
    )
    assert eos == ((3, 7, 1) if listed != 3 else (3, 1))
    assert said == []


@pytest.mark.parametrize(
    ("config", "settings", "eos", "warnings"),
    [
        ({"eos_token_id": [3, 5000]}, {}, (3,), ["eos_token_id 5000 is not in the vocabulary"]),
        ({"eos_token_id": [3, 262]}, {}, (3,), ["eos_token_id 262 is not in the vocabulary"]),  # a padded row
        ({"bos_token_id": 5000}, {}, (3,), ["bos_token_id 5000 is not in the vocabulary"]),
        ({}, {"eos_token": "<|none|>"}, (3,), [r"eos_token '<\|none\|>' is not in the vocabulary"]),
        ({}, {"bos_token": "<|none|>"}, (3,), [r"bos_token '<\|none\|>' is not in the vocabulary"]),
        (
            {"eos_token_id": 1},
            {},
            (1, 3),
            [r"ends an answer with '<\|im_end\|>'.*not among its end tokens \('</s>'\)"],
        ),
        ({"eos_token_id": None}, {}, (3,), [r"ends an answer with '<\|im_end\|>'.*end tokens \(none\)"]),
        ({"eos_token_id": None}, {"chat_template": None}, (), ["has no end token"]),
    ],
)
def test_end_tokens_that_cannot_end_an_answer_are_named(
    write: Write,
    tmp_path: Path,
    config: dict[str, Any],
    settings: dict[str, Any],
    eos: tuple[int, ...],
    warnings: list[str],
) -> None:
    chat, found, said = converted(write({"chat_template": TURNS, **settings}, config), tmp_path / "m")
    assert found == eos
    assert len(said) == len(warnings) and all(str(tmp_path) in message for message in said)
    for message, pattern in zip(said, warnings, strict=True):
        assert re.search(pattern, message), message
    assert "bos_token" not in chat.special or chat.special["bos_token"] in ("<s>", "<|none|>")


@pytest.mark.parametrize(
    ("template", "warnings"),
    [
        (TURNS, []),
        ("{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content }}<|im_end|>{% endfor %}", []),
        (TURNS.replace("im_start", "start_of"), [r"writes <\|start_of\|>, which the tokenizer splits"]),
        ("[INST] {{ messages[0].content }}</s><start_of_turn>", ["writes <start_of_turn>, which the tok"]),
        ("{{ bos_token }}<s>" + TURNS, ["starts with '<s>' twice"]),
        ("{{ raise_exception('only one') if messages[1:] }}" + TURNS, ["cannot be rendered: .*: only one"]),
        ("{{ messages.append(1) }}", ["cannot be rendered: .*'append' of 'list' object is unsafe"]),
        ("{{ undefined.what }}", ["cannot be rendered: .*'undefined' is undefined"]),
        ("{% for %}", ["does not compile"]),
        ("{{ messages | length }}<|im_end|>", ["leaves out the user's message"]),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}",
            ["writes nothing after an answer, and none of the end tokens"],
        ),
        ("", ["leaves out the user's message"]),
    ],
)
def test_what_is_odd_about_a_template_is_said(
    write: Write, tmp_path: Path, template: str, warnings: list[str]
) -> None:
    source, said = write({"bos_token": "<s>", "chat_template": template}), list[str]()
    progress: list[int] = []

    def warn(message: str) -> None:
        assert progress == []  # before the long work
        said.append(message)

    convert(source, tmp_path / "m", dtype="f32", progress=lambda *_: progress.append(1), warn=warn)
    assert len(said) == len(warnings), said
    for message, pattern in zip(said, warnings, strict=True):
        assert re.search(pattern, message), message
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == template


def test_a_template_may_write_no_token_that_the_embedding_lacks(write: Write, tmp_path: Path) -> None:
    source = write({"chat_template": TURNS})
    document = json.loads((source / "tokenizer.json").read_text())
    document["added_tokens"].append({**document["added_tokens"][2], "id": 270, "content": "<|more|>"})
    document["model"]["vocab"] |= {f"pad{i}": i for i in range(261, 270)} | {"<|more|>": 270}
    (source / "tokenizer.json").write_text(json.dumps(document))
    (source / "chat_template.jinja").write_text("<|more|>" + TURNS)
    with pytest.raises(ModelFileError, match=r"writes '<\|more\|>', which its embedding lacks"):
        convert(source, tmp_path / "m", dtype="f32")
    assert not (tmp_path / "m").exists()


FILE, MORE, OLD = "chat_template.jinja", "additional_chat_templates/rag.jinja", "chat_template.json"


@pytest.mark.parametrize(
    ("setting", "files", "expected"),
    [
        ("S<|im_end|>", {}, "S"),
        ("S<|im_end|>", {FILE: "F<|im_end|>"}, "F"),
        ("S<|im_end|>", {OLD: {"chat_template": "J<|im_end|>"}}, "S"),
        (None, {OLD: {"chat_template": "J<|im_end|>"}}, "J"),
        ([{"name": "x", "template": "X"}, {"name": "default", "template": "D<|im_end|>"}], {}, "D"),
        ("S", {FILE: "F<|im_end|>", MORE: "R"}, "F"),
        ("S", {"additional_chat_templates/default.jinja": "A<|im_end|>", MORE: "R"}, "A"),
        ("S", {MORE: "R"}, "called rag and none is the default"),
        (
            [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}],
            {},
            "called rag, tool_use and",
        ),
        (None, {}, None),
    ],
)
def test_one_of_several_templates(
    write: Write, tmp_path: Path, setting: Any, files: dict[str, Any], expected: str | None
) -> None:
    chat, _, said = converted(write({"chat_template": setting}, **files), tmp_path / "m")
    said = [message for message in said if "leaves out" not in message]
    if expected is None or "called" in expected:
        assert not chat.has_template
        assert said == [] if expected is None else (expected in said[0] and "chat_template.jinja" in said[0])
    else:
        assert chat.render([Message("user", "")]) == f"{expected}<|im_end|>"
        assert said == []


@pytest.mark.parametrize(
    "names", [["tokenizer.model"], ["vocab.json", "merges.txt"], ["vocab.txt"], ["tekken.json"]]
)
def test_a_tokenizer_in_other_files_is_refused_with_what_to_do(
    write: Write, tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(**{"tokenizer.json": None}, **dict.fromkeys(names, "x"))
    with pytest.raises(UnsupportedModelError, match=f"its tokenizer in {names[0]}.*save_pretrained"):
        convert(source, tmp_path / "m", dtype="f32")
    assert main(["convert", str(source), str(tmp_path / "m")]) == 4
    assert not (tmp_path / "m").exists()


def test_a_model_without_a_tokenizer_is_told(checkpoint_dir: Path, tmp_path: Path) -> None:
    said: list[str] = []
    convert(TINY, tmp_path / "m", dtype="f32", warn=said.append)
    assert len(said) == 1 and "has no tokenizer.json" in said[0] and "token ids" in said[0]
    said.clear()
    convert(write_tiny(tmp_path / "x.gguf"), tmp_path / "g", dtype="f32", warn=said.append)
    assert len(said) == 1 and "x.gguf has no tokenizer" in said[0]


def gguf(path: Path, templates: Mapping[str, str], **tokenizer: Any) -> Path:
    return write_tiny(path, tokenizer=metadata(**tokenizer), templates=templates)


def test_a_gguf_without_a_named_pre_tokenizer_is_told(tmp_path: Path) -> None:
    source = gguf(tmp_path / "x.gguf", {"": TURNS}, pre=None)
    chat, eos, said = converted(source, tmp_path / "m")
    assert len(said) == 1 and "names no pre-tokenizer" in said[0] and "x.gguf" in said[0]
    named, _, nothing = converted(gguf(tmp_path / "y.gguf", {"": TURNS}, pre="default"), tmp_path / "n")
    text = [Message("user", "don't 12345 he  is")]
    assert chat.encode(text) == named.encode(text) and nothing == []
    assert 3 in eos


def test_the_templates_of_a_gguf(tmp_path: Path) -> None:
    both = {"": TURNS, ".tool_use": "T"}
    chat, _, said = converted(gguf(tmp_path / "x.gguf", both), tmp_path / "m")
    assert chat.render([Message("user", "a")]).startswith("<|im_start|>") and said == []
    chat, _, said = converted(gguf(tmp_path / "y.gguf", {".tool_use": "T", ".rag": "R"}), tmp_path / "n")
    assert not chat.has_template and "called rag, tool_use and none is the default" in said[0]


def test_a_damaged_map_of_special_tokens_is_named(write: Write, tmp_path: Path) -> None:
    source = write({"bos_token": "</s>", "chat_template": "{{ bos_token }}" + TURNS})
    converted(source, tmp_path / "m")
    for bad in ("[", "[1]", '{"bos_token": 1}'):
        convert(source, tmp_path / bad[-2:], dtype="f32")
        index = json.loads((tmp_path / bad[-2:] / "index.json").read_text())
        (tmp_path / bad[-2:] / SPECIAL_TOKENS).write_text(bad)
        entry = index["files"][SPECIAL_TOKENS]
        entry["size"], entry["sha256"] = len(bad), hashlib.sha256(bad.encode()).hexdigest()
        (tmp_path / bad[-2:] / "index.json").write_text(json.dumps(index))
        with pytest.raises(ModelFileError, match=r"special_tokens_map\.json"):
            Chat.open(tmp_path / bad[-2:])


def test_models_made_before_open_as_they_did(write: Write, tmp_path: Path) -> None:
    """A directory without a map of special tokens takes them from the ids in config.json."""
    source = write({"bos_token": "</s>", "chat_template": "{{ bos_token }}" + TURNS})
    converted(source, tmp_path / "m")
    index = json.loads((tmp_path / "m" / "index.json").read_text())
    index["files"].pop(SPECIAL_TOKENS)
    (tmp_path / "m" / "index.json").write_text(json.dumps(index))
    assert Chat.open(tmp_path / "m").render([Message("user", "a")]).startswith("<s><|im_start|>")
