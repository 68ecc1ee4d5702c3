"""Checkpoints in: types, files, families, names, damage; and what equalisation may change."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tests.weights.checkpoints import HEAD, change_config, rewrite, tensors
from tests.weights.conftest import TINY

from shoal.cli import main
from shoal.engine import convert as converting
from shoal.engine import families
from shoal.engine.calibrate import Calibration, pseudo_tokens
from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.config import parse_config
from shoal.engine.convert import convert
from shoal.engine.equalise import equalise
from shoal.engine.errors import ModelFileError, ShoalError, UnsupportedModelError
from shoal.engine.host import Ram
from shoal.engine.model_directory import Model
from shoal.engine.packing import unpack_q4


def weights(model: Path) -> dict[tuple[int, str], np.ndarray]:
    opened = Model.open(model)
    return {(u, n): t.data for u in range(opened.n_units) for n, t in opened.unit_weights(u).items()}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_every_float_type_of_a_checkpoint_is_read(checkpoint_dir: Path, dtype: type) -> None:
    values = {name: w.astype(dtype) for name, w in tensors(TINY).items()}
    if dtype is np.float64:
        values[HEAD] += 2.0**-40  # which f32 cannot hold
    rewrite(checkpoint_dir, values)
    convert(checkpoint_dir, checkpoint_dir / "out", dtype="f32")
    model = Model.open(checkpoint_dir / "out")
    for u, unit in enumerate(model.program.units):
        for weight in unit.weights:
            read = model.unit_weights(u)[weight.name].data
            np.testing.assert_array_equal(read.ravel(), values[weight.source].astype(np.float32).ravel())


def test_a_checkpoint_in_several_files_is_the_same(checkpoint_dir: Path) -> None:
    values = tensors(TINY)
    convert(TINY, checkpoint_dir / "one")
    (checkpoint_dir / "model.safetensors").unlink()
    parts: dict[str, dict[str, np.ndarray]] = {"a.safetensors": {}, "b.safetensors": {}}
    for i, name in enumerate(sorted(values)):
        parts[("a.safetensors", "b.safetensors")[i % 2]][name] = values[name]
    for file, part in parts.items():
        safetensors.numpy.save_file(part, checkpoint_dir / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (checkpoint_dir / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(checkpoint_dir, checkpoint_dir / "several")
    assert Model.open(checkpoint_dir / "several").hash == Model.open(checkpoint_dir / "one").hash


def test_what_ends_an_answer_may_stand_in_the_generation_config(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "generation_config.json").write_text('{"eos_token_id": [3, 7]}')
    convert(checkpoint_dir, checkpoint_dir / "out")
    assert Model.open(checkpoint_dir / "out").config.eos == (2, 3, 7)


def test_licence_and_template_are_taken_along(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Tiny\n")
    (checkpoint_dir / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    convert(checkpoint_dir, checkpoint_dir / "out", origin="hf:a/b@c")
    index = Model.open(checkpoint_dir / "out").index
    assert (index.license, index.source) == ("mit", "hf:a/b@c")
    assert (checkpoint_dir / "out" / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    (checkpoint_dir / "chat_template.jinja").write_text("newer")
    assert open_checkpoint(checkpoint_dir).chat_template == "newer"


@pytest.mark.slow
def test_bad_checkpoints_are_refused_named_and_leave_nothing(
    checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, out = tensors(TINY), checkpoint_dir / "out"
    nan = good[HEAD].copy()
    nan[3, 4] = np.nan
    extra = "model.layers.0.self_attn.q_proj.bias"
    cases: list[tuple[dict[str, np.ndarray], dict[str, object], type[ShoalError], str]] = [
        (
            {k: v for k, v in good.items() if k != HEAD},
            {},
            ModelFileError,
            r"'lm_head\.weight' is missing \(1 in",
        ),
        (
            {**good, extra: good[HEAD][0]},
            {},
            UnsupportedModelError,
            r"q_proj\.bias' is not used by this family",
        ),
        (
            {k: v for k, v in good.items() if k != HEAD},
            {"architectures": ["LlamaForTokenClassification"]},
            ModelFileError,
            "LlamaForTokenClassification, which has no LM head",
        ),
        (
            {k: v for k, v in good.items() if k != HEAD},
            {"architectures": ["LlamaForSequenceClassification"]},
            ModelFileError,
            r"'score\.weight' is missing",
        ),
        (
            good,
            {"quantization_config": {"quant_method": "gptq"}},
            UnsupportedModelError,
            "already .'gptq' by quantization_config",
        ),
        (good, {"tie_word_embeddings": "false"}, ModelFileError, "must be true or false, not 'false'"),
        (
            {k: v for k, v in good.items() if k != HEAD},
            {"tie_word_embeddings": None},
            ModelFileError,
            "does not tie the LM head to the embedding; .* set tie_word_embeddings to true",
        ),
        ({**good, HEAD: good[HEAD].T.copy()}, {}, ModelFileError, r"has the shape \(72, 267\)"),
        (
            {**good, HEAD: good[HEAD].astype(np.float64) * 1e300},
            {},
            UnsupportedModelError,
            "F64 .* beyond the range of f32",
        ),
        ({**good, HEAD: nan}, {}, ModelFileError, r"'lm_head\.weight' holds NaN or infinity"),
        ({**good, HEAD: good[HEAD] * np.float32(1e8)}, {}, UnsupportedModelError, "too large for int8"),
        (
            {**good, HEAD: good[HEAD].astype(np.int32)},
            {},
            UnsupportedModelError,
            "is I32, which is not supported: fetch the model in F32",
        ),
        (
            good,
            {"model_type": "mystery"},
            UnsupportedModelError,
            "'mystery' is not supported; supported are ",
        ),
        (good, {"model_type": None}, ModelFileError, "model_type must name the family"),
        (good, {"num_hidden_layers": 1 << 60}, ModelFileError, "num_hidden_layers must be an integer from 1"),
        (good, {"num_hidden_layers": 1 << 20}, UnsupportedModelError, "is 1048576; up to 1024"),
        (good, {"head_dim": 528}, UnsupportedModelError, "a multiple of 16 up to 512"),
        (good, {"rms_norm_eps": 10**400}, ModelFileError, "rms_norm_eps must be a positive number"),
        (good, {"rope_parameters": {"rope_theta": None}}, ModelFileError, "rope_theta must be a positive"),
        (good, {"rope_parameters": {"rope_theta": -5.0}}, ModelFileError, "rope_theta must be a positive"),
        (
            good,
            {"rope_parameters": {"rope_theta": 0.5}},
            UnsupportedModelError,
            "angles above 1 per position",
        ),
        (
            good,
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 0.5}},
            UnsupportedModelError,
            "angles above 1 per position",
        ),
        (
            good,
            {"attention_bias": True},
            ModelFileError,
            r"self_attn\.k_proj\.bias' is missing \(12 in all\)",
        ),
    ]
    for values, changes, kind, message in cases:
        rewrite(checkpoint_dir, values)
        (checkpoint_dir / "config.json").write_bytes((TINY / "config.json").read_bytes())
        change_config(checkpoint_dir, **changes)
        with pytest.raises(kind, match=message) as error:
            convert(checkpoint_dir, out)
        assert str(checkpoint_dir) in str(error.value)
        assert main(["convert", str(checkpoint_dir), str(out)]) == kind.exit_code
        assert str(error.value) in capsys.readouterr().err
        assert not out.exists() and not list(checkpoint_dir.glob(".out*"))


def test_text_files_that_cannot_be_read_are_named(checkpoint_dir: Path) -> None:
    template = checkpoint_dir / "chat_template.jinja"
    template.write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja is not UTF-8"):
        convert(checkpoint_dir, checkpoint_dir / "out")
    template.unlink()
    (checkpoint_dir / "tokenizer.json").unlink(missing_ok=True)
    (checkpoint_dir / "tokenizer.json").mkdir()
    with pytest.raises(ModelFileError, match=r"tokenizer\.json cannot be read"):
        convert(checkpoint_dir, checkpoint_dir / "out")


def test_damaged_files_of_a_checkpoint_are_named(checkpoint_dir: Path) -> None:
    weights = checkpoint_dir / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-5])
    with pytest.raises(ModelFileError, match=r"model\.safetensors is truncated"):
        convert(checkpoint_dir, checkpoint_dir / "out")
    weights.unlink()
    with pytest.raises(
        ModelFileError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        convert(checkpoint_dir, checkpoint_dir / "out")
    (checkpoint_dir / "config.json").write_text("[" * 100_000)
    with pytest.raises(ModelFileError, match=r"config\.json cannot be read as JSON"):
        convert(checkpoint_dir, checkpoint_dir / "out")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"has no config\.json and 0 \.gguf files"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(ModelFileError, match="nowhere is missing"):
        convert(tmp_path / "nowhere", tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ShoalError, match="out already exists"):
        convert(TINY, tmp_path / "out")


def test_a_disk_that_is_full_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert main(["convert", str(TINY), str(tmp_path / "out")]) == 16
    assert f"{tmp_path / 'out'} could not be written: No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_would_be_killed_for_want_of_memory_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [w.size for w in tensors(TINY).values()]
    needed = converting._BESIDE_BYTES + 4 * sum(numbers) + max(numbers)  # of one unit, and more
    for found in (Ram(None, None), Ram(1 << 40, None), Ram(1 << 40, needed)):
        monkeypatch.setattr(converting, "ram", lambda found=found: found)
        convert(TINY, tmp_path / str(found.available) / str(found.total))
    small = Ram(100_000_000, converting._BESIDE_BYTES, "that this container may use")
    monkeypatch.setattr(converting, "ram", lambda: small)
    with pytest.raises(
        ShoalError,
        match=r"needs 40 MB .* 40 MB are available of the 100 MB that this container may use: convert",
    ):
        convert(TINY, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_converting_twice_gives_the_same_model(tmp_path: Path) -> None:
    hashes = []
    for i in range(2):
        convert(TINY, tmp_path / str(i), origin="x")
        hashes.append(Model.open(tmp_path / str(i)).hash)
    assert hashes[0] == hashes[1]


def test_progress_ends_with_the_last_unit(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(TINY, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(u, 5) for u in range(1, 6)]


def test_equalised_weights_compute_the_same_in_floats() -> None:
    """The same activations leave every layer, although every matrix has changed."""
    checkpoint = open_checkpoint(TINY)
    program = families.build(parse_config(checkpoint.config, "x"))
    before, after = Calibration(program, pseudo_tokens(267)), Calibration(program, pseudo_tokens(267))
    for u, unit in enumerate(program.units[:-1]):
        plain = {w.name: checkpoint.tensor(w.source) for w in unit.weights}
        changed = dict(plain)
        equalise(unit, changed, before.run(u, plain))
        sizes = after.run(u, changed)
        moved = {name for name in plain if not np.array_equal(plain[name], changed[name])}
        assert moved == (set() if u == 0 else set(plain))
        a, b = before.hidden, after.hidden
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
        for name, size in sizes.items():
            assert np.isfinite(size).all(), name


def test_equalisation_is_an_option(tmp_path: Path) -> None:
    assert main(["convert", str(TINY), str(tmp_path / "with")]) == 0
    assert main(["convert", str(TINY), str(tmp_path / "without"), "--no-equalise"]) == 0
    equalised, plain = weights(tmp_path / "with"), weights(tmp_path / "without")
    norm = open_checkpoint(TINY).tensor("model.layers.0.input_layernorm.weight")
    np.testing.assert_array_equal(plain[1, "attn_norm.weight"].ravel(), norm)
    assert not np.array_equal(equalised[1, "attn_norm.weight"].ravel(), norm)


@pytest.mark.slow
def test_types_of_int4_models_are_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dtype", "int4", "--head-dtype", "int8", "--min"]
    assert main(["convert", str(TINY), str(tmp_path / "out"), *flags]) == 0
    model = Model.open(tmp_path / "out")
    types = [{t.type for n, t in model.unit_weights(u).items() if "norm" not in n} for u in range(5)]
    assert types == [{"q4_min"}, {"q4_min"}, {"q4_min"}, {"q4_min"}, {"q8"}]
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "int4 with minima, head int8 weights" in capsys.readouterr().out
    for wrong in (["--min"], ["--head-dtype", "int4"], ["--dtype", "f32", "--head-dtype", "int8"]):
        assert main(["convert", str(TINY), str(tmp_path / "wrong"), *wrong]) == 1
        assert "--min need --dtype int4" in capsys.readouterr().err
        assert not (tmp_path / "wrong").exists()


@pytest.mark.slow
def test_an_int4_table_that_is_tied_is_written_with_the_sizes_of_the_head(checkpoint_dir: Path) -> None:
    """Columns that the head's input makes large are rounded more finely than in a table alone."""
    values = tensors(TINY)
    del values[HEAD]
    norm = values["model.norm.weight"].copy()
    norm[:8] *= 50
    rewrite(checkpoint_dir, {**values, "model.norm.weight": norm})
    change_config(checkpoint_dir, tie_word_embeddings=True)
    convert(checkpoint_dir, checkpoint_dir / "tied", dtype="int4")
    convert(TINY, checkpoint_dir / "untied", dtype="int4")
    table = values["model.embed_tokens.weight"]
    errors = []
    for name in ("tied", "untied"):
        (tensor,) = Model.open(checkpoint_dir / name).unit_weights(0).values()
        assert tensor.scales is not None
        errors.append((unpack_q4(tensor.data, tensor.scales, None, *table.shape) - table) ** 2)
    assert errors[0][:, :8].mean() < 0.85 * errors[1][:, :8].mean()
    assert errors[0][:, 8:].mean() > errors[1][:, 8:].mean()


@pytest.mark.slow
def test_matrices_on_even_steps_keep_them_where_there_are_minima(checkpoint_dir: Path) -> None:
    """Equalisation would take them off the steps, which int4 with minima holds as they are."""
    rng = np.random.default_rng(3)
    values = tensors(TINY)
    for name, w in values.items():
        if w.ndim == 2:
            q = rng.integers(0, 16, w.shape)
            q[:, ::32], q[:, 1::32] = 0, 15
            values[name] = ((q - 8) / 128).astype(np.float32)
    rewrite(checkpoint_dir, values)
    convert(checkpoint_dir, checkpoint_dir / "kept", dtype="int4", has_min=True)
    convert(checkpoint_dir, checkpoint_dir / "equalised", dtype="int4")
    kept, equalised = Model.open(checkpoint_dir / "kept"), Model.open(checkpoint_dir / "equalised")
    for u, unit in enumerate(kept.program.units):
        for weight in unit.weights:
            t = kept.unit_weights(u)[weight.name]
            value = t.data.ravel()
            if t.scales is not None:
                value = unpack_q4(t.data, t.scales, t.mins, t.rows, t.cols)
            np.testing.assert_array_equal(value, values[weight.source])
    norm = equalised.unit_weights(1)["attn_norm.weight"].data
    assert not np.array_equal(norm.ravel(), values["model.layers.0.input_layernorm.weight"])
