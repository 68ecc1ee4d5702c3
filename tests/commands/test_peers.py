"""bench/peers.py: how pairs are made, what the ratios are, and which calls the peer's worker makes.

llama.cpp itself takes many minutes to compile: a module with its names stands in for it."""

from __future__ import annotations

import ctypes
import json
import os
import sys
import types
from pathlib import Path

import pytest
from bench import llama_cpp_worker, peers
from bench.peers import Sample, Speeds

# As `shoal bench smollm2-135m -t 1 -r 1 -o json` printed it, most fields left out.
SHOAL = """[{"n_threads": 1, "n_prompt": 512, "n_gen": 0, "avg_ns": 750634243, "avg_ts": 682.0898523810084,
  "samples_ts": [682.0898523810084], "test": "pp512", "read_bytes_per_s": null},
 {"n_threads": 1, "n_prompt": 0, "n_gen": 128, "avg_ns": 1710191172, "avg_ts": 74.84543371271712,
  "samples_ts": [74.84543371271712], "test": "tg128", "read_bytes_per_s": 10816070801.235548}]"""


class FakeLibrary(types.ModuleType):
    """The names of llama_cpp that the worker uses; it notes what was decoded and quantised."""

    llama_token = ctypes.c_int32
    LLAMA_FTYPE_MOSTLY_Q8_0 = 7

    def __init__(self, refuses: bool = False) -> None:
        super().__init__("llama_cpp")
        self.refuses = refuses
        self.calls: list[tuple[str, object]] = []
        self.context: types.SimpleNamespace | None = None

    def llama_backend_init(self) -> None:
        self.calls.append(("init", None))

    def llama_model_default_params(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(n_gpu_layers=99)

    llama_context_default_params = llama_model_quantize_default_params = types.SimpleNamespace

    def llama_model_load_from_file(self, path: bytes, params: types.SimpleNamespace) -> str | None:
        assert params.n_gpu_layers == 0
        return None if self.refuses else path.decode()

    def llama_init_from_model(self, model: str, params: types.SimpleNamespace) -> str:
        self.context = params
        return f"context of {model}"

    def llama_model_get_vocab(self, model: str) -> str:
        return model

    def llama_vocab_n_tokens(self, vocab: str) -> int:
        return 10

    def llama_get_memory(self, context: str) -> str:
        return context

    def llama_memory_clear(self, memory: str, data: bool) -> None:
        self.calls.append(("clear", data))

    def llama_batch_get_one(self, tokens: ctypes.Array[ctypes.c_int32], rows: int) -> list[int]:
        assert len(tokens) == rows
        return list(tokens)

    def llama_decode(self, context: str, batch: list[int]) -> int:
        assert all(0 <= token < 10 for token in batch)
        self.calls.append(("decode", len(batch)))
        return 0

    def llama_synchronize(self, context: str) -> None:
        self.calls.append(("synchronise", None))

    def llama_model_quantize(self, source: bytes, target: bytes, params: types.SimpleNamespace) -> int:
        self.calls.append(("quantise", (source, target, vars(params))))
        return int(self.refuses)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    return fake


def test_the_worker_times_what_llama_bench_times(
    library: FakeLibrary, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llama_cpp_worker.main(["measure", "m.gguf", "2", "600", "6"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["test"], row["n_threads"]) for row in rows] == [("pp600", 2), ("tg6", 2)]
    assert peers.speeds(json.dumps(rows)).keys() == {"pp600", "tg6"}
    assert min(row["avg_ts"] for row in rows) > 0
    prompt: list[tuple[str, object]] = [("clear", True), ("decode", 600), ("synchronise", None)]
    tokens = [[("clear", True), *[("decode", 1)] * n, ("synchronise", None)] for n in (4, 6)]  # warm, timed
    assert library.calls == [("init", None), *prompt, *prompt, *tokens[0], *tokens[1]]
    assert library.context is not None
    assert vars(library.context) == {
        "n_ctx": 600,
        "n_batch": 600,
        "n_ubatch": 512,
        "n_threads": 2,
        "n_threads_batch": 2,
    }


def test_the_worker_leaves_out_what_is_not_asked(
    library: FakeLibrary, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llama_cpp_worker.main(["measure", "m.gguf", "1", "0", "3"]) == 0
    assert [row["test"] for row in json.loads(capsys.readouterr().out)] == ["tg3"]


def test_the_worker_requantises_everything_alike(library: FakeLibrary) -> None:
    assert llama_cpp_worker.main(["quantise", "a", "b", "Q8_0"]) == 0
    params = {"ftype": 7, "allow_requantize": True, "pure": True}
    assert library.calls == [("quantise", (b"a", b"b", params))]


def test_the_worker_fails_aloud(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", FakeLibrary(refuses=True))
    with pytest.raises(RuntimeError, match=r"cannot load m\.gguf"):
        llama_cpp_worker.main(["measure", "m.gguf", "1", "8", "8"])
    with pytest.raises(RuntimeError, match="cannot write a as Q8_0"):
        llama_cpp_worker.main(["quantise", "a", "b", "Q8_0"])
    assert llama_cpp_worker.main(["measure"]) == 2
    assert "quantise SOURCE.gguf" in capsys.readouterr().err


def test_speeds_of_a_recorded_run() -> None:
    assert peers.speeds(SHOAL) == {"pp512": 682.0898523810084, "tg128": 74.84543371271712}


@pytest.mark.parametrize("text", ["", "[]", '[{"test": "a", "avg_ts": 1}, {"test": "a", "avg_ts": 2}]'])
def test_output_that_is_no_measurement_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting value|not one row a test"):
        peers.speeds(text)


def test_engines_run_in_pairs_and_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, int]] = []

    def measure(engine: str, threads: int) -> Speeds:
        asked.append((engine, threads))
        return {"pp8": len(asked), "tg4": 100.0 * threads}

    samples = peers.sample(measure, (1, 2), 2)
    first = [("shoal", 1), ("peer", 1), ("shoal", 2), ("peer", 2)]
    second = [("peer", 1), ("shoal", 1), ("peer", 2), ("shoal", 2)]
    assert asked == first + second
    assert len(samples) == 16
    assert samples[2] == Sample(0, "peer", 1, "pp8", 2)
    assert samples[15] == Sample(1, "shoal", 2, "tg4", 200)
    assert "round 2: shoal, 2 threads, tg4: 200.0 t/s" in capsys.readouterr().out


def test_ratios_are_of_pairs_and_the_peer_takes_its_better_threads() -> None:
    # The peer decodes faster with one thread than with two; round 1 was slow for everybody.
    speed = {("shoal", 1): 150.0, ("shoal", 2): 240.0, ("peer", 1): 100.0, ("peer", 2): 80.0}
    load = [1.0, 0.5, 1.0]
    luck = {("shoal", 2, 0): 1.1}
    samples = [
        Sample(
            number, engine, threads, "tg128", value * load[number] * luck.get((engine, threads, number), 1)
        )
        for number in range(3)
        for (engine, threads), value in speed.items()
    ]
    one, two = peers.ratios(samples)
    assert (one.test, one.threads, one.peer_threads, one.rounds) == ("tg128", 1, 1, 3)
    assert (one.median, one.low, one.high) == (1.5, 1.5, 1.5)
    assert (two.threads, two.peer_threads) == (2, 1)
    assert (two.shoal, two.peer, two.median) == (240.0, 100.0, 2.4)
    assert (two.low, two.high) == pytest.approx((2.4, 2.64))
    lines = peers.report([one, two]).splitlines()
    assert lines[-1].split() == ["tg128", "2", "240.0", "100.0", "1", "2.40", "2.40", "2.64", "3"]


def test_a_child_is_pinned_in_a_session_of_its_own() -> None:
    code = "import os; print(sorted(os.sched_getaffinity(0)), os.getsid(0) == os.getpid())"
    last = sorted(os.sched_getaffinity(0))[-1:]
    assert peers.run([sys.executable, "-c", code], 1) == f"{last} True\n"
    with pytest.raises(RuntimeError, match=r"(?s)failed:.*no luck"):
        peers.run([sys.executable, "-c", "raise SystemExit('no luck')"], 1)


def test_nothing_is_built_when_it_is_there_or_must_not_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="without --skip-build"):
        peers.environment(tmp_path, build=False)
    (tmp_path / ".built").touch()
    assert peers.environment(tmp_path, build=True) == tmp_path / "bin/python"
    assert [path.name for path in tmp_path.iterdir()] == [".built"]


def test_a_type_is_made_once_and_the_source_itself_needs_nothing(tmp_path: Path) -> None:
    python = tmp_path / "environment/bin/python"
    source = Path("elsewhere/Tiny.F16.gguf")
    assert peers.requantised(python, source, "as-it-is") == source
    made = tmp_path / "Tiny.F16.Q8_0-pure.gguf"
    made.touch()
    assert peers.requantised(python, source, "Q8_0") == made


@pytest.mark.parametrize("text", ["0", "1,9999"])
def test_more_threads_than_cpus_would_measure_nothing(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["-t", text])
    assert "CPUs" in capsys.readouterr().err
