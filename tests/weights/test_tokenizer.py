"""Tokenizers against ids that transformers made; incremental decoding against decoding as a whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.weights.gguf_files import sentencepiece_vocabulary, write_tiny
from tests.weights.small_vocabulary import tokenizer_file
from tests.weights.texts import texts

from shoal.cli import main
from shoal.engine.chat import Chat, Message
from shoal.engine.checkpoint.gguf_tokenizer import tokenizer_json
from shoal.engine.convert import convert
from shoal.engine.errors import MissingDependencyError, ModelFileError, ShoalError, UnsupportedModelError
from shoal.engine.tokenizer import Detokenizer, StopBuffer, Tokenizer

FIXTURE = Path(__file__).parent.parent / "fixtures" / "smollm2-tokens.json"


def metadata(**values: Any) -> dict[str, Any]:
    """GGUF metadata with keys under tokenizer.ggml."""
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def make(**values: Any) -> Tokenizer:
    data = tokenizer_json(metadata(**values), "x.gguf")
    assert data is not None
    return Tokenizer.parse(data, "x.gguf")


def byte_level(**values: Any) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: the 256 bytes, a few merges, two control tokens."""
    spelling = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    tokens = [
        *spelling,
        *(chr(256 + i) for i in range(256 - len(spelling))),
        "Ġt",
        "he",
        "Ġthe",
        "<|end|>",
        "[x]",
    ]
    types = [1] * 259 + [3, 4]
    known = {"model": "gpt2", "tokens": tokens, "token_type": types, "merges": ["Ġ t", "h e", "Ġt he"]}
    return {**known, **values}


@pytest.fixture(scope="session")
def real(smollm2: Path) -> Tokenizer:
    return Tokenizer.open(smollm2)


@pytest.fixture(scope="session")
def fixture() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="utf-8"))
    return values


@pytest.mark.slow
def test_ids_are_those_of_transformers(real: Tokenizer, fixture: dict[str, Any]) -> None:
    assert len(fixture["texts"]) == 120
    for text, ids in fixture["texts"]:
        assert real.encode(text) == ids, repr(text)


@pytest.mark.slow
def test_chats_are_those_of_transformers(smollm2: Path, fixture: dict[str, Any]) -> None:
    chat = Chat.open(smollm2)
    for messages, rendered in fixture["chats"]:
        assert chat.render([Message(**message) for message in messages]) == rendered


def tokens_of(tokenizer: Tokenizer, count: int = 40) -> list[list[int]]:
    """Ids of texts, and ids drawn at random, whose bytes are no UTF-8."""
    rng = np.random.default_rng(4)
    size = next(i for i in range(1 << 20) if tokenizer.token(i) is None)
    drawn = [rng.integers(0, size, int(rng.integers(1, 40))).tolist() for _ in range(count)]
    return [tokenizer.encode(text) for text in texts(count, seed=5)] + drawn


def check_incremental(tokenizer: Tokenizer, ids: Sequence[int], *, skip_special: bool) -> None:
    whole = tokenizer.decode(ids, skip_special=skip_special)
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    pieces = [detokenizer.push(token) for token in ids]
    last = detokenizer.flush()
    assert "".join(pieces) + last == whole
    assert "".join(pieces).count("\ufffd") <= whole.count("\ufffd")


@pytest.mark.slow
@pytest.mark.parametrize("skip_special", [False, True])
def test_pieces_of_the_real_model_join_to_the_whole(real: Tokenizer, skip_special: bool) -> None:
    for ids in tokens_of(real):
        check_incremental(real, ids, skip_special=skip_special)


@pytest.mark.parametrize("skip_special", [False, True])
@pytest.mark.parametrize("kind", ["byte level", "sentencepiece", "sentencepiece without a prefix"])
def test_pieces_join_to_the_whole(kind: str, skip_special: bool) -> None:
    values = byte_level() if kind == "byte level" else sentencepiece_vocabulary(merges=False)
    tokenizer = make(**values, add_space_prefix=None if kind.count(" ") < 2 else False)
    for ids in tokens_of(tokenizer):
        check_incremental(tokenizer, ids, skip_special=skip_special)


@pytest.mark.slow
@given(st.lists(st.integers(0, 260), max_size=30))
def test_any_bytes_join_to_the_whole(ids: list[int]) -> None:
    check_incremental(BYTES, ids, skip_special=False)


@given(st.text(max_size=20))
def test_a_text_comes_back_character_by_character(text: str) -> None:
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(token) for token in BYTES.encode(text)]
    assert "".join(pieces) + detokenizer.flush() == BYTES.decode(BYTES.encode(text))
    # A character appears at the token that completes it, not before, and never in part.
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


BYTES = make(**byte_level())


def test_a_long_answer_costs_no_more_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: Sequence[int], *, skip_special: bool = True) -> str:
        decoded.append(len(ids))
        return decode(self, ids, skip_special=skip_special)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    detokenizer = Detokenizer(BYTES)
    for token in BYTES.encode("the ferry " * 200):
        detokenizer.push(token)
    assert max(decoded) <= 4


def test_special_tokens_and_begin_and_end() -> None:
    tokenizer = make(**byte_level(bos_token_id=259, eos_token_id=259, add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode(" the") == [259, 258, 259]
    assert tokenizer.encode(" the", special=False) == [258]
    assert tokenizer.encode("a<|end|>[x]", special=False) == [64, 259, 260]
    assert tokenizer.decode([258, 259, 260]) == " the[x]"
    assert tokenizer.decode([258, 259, 260], skip_special=False) == " the<|end|>[x]"
    assert (tokenizer.is_special(259), tokenizer.is_special(260), tokenizer.is_special(1)) == (
        True,
        False,
        False,
    )
    assert (tokenizer.token(257), tokenizer.token_id("he"), tokenizer.token(999)) == ("he", 257, None)
    with_bos = make(**sentencepiece_vocabulary(merges=True), bos_token_id=1)
    assert with_bos.encode("the")[0] == 1  # sentencepiece files that do not say otherwise begin so


def test_what_a_file_says_of_batches_is_not_obeyed() -> None:
    import tokenizers

    data = tokenizer_json({f"tokenizer.ggml.{k}": v for k, v in byte_level().items()}, "x")
    assert data is not None
    backend = tokenizers.Tokenizer.from_str(data.decode())
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    assert len(Tokenizer.parse(backend.to_str().encode(), "x").encode("abcde")) == 5


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (
            {"model": "bert"},
            UnsupportedModelError,
            "its tokenizer 'bert' is not supported; 'gpt2' and 'llama' are",
        ),
        (
            {"pre": "mystery"},
            UnsupportedModelError,
            "pre-tokenizer 'mystery' is not supported; supported are .*smollm.*",
        ),
        ({"pre": 7}, UnsupportedModelError, "pre-tokenizer 7 is not supported"),
        ({"pre": ["a"]}, UnsupportedModelError, r"pre-tokenizer \['a'\] is not supported"),
        ({"tokens": None}, ModelFileError, "tokens is missing"),
        ({"tokens": [1, 2]}, ModelFileError, "tokens must be a list of str"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, ModelFileError, "token 'a' has two ids, 0 and 1"),
        ({"token_type": [1]}, ModelFileError, "token_type has 1 values for 261 tokens"),
        ({"scores": [1.0]}, ModelFileError, "scores has 1 values for 261 tokens"),
        ({"merges": None}, ModelFileError, "neither merges nor scores"),
        ({"merges": ["h e", "he x"]}, ModelFileError, "has 'he x', which does not join two tokens"),
        ({"merges": ["h e x"]}, ModelFileError, "has 'h e x', which does not join two tokens"),
        ({"bos_token_id": 261}, ModelFileError, "bos_token_id is 261, which is not a token id"),
        ({"eos_token_id": -1}, ModelFileError, "eos_token_id is -1, which is not a token id"),
    ],
)
def test_bad_metadata_are_refused(values: dict[str, Any], kind: type[ShoalError], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        tokenizer_json(metadata(**byte_level(**values)), "x.gguf")
    assert "x.gguf" in str(error.value)


def test_a_long_token_is_not_split_at_every_letter() -> None:
    tokens = ["a", "b", "ab", "c" * 400_000]  # all splits together have 160 GB
    named = {"model": "llama", "tokens": tokens, "scores": [0.0] * len(tokens)}
    made = tokenizer_json({f"tokenizer.ggml.{key}": value for key, value in named.items()}, "x.gguf")
    assert json.loads(made or b"")["model"]["merges"] == [["a", "b"]]


def test_a_model_without_a_tokenizer_takes_ids_only(converted: Path) -> None:
    assert tokenizer_json({}, "x.gguf") is None
    with pytest.raises(ModelFileError, match=r"has no tokenizer\.json"):
        Tokenizer.open(converted)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="x cannot be read by the `tokenizers` package"):
        Tokenizer.parse(b"{}", "x")
    write_tiny(tmp_path / "x.gguf", tokenizer=byte_level())
    convert(tmp_path / "x.gguf", tmp_path / "m")
    assert Tokenizer.open(tmp_path / "m").encode(" the") == [258]
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"tokenizer\.json is truncated"):
        Tokenizer.open(tmp_path / "m")


def test_a_tokenizer_at_which_its_library_panics_is_named() -> None:
    document = json.loads(tokenizer_file())
    begin = [{"SpecialToken": {"id": "<none>", "type_id": 0}}]
    document["post_processor"] = {
        "type": "TemplateProcessing", "single": begin, "pair": begin, "special_tokens": {},
    }  # fmt: skip
    with pytest.raises(ModelFileError, match="x cannot be read by the `tokenizers` package: no entry"):
        Tokenizer.parse(json.dumps(document).encode(), "x")


def test_a_tokenizer_with_an_id_beyond_any_table_is_refused_before_its_ids_are_listed() -> None:
    document = json.loads(tokenizer_file())
    document["model"]["vocab"]["far"] = (1 << 32) - 1
    tokenizer = Tokenizer.parse(json.dumps(document).encode(), "x")
    with pytest.raises(ModelFileError, match="a token with the id 4294967295"):
        tokenizer.encode("<s>", control=False)


@pytest.mark.parametrize("length", [1, 1 << 16])
def test_half_a_character_is_refused(length: int) -> None:
    with pytest.raises(ShoalError, match="a lone surrogate"):
        Tokenizer.parse(tokenizer_file(), "x").encode("\ud800" * length)


def test_more_tokens_than_rows_of_the_table(tmp_path: Path) -> None:
    tokens = byte_level()
    tokens["tokens"] = [*tokens["tokens"], *(f"t{i}" for i in range(20)), "T"]
    tokens["token_type"] = [1] * len(tokens["tokens"])
    tokens["merges"] = ["h e"]
    tokens["tokens"][270], tokens["tokens"][51] = tokens["tokens"][51], tokens["tokens"][270]
    write_tiny(tmp_path / "x.gguf", tokenizer=tokens)
    assert main(["convert", str(tmp_path / "x.gguf"), str(tmp_path / "m")]) == 3


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(MissingDependencyError, match="pip install tokenizers"):
        Tokenizer.parse(b"{}", "x")


@pytest.mark.slow
@given(
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.text(alphabet="abc", max_size=5), max_size=8),
)
def test_a_stop_string_ends_the_text_however_it_is_cut(stops: list[str], pieces: list[str]) -> None:
    buffer = StopBuffer(stops)
    given_out = ""
    for i, piece in enumerate(pieces):
        given_out += buffer.push(piece)
        so_far = "".join(pieces[: i + 1])
        held = so_far[len(given_out) :]
        if not buffer.stopped:
            # Only what may begin a stop string is held back.
            assert held == "" or any(stop.startswith(held) for stop in stops)
    text = "".join(pieces)
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    given_out += buffer.flush()
    assert buffer.stopped == bool(found)
    if found:
        assert text.startswith(given_out)
        assert not any(stop in given_out for stop in stops)
    else:
        assert given_out == text
