"""Programs that speak OpenAI's API, as PyPI has them, ask `shoal serve` by a changed address: on one device
and on three nodes, with the answers of `shoal.LLM`. `make check-clients` makes their environment."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.models import smollm2_dir

import shoal
from shoal.processes import NodeSpec, nodes

pytestmark = pytest.mark.clients
ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / ".venv-clients" / "bin"
FRANCE = "What is the capital of France?"


@pytest.fixture(scope="module")
def llm() -> Iterator[shoal.LLM]:
    with shoal.LLM(smollm2_dir(), context=1024) as opened:
        yield opened


@pytest.fixture(scope="module", params=["alone", "three nodes"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server in a process of its own."""
    directory = tmp_path_factory.mktemp("served")
    if request.param == "alone":
        yield from served(directory, "--alone")
        return
    specs = [NodeSpec(f"n{i}", ram_mb=170, options=("--measure-seconds", "0.05")) for i in range(3)]
    with nodes(smollm2_dir(), specs, directory) as running:
        yield from served(directory, "--nodes", ",".join("{}:{}".format(*one.address) for one in running))


def served(directory: Path, *options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "shoal", "serve", str(smollm2_dir()), "--port", "0", "--context", "1024"]
    with (directory / "log").open("w+") as log:
        process = subprocess.Popen([*command, *options], stderr=log)
        try:
            with (directory / "log").open() as lines:
                while not (found := re.search("listening on (.*)", (directory / "log").read_text())):
                    assert process.poll() is None, lines.read()
            yield found[1]
        finally:
            process.terminate()
            assert process.wait(60) == 0


def run(*words: str, cwd: Path | None = None, **environment: str) -> str:
    """What a program of the clients' environment prints."""
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    whole = {**os.environ, **offline, "OPENAI_API_KEY": "none", **environment}
    command = [str(PROGRAMS / words[0]), *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=whole, cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_openai(llm: shoal.LLM, url: str) -> None:
    name = llm.model.path.name
    found = json.loads(run("python", str(Path(__file__).with_name("openai_program.py")), url, name))
    expected = llm.chat(FRANCE, logprobs=3)
    assert found["models"] == [name]
    assert found["chat"] == found["stream"] == expected.text
    assert found["usage"] == found["stream usage"] == len(expected.tokens)
    assert [one[1] for one in found["logprobs"]] == pytest.approx(
        [one.drawn for one in expected.logprobs or ()]
    )
    assert "".join(one[0] for one in found["logprobs"]) == expected.text
    assert found["parsed"] == found["parsed stream"]
    assert found["response"] == [expected.text, "completed"]
    assert found["response stream"] == expected.text
    options: Any = {"seed": 7, "max_tokens": 8, "stop": ["."], "temperature": 1.0}
    assert found["several"] == [one.text for one in llm.chat(FRANCE, n=3, **options)]
    np.testing.assert_allclose(found["embeddings"], llm.embed(["A boat", "Butter"]), atol=1e-7)
    assert found["text"] == "The sea is" + llm.generate("The sea is", max_tokens=5).text
    assert found["error"] == ["model_not_found", "model"]


def test_langchain_and_litellm(llm: shoal.LLM, url: str) -> None:
    program = str(Path(__file__).with_name("others_program.py"))
    found = json.loads(run("python", program, url, llm.model.path.name).splitlines()[-1])
    expected = llm.chat(FRANCE).text
    assert [found[name] for name in ("invoke", "stream", "litellm", "litellm stream")] == [expected] * 4
    assert set(found["parsed"]) == {"name", "age"}
    np.testing.assert_allclose(found["embedding"], llm.embed("A boat"), atol=1e-6)


def test_llm(llm: shoal.LLM, url: str, tmp_path: Path) -> None:
    model = {"model_id": "ours", "model_name": llm.model.path.name, "api_base": f"{url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(f"- {json.dumps(model)}\n")
    for options in ((), ("--no-stream",)):
        words = ("llm", "-m", "ours", "-o", "temperature", "0", *options, FRANCE)
        assert run(*words, LLM_USER_PATH=str(tmp_path)).strip() == llm.chat(FRANCE).text


def test_curl(llm: shoal.LLM, url: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": FRANCE}], "temperature": 0, "stream": True})
    command = [
        "curl",
        "-sN",
        f"{url}/v1/chat/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        body,
    ]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n")
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == llm.chat(FRANCE).text


TASK = """\
task: sea
dataset_path: json
dataset_kwargs: {data_files: sea.jsonl}
output_type: multiple_choice
test_split: train
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
target_delimiter: ""
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SEA = Path(__file__).parents[1] / "fixtures" / "sea.jsonl"
"""Each item with the log-probabilities of its choices by transformers in float32 (make_fixtures.py)."""
NOISE = 0.3
"""The most by which int8 moves the log-probability of a choice: these move by 0.27 at most."""


def test_lm_eval(llm: shoal.LLM, url: str, tmp_path: Path) -> None:
    (tmp_path / "sea.yaml").write_text(TASK)
    shutil.copy(SEA, tmp_path)
    path = llm.model.path
    model = f"model={path.name},base_url={url}/v1/completions,num_concurrent=3,tokenizer={path}"
    words = ["--model", "local-completions", "--model_args", model, "--tasks", "sea", "--log_samples"]
    words += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    run("lm_eval", *words, cwd=tmp_path, HF_HOME=str(tmp_path))
    (samples,) = (tmp_path / "out").glob("*/samples_sea_*.jsonl")
    for sample in map(json.loads, samples.read_text().splitlines()):
        item = sample["doc"]
        theirs, found = item["logprobs"], [float(logprob) for ((logprob, _),) in sample["resps"]]
        for choice, logprob in zip(item["choices"], found, strict=True):
            own = llm.score(choice, prompt=item["text"]).logprob
            assert logprob == pytest.approx(own, abs=1e-9)  # on one device and on three nodes
        np.testing.assert_allclose(found, theirs, rtol=0, atol=NOISE)
        assert sample["acc"] == (np.argmax(theirs) == item["label"])
