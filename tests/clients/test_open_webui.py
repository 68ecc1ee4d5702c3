"""Open WebUI, as PyPI has it, lists the model of `shoal serve` and chats with it (`make check-webui`)."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from bench.llama_server import free_port
from tests.models import smollm2_dir
from tests.patience import LIMIT

import shoal
from shoal.processes import end

from .test_clients import FRANCE, ROOT, served

pytestmark = pytest.mark.webui
PROGRAM = ROOT / ".venv-webui" / "bin" / "open-webui"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Its interface, signed in, over a server in a process of its own."""
    directory, port = tmp_path_factory.mktemp("webui"), free_port()
    for url in served(directory, "--alone"):
        options = {"OPENAI_API_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "none", "ENABLE_OLLAMA_API": "False"}
        offline = {"OFFLINE_MODE": "True", "HF_HUB_OFFLINE": "1", "RAG_EMBEDDING_ENGINE": "openai"}
        own = {"DATA_DIR": str(directory), "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "x"}
        command = [str(PROGRAM), "serve", "--host", "127.0.0.1", "--port", str(port)]
        with (directory / "webui").open("w") as log:
            environment = {**os.environ, **options, **offline, **own}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=directory)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=LIMIT, trust_env=False) as client:
                signed = wait_for(client, process, directory / "webui")
                client.headers["Authorization"] = f"Bearer {signed['token']}"
                yield client
        finally:
            end([process])


def wait_for(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> Any:
    """Signs in as soon as it listens."""
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx.TransportError):
            return client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def test_it_lists_the_model_and_chats(page: httpx.Client) -> None:
    (model,) = page.get("/api/models").json()["data"]
    assert model["id"] == smollm2_dir().name
    asked = {"model": model["id"], "messages": [{"role": "user", "content": FRANCE}], "temperature": 0}
    with shoal.LLM(smollm2_dir(), context=1024) as llm:
        expected = llm.chat(FRANCE).text
    made = page.post("/api/chat/completions", json={**asked, "stream": False}).json()
    assert made["choices"][0]["message"]["content"] == expected
    streamed = page.post("/api/chat/completions", json={**asked, "stream": True}).text
    *parts, last = [line.removeprefix("data: ") for line in streamed.split("\n") if line.startswith("data: ")]
    assert last == "[DONE]"
    choices = [choice for part in parts for choice in json.loads(part).get("choices", ())]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == expected
