"""bench/peers.py: how pairs are made, what the ratios are, and which calls the peers' workers make.

llama.cpp itself takes many minutes to compile: a module with its names stands in for it."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
import types
from pathlib import Path

import pytest
from bench import chain, engines, llama_cpp_worker, pairs, peers, rpc, torch_worker
from bench.engines import Finished, Job
from bench.pairs import Reached, Sample

from shoal.engine.convert import convert
from shoal.engine.model_directory import Model

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"

# As `shoal bench smollm2-135m -t 1 -r 1 -o json` printed it, most fields left out.
SHOAL = """[{"n_threads": 1, "n_prompt": 512, "n_gen": 0, "avg_ns": 750634243, "avg_ts": 682.0898523810084,
  "samples_ts": [682.0898523810084], "test": "pp512", "read_bytes_per_s": null},
 {"n_threads": 1, "n_prompt": 0, "n_gen": 128, "avg_ns": 1710191172, "avg_ts": 74.84543371271712,
  "samples_ts": [74.84543371271712], "test": "tg128", "read_bytes_per_s": 10816070801.235548}]"""


class FakeLibrary(types.ModuleType):
    """The names of llama_cpp that the worker uses; it notes what was decoded and quantised."""

    llama_token = ctypes.c_int32
    LLAMA_FTYPE_MOSTLY_Q8_0 = 7
    GGML_TYPE_Q8_0 = 8

    def __init__(self, refuses: bool = False) -> None:
        super().__init__("llama_cpp")
        self.refuses = refuses
        self.remote = False
        self.calls: list[tuple[str, object]] = []
        self.context: types.SimpleNamespace | None = None

    def llama_backend_init(self) -> None:
        self.calls.append(("init", None))

    def llama_model_default_params(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(n_gpu_layers=99)

    llama_context_default_params = llama_model_quantize_default_params = types.SimpleNamespace

    def llama_model_load_from_file(self, path: bytes, params: types.SimpleNamespace) -> str | None:
        assert (params.n_gpu_layers > 0) == self.remote
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
        return list(tokens)[:rows]

    def llama_decode(self, context: str, batch: list[int]) -> int:
        assert all(0 <= token < 10 for token in batch)
        self.calls.append(("decode", len(batch)))
        return 0

    def llama_synchronize(self, context: str) -> None:
        self.calls.append(("synchronise", None))

    def llama_tokenize(
        self,
        vocab: str,
        text: bytes,
        length: int,
        tokens: ctypes.Array[ctypes.c_int32],
        size: int,
        *flags: bool,
    ) -> int:
        assert (length, size, flags) == (len(text), len(tokens), (True, False))
        tokens[:length] = [byte % 10 for byte in text]
        return length

    def llama_sampler_init_greedy(self) -> str:
        return "greedy"

    def llama_sampler_sample(self, sampler: str, context: str, index: int) -> int:
        assert (sampler, index) == ("greedy", -1)
        return 7

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
    assert engines.speeds(Finished(json.dumps(rows), 1, 1)).keys() == {"pp600", "tg6"}
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


def test_the_worker_puts_all_layers_on_servers_and_waits_for_each_token(
    library: FakeLibrary,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Libraries are opened by the names under which they are loaded already: a copy would have no devices."""
    library.__file__, library.remote = str(tmp_path / "__init__.py"), True
    (tmp_path / "lib").mkdir()
    for name in ("libggml.so.0", "libggml.so.0.25.3", "libggml-rpc.so.0", "libggml.so", "libggml-rpc.so"):
        (tmp_path / "lib" / name).touch()
    opened: list[str] = []

    class Function:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, *arguments: object) -> int | None:
            library.calls.append((self.name, arguments))
            return None if b"nobody" in str(arguments).encode() else 77

    class Ggml:
        def __init__(self, name: str) -> None:
            opened.append(name)
            self.ggml_backend_rpc_add_server = Function("add")
            self.ggml_backend_register = Function("register")

    monkeypatch.setattr(ctypes, "CDLL", Ggml)
    assert llama_cpp_worker.main(["rpc", "m.gguf", "a:1,b:2", "128", "600", "2"]) == 0
    assert opened == ["libggml.so.0", "libggml-rpc.so.0"]
    added = [("add", (b"a:1",)), ("register", (77,)), ("add", (b"b:2",)), ("register", (77,))]
    assert library.calls[:5] == [*added, ("init", None)]
    assert library.calls[-5:] == [("decode", 1), ("synchronise", None)] * 2 + [("synchronise", None)]
    assert library.context is not None
    assert (library.context.n_ubatch, library.context.n_threads) == (128, 1)
    assert [row["test"] for row in json.loads(capsys.readouterr().out)] == ["pp600", "tg2"]
    with pytest.raises(RuntimeError, match="no device at nobody:1"):
        llama_cpp_worker.main(["rpc", "m.gguf", "nobody:1", "128", "600", "2"])
    (tmp_path / "lib/libggml-rpc.so.0").unlink()
    with pytest.raises(FileNotFoundError, match="without RPC"):
        llama_cpp_worker.main(["rpc", "m.gguf", "a:1", "128", "600", "2"])


def test_the_worker_leaves_out_what_is_not_asked(
    library: FakeLibrary, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llama_cpp_worker.main(["measure", "m.gguf", "1", "0", "3"]) == 0
    assert [row["test"] for row in json.loads(capsys.readouterr().out)] == ["tg3"]


def test_the_worker_requantises_everything_alike(library: FakeLibrary) -> None:
    assert llama_cpp_worker.main(["quantise", "a", "b", "Q8_0"]) == 0
    params = {"ftype": 7, "allow_requantize": True, "pure": True}
    params |= {"output_tensor_type": 8, "token_embedding_type": 8}
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
    assert engines.speeds(Finished(SHOAL, 1, 1)) == {"pp512": 682.0898523810084, "tg128": 74.84543371271712}


@pytest.mark.parametrize("text", ["", "[]", '[{"test": "a", "avg_ts": 1}, {"test": "a", "avg_ts": 2}]'])
def test_output_that_is_no_measurement_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting value|not one row a test"):
        engines.speeds(Finished(text, 1, 1))


def test_a_start_is_one_token_after_a_text_or_ids(
    library: FakeLibrary, capsys: pytest.CaptureFixture[str]
) -> None:
    assert llama_cpp_worker.main(["start", "m.gguf", "a text", "2", "512"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line["token"] == 7
    assert line["import_s"] >= 0
    assert library.calls == [("init", None), ("decode", 6)]
    assert library.context is not None
    assert (library.context.n_ctx, library.context.n_threads) == (512, 2)
    assert llama_cpp_worker.main(["start", "m.gguf", "", "1", "512"]) == 0
    assert library.calls[-1] == ("decode", 4)


def test_a_start_is_timed_with_and_without_the_import_of_bindings() -> None:
    text, ids = engines.llama_start_jobs(Path("python"), Path("m.gguf"), 2)
    assert text.read(Finished('{"import_s": 0.5, "token": 3}\n', 0.75, 1)) == {
        "start": 1 / 0.75,
        "start C": 4.0,
    }
    ours, ours_ids = engines.start_jobs(Path("m"), 2)
    assert ours.read(Finished("said\n", 0.5, 1)) == {"start": 2.0, "start C": 2.0}
    both = {"start ids": 2.0, "start ids C": 2.0}
    assert ours_ids.read(Finished("17\n", 0.5, 1)) == ids.read(Finished("17\n", 0.5, 1)) == both


@pytest.mark.slow
def test_shoal_starts(tmp_path: Path) -> None:
    convert(FIXTURES / "tiny-llama", tmp_path / "tiny")
    _, ids = engines.start_jobs(tmp_path / "tiny", 1)
    assert engines.measure([ids], 1).keys() == {"start ids", "start ids C"}


def test_torch_reads_a_prompt_twice_and_keeps_one_row_of_logits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[object] = []

    class Module:
        config = types.SimpleNamespace(vocab_size=10)

        def eval(self) -> Module:
            return self

        def __call__(self, tokens: tuple[int, tuple[int, int]], logits_to_keep: int) -> None:
            calls.append((tokens, logits_to_keep))

    def load(**where: object) -> Module:
        calls.append(where)
        return Module()

    torch = types.SimpleNamespace(
        bfloat16="bf16",
        set_num_threads=lambda count: calls.append(count),
        manual_seed=lambda seed: None,
        randint=lambda most, shape: (most, shape),
        inference_mode=contextlib.nullcontext,
    )
    loader = types.SimpleNamespace(from_pretrained=load)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoModelForCausalLM=loader))
    file = tmp_path / "m.gguf"
    file.touch()
    (row,) = torch_worker.measure(file, 2, 64)
    assert (row["test"], row["n_threads"]) == ("pp64", 2)
    where = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": "m.gguf", "dtype": "bf16"}
    assert calls == [2, where, *[((10, (1, 64)), 1)] * 2]
    torch_worker.measure(tmp_path, 1, 8)
    assert {"pretrained_model_name_or_path": str(tmp_path), "dtype": "bf16"} in calls


def test_engines_run_in_pairs_and_take_turns() -> None:
    asked: list[tuple[str, int]] = []

    def measure(engine: str, threads: int) -> dict[str, Reached]:
        asked.append((engine, threads))
        return {"pp8": Reached(len(asked), 5), "tg4": Reached(100.0 * threads, 6)}

    samples = list(pairs.sample(measure, ("shoal", "peer"), (1, 2), range(2)))
    first = [("shoal", 1), ("peer", 1), ("shoal", 2), ("peer", 2)]
    second = [("peer", 1), ("shoal", 1), ("peer", 2), ("shoal", 2)]
    assert asked == first + second
    assert len(samples) == 16
    assert samples[2] == Sample(0, "peer", 1, "pp8", 2, 5)
    assert samples[15] == Sample(1, "shoal", 2, "tg4", 200, 6)


def _samples() -> list[Sample]:
    """The peer decodes faster with one thread than with two; round 1 was slow for everybody. Another peer has
    one thread only, and missed a round."""
    speed = {
        ("shoal", 1): 150.0,
        ("shoal", 2): 240.0,
        ("peer", 1): 100.0,
        ("peer", 2): 80.0,
        ("other", 1): 300.0,
    }
    load = [1.0, 0.5, 1.0]
    luck = {("shoal", 2, 0): 1.1}
    return [
        Sample(
            number,
            engine,
            threads,
            "tg128",
            value * load[number] * luck.get((engine, threads, number), 1),
            10**6 * (number + threads),
        )
        for number in range(3)
        for (engine, threads), value in speed.items()
        if (engine, number) != ("other", 2)
    ]


def test_ratios_are_of_pairs_and_the_peer_takes_its_better_threads() -> None:
    other_one, one, other_two, two = pairs.ratios(_samples())
    assert (one.test, one.threads, one.peer, one.peer_threads, one.rounds) == ("tg128", 1, "peer", 1, 3)
    assert (one.median, one.low, one.high) == (1.5, 1.5, 1.5)
    assert (one.shoal_rss, one.peer_rss) == (2_000_000, 2_000_000)
    assert (two.threads, two.peer_threads) == (2, 1)
    assert (two.shoal_tokens_per_s, two.peer_tokens_per_s, two.median) == (240.0, 100.0, 2.4)
    assert (two.low, two.high) == pytest.approx((2.4, 2.64))
    assert (other_one.peer, other_one.median, other_one.rounds) == ("other", 0.5, 2)
    assert (other_two.median, other_two.rounds) == (pytest.approx(0.84), 2)
    lines = pairs.report([one, two]).splitlines()
    assert lines[-1].split() == [
        "tg128",
        "2",
        "peer",
        "240.0",
        "100.0",
        "1",
        "2.40",
        "2.40",
        "2.64",
        "3",
        "3",
        "2",
    ]


def test_rounds_can_be_added_to_those_of_the_same_run_only(tmp_path: Path) -> None:
    path, what = tmp_path / "peers.json", {"model": "m", "dtype": "int8"}
    assert pairs.load(path, what) == []
    pairs.save(path, what, _samples())
    assert pairs.load(path, what) == _samples()
    assert [ratio["rounds"] for ratio in json.loads(path.read_text())["ratios"]] == [2, 3, 2, 3]
    with pytest.raises(ValueError, match="is of another run: its dtype is 'int8', not 'int4'"):
        pairs.load(path, {"dtype": "int4"})


def test_a_child_is_pinned_in_a_session_of_its_own() -> None:
    code = "import os; print(sorted(os.sched_getaffinity(0)), os.getsid(0) == os.getpid())"
    last = sorted(os.sched_getaffinity(0))[-1:]
    said = []
    job = Job([sys.executable, "-c", code], lambda done: {"it": len(said) if said.append(done) else 2.5})
    assert engines.measure([job], 1)["it"].tokens_per_s == 2.5
    (done,) = said
    assert done.output == f"{last} True\n"
    assert done.seconds > 0
    with pytest.raises(RuntimeError, match=r"(?s)failed:.*no luck"):
        engines.run([sys.executable, "-c", "raise SystemExit('no luck')"], ())


@pytest.mark.slow
def test_the_memory_of_a_child_is_its_own() -> None:
    assert engines.run([sys.executable, "-c", "b'x' * 300_000_000"], ()).peak_rss > 300_000_000


def test_nothing_is_built_when_it_is_there_or_must_not_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="without --skip-build"):
        engines.environment(tmp_path, build=False)
    (tmp_path / ".built").write_text("-DGGML_NATIVE=ON")  # by an earlier version, without RPC
    with pytest.raises(FileNotFoundError, match="GGML_RPC=ON"):
        engines.environment(tmp_path, build=False)
    (tmp_path / ".built").write_text(engines.CMAKE_ARGS)
    assert engines.environment(tmp_path, build=True) == tmp_path / "bin/python"
    assert [path.name for path in tmp_path.iterdir()] == [".built"]


def test_a_type_is_made_once_and_the_source_itself_needs_nothing(tmp_path: Path) -> None:
    python = tmp_path / "environment/bin/python"
    source = Path("elsewhere/Tiny.F16.gguf")
    assert engines.requantised(python, source, "as-it-is") == source
    made = tmp_path / "Tiny.F16.Q8_0-pure.gguf"
    made.touch()
    assert engines.requantised(python, source, "Q8_0") == made


@pytest.mark.parametrize("text", ["0", "1,9999"])
def test_more_threads_than_cpus_would_measure_nothing(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["-t", text])
    assert "CPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ("--rpc -t 1", "--threads does not go with --rpc"),
        ("--rpc --startup", "--startup does not go with --rpc"),
        ("--rpc --add", "--add does not go with --rpc"),
        ("--rpc --torch python", "--torch does not go with --rpc"),
        ("--rpc -n 0", "above 0"),
        ("--rpc -p 0", "above 0"),
        ("--against .", "goes with --rpc only"),
    ],
)
def test_options_that_do_not_go_with_rpc(flags: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(flags.split())
    assert word in capsys.readouterr().err


_LISTENER = (
    "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(99)"
)


@pytest.mark.slow
def test_nodes_servers_and_one_process_take_turns(
    tiny_llama: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer's processes are stand-ins; the nodes are real."""

    def command(*asked: object) -> list[str]:
        python, model, servers, rows, prompt, generated = asked
        assert (python, model) == (Path("python"), Path("m.gguf")) and len(set(servers)) == 2  # type: ignore[call-overload]
        speeds = {f"pp{prompt}": 1000 + rows} | ({f"tg{generated}": 5.0} if generated else {})  # type: ignore[operator]
        lines = json.dumps([{"test": test, "avg_ts": speed} for test, speed in speeds.items()])
        return [sys.executable, "-c", f"print({lines!r})"]

    monkeypatch.setattr(chain, "_MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(engines, "llama_rpc", command)
    monkeypatch.setattr(
        engines,
        "llama_server",
        lambda python, at: [sys.executable, "-c", _LISTENER, at.split(":")[1]],
    )
    samples = rpc.compare(chain.checkouts(None), tiny_llama, Path("python"), Path("m.gguf"), 40, 8, 1)
    found = {(s.figure, s.program): s.value for s in samples.taken}
    read, decode = "prompt of 40, tokens/s", "decode of 8, tokens/s"
    assert found[read, "RPC, parts of 64"] == 1064 and found[decode, "RPC, parts of 512"] == 5.0
    for program in ("this", "one process"):
        assert found[read, program] > 0 and found[decode, program] > 0
    monkeypatch.setattr(engines, "llama_server", lambda python, at: [sys.executable, "-c", "pass"])
    with pytest.raises(RuntimeError, match="RPC server on core"):
        rpc.compare(chain.checkouts(None), tiny_llama, Path("python"), Path("m.gguf"), 40, 8, 1)
