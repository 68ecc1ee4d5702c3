"""`--dtype keep`: a model directory holds the values of its GGUF file, none of them rounded."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from bench.quality import all_logits
from tests.weights.conftest import TINY
from tests.weights.gguf_files import gguf_name, paired
from tests.weights.gguf_reference import Reference
from tests.weights.gguf_types import rewritten, write_random

from shoal.cli import main
from shoal.engine.convert import convert
from shoal.engine.errors import UnsupportedModelError, Warn
from shoal.engine.model_directory import Model
from shoal.engine.packing import unpack
from shoal.engine.stage import Stage, StageOptions

pytestmark = pytest.mark.slow

TOKENS = [3, 60, 17, 0, 42, 9, 33]
LAYER = [f"blk.0.{name}" for name in ("attn_q", "attn_k", "attn_v", "attn_output")]
LAYER += [f"blk.0.ffn_{name}" for name in ("gate", "up", "down")]
CASES: dict[str, tuple[str, dict[str, str], str]] = {
    **{kind: (kind, {}, "int8") for kind in ("Q8_0", "Q5_0", "IQ4_NL")},
    **{kind: (kind, {}, "int4") for kind in ("Q4_0", "TQ1_0", "TQ2_0")},
    **{kind: (kind, {}, "f32") for kind in ("F32", "F16", "BF16")},
    "Q4_1": ("Q4_1", {}, "int4 with minima"),
    "Q4_0 and Q4_1": ("Q4_0", {"blk.0.ffn_down": "Q4_1"}, "int4 with minima"),
    "Q4_0, head Q8_0": ("Q4_0", {"output": "Q8_0"}, "int4, head int8"),
    "Q4_1, head Q5_0": ("Q4_1", {"output": "Q5_0"}, "int4 with minima, head int8"),
    "Q4_0, embedding Q8_0": ("Q4_0", {"token_embd": "Q8_0"}, "int8"),
    "Q8_0 and Q4_0": ("Q8_0", {"blk.0.ffn_up": "Q4_0", "blk.0.attn_q": "IQ4_NL"}, "int8"),
    "F16, head Q8_0": ("F16", {"output": "Q8_0", "token_embd": "Q6_K"}, "f32"),
}
"""Types of a file's matrices, of some of them, and what holds them all."""


def converted(path: Path, warnings: list[str] | None = None, dtype: str = "keep", **options: bool) -> Model:
    """The model of a GGUF file. The warning that it has no tokenizer is left out of `warnings`."""
    noted = [] if warnings is None else warnings
    warn: Warn = lambda message: None if "tokenizer" in message else noted.append(message)  # noqa: E731
    target = path.with_name(f"{path.stem}-{dtype}-{len(list(path.parent.iterdir()))}")
    convert(path, target, dtype=dtype, warn=warn, **options)
    assert warnings is not None or noted == []
    return Model.open(target)


def of_file(path: Path) -> dict[str, np.ndarray]:
    """The file's tensors by their GGUF names, dequantised by the gguf package; rotated rows in pairs."""
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
        for t in gguf.GGUFReader(path).tensors
    }


def of_model(model: Model) -> dict[str, np.ndarray]:
    """The model's tensors in the same form."""
    values = {}
    for u, unit in enumerate(model.program.units):
        for weight in unit.weights:
            t = model.unit_weights(u)[weight.name]
            w = t.data if t.scales is None else unpack(t.data, t.scales, t.mins, t.rows, t.cols)
            w = w.ravel() if weight.vector else w
            if ".q_proj." in weight.source or ".k_proj." in weight.source:
                queries = ".q_proj." in weight.source
                w = paired(w, model.config.count(f"num_{'attention' if queries else 'key_value'}_heads"))
            values[gguf_name(weight.source)] = w
    return values


def check_equal(model: Model, path: Path, *, but: tuple[str, ...] = ()) -> None:
    """Every value is the file's, but for those of some matrices."""
    ours, theirs = of_model(model), of_file(path)
    assert ours.keys() == theirs.keys()
    different = {name for name, w in ours.items() if not np.array_equal(w, theirs[name])}
    assert different == {f"{name}.weight" for name in but}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_values_are_those_of_the_file(tmp_path: Path, case: str, tied: bool) -> None:
    kind, others, weights = CASES[case]
    if tied and "token_embd" in others:
        weights = "int4, head int8" if kind == "Q4_0" else weights
    elif tied and kind.startswith("Q4"):
        weights = weights.removesuffix(", head int8")
    path = write_random(tmp_path / "x.gguf", kind, others=others, tied=tied)
    model = converted(path)
    assert model.index.weights == weights
    check_equal(model, path)
    assert converted(path).hash == model.hash
    expected = Reference([path]).logits(TOKENS)
    with Stage(model, 0, model.n_units, StageOptions(max_wanted=len(TOKENS))) as stage:
        error = np.abs(all_logits(stage, TOKENS) - expected).max() / expected.std()
    assert error < (1e-4 if weights == "f32" else 0.1)  # int8 rounds activations


def test_quantised_values_are_the_same_bytes(tmp_path: Path) -> None:
    """Integers and scales are equal, and not only their products, which others have too."""
    path = write_random(tmp_path / "x.gguf", "Q8_0")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "output.weight")
    blocks = tensor.data.reshape(64, 8, 34)
    held = converted(path).unit_weights(2)["head.weight"]
    numbers = held.data.reshape(4, 64, 16, 4).transpose(0, 2, 1, 3).reshape(64, 8, 32)
    np.testing.assert_array_equal(numbers, blocks[..., 2:].view(np.int8))
    assert held.scales is not None
    np.testing.assert_array_equal(
        held.scales.transpose(0, 2, 1).reshape(64, 8),
        np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0],
    )


def test_a_file_in_three_parts_gives_the_same_model(tmp_path: Path) -> None:
    path = write_random(tmp_path / "x.gguf", "Q4_0", others={"output": "Q8_0"})
    convert(path, tmp_path / "whole", dtype="keep", origin="x")
    convert(rewritten(path, tmp_path / "y.gguf", parts=3)[1], tmp_path / "parts", dtype="keep", origin="x")
    assert Model.open(tmp_path / "parts").hash == Model.open(tmp_path / "whole").hash


@pytest.mark.parametrize(
    ("kind", "others", "tied", "weights", "rounded"),
    [
        ("Q4_0", {"output": "Q6_K"}, False, "int4, head int8", "output"),
        ("Q4_0", {"token_embd": "Q6_K"}, True, "int4, head int8", "token_embd"),
        ("Q4_0", {"token_embd": "Q6_K"}, False, "int8", "token_embd"),
        ("Q4_1", {"output": "F16"}, False, "int4 with minima, head int8", "output"),
        ("Q8_0", {"output": "F16"}, False, "int8", "output"),
        ("Q8_0", {"token_embd": "Q4_1"}, False, "int8", "token_embd"),
    ],
)
def test_a_head_or_embedding_without_a_form_here_is_rounded_to_int8_and_named(
    tmp_path: Path, kind: str, others: dict[str, str], tied: bool, weights: str, rounded: str
) -> None:
    path = write_random(tmp_path / "x.gguf", kind, others=others, tied=tied)
    warnings: list[str] = []
    model = converted(path, warnings)
    assert model.index.weights == weights
    (warning,) = warnings
    source = "lm_head.weight" if rounded == "output" else "model.embed_tokens.weight"
    assert f"{path}: {source} is {others[rounded]}, which int8 cannot hold" in warning
    check_equal(model, path, but=(rounded,))
    name = f"{rounded}.weight"
    ours, theirs = of_model(model)[name], of_file(path)[name]
    assert np.abs(ours - theirs).max() <= np.abs(theirs).max() / 253


@pytest.mark.parametrize(
    ("kind", "others", "named"),
    [
        ("Q4_K", {}, [r"Q4_K \(model\.layers\.0\.self_attn\.q_proj\.weight\)"]),
        ("Q8_0", {"blk.0.ffn_down": "Q4_1"}, ["Q4_1 .*mlp.down_proj", "Q8_0 .*self_attn.q_proj"]),
        ("Q8_0", {"blk.0.attn_v": "F16"}, ["F16 .*self_attn.v_proj", "Q8_0 "]),
        ("Q4_0", {"blk.0.ffn_down": "Q6_K"}, ["Q6_K .*mlp.down_proj", "Q4_0 "]),
        ("Q4_1", {"token_embd": "Q8_0"}, ["Q8_0 .*embed_tokens", "Q4_1 "]),
    ],
)
def test_layers_without_one_form_here_are_refused_with_what_to_do(
    tmp_path: Path, kind: str, others: dict[str, str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_random(tmp_path / "x.gguf", kind, others=others)
    for match in (*named, "--dtype int8 or int4 rounds them, --dtype f32 keeps their values"):
        with pytest.raises(UnsupportedModelError, match=match):
            convert(path, tmp_path / "out", dtype="keep")
    code = main(["convert", str(path), str(tmp_path / "out"), "--dtype", "keep"])
    assert code == UnsupportedModelError.exit_code
    assert str(path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def with_minus_128(shape: tuple[int, int]) -> np.ndarray:
    """Q8_0 blocks as some quantisers write them, with one -128."""
    w = np.random.default_rng(1).normal(0, 0.05, shape).astype(np.float32)
    data = gguf.quants.quantize(w, gguf.GGMLQuantizationType.Q8_0)
    data[5, 34 + 2 + 7] = 128
    return data


def test_values_that_the_kernels_do_not_multiply_are_rounded_and_named(tmp_path: Path) -> None:
    blocks = {"blk.0.ffn_up": with_minus_128((512, 256))}
    path = write_random(tmp_path / "x.gguf", "Q8_0", blocks=blocks)
    warnings: list[str] = []
    model = converted(path, warnings)
    (warning,) = warnings
    assert "model.layers.0.mlp.up_proj.weight is Q8_0 with values" in warning
    assert "-128" in warning
    check_equal(model, path, but=("blk.0.ffn_up",))
    ours, theirs = (of(x)["blk.0.ffn_up.weight"] for of, x in ((of_model, model), (of_file, path)))
    different = np.argwhere(ours != theirs)
    assert {(row, col // 32) for row, col in different.tolist()} == {(5, 1)}
    assert [size for _, size in model.verify()]  # which refuses -128


def test_a_minimum_beyond_fp16_is_rounded_and_named(tmp_path: Path) -> None:
    """(q - 8) * scale as q * scale + minimum needs eight times the scale."""
    data = np.zeros((256, 8 * 18), np.uint8)
    data.reshape(256, 8, 18)[3, 2, :2] = np.array([9000], "<f2").view(np.uint8)
    data.reshape(256, 8, 18)[:, :, 2:] = 0x88  # zero
    path = write_random(
        tmp_path / "x.gguf", "Q4_0", others={"blk.0.ffn_down": "Q4_1"}, blocks={"blk.0.attn_q": data}
    )
    warnings: list[str] = []
    check_equal(converted(path, warnings), path)  # of zeros any type holds the values
    assert [w for w in warnings if "self_attn.q_proj.weight is Q4_0 with values" in w] == warnings != []


@pytest.mark.parametrize(("kind", "dtype"), [("Q8_0", "int8"), ("Q4_0", "int4")])
def test_what_is_not_equalised_is_copied_without_being_asked(tmp_path: Path, kind: str, dtype: str) -> None:
    """Of these values rounding would make others: no group has a value of the largest magnitude."""
    rng = np.random.default_rng(2)
    shapes = {"token_embd": (64, 256), "output": (64, 256), "blk.0.ffn_up": (512, 256)}
    blocks = {}
    for name, shape in shapes.items():
        type_ = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(rng.normal(0, 0.05, shape).astype(np.float32), type_)
        groups = data.reshape(shape[0], 8, -1)
        groups[..., 2:] = rng.integers(0, 100, groups[..., 2:].shape) if kind == "Q8_0" else 0x77
        blocks[name] = data
    path = write_random(tmp_path / "x.gguf", kind, blocks=blocks)
    kept, plain = converted(path), converted(path, dtype=dtype, equalise=False)
    assert plain.hash == kept.hash
    usual = converted(path, dtype=dtype)
    if kind == "Q4_0":  # equalisation would round 4 bits again, and does more harm than good
        assert usual.hash == kept.hash
    else:
        check_equal(usual, path, but=(*LAYER, "blk.0.attn_norm", "blk.0.ffn_norm"))


def test_floats_of_a_hugging_face_checkpoint_are_kept_as_f32(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "keep", dtype="keep")
    convert(TINY, tmp_path / "f32", dtype="f32")
    keep, f32 = Model.open(tmp_path / "keep"), Model.open(tmp_path / "f32")
    assert (keep.hash, keep.dtype, keep.kv_dtype) == (f32.hash, "f32", "f32")


def test_keep_finds_the_types_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--min"], ["--head-dtype", "int8"]):
        assert main(["convert", str(TINY), str(tmp_path / "out"), "--dtype", "keep", *more]) == 1
        assert "--dtype keep takes the types from the file" in capsys.readouterr().err


def test_pull_names_and_types_what_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_random(tmp_path / "Tiny.Q8_0.gguf", "Q8_0")
    assert main(["pull", str(path), "--dtype", "keep", "--kv-dtype", "int8"]) == 0
    model = Model.open(tmp_path / "cache/shoal/models/tiny.q8_0-keep-kv-int8")
    assert (model.dtype, model.kv_dtype, model.index.numerics_version) == ("int8", "int8", 2)
    check_equal(model, path)
    made = (model.path / "index.json").stat()
    assert main(["pull", str(path), "--dtype", "keep", "--kv-dtype", "int8"]) == 0
    assert (model.path / "index.json").stat() == made  # nothing is left to do
    write_random(path, "Q4_0")
    assert main(["pull", str(path), "--dtype", "keep", "--kv-dtype", "int8"]) == 0
    check_equal(Model.open(model.path), path)
    assert main(["pull", str(path), "--name", model.path.name]) == 1  # taken by other options
