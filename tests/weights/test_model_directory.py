"""A model directory: what is opened, what is refused, and when a file is hashed again."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.weights.conftest import TINY

from shoal.cli import main
from shoal.engine import hash_cache
from shoal.engine.convert import convert
from shoal.engine.errors import ModelFileError, UnsupportedModelError
from shoal.engine.index import FileEntry, read_index
from shoal.engine.model_directory import Model
from shoal.engine.packing import unpack
from shoal.engine.safetensors_file import TensorInfo, open_file, write

UNIT = "unit-001.safetensors"


def register(directory: Path, name: str) -> None:
    """Makes the index agree with a file that a test has changed, as a malicious maker would."""
    values = json.loads((directory / "index.json").read_text())
    path = directory / name
    values["files"][name] = {"size": path.stat().st_size, "sha256": hash_cache.file_sha256(path)}
    (directory / "index.json").write_text(json.dumps(values))


def test_weights_are_those_of_the_checkpoint(converted: Path) -> None:
    model = Model.open(converted)
    source = open_file(Path(__file__).parent.parent / "fixtures" / "tiny-llama" / "model.safetensors")
    for u in (0, 4):
        for name, tensor in model.unit_weights(u).items():
            weight = model.program.units[u].weight(name)
            expected = (source.tensor(weight.source).astype(np.uint32) << 16).view(np.float32)
            assert (tensor.rows, tensor.cols) == (weight.rows, weight.cols)
            if tensor.type == "f32":
                np.testing.assert_array_equal(tensor.data, expected.reshape(weight.rows, weight.cols))
            else:
                assert tensor.scales is not None
                back = unpack(tensor.data, tensor.scales, tensor.mins, tensor.rows, tensor.cols)
                steps = {"q8": 127, "q4": 8}[tensor.type]
                assert np.abs(back - expected).max() <= np.abs(expected).max() / steps
            assert not tensor.data.flags.writeable
            assert tensor.data.ctypes.data % 64 == 0
    (frequencies,) = model.constants().values()
    assert frequencies.dtype == np.float64
    np.testing.assert_allclose(frequencies, 10000.0 ** (-np.arange(8) / 8), rtol=1e-12)


def test_only_the_files_of_the_units_asked_for_are_needed(model_dir: Path) -> None:
    files = Model.open(model_dir).files_of(2, 4)
    assert files == ("config.json", "common.safetensors", "unit-002.safetensors", "unit-003.safetensors")
    for path in model_dir.iterdir():
        if path.name not in (*files, "index.json"):
            path.unlink()
    model = Model.open(model_dir)
    for u in (2, 3):
        assert model.unit_weights(u)
        assert model.unit_bytes(u) == (model_dir / f"unit-00{u}.safetensors").stat().st_size
    assert model.constants()
    with pytest.raises(ModelFileError, match=r"unit-001\.safetensors is missing .* pull or convert"):
        model.unit_weights(1)


def damage_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_grown(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def damage_altered(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))


def damage_missing(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncated, "is truncated"),
        (damage_grown, "has grown"),
        (damage_altered, "was altered"),
        (damage_missing, "is missing"),
    ],
)
@pytest.mark.parametrize("name", [UNIT, "common.safetensors", "config.json"])
def test_a_damaged_file_is_refused_and_named(
    model_dir: Path, name: str, damage: object, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(damage)
    damage(model_dir / name)

    def load() -> None:
        model = Model.open(model_dir)
        model.unit_weights(1)
        model.constants()

    for action in (load, load, lambda: list(Model.open(model_dir).verify())):
        with pytest.raises(ModelFileError, match=f"{name} {message}"):
            action()
    assert main(["verify", str(model_dir)]) == 3
    assert f"{model_dir / name} {message}" in capsys.readouterr().err


def test_an_alteration_behind_the_stamps_back_is_found_by_verify(model_dir: Path) -> None:
    path = model_dir / UNIT
    Model.open(model_dir).unit_weights(1)
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    Model.open(model_dir).unit_weights(1)
    with pytest.raises(ModelFileError, match="was altered"):
        list(Model.open(model_dir).verify())


def test_an_unchanged_file_is_hashed_once(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    sha256 = hash_cache.file_sha256

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(hash_cache, "file_sha256", counted)
    # The copy has other inodes than the directory that was stamped.
    Model.open(model_dir).unit_weights(1)
    assert sorted(hashed) == ["config.json", UNIT]
    Model.open(model_dir).unit_weights(1)
    assert sorted(hashed) == ["config.json", UNIT]
    (model_dir / UNIT).touch()
    Model.open(model_dir).unit_weights(1)
    assert sorted(hashed) == ["config.json", UNIT, UNIT]


def test_stamps_that_cannot_be_kept_or_read_only_cost_time(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for content in ("", "[]", '{"unit-001.safetensors": 5}', "\x00"):
        (model_dir / "stamps.json").write_text(content)
        assert Model.open(model_dir).unit_weights(1)
    (model_dir / "stamps.json").unlink()

    def full(path: Path, *args: object, **kwargs: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert Model.open(model_dir).unit_weights(1)
    assert not list(model_dir.glob("stamps.json*"))


def test_a_file_with_the_right_hash_must_still_fit_the_program(model_dir: Path) -> None:
    good = open_file(model_dir / UNIT)
    arrays = {name: np.array(good.tensor(name)) for name in good.tensors}
    infos = {name: TensorInfo(name, t.dtype, t.shape) for name, t in good.tensors.items() if name[0] != "_"}
    norm = infos["attn_norm.weight"]
    cases: list[tuple[dict[str, TensorInfo], str]] = [
        ({k: v for k, v in infos.items() if k != "o.weight"}, "'o.weight' is missing"),
        ({**infos, "extra": TensorInfo("extra", "F32", norm.shape)}, "'extra' does not belong there"),
        (
            {**infos, norm.name: TensorInfo(norm.name, "F32", (8, 9))},
            r"F32 \[8, 9\], but the model needs F32 \[72\]",
        ),
        ({**infos, norm.name: TensorInfo(norm.name, "I32", (72,))}, r"I32 \[72\], but the model needs F32"),
    ]
    for changed, message in cases:
        values = [arrays.get(n, arrays[norm.name]).view() for n in changed]
        values = [
            v.view(np.int32) if i.dtype == "I32" else v.reshape(i.shape)
            for v, i in zip(values, changed.values(), strict=True)
        ]
        write(model_dir / UNIT, list(changed.values()), values)
        register(model_dir, UNIT)
        with pytest.raises(ModelFileError, match=message) as error:
            Model.open(model_dir).unit_weights(1)
        assert str(model_dir / UNIT) in str(error.value)


def test_a_number_without_a_positive_twin_is_refused_each_time(tmp_path: Path) -> None:
    model_dir = tmp_path / "model"
    convert(TINY, model_dir)
    good = open_file(model_dir / UNIT)
    infos = {name: TensorInfo(name, t.dtype, t.shape) for name, t in good.tensors.items() if name[0] != "_"}
    arrays = {name: np.array(good.tensor(name)) for name in infos}
    name = next(name for name, info in infos.items() if info.dtype == "I8")
    arrays[name].flat[5] = -128
    write(model_dir / UNIT, list(infos.values()), list(arrays.values()))
    register(model_dir, UNIT)
    for _ in range(2):
        with pytest.raises(ModelFileError, match=f"tensor '{name}' holds -128"):
            Model.open(model_dir).unit_weights(1)
    with pytest.raises(ModelFileError, match="holds -128"):
        list(Model.open(model_dir).verify())


def test_index_and_configuration_must_agree(model_dir: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    for change, kind, message in (
        ({"num_hidden_layers": 4}, ModelFileError, "does not list the 6 units"),
        ({"model_type": "mystery"}, UnsupportedModelError, "'mystery' is not supported; supported are "),
        ({"hidden_size": 0}, ModelFileError, "hidden_size must be an integer from 1"),
        ({"num_attention_heads": 5}, ModelFileError, "cannot share"),
    ):
        (model_dir / "config.json").write_text(json.dumps({**config, **change}))
        register(model_dir, "config.json")
        with pytest.raises(kind, match=message):
            Model.open(model_dir)


def test_the_index_of_another_family_is_refused(model_dir: Path) -> None:
    values = json.loads((model_dir / "index.json").read_text())
    (model_dir / "index.json").write_text(json.dumps({**values, "family": "mystery"}))
    with pytest.raises(ModelFileError, match=r"has the family 'mystery', but config\.json 'llama'"):
        Model.open(model_dir)


def test_the_model_hash_is_that_of_the_index(model_dir: Path) -> None:
    first = Model.open(model_dir).hash
    assert first == hash_cache.file_sha256(model_dir / "index.json")
    path = model_dir / "index.json"
    path.write_bytes(path.read_bytes() + b"\n")
    assert Model.open(model_dir).hash != first


def test_no_model_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelFileError, match=r"index\.json is missing: .* is not a model directory"):
        Model.open(tmp_path)
    shutil.rmtree(tmp_path)
    assert main(["verify", str(tmp_path)]) == 3
    assert "there is no model" in capsys.readouterr().err


def test_entries_of_the_index_are_the_files(converted: Path) -> None:
    index, _ = read_index(converted / "index.json")
    for name, entry in index.files.items():
        path = converted / name
        assert entry == FileEntry(path.stat().st_size, hash_cache.file_sha256(path))
    assert set(index.files) | {"index.json", "stamps.json"} == {path.name for path in converted.iterdir()}
