"""Targets that read what `shoal pull` fetches: models that somebody has published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from tests.models import TEMPLATE
from tests.weights.gguf_files import write_tiny

from shoal.engine import families
from shoal.engine.chat import Chat
from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.checkpoint.files import checkpoint_files
from shoal.engine.checkpoint.gguf_file import GgufFile
from shoal.engine.checkpoint.gguf_tokenizer import tokenizer_json
from shoal.engine.config import parse_config, read_config
from shoal.engine.errors import DownloadError, ModelFileError, ShoalError, UnsupportedModelError
from shoal.engine.model_directory import units_of
from shoal.engine.safetensors_file import open_file
from shoal.engine.tokenizer import Tokenizer
from shoal.engine.typed import typed
from shoal.hub import weight_files

from .target import Target, in_a_file, mostly

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny-llama"
_FIRST = 64
"""Bytes of the first tensor that are in an input."""
WRONG = (ModelFileError, UnsupportedModelError)


def checkpoint_targets(place: Path) -> dict[str, Target]:
    """All of them, by name. `place` is for files."""
    config = (TINY / "config.json").read_bytes()
    headers, tail = _gguf_headers(place)
    return {
        "config.json": Target(in_a_file(_config), _configs(config), WRONG, slow=4),
        "safetensors": Target(in_a_file(_open_fitted), _shards(), WRONG),
        "gguf": Target(in_a_file(_gguf, tail), headers, WRONG, slow=8),
        "files of a checkpoint": Target(
            _reader_of_files(place), _checkpoints(config), (*WRONG, DownloadError), slow=8
        ),
        "chat template": Target(_template(), _templates(), (ShoalError,), slow=8),
    }


def _config(path: Path) -> None:
    """As a node reads what the head has sent, and `shoal pull` what somebody has published."""
    units_of(typed(families.build(read_config(path)), "q4", "q8"))


def _configs(tiny: bytes) -> tuple[bytes, ...]:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    labels = {"architectures": ["XForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    more = {"rope_scaling": llama3, "sliding_window": 64, "use_sliding_window": True, **labels}
    kinds = ({"model_type": family, **more} for family in families.names())
    older = {"type": "linear", "factor": 2.0, "rope_theta": 1e5}
    newer = {"rope_parameters": {**llama3, "original_max_position_embeddings": 64}, "rope_theta": 1e4}
    scaled = ({"rope_scaling": older}, newer, {"rope_scaling": older, **newer})
    return (tiny, *(json.dumps({**json.loads(tiny), **kind}).encode() for kind in (*kinds, *scaled)))


# --- weights


def _open_fitted(path: Path) -> None:
    data = path.read_bytes()
    header = data[8 : data.rfind(b"}") + 1]
    if mostly(data) and header:  # with the length that it has, with the spaces behind it
        spaces = len(data) - 8 - len(header) - len(data[8 + len(header) :].lstrip(b" "))
        with path.open("r+b") as changed:
            changed.write((len(header) + spaces).to_bytes(8, "little"))
    opened = open_file(path)
    for name in opened.tensors:
        opened.tensor(name)


def _shards() -> tuple[bytes, ...]:
    tensors = {
        "a": np.ones((2, 3), np.float32),
        "b": np.arange(4, dtype=np.int8),
        "c": np.zeros(0, np.float16),
    }
    return (save(tensors), save({"a": tensors["a"]}, {"format": "pt"}))


def _gguf(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.config
    checkpoint.tokenizer_json()
    for name in [name for name in sorted(checkpoint.names) if checkpoint.type_of(name) != "F32"]:
        checkpoint.quantised(name)
        checkpoint.tensor(name)
    assert isinstance(checkpoint.license, str | None)


def _gguf_headers(place: Path) -> tuple[tuple[bytes, ...], int]:
    """The beginnings of some files, and at least as many bytes as follow them."""
    letters = [*"abcdefgh", "ab", "\u0120", "\u0120a", "<s>", "</s>"]
    words = {"model": "gpt2", "pre": "llama-bpe", "tokens": letters, "merges": ["a b"]}
    factors = [1.0] * (json.loads((TINY / "config.json").read_bytes())["head_dim"] // 2)
    pieces = ["<unk>", "<s>", "</s>", "<0x0A>", "a", "b", "ab", "\u2581", "\u2581a", "\u2581ab"]
    some = {"model": "llama", "tokens": pieces, "scores": [-float(i) for i in range(len(pieces))]}
    some["token_type"] = [2, 3, 3, 6, *[1] * 6]
    files: list[dict[str, Any]] = [
        {},
        {"tokenizer": words, "templates": {"": "{{ eos_token }}"}},
        {"tokenizer": some, "templates": {".default": TEMPLATE, ".tool_use": "x"}, "tied": True},
        {"rope_freqs": factors, "rope__scaling__type": "none"},
        {"rope__scaling__type": "linear", "rope__scaling__factor": 2.0, "dtype": np.float16},
    ]
    headers, tails = [], []
    for number, options in enumerate(files):
        path = write_tiny(place / f"tiny-{number}.gguf", **options)
        begin = min(tensor.begin for tensor in GgufFile(path).tensors.values())
        headers.append(path.read_bytes()[: begin + _FIRST])
        tails.append(path.stat().st_size - begin)
    return tuple(headers), max(tails) + 4096


# --- Hugging Face directories


_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "README.md",
)


def _reader_of_files(place: Path) -> Callable[[bytes], None]:
    """Reads a directory whose small files are in an object, by name."""
    directory = place / "checkpoint"
    directory.mkdir()
    (directory / "a.safetensors").write_bytes(_shards()[0])
    table = np.ones((3, 2), np.float32)
    tied = {"model.embed_tokens.weight": table, "lm_head.weight": 2 * table, "a": table}
    (directory / "b.safetensors").write_bytes(save(tied))

    written = dict.fromkeys(_SMALL, "")

    def read(data: bytes) -> None:
        try:
            files = dict(json.loads(data))
        except (ValueError, TypeError, RecursionError):
            raise ModelFileError("this is no object of files") from None
        for name in _SMALL:
            path, found = directory / name, files.get(name)
            text = found if isinstance(found, str) and not name.endswith("json") else json.dumps(found)
            if text == written[name]:
                continue
            written[name] = text
            path.unlink(missing_ok=True)
            if found is not None:
                path.write_bytes(text.encode("utf-8", "surrogatepass"))
        checkpoint_files(directory)
        checkpoint = open_checkpoint(directory)
        parse_config(checkpoint.config, "config.json")
        assert isinstance(checkpoint.chat_template, str | None)
        assert all(isinstance(token, str | None) for token in checkpoint.special_tokens.values())
        assert isinstance(checkpoint.license, str | None)
        for name in checkpoint.names:
            checkpoint.type_of(name)
        weight_files("a/b", [file.name for file in directory.iterdir()], "", directory)

    return read


def _checkpoints(config: bytes) -> tuple[bytes, ...]:
    map_ = {"weight_map": {"a": "a.safetensors", "b": "a.safetensors", "c": "a.safetensors"}}
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}
    named = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    files = {
        "config.json": json.loads(config),
        "generation_config.json": {"eos_token_id": [2, 3]},
        "tokenizer_config.json": {**names, "chat_template": named, "add_bos_token": True},
        "special_tokens_map.json": names,
        "model.safetensors.index.json": map_,
        "README.md": "---\nlicense: mit\n---\n",
    }
    other = {**files, "chat_template.json": {"chat_template": "x"}}
    other["tokenizer_config.json"] = {"added_tokens_decoder": {}}
    other["model.safetensors.index.json"] = {"weight_map": {"lm_head.weight": "b.safetensors"}}
    other["config.json"] = {**json.loads(config), "tie_word_embeddings": True}
    all_ = (files, other, {**files, "chat_template.jinja": TEMPLATE})
    return tuple(json.dumps(some).encode() for some in all_)


# --- chats


def _template() -> Callable[[bytes], None]:
    tokens = [*map(chr, range(32, 127)), "<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [1] * 95 + [2, 3, 3],
        "tokenizer.ggml.unknown_token_id": 95,
    }
    tokenizer = Tokenizer.parse(tokenizer_json(vocabulary, "fuzz") or b"", "fuzz")
    function = {"name": "look", "arguments": {"at": ["sea", 1, 0.5, None]}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be <|im_end|> brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": "blue"},
    ]

    def read(data: bytes) -> None:
        chat = Chat(tokenizer, data.decode("utf-8", "replace"), {"bos_token": "<s>", "eos_token": None})
        chat.encode(messages, tools=[{"type": "function", "function": {"name": "look", "parameters": {}}}])

    return read


def _templates() -> tuple[bytes, ...]:
    """As those of usual families are written."""
    tools = (
        "{{- bos_token }}{% set ns = namespace(n=0) %}{% if tools is not none %}"
        "{{ tools | tojson(indent=2) }}{% endif %}"
        "{% for m in messages if m.role != 'system' %}{% set ns.n = ns.n + 1 %}{% if m.tool_calls "
        "is defined %}{% for c in m.tool_calls %}{{ '<tool_call>' ~ (c.function | tojson) }}{% endfor %}"
        "{% elif loop.first or loop.last %}{{ m['content'].split('x')[-1].strip() | upper }}{% else %}"
        "{{ raise_exception('no') if ns.n > 99 else m.content[:3].replace('a', 'b') }}{% endif %}{% endfor %}"
    )
    macros = (
        "{% macro turn(m, sep='\\n') %}{% generation %}{{ '%s: %s' % (m.role, m.content) ~ sep }}"
        "{% endgeneration %}{% endmacro %}{% for m in messages %}"
        "{% if loop.index0 > 3 %}{% break %}{% endif %}"
        "{{ turn(m).title() }}{{ '{} {x}'.format(m.role, x=strftime_now('%Y')) | trim | indent(2) }}"
        "{{ m.items() | list | length }}{{ ', '.join(m.content.splitlines()) }}{% endfor %}"
        "{{ messages[0].content.partition('b')[2].lstrip().removeprefix('e').capitalize().rsplit(None, 1) }}"
    )
    return tuple(text.encode() for text in (TEMPLATE, tools, macros))
