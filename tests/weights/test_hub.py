"""`shoal pull hf:ORG/NAME` against a hub on loopback that answers as huggingface.co does."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

import numpy as np
import pytest
import safetensors.numpy
from tests.models import tiny_chat_checkpoint
from tests.patience import LIMIT
from tests.weights.conftest import TINY
from tests.weights.gguf_files import write_tiny

from shoal.engine.checkpoint import open_checkpoint
from shoal.engine.model_directory import Model

pytestmark = pytest.mark.slow

REVISION = 40 * "a"
TINY_FILES = {path.name: path.read_bytes() for path in TINY.iterdir()} | {"pytorch_model.bin": b"not wanted"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def sharded() -> dict[str, bytes]:
    """The tiny checkpoint with shards that have names of their own, one in a folder."""
    checkpoint = open_checkpoint(TINY)
    names = sorted(checkpoint.names)
    parts = {"odd.safetensors": names[:7], "more/[2] of 2.safetensors": names[7:]}
    files = {name: data for name, data in TINY_FILES.items() if name != SINGLE}
    for file, held in parts.items():
        files[file] = safetensors.numpy.save({name: checkpoint.tensor(name) for name in held})
    weight_map = {name: file for file, held in parts.items() for name in held}
    return files | {INDEX: json.dumps({"weight_map": weight_map}).encode()}


def ggufs(directory: Path) -> dict[str, bytes]:
    """The tiny checkpoint as several GGUF files, one of them in parts, and what else is often beside them."""
    write_tiny(directory / "tiny-f16.gguf", dtype=np.float16)
    write_tiny(directory / "tiny-F32.gguf", split=12)
    files = {path.name: path.read_bytes() for path in directory.glob("*.gguf")}
    return files | {"config.json": b'{"model_type": "llama"}', "mmproj-tiny-f16.gguf": b"an image encoder"}


class Hub(BaseHTTPRequestHandler):
    repositories: ClassVar[dict[str, dict[str, bytes]]] = {}

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path, headers = unquote(self.path.split("?")[0]), {}
        data: bytes | None = None
        _, *words = path.removeprefix("/api/models").split("/", 4)
        name, kind = "/".join(words[:2]), "/".join(words[2:])
        files = self.repositories.get(name, {})
        if files and kind == "revision/main":
            siblings = [{"rfilename": file} for file in files]
            data = json.dumps({"id": name, "sha": REVISION, "siblings": siblings}).encode()
        elif files and kind in (f"tree/{REVISION}", "tree/main"):
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in files.items()
            ]
            data = json.dumps(entries).encode()
        elif kind.startswith((f"resolve/{REVISION}/", "resolve/main/")):
            data = files.get(kind.split("/", 2)[2])
            headers = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha1(data or b"").hexdigest()}"'}
        if data is None:
            headers, data = {"X-Error-Code": "RepoNotFound"}, b""
            self.send_response(404)
        else:
            self.send_response(200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, form: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    bad = sharded()
    bad[INDEX] = bad[INDEX].replace(b"odd.safetensors", b"../../odd.safetensors")
    missing = {name: data for name, data in sharded().items() if name != "odd.safetensors"}
    several = ggufs(tmp_path_factory.mktemp("ggufs"))
    Hub.repositories = {
        "org/tiny": TINY_FILES,
        "org/odd": sharded(),
        "org/both": sharded() | TINY_FILES,
        "org/traversal": bad,
        "org/missing": missing,
        "org/several": several,
        "org/one": {name: data for name, data in several.items() if "F32" not in name},
        "org/torch": {"config.json": TINY_FILES["config.json"], "pytorch_model.bin": b"not wanted"},
    }
    chat = tiny_chat_checkpoint(tmp_path_factory.mktemp("chat") / "tiny")
    Hub.repositories["org/chat"] = {path.name: path.read_bytes() for path in chat.iterdir()}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def shoal(hub: str, home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: the library reads its environment when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(home / "hf"), "XDG_CACHE_HOME": str(home)}
    command = [sys.executable, "-m", "shoal", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)


def test_a_repository_is_pulled(hub: str, tmp_path: Path) -> None:
    done = shoal(hub, tmp_path, "pull", "hf:org/tiny")
    assert done.returncode == 0, done.stderr
    model = Model.open(tmp_path / "shoal" / "models" / "tiny")
    assert model.index.source == f"hf:org/tiny@{REVISION}"
    assert not list((tmp_path / "hf").rglob("pytorch_model.bin"))
    assert "100 %" in done.stderr and "\r" not in done.stderr
    again = shoal("http://127.0.0.1:9", tmp_path, "pull", "hf:org/tiny")
    assert (again.returncode, again.stderr) == (0, "")


def pulled(hub: str, home: Path, source: str, *options: str) -> Model:
    done = shoal(hub, home, "pull", source, "--name", "m", "--dtype", "f32", *options)
    assert done.returncode == 0, done.stderr
    return Model.open(home / "shoal" / "models" / "m")


def test_shards_are_those_that_the_index_names(hub: str, tmp_path: Path) -> None:
    model = pulled(hub, tmp_path, "hf:org/odd")
    head = model.unit_weights(4)["head.weight"].data
    np.testing.assert_array_equal(head, open_checkpoint(TINY).tensor("lm_head.weight"))
    fetched = {path.name for path in (tmp_path / "hf").rglob("*") if path.is_symlink()}
    assert fetched == {"odd.safetensors", "[2] of 2.safetensors", INDEX, "config.json"} | beside()
    offline = shoal("http://127.0.0.1:9", tmp_path, "pull", "hf:org/odd", "--name", "again")
    assert offline.returncode == 0, offline.stderr


def beside() -> set[str]:
    return set(TINY_FILES) - {SINGLE, "pytorch_model.bin"}


def test_one_file_comes_before_several(hub: str, tmp_path: Path) -> None:
    """As in transformers, where a repository has both."""
    pulled(hub, tmp_path, "hf:org/both")
    fetched = {path.name for path in (tmp_path / "hf").rglob("*") if path.is_symlink()}
    assert fetched == {SINGLE, INDEX} | beside()


@pytest.mark.parametrize(
    ("source", "options", "name"),
    [
        ("hf:org/one", (), "one"),
        ("hf:org/several:F16", (), "several-f16"),
        ("hf:org/several:tiny-F32-00002-of-00003.gguf", ("--name", "parts"), "parts"),
    ],
)
def test_a_gguf_of_a_repository(
    hub: str, tmp_path: Path, source: str, options: tuple[str, ...], name: str
) -> None:
    done = shoal(hub, tmp_path, "pull", source, *options)
    assert done.returncode == 0, done.stderr
    model = Model.open(tmp_path / "shoal" / "models" / name)
    assert model.index.source == f"{source}@{REVISION}"
    fetched = {path.name for path in (tmp_path / "hf").rglob("*.gguf")}
    assert len(fetched) == (3 if "32" in source else 1)


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("hf:org/several", 11, "has tiny-F32-00001-of-00003.gguf (3 parts), tiny-f16.gguf"),
        ("hf:org/torch", 11, "neither model.safetensors nor model.safetensors.index.json nor a GGUF"),
        ("hf:org/missing", 11, "has no odd.safetensors, which its model.safetensors.index.json lists"),
        ("hf:org/traversal", 3, "in '../../odd.safetensors', which is not the name of a .safetensors file"),
    ],
)  # fmt: skip
def test_a_repository_that_has_not_what_is_wanted(
    hub: str, tmp_path: Path, source: str, code: int, message: str
) -> None:
    done = shoal(hub, tmp_path, "pull", source)
    assert done.returncode == code
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_such_repository(hub: str, tmp_path: Path) -> None:
    done = shoal(hub, tmp_path, "pull", "hf:org/none")
    assert done.returncode == 11
    assert done.stderr.startswith("shoal: error: hf:org/none could not be downloaded: ")
    assert "check the name and the network" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_repository_that_is_run_is_fetched_once_after_its_costs_were_said(hub: str, tmp_path: Path) -> None:
    done = shoal(hub, tmp_path, "run", "hf:org/chat", "hello", "-n", "3")
    assert done.returncode == 0, done.stderr
    costs, *_, named = done.stderr.splitlines()
    size = len(Hub.repositories["org/chat"][SINGLE])
    assert (
        f"first use of hf:org/chat: converting it to int8, which needs {size / 1e6:.0f} MB to down" in costs
    )
    assert "of disk" in costs and "of RAM" in costs and named.endswith("its name from now on is chat")
    again = shoal("http://127.0.0.1:9", tmp_path, "run", "hf:org/chat", "hello", "-n", "3")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert "first use" not in again.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("org/odd", r"1 MB to download, about 0 MB of disk for the model, and about \d+ MB of RAM to run it"),
        ("org/several:F16", r"0 MB to download, about"),
        ("org/several", "None"),
        ("org/none", "None"),
        ("org/torch", "None"),
    ],
)
def test_what_a_repository_takes(hub: str, tmp_path: Path, source: str, said: str) -> None:
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf")}
    program = "import sys; from shoal import first_use; print(first_use._of_repository(sys.argv[1]))"
    command = [sys.executable, "-c", program, source]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert re.match(said, done.stdout), done
    assert not list((tmp_path / "hf").rglob("*.safetensors"))
