"""Chats against transformers: the text of published templates, and token ids of every kind of tokenizer."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from tests.models import smollm2_gguf
from tests.weights.test_chat import KINDS, TEMPLATES, tokenizer
from tests.weights.test_chat_template import CONSTRUCTS, MESSAGES, SPECIAL, TOKENS
from tests.weights.texts import texts
from tests.weights.toy_tokenizers import toy

from shoal.download import download
from shoal.engine.chat import Chat
from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.checkpoint.hugging_face_chat import chat_template, special_tokens
from shoal.engine.errors import ShoalError, ignore
from shoal.engine.tokenizer import Tokenizer
from shoal.fetch import Wheel, _find_url
from shoal.store import downloads_directory

pytestmark = pytest.mark.oracle

PUBLISHED = Wheel(
    project="llama-cpp-python",
    version="0.3.36",
    file="llama_cpp_python-0.3.36.tar.gz",
    size=76589250,
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    member="vendor/llama.cpp/models/templates/",
    member_sha256="",
)
"""A source distribution with the chat templates of some 70 models."""


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "f", "arguments": {"a": 1, "b": ["é", None, True]}},
}
CHATS = [
    [user("hi")],
    [
        {"role": "system", "content": "Be nice."},
        user(" hé <b>&amp; \n"),
        assistant(" yes\n\n"),
        user("x'\"\\"),
    ],
    [user("a"), assistant("<think>hm\n</think>\n\nb</think>c"), user("d")],
    [
        user("w?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "name": "f", "tool_call_id": "abcdefghi", "content": '{"r": 1}'},
        assistant("ok"),
        user("so?"),
    ],
    [assistant("x")],
    [{"role": "system", "content": "s"}],
    [],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "dé <b>",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "n"}}},
    },
}
VARIABLES: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False},
    {"enable_thinking": True, "date_string": "1 Jan 2025"},
    {"documents": [{"title": "t", "text": "x"}]},
    {"tools": [TOOL]},
    {"tools": [TOOL], "enable_thinking": True},
]


def transformers_text(template: str, messages: list[dict[str, Any]], **variables: Any) -> str | Exception:
    """What transformers renders, or how it refuses."""
    from transformers.utils.chat_template_utils import _normalize_chat_messages, render_jinja_template

    try:
        chat = _normalize_chat_messages(messages)
        rendered = render_jinja_template([chat], chat_template=template, **SPECIAL, **variables)
    except Exception as error:
        return error
    text: str = rendered[0][0]
    return text


def published() -> dict[str, str]:
    """Templates by name, out of the source distribution, which the first test run on a machine fetches."""
    archive = downloads_directory() / PUBLISHED.file
    archive.parent.mkdir(parents=True, exist_ok=True)
    if not archive.exists():
        url, size = _find_url(PUBLISHED), PUBLISHED.size
        download(url, archive, size=size, sha256=PUBLISHED.sha256, progress=lambda done, total: None)
    found = {}
    with tarfile.open(archive) as files:
        for member in files:
            if PUBLISHED.member in member.name and member.name.endswith(".jinja"):
                content = files.extractfile(member)
                assert content is not None
                found[Path(member.name).stem] = content.read().decode()
    return found


def test_templates_of_published_models() -> None:
    templates, rendered, refused = published(), 0, 0
    assert len(templates) >= 70
    for name, template in templates.items():
        chat = Chat(TOKENS, template, SPECIAL)
        for messages in CHATS:
            for variables in VARIABLES:
                for prompt in (True, False):
                    expected = transformers_text(
                        template, messages, add_generation_prompt=prompt, **variables
                    )
                    if isinstance(expected, Exception):
                        with pytest.raises(ShoalError):
                            chat.render(messages, generation_prompt=prompt, **variables)
                        refused += 1
                    else:
                        text = chat.render(messages, generation_prompt=prompt, **variables)
                        assert text == expected, (name, messages, variables, prompt)
                        rendered += 1
    assert rendered > 3 * refused


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_constructs(name: str) -> None:
    template, variables, expected = CONSTRUCTS[name]
    assert transformers_text(template, MESSAGES, add_generation_prompt=True, **variables) == expected


def chats_of_texts() -> list[list[dict[str, Any]]]:
    """Honest chats: the texts that spell special tokens are left out."""
    honest = [text for text in texts(60, seed=6) if "<" not in text]
    return [
        [user(a), assistant(b), user(c)]
        for a, b, c in zip(honest[::3], honest[1::3], honest[2::3], strict=False)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_kind_of_tokenizer(kind: str) -> None:
    from transformers import PreTrainedTokenizerFast

    oracle = PreTrainedTokenizerFast(tokenizer_object=toy(kind), **SPECIAL)
    for template in TEMPLATES.values():
        chat = Chat(tokenizer(kind), template, SPECIAL)
        for messages in chats_of_texts():
            ids = oracle.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, return_dict=False
            )
            assert chat.encode(messages) == ids, (template, messages)


def test_ids_of_smollm2() -> None:
    from transformers import AutoTokenizer

    gguf = smollm2_gguf()
    checkpoint = open_checkpoint(gguf)
    oracle = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokens = Tokenizer.parse(checkpoint.tokenizer_json() or b"", gguf.name)
    chat = Chat(
        tokens, checkpoint.chat_template, {"bos_token": oracle.bos_token, "eos_token": oracle.eos_token}
    )
    for messages in chats_of_texts():
        ids = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat.encode(messages) == ids, messages


def test_special_tokens_of_a_directory(tmp_path: Path) -> None:
    """Which file counts: transformers opens the directories of `T/test_chat_check.py`."""
    from tests.weights.small_vocabulary import tokenizer_file
    from transformers import AutoTokenizer

    cases: list[tuple[dict[str, Any], dict[str, Any] | None, str | None]] = [
        ({"bos_token": "<s>"}, None, "<s>"),
        ({"bos_token": {"__type": "AddedToken", "content": "<s>"}}, None, "<s>"),
        ({"bos_token": "<s>"}, {"bos_token": {"content": "</s>"}}, "</s>"),
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "</s>"}, "<s>"),
        ({"bos_token": None}, None, None),
    ]
    for number, (settings, special, expected) in enumerate(cases):
        directory = tmp_path / str(number)
        directory.mkdir()
        write_json(
            directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        )
        write_json(directory / "config.json", {"model_type": "llama", "bos_token_id": 2})
        (directory / "tokenizer.json").write_bytes(tokenizer_file())
        if special is not None:
            write_json(directory / "special_tokens_map.json", special)
        oracle = AutoTokenizer.from_pretrained(directory)
        assert oracle.bos_token == expected, settings
        assert special_tokens(directory, read_json).get("bos_token") == expected


def test_which_of_several_templates(tmp_path: Path) -> None:
    from tests.weights.small_vocabulary import tokenizer_file
    from transformers import AutoTokenizer

    both = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    cases: list[tuple[Any, dict[str, str]]] = [
        ("S", {}),
        ("S", {"chat_template.jinja": "F"}),
        (both, {}),
        (both[1:], {}),
        ("S", {"chat_template.jinja": "F", "additional_chat_templates/rag.jinja": "R"}),
        ("S", {"additional_chat_templates/default.jinja": "A"}),
        ("S", {"additional_chat_templates/rag.jinja": "R"}),
    ]
    for number, (setting, files) in enumerate(cases):
        directory = tmp_path / str(number)
        (directory / "additional_chat_templates").mkdir(parents=True)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": setting}
        write_json(directory / "tokenizer_config.json", settings)
        (directory / "tokenizer.json").write_bytes(tokenizer_file())
        for name, content in files.items():
            (directory / name).write_text(content)
        oracle = AutoTokenizer.from_pretrained(directory)
        try:
            expected = oracle.get_chat_template()
        except ValueError:
            expected = None
        assert chat_template(directory, read_json, ignore) == expected, (setting, files)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value
