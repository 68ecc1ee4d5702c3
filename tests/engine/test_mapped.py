"""Files that are truncated while a stage has them mapped: an error of that stage, not the process's end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.patience import LIMIT

from shoal.engine.batch import Run, Want
from shoal.engine.errors import ModelFileError
from shoal.engine.generate import generate
from shoal.engine.model_directory import Model, unit_file
from shoal.engine.stage import Stage, StageOptions

PROMPT = [3, 1, 4, 1, 5]
MAPPED = StageOptions(resident=False)


def copied(model: Model, folder: Path) -> Model:
    return Model.open(shutil.copytree(model.path, folder / "model"))


def cut(model: Model, unit: int, size: int) -> Path:
    """Truncates the file of a unit to `size` bytes, or by as many if that is negative."""
    path = model.path / unit_file(unit)
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    return path


NATIVE = [("native", unit, size) for unit in (0, 2, 4) for size in (0, 4096, 20000, -1)]


@pytest.mark.parametrize(
    ("backend", "unit", "size"),
    [
        *NATIVE,
        ("numpy", 2, 0),
        ("numpy", 0, -1),
        pytest.param("numba", 2, 0, marks=pytest.mark.slow),
        pytest.param("numba", 0, -1, marks=pytest.mark.slow),
    ],
)
def test_a_truncated_file_is_an_error_that_names_it(
    tiny_int8: Model, tmp_path: Path, backend: str, unit: int, size: int
) -> None:
    model = copied(tiny_int8, tmp_path)
    with Stage(model, 0, model.n_units, StageOptions(backend, resident=False, threads=2)) as stage:
        sequence = stage.open_sequence(None)
        stage.run([Run(sequence, 0, PROMPT, Want.TOKEN)])
        path = cut(model, unit, size)
        for _ in range(2):
            with pytest.raises(ModelFileError, match=f"{path} was truncated while it was in use"):
                stage.run([Run(sequence, len(PROMPT), [2], Want.TOKEN)])
        assert stage.positions(sequence, 1) == len(PROMPT)


def test_other_stages_of_the_process_go_on(tiny_int8: Model, tmp_path: Path) -> None:
    n = tiny_int8.n_units
    with Stage(tiny_int8, 0, n, MAPPED) as whole:
        expected = list(generate(whole, PROMPT, max_tokens=8, end=()))
        model = copied(tiny_int8, tmp_path)
        with Stage(model, 0, n, MAPPED) as stage:
            answer = generate(stage, PROMPT, max_tokens=8, end=())
            first = next(answer)
            cut(model, 3, 0)
            with pytest.raises(ModelFileError, match="was truncated"):
                list(answer)
            assert [first] == expected[:1]
            assert list(generate(whole, PROMPT, max_tokens=8, end=())) == expected


def test_a_file_that_is_copied_or_replaced_may_change(tiny_int8: Model, tmp_path: Path) -> None:
    model = copied(tiny_int8, tmp_path)
    with (
        Stage(model, 0, model.n_units, StageOptions(resident=True)) as resident,
        Stage(model, 0, model.n_units, MAPPED) as mapped,
    ):
        expected = list(generate(resident, PROMPT, max_tokens=8, end=()))
        path = model.path / unit_file(2)
        (tmp_path / "new").write_bytes(b"short")
        os.replace(tmp_path / "new", path)  # the old file stays as long as it is mapped
        for stage in (resident, mapped):
            assert list(generate(stage, PROMPT, max_tokens=8, end=())) == expected


def test_a_truncated_file_is_not_loaded_again(tiny_int8: Model, tmp_path: Path) -> None:
    model = copied(tiny_int8, tmp_path)
    with Stage(model, 0, 2, MAPPED) as stage:
        cut(model, 2, 4096)
        with pytest.raises(ModelFileError, match=unit_file(2)):
            stage.set_range(0, 3)
        assert (stage.first, stage.last) == (0, 2)
        sequence = stage.open_sequence(None)
        stage.run([Run(sequence, 0, PROMPT, Want.NOTHING)])


SIGBUS = """
import faulthandler, mmap, os, signal, sys
from pathlib import Path
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

def own(path):  # a mapping that shoal knows nothing of
    path.write_bytes(bytes(8192))
    with path.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 8192, access=mmap.ACCESS_READ)
    os.truncate(path, 0)
    return memory

folder, case = Path(sys.argv[1]), sys.argv[2]
if "handler" in case:
    faulthandler.enable()
if "python" in case:
    signal.signal(signal.SIGBUS, lambda *args: print("heard", flush=True))
if "ignored" in case:
    signal.signal(signal.SIGBUS, signal.SIG_IGN)
stage = Stage(Model.open(folder / "model"), 0, 2, StageOptions(resident=False))
if "closed" in case:
    stage.close()
if "sent" in case:
    os.kill(os.getpid(), signal.SIGBUS)
else:
    own(folder / "own")[5000]
print("alive", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "code", "out", "said"),
    [
        ("plain", -signal.SIGBUS, "", ""),
        ("handler", -signal.SIGBUS, "", "Fatal Python error: Bus error"),
        ("handler closed", -signal.SIGBUS, "", "Fatal Python error: Bus error"),
        ("sent", -signal.SIGBUS, "", ""),
        ("sent python", 0, "heard\nalive\n", ""),
        ("sent python closed", 0, "heard\nalive\n", ""),
        ("sent ignored", 0, "alive\n", ""),
    ],
)
def test_a_bus_error_elsewhere_is_what_it_was(
    tiny_int8: Model, tmp_path: Path, case: str, code: int, out: str, said: str
) -> None:
    copied(tiny_int8, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", SIGBUS, tmp_path, case], capture_output=True, text=True, timeout=LIMIT
    )
    assert (done.returncode, done.stdout) == (code, out)
    assert said in done.stderr if said else done.stderr == ""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="asks /proc")
def test_mappings_and_their_files_are_closed_with_the_stage(tiny_int8: Model) -> None:
    def files() -> int:
        return sum(
            str(tiny_int8.path) in os.readlink(p) for p in Path("/proc/self/fd").iterdir() if p.exists()
        )

    before = files()
    with Stage(tiny_int8, 0, 3, MAPPED) as stage:
        assert files() > before
        stage.set_range(0, 1)
    assert files() == before
