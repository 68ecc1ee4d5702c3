"""`shoal export-c` and examples/c/generate.c: a program in C gives the tokens that `shoal.generate` gives,
and refuses files and libraries that are not those of the export."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tests import families
from tests.families import TOKENS

from shoal.cli import main
from shoal.engine.backends.native import library_path
from shoal.engine.batch import Sampling
from shoal.engine.convert import convert
from shoal.engine.errors import ShoalError
from shoal.engine.export_c import export_c
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "c" / "generate.c"
STRICT = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Wno-sign-conversion", "-Werror")
ROWS = 64
GREEDY = Sampling()
CASES = (
    ("llama", "f32"),
    ("llama-biases", "int8"),
    ("mistral", "int4"),
    ("mistral-window", "int8"),
    ("qwen2", "int4-min"),
    ("qwen2-tied", "int8"),
    ("qwen3", "int8-kv"),
)


def compiler(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Compiles the example with what `folder` holds, beside the library that tests use."""
    library = library_path()
    sources = (f"-I{folder}", str(EXAMPLE), str(folder / "model.c"), str(library))
    command = (os.environ.get("CC", "cc"), *STRICT, *more, *sources, f"-Wl,-rpath,{library.parent}")
    return subprocess.run(
        [*command, "-o", str(folder / "generate")], capture_output=True, text=True, check=False
    )


def build(model: Model, folder: Path) -> Path:
    """An export with the program that runs it."""
    export_c(model, folder, StageOptions(max_rows=ROWS))
    done = compiler(folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def call(folder: Path, prompt: Sequence[int], n: int, sampling: Sampling = GREEDY) -> list[int]:
    done = started(folder, prompt, n, sampling)
    assert (done.returncode, done.stderr) == (0, "")
    return [int(line) for line in done.stdout.split()]


def started(
    folder: Path, prompt: Sequence[int], n: int, sampling: Sampling = GREEDY
) -> subprocess.CompletedProcess[str]:
    words = [folder / "generate", folder, n, sampling.temperature, sampling.seed, *prompt]
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Model]:
    """A model directory of a family in a type, as tests/engine/test_families.py has them."""

    def make(name: str, types: str) -> Model:
        folder = tmp_path_factory.mktemp("made")
        families.write_checkpoint(name, folder / "source")
        dtype, _, more = types.partition("-")
        kv_dtype = "int8" if more == "kv" else None
        convert(folder / "source", folder / "model", dtype=dtype, has_min=more == "min", kv_dtype=kv_dtype)
        return Model.open(folder / "model")

    return make


@pytest.fixture(scope="module")
def exported(
    made: Callable[[str, str], Model], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, Path]:
    model = made("llama", "int8")
    return model, build(model, tmp_path_factory.mktemp("exported") / "export")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "types"), CASES)
def test_c_gives_the_tokens_of_generate(
    made: Callable[[str, str], Model], name: str, types: str, tmp_path: Path
) -> None:
    """Greedy and drawn; a prompt that fits in one call, and one of several calls and pages."""
    model = made(name, types)
    folder = build(model, tmp_path / "export")
    drawn = Sampling(temperature=0.9, seed=7)
    with Stage(model, 0, model.n_units) as stage:
        for prompt, n, sampling in ((TOKENS[:40], 24, GREEDY), (TOKENS[:250], 24, drawn)):
            expected = list(generate(stage, prompt, sampling, max_tokens=n))
            assert len(expected) > 4
            assert call(folder, prompt, n, sampling) == expected


@pytest.mark.slow
def test_an_answer_ends_before_an_end_token(exported: tuple[Model, Path], tmp_path: Path) -> None:
    model, folder = exported
    whole = call(folder, TOKENS[:40], 24)
    end = whole[5]
    before = whole[: whole.index(end)]
    other = Model.open(model.path)
    other.config = replace(other.config, eos=(266, end))
    assert call(build(other, tmp_path / "export"), TOKENS[:40], 24) == before


@pytest.mark.slow
def test_what_does_not_fit_is_refused(exported: tuple[Model, Path]) -> None:
    model, folder = exported
    for prompt, n in ((TOKENS[:40], model.config.context - 39), (TOKENS[:2], -1)):
        done = started(folder, prompt, n)
        assert done.returncode == 1
        assert done.stderr == f"generate: the context holds {model.config.context} tokens\n"
    done = started(folder, [267], 4)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "generate: token 267 of row 0 is not in [0, 267)\n"


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def change(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unit-000.safetensors", "unit-004.safetensors", "common.safetensors"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shorten, "has another size"),
        (change, "was altered"),
        (Path.unlink, "cannot be opened"),
    ],
)
def test_damaged_files_are_refused(
    exported: tuple[Model, Path], name: str, damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported[1], folder)  # its files are those of the model directory
    damage(folder / name)
    done = started(folder, TOKENS[:4], 4)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"generate: {folder / name} {said}: export the model again\n"


@pytest.mark.slow
def test_a_library_of_other_sources_is_refused(exported: tuple[Model, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported[1], folder)
    header = (folder / "model.h").read_text()
    (folder / "model.h").write_text(re.sub(r"(MODEL_SOURCES \")[0-9a-f]", r"\1x", header))
    assert compiler(folder).returncode == 0
    done = started(folder, TOKENS[:4], 4)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "generate: libshoal is of another version than the export\n"


@pytest.mark.slow
def test_a_header_of_another_layout_does_not_compile(exported: tuple[Model, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported[1], folder)
    header = (folder / "shoal.h").read_text()
    (folder / "shoal.h").write_text(header.replace("SHOAL_NUMERICS = ", "SHOAL_NUMERICS = 1"))
    done = compiler(folder)
    assert done.returncode != 0
    assert "shoal.h is of another version" in done.stderr


def test_the_weights_are_the_files_of_the_model_directory(
    made: Callable[[str, str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("qwen2-tied", "int8")
    export_c(model, tmp_path / "linked")
    weights = {path.name for path in model.path.glob("*.safetensors")}
    assert {path.name for path in (tmp_path / "linked").iterdir()} == weights | {
        "model.c",
        "model.h",
        "shoal.h",
    }
    for name in weights:
        assert (tmp_path / "linked" / name).samefile(model.path / name)

    def refuse(source: object, target: object) -> None:
        raise PermissionError(1, "this file system has no links")

    monkeypatch.setattr(os, "link", refuse)
    export_c(model, tmp_path / "copied")
    for name in weights:
        assert not (tmp_path / "copied" / name).samefile(model.path / name)
        assert (tmp_path / "copied" / name).read_bytes() == (model.path / name).read_bytes()


def test_an_existing_directory_is_refused(made: Callable[[str, str], Model], tmp_path: Path) -> None:
    with pytest.raises(ShoalError, match="already exists: remove it"):
        export_c(made("llama", "int8"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_directory(
    made: Callable[[str, str], Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "export"
    assert main(["export-c", str(made("llama", "f32").path), "-o", str(folder), "--rows", "8"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert ".max_rows = 8, .max_wanted = 8" in (folder / "model.c").read_text()
    interface = (ROOT / "csrc" / "kernels.h").read_text()
    assert interface in (folder / "shoal.h").read_text()
