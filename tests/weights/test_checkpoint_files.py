"""Which files make a checkpoint: what an index names, what a directory holds, what only looks like one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tests.weights.checkpoints import HEAD, rewrite, tensors
from tests.weights.conftest import TINY
from tests.weights.gguf_files import write_tiny

from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.checkpoint.gguf_checkpoint import GgufCheckpoint
from shoal.engine.checkpoint.hugging_face import HuggingFaceCheckpoint
from shoal.engine.errors import ModelFileError, UnsupportedModelError


def sharded(directory: Path, parts: dict[str, list[str]], listed: dict[str, object]) -> None:
    """Replaces a checkpoint's file by several, whose index says `listed`."""
    values = tensors(directory)
    (directory / "model.safetensors").unlink()
    for file, names in parts.items():
        (directory / file).parent.mkdir(exist_ok=True)
        safetensors.numpy.save_file({name: values[name] for name in names}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def test_shards_may_be_in_folders_and_have_any_name(checkpoint_dir: Path) -> None:
    names = sorted(tensors(TINY))
    parts = {"weights/x.safetensors": names[:5], "Odd name [2].safetensors": names[5:]}
    sharded(checkpoint_dir, parts, {name: file for file, held in parts.items() for name in held})
    opened = open_checkpoint(checkpoint_dir)
    for name, values in tensors(TINY).items():
        np.testing.assert_array_equal(opened.tensor(name), values)


@pytest.mark.parametrize(
    "bad",
    [
        *("../a.safetensors", "/a.safetensors", "a/../b.safetensors", "./a.safetensors", "a//b.safetensors"),
        *("..\\a.safetensors", "a\0.safetensors", "\ud800.safetensors", "a.safetensors/", "a.bin", ""),
        *(250 * "a" + ".safetensors", 300 * "a/" + ".safetensors", None, 5, ["a.safetensors"]),
    ],
)
def test_a_name_in_an_index_that_leads_elsewhere_is_refused(checkpoint_dir: Path, bad: object) -> None:
    names = sorted(tensors(TINY))
    sharded(checkpoint_dir, {"a.safetensors": names}, dict.fromkeys(names, "a.safetensors") | {HEAD: bad})
    with pytest.raises(
        ModelFileError, match=r"'lm_head\.weight' in .*, which is not the name of a \.safetensors"
    ):
        open_checkpoint(checkpoint_dir)


def test_an_index_and_its_files_may_disagree(checkpoint_dir: Path) -> None:
    names = sorted(tensors(TINY))
    everything = dict.fromkeys(names, "a.safetensors")
    sharded(checkpoint_dir, {"a.safetensors": names}, everything | {"x.weight": "a.safetensors"})
    with pytest.raises(ModelFileError, match=r"'x\.weight' in 'a\.safetensors', which does not have it \(1 "):
        open_checkpoint(checkpoint_dir)
    index = checkpoint_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: v for k, v in everything.items() if k != HEAD}}))
    warnings: list[str] = []
    assert HEAD in open_checkpoint(checkpoint_dir, warnings.append).names
    assert len(warnings) == 1
    assert "does not list 'lm_head.weight', which a.safetensors has (1 " in warnings[0]
    safetensors.numpy.save_file({HEAD: np.ones((2, 2))}, checkpoint_dir / "b.safetensors")
    index.write_text(json.dumps({"weight_map": everything | {HEAD: "b.safetensors"}}))
    with pytest.raises(ModelFileError, match=r"'lm_head\.weight' is in a\.safetensors and in b\.safetensors"):
        open_checkpoint(checkpoint_dir)
    index.write_text(json.dumps({"weight_map": everything | {HEAD: "c.safetensors"}}))
    with pytest.raises(ModelFileError, match=r"c\.safetensors is missing \(1 of 2 files are\)"):
        open_checkpoint(checkpoint_dir)


def test_a_model_without_its_head_has_names_without_the_prefix(checkpoint_dir: Path) -> None:
    values = tensors(TINY)
    del values[HEAD]
    rewrite(checkpoint_dir, {name.removeprefix("model."): w for name, w in values.items()})
    opened = open_checkpoint(checkpoint_dir)
    assert set(opened.names) == set(values)
    for name, w in values.items():
        np.testing.assert_array_equal(opened.tensor(name), w)


def test_a_directory_with_both_kinds_of_files(checkpoint_dir: Path) -> None:
    """Repositories of GGUF files often have a config.json too; safetensors come first where there are any."""
    write_tiny(checkpoint_dir / "tiny.gguf")
    assert isinstance(open_checkpoint(checkpoint_dir), HuggingFaceCheckpoint)
    (checkpoint_dir / "model.safetensors").unlink()
    assert isinstance(open_checkpoint(checkpoint_dir), GgufCheckpoint)
    (checkpoint_dir / "mmproj-tiny-f16.gguf").touch()  # the image encoder of a model is not another model
    assert isinstance(open_checkpoint(checkpoint_dir), GgufCheckpoint)
    write_tiny(checkpoint_dir / "other.gguf")
    with pytest.raises(
        ModelFileError, match=r"has 2 \.gguf files \(other\.gguf, tiny\.gguf\): name one of them"
    ):
        open_checkpoint(checkpoint_dir)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], r"is an adapter \(LoRA\), not a whole model"),
        (["config.json", "pytorch_model.bin"], r"pytorch_model\.bin is a PyTorch file, .* as safetensors"),
        (
            ["config.json", "a.safetensors", "b.safetensors"],
            r"it has a\.safetensors, b\.safetensors: one file must",
        ),
        (["config.json"], r"neither model\.safetensors nor .*: fetch the checkpoint again"),
    ],
)
def test_a_directory_that_is_no_checkpoint_says_what_it_has(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelFileError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_one_file_of_a_checkpoint_is_not_taken_for_a_gguf(checkpoint_dir: Path, name: str) -> None:
    (checkpoint_dir / name).touch()
    with pytest.raises(ModelFileError, match="is one file of a checkpoint: name the directory"):
        open_checkpoint(checkpoint_dir / name)


def test_a_pipe_is_no_checkpoint_and_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "model.gguf"
    os.mkfifo(pipe)
    for source in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(ModelFileError, match=r"is a pipe or a device: name a file or a directory"):
            open_checkpoint(source)


def test_what_git_keeps_of_a_file_is_named(checkpoint_dir: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    for name in ("model.safetensors", "x.gguf"):
        (checkpoint_dir / name).write_text(pointer)
        source = checkpoint_dir if name == "model.safetensors" else checkpoint_dir / name
        with pytest.raises(ModelFileError, match=f"{name} is a Git LFS pointer.* run `git lfs pull`"):
            open_checkpoint(source)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64"])
def test_types_that_are_not_read_are_named(checkpoint_dir: Path, dtype: str) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 1]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"x"
    (checkpoint_dir / "model.safetensors").write_bytes(data)
    with pytest.raises(
        UnsupportedModelError, match=f"tensor 'a' has the type {dtype}, which is not supported"
    ):
        open_checkpoint(checkpoint_dir)
