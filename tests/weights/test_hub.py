"""`shoal pull hf:ORG/NAME` against a hub on loopback that answers as huggingface.co does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.weights.conftest import TINY

from shoal.engine.shards import Model

pytestmark = pytest.mark.slow

REVISION = 40 * "a"
FILES = {path.name: path.read_bytes() for path in TINY.iterdir()} | {"pytorch_model.bin": b"not wanted"}
API = "/api/models/org/tiny"


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path, headers = self.path.split("?")[0], {}
        data: bytes | None = None
        if path == f"{API}/revision/main":
            siblings = [{"rfilename": name} for name in FILES]
            data = json.dumps({"id": "org/tiny", "sha": REVISION, "siblings": siblings}).encode()
        elif path == f"{API}/tree/{REVISION}":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in FILES.items()
            ]
            data = json.dumps(entries).encode()
        elif path.startswith(f"/org/tiny/resolve/{REVISION}/"):
            data = FILES.get(path.rsplit("/", 1)[1])
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
def hub() -> Iterator[str]:
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
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_a_repository_is_pulled(hub: str, tmp_path: Path) -> None:
    done = shoal(hub, tmp_path, "pull", "hf:org/tiny")
    assert done.returncode == 0, done.stderr
    model = Model.open(tmp_path / "shoal" / "models" / "tiny")
    assert model.index.source == f"hf:org/tiny@{REVISION}"
    assert not list((tmp_path / "hf").rglob("pytorch_model.bin"))
    assert "100 %" in done.stderr and "\r" not in done.stderr
    again = shoal("http://127.0.0.1:9", tmp_path, "pull", "hf:org/tiny")
    assert (again.returncode, again.stderr) == (0, "")


def test_no_such_repository(hub: str, tmp_path: Path) -> None:
    done = shoal(hub, tmp_path, "pull", "hf:org/none")
    assert done.returncode == 11
    assert done.stderr.startswith("shoal: error: hf:org/none could not be fetched: ")
    assert "check the name and the network" in done.stderr
    assert len(done.stderr.splitlines()) == 1
