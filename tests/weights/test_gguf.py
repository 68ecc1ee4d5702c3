"""GGUF in: equal to the same checkpoint in safetensors, for every type; and hostile headers refused."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.weights.conftest import TINY
from tests.weights.gguf_files import header, pair, tensor, text, write_tiny

from shoal.cli import main
from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.checkpoint.gguf_checkpoint import GgufCheckpoint
from shoal.engine.checkpoint.gguf_file import GgufFile
from shoal.engine.config import parse_config
from shoal.engine.convert import convert
from shoal.engine.decoder import Decoder
from shoal.engine.errors import ModelFileError, ShoalError, UnsupportedModelError
from shoal.engine.model_directory import Model

F32 = int(gguf.GGMLQuantizationType.F32)
HUGE = (1 << 64) - 1
QUANTISED = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"]


def test_the_same_checkpoint_gives_the_same_weights(tmp_path: Path) -> None:
    from_gguf = open_checkpoint(write_tiny(tmp_path / "tiny.gguf"))
    original = open_checkpoint(TINY)
    assert set(from_gguf.names) == set(original.names)
    for name in original.names:
        np.testing.assert_array_equal(from_gguf.tensor(name), original.tensor(name))
    config, expected = (parse_config(c.config, "x") for c in (from_gguf, original))
    assert (
        replace(config, eos=expected.eos, values=expected.values) == expected
    )  # the GGUF names one end token
    shape, wanted = Decoder.of(config), Decoder.of(expected)
    assert replace(shape, norm_epsilon=wanted.norm_epsilon) == wanted
    assert shape.norm_epsilon == pytest.approx(wanted.norm_epsilon, rel=1e-7)  # which GGUF stores as f32
    assert from_gguf.license == "mit"


def test_a_gguf_converts_in_a_directory_too_and_may_be_tied(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", tied=True)
    convert(tmp_path, tmp_path / "model", dtype="f32")
    model = Model.open(tmp_path / "model")
    head, embed = model.unit_weights(4), model.unit_weights(0)
    np.testing.assert_array_equal(head["embed.weight"].data, embed["embed.weight"].data)
    assert model.files_of(4, 5)[-2:] == ("unit-004.safetensors", "unit-000.safetensors")
    assert Decoder.of(model.config).tied


@pytest.mark.parametrize("kind", QUANTISED)
def test_every_type_equals_the_packages_own_dequantisation(tmp_path: Path, kind: str) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    w = np.random.default_rng(1).normal(size=(6, 512)).astype(np.float32)
    data = gguf.quants.quantize(w, type_)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "any")
    writer.add_tensor("w", data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = GgufFile(tmp_path / "x.gguf").tensor("w")
    assert read.shape == w.shape
    np.testing.assert_array_equal(read, gguf.quants.dequantize(data, type_).reshape(w.shape))


def q4_k(block: bytes) -> np.ndarray:
    """The 256 numbers of a Q4_K block, one by one, as ggml-quants.c defines them."""
    d, dmin = (float(x) for x in np.frombuffer(block[:4], np.float16))
    packed, nibbles = block[4:16], block[16:]
    values: list[float] = []
    for j in range(8):
        if j < 4:
            scale, least = packed[j] & 63, packed[j + 4] & 63
        else:
            scale = packed[j + 4] & 15 | packed[j - 4] >> 6 << 4
            least = packed[j + 4] >> 4 | packed[j] >> 6 << 4
        part = nibbles[j // 2 * 32 :][:32]
        values += [d * scale * (byte >> 4 if j % 2 else byte & 15) - dmin * least for byte in part]
    return np.array(values, np.float32)


def test_k_quants_are_read(tmp_path: Path) -> None:
    """The package reads them and writes none, so the blocks here are random."""
    random = np.random.default_rng(4)
    blocks = [np.float16([0.01, 0.02]).tobytes() + random.bytes(140) for _ in range(6)]
    described = tensor("w", [512, 3], gguf.GGMLQuantizationType.Q4_K, 0)
    (tmp_path / "k.gguf").write_bytes(header(tensors=[described], data=b"".join(blocks)))
    expected = np.concatenate([q4_k(block) for block in blocks]).reshape(3, 512)
    np.testing.assert_allclose(GgufFile(tmp_path / "k.gguf").tensor("w"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["Q8_K", "Q8_1"])
def test_a_type_that_cannot_be_dequantised_is_named(tmp_path: Path, kind: str) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    (tmp_path / "x.gguf").write_bytes(
        header(tensors=[tensor("blk.0.ffn_up.weight", [block], type_, 0)], data=bytes(size))
    )
    file = GgufFile(tmp_path / "x.gguf")
    with pytest.raises(UnsupportedModelError, match=f"ffn_up.weight' is {kind}, .* fetch the model as F16"):
        file.tensor("blk.0.ffn_up.weight")


def test_a_template_gets_the_end_token_that_the_metadata_name(tmp_path: Path) -> None:
    tokens = {"tokens": ["<|endoftext|>", "a", "<|im_end|>"], "token_type": [3, 1, 3]}
    for template, ids in (("{{ messages }}", [0, 2]), ("{{ messages }}{{ eos_token }}", [2, 0])):
        checkpoint = GgufCheckpoint(write_tiny(tmp_path / "x.gguf", tokenizer=tokens))
        checkpoint._file.values["tokenizer.chat_template"] = template
        assert checkpoint.config["eos_token_id"] == ids


def test_rope_scaling(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.gguf", rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert open_checkpoint(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    for path in (
        write_tiny(tmp_path / "no-type.gguf", rope__scaling__factor=4.0),
        write_tiny(tmp_path / "old-key.gguf", rope__scale_linear=4.0),
    ):
        assert open_checkpoint(path).config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    path = write_tiny(tmp_path / "none.gguf", rope__scaling__type="none", rope__scaling__factor=4.0)
    assert open_checkpoint(path).config["rope_scaling"] is None
    path = write_tiny(tmp_path / "b.gguf", rope__scaling__type="yarn")
    with pytest.raises(UnsupportedModelError, match="rope scaling 'yarn' is not supported"):
        _ = open_checkpoint(path).config
    path = write_tiny(tmp_path / "twice.gguf", rope__scaling__factor=4.0, rope_freqs=[1.0] * 8)
    with pytest.raises(UnsupportedModelError, match=r"by rope_freqs and by rope\.scaling\.factor 4\.0"):
        _ = open_checkpoint(path).config
    path = write_tiny(tmp_path / "c.gguf", rope__dimension_count=8)
    with pytest.raises(UnsupportedModelError, match="rotates 8 of 16 columns"):
        _ = open_checkpoint(path).config


@pytest.mark.parametrize(
    ("metadata", "kind", "message"),
    [
        (
            {"architecture": "mystery"},
            UnsupportedModelError,
            "'mystery' is not supported; supported are ",
        ),
        ({"block_count": None}, ModelFileError, "block_count must be a positive integer, not None"),
        ({"embedding_length": "72"}, ModelFileError, "embedding_length must be a positive integer, not '72'"),
        ({"attention__head_count": 0}, ModelFileError, "head_count must be a positive integer, not 0"),
        ({"block_count": 4}, ModelFileError, r"'model\.layers\.3\..*' is missing \(9 in all\)"),
        ({"block_count": 2}, UnsupportedModelError, r"'model\.layers\.2\..*' is not used by this family"),
        (
            {"embedding_length": 64},
            ModelFileError,
            r"has the shape \(267, 72\), and \(267, 64\) by the configuration",
        ),
        (
            {"feed_forward_length": 4_000_000_000},
            ModelFileError,
            "intermediate_size must be an integer from 1",
        ),
        (
            {"drop": ["model.embed_tokens.weight"]},
            ModelFileError,
            r"embedding \(token_embd.weight\) is missing",
        ),
    ],
)
def test_metadata_that_lie_are_refused(
    tmp_path: Path, metadata: dict[str, object], kind: type[ShoalError], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = write_tiny(tmp_path / "bad.gguf", **metadata)  # type: ignore[arg-type]
    with pytest.raises(kind, match=message) as error:
        convert(path, tmp_path / "model")
    assert str(path) in str(error.value)
    assert not list(tmp_path.glob("model*")) + list(tmp_path.glob(".model*"))
    assert main(["convert", str(path), str(tmp_path / "model")]) == kind.exit_code
    assert str(error.value) in capsys.readouterr().err


def test_counts_may_be_listed_by_layer_where_they_are_equal(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "a.gguf", attention__head_count_kv=[2, 2, 2], feed_forward_length=[104] * 3)
    assert Decoder.of(parse_config(open_checkpoint(path).config, "x")).kv_heads == 2
    path = write_tiny(tmp_path / "b.gguf", attention__head_count_kv=[2, 1, 2])
    with pytest.raises(UnsupportedModelError, match="head_count_kv differs among layers"):
        _ = open_checkpoint(path).config


@pytest.mark.parametrize("name", ["x.gguf-split-a", "x.gguf.part1of2", "x.gguf.part-00"])
def test_a_piece_of_a_file_that_was_cut_is_named(tmp_path: Path, name: str) -> None:
    write_tiny(tmp_path / "x.gguf")
    (tmp_path / name).write_bytes((tmp_path / "x.gguf").read_bytes()[:-4000])
    with pytest.raises(ModelFileError, match="a piece of a file; join the pieces with `cat`, in order"):
        open_checkpoint(tmp_path / name)


ONE = tensor("a", [4], F32, 0)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "no magic": (header(magic=b"GGML"), "is not a GGUF file"),
    "short": (b"GGUF", "too short"),
    "many tensors": (header(tensor_count=HUGE), "claims 18446744073709551615 tensors"),
    "many pairs": (header(pair_count=1 << 40), "claims 1099511627776 key-value pairs"),
    "more pairs than there are": (
        header([pair("a", 4, b"1234")], pair_count=3, data=bytes(64)),
        "duplicate key",
    ),
    "long key": (header([struct.pack("<Q", HUGE) + bytes(40)]), "needs 18446744073709551615 bytes"),
    "long string": (header([pair("a", 8, struct.pack("<Q", 1 << 50))]), "needs 1125899906842624 bytes"),
    "key no utf-8": (header([struct.pack("<Q", 1) + b"\xff" + bytes(16)]), "not UTF-8"),
    "unknown value type": (header([pair("a", 13, bytes(8))]), "the unknown type 13"),
    "unknown array type": (
        header([pair("a", 9, struct.pack("<IQ", 77, 1))]),
        "array 'a' of the unknown type 77",
    ),
    "array of arrays": (header([pair("a", 9, struct.pack("<IQ", 9, 1))]), "array 'a' of the unknown type 9"),
    "long array": (header([pair("a", 9, struct.pack("<IQ", 10, 1 << 61))]), "claims 230584300921369"),
    "long array of strings": (header([pair("a", 9, struct.pack("<IQ", 8, 1 << 61))]), "strings in 'a'"),
    "key twice": (header([pair("a", 4, b"1234")] * 2), "duplicate key 'a'"),
    "alignment 0": (header([pair("general.alignment", 4, struct.pack("<I", 0))]), "alignment 0"),
    "alignment 3": (header([pair("general.alignment", 4, struct.pack("<I", 3))]), "alignment 3"),
    "alignment a string": (header([pair("general.alignment", 8, text("32"))]), "alignment '32'"),
    "tensor twice": (
        header(tensors=[ONE, tensor("a", [4], F32, 32)], data=bytes(64)),
        "duplicate tensor 'a'",
    ),
    "no dimensions": (header(tensors=[tensor("a", [], F32, 0)], data=bytes(64)), "0 dimensions"),
    "many dimensions": (header(tensors=[tensor("a", [1] * 9, F32, 0)], data=bytes(64)), "9 dimensions"),
    "dimension 0": (header(tensors=[tensor("a", [0], F32, 0)]), "impossible shape"),
    "huge dimension": (header(tensors=[tensor("a", [HUGE], F32, 0)]), "impossible shape"),
    "huge product": (header(tensors=[tensor("a", [1 << 30] * 4, F32, 0)]), "impossible shape"),
    "truncated data": (header(tensors=[ONE], data=bytes(15)), "'a' ends at"),
    "offset beyond": (header(tensors=[tensor("a", [4], F32, 1 << 40)], data=bytes(64)), "'a' ends at"),
    "offset out of line": (header(tensors=[tensor("a", [4], F32, 8)], data=bytes(64)), "misaligned"),
    "overlap": (
        header(tensors=[tensor("a", [16], F32, 0), tensor("b", [4], F32, 32)], data=bytes(64)),
        "inside",
    ),
    "half a block": (header(tensors=[tensor("a", [33], 8, 0)], data=bytes(99)), "not a multiple of 32"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_and_named(tmp_path: Path, case: str) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelFileError, match=message) as error:
        GgufFile(path)
    assert str(path) in str(error.value)
    assert main(["convert", str(path), str(tmp_path / "model")]) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(version=1), "GGUF version 1"),
        (
            b"GGUF" + struct.pack(">IQQ", 3, 1, 1),
            "is big-endian: convert it with `gguf-convert-endian .* little`",
        ),
        (b"GGUF" + struct.pack(">IQQ", 2, 1, 1), "is big-endian"),
        (header(magic=b"tjgg"), "is a GGML file, older than GGUF"),
        (header(tensors=[tensor("a", [32], 31, 0)], data=bytes(64)), "'a' is Q4_0_4_4, .* the model as Q4_0"),
        (header(tensors=[tensor("a", [32], 38, 0)], data=bytes(64)), "IQ4_NL_8_8, .* the model as IQ4_NL"),
        (header(tensors=[tensor("a", [32], 9999, 0)], data=bytes(64)), "type 9999, which this gguf package"),
    ],
)
def test_what_is_sound_but_unknown_is_said_to_be(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "new.gguf"
    path.write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=message) as error:
        GgufFile(path)
    assert str(path) in str(error.value)
    assert "fetch it again" not in str(error.value)


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny(tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


@pytest.mark.slow
@given(st.integers(0, 3000), st.sampled_from([b"\xff", b"\x00", b"\x7f" * 8, b"\xff" * 8]))
def test_any_damage_to_the_header_is_harmless_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tiny_gguf: bytes, at: int, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "x.gguf"
    path.write_bytes(tiny_gguf[:at] + junk + tiny_gguf[at + len(junk) :])
    message = ""
    try:
        checkpoint = open_checkpoint(path)
        _ = checkpoint.config
        checkpoint.tokenizer_json()
    except ShoalError as e:
        message = str(e)
    assert not message or str(path) in message


@given(st.integers(0, 1 << 20))
def test_any_truncation_is_refused(
    tmp_path_factory: pytest.TempPathFactory, tiny_gguf: bytes, size: int
) -> None:
    path = tmp_path_factory.mktemp("truncated") / "x.gguf"
    path.write_bytes(tiny_gguf[: size % (len(tiny_gguf) - 4)])
    with pytest.raises(ModelFileError):
        open_checkpoint(path)
