"""`shoal bench`: which steps are timed, what is counted as read and computed, and what is printed.

The counts are compared with sums over the published configuration, written out here."""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shoal.arguments import build_parser
from shoal.benchmark import Case, all_cases, peak_rss, time_case, work
from shoal.cli import main
from shoal.engine.backends.native import isa_names
from shoal.engine.batch import Result, Run, Want
from shoal.engine.convert import convert
from shoal.engine.errors import ContextError, ShoalError
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions
from shoal.peaks import Peaks, peaks_of

CHECKPOINT = Path(__file__).resolve().parents[1] / "fixtures/tiny-llama"
CONFIG = json.loads((CHECKPOINT / "config.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    target = tmp_path_factory.mktemp("models") / "tiny"
    convert(CHECKPOINT, target, dtype="f32")
    return Model.open(target)


def parse(flags: str) -> argparse.Namespace:
    return build_parser().parse_args(["bench", "m", *flags.split()])


def bench(model: Model, flags: str) -> int:
    return main(["--traceback", "bench", str(model.path), *flags.split()])


class RecordingStage(Stage):
    """A stage that remembers which positions each batch had, and what was wanted."""

    def run(self, batch: Sequence[Run]) -> list[Result]:
        if not hasattr(self, "seen"):
            self.seen: list[list[tuple[int, int, int, Want]]] = []
        self.seen.append([(run.sequence, run.first, len(run.tokens), run.want) for run in batch])
        return super().run(batch)


class Speed:
    """Loops of known speeds, which count how often they were asked."""

    def __init__(self, macs: float | None = None) -> None:
        self.asked, self.macs = 0, macs

    def bytes_per_s(self) -> float:
        self.asked += 1
        return 1e9 * self.asked

    def macs_per_s(self) -> float | None:
        return self.macs


def recorded(model: Model, case: Case, repetitions: int) -> tuple[RecordingStage, Speed, list[int]]:
    speed = Speed()
    with RecordingStage(model, 0, model.n_units, StageOptions(backend="numpy", max_rows=8)) as stage:
        samples, loops = time_case(stage, case, repetitions, speed)
    assert loops == [1e9 * (i + 1) for i in range(speed.asked)]
    assert stage.kv_bytes == 0
    return stage, speed, samples


def matrices() -> tuple[int, int, int]:
    """(weights of one layer's matrices, of the head, keys and values of a position and layer)."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    head_dim = CONFIG.get("head_dim") or hidden // CONFIG["num_attention_heads"]
    queries, keys = CONFIG["num_attention_heads"] * head_dim, CONFIG["num_key_value_heads"] * head_dim
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * inner
    return layer, CONFIG["vocab_size"] * hidden, 2 * keys


def test_the_flags_are_those_of_llama_bench() -> None:
    args = parse("-p 512,64 -n 128 -d 0,2048 -t 1,2 -r 3 --batch 1,4,8 -o csv --isa avx2")
    assert (args.n_prompt, args.n_gen, args.n_depth) == ((512, 64), (128,), (0, 2048))
    assert (args.threads, args.batch, args.repetitions) == ((1, 2), (1, 4, 8), 3)
    assert (args.output, args.backend, args.isa) == ("csv", "auto", "avx2")
    bare = parse("")
    assert (bare.n_prompt, bare.n_gen, bare.n_depth, bare.threads) == ((512,), (128,), (0,), None)
    assert (bare.batch, bare.repetitions, bare.output) == ((1,), 5, "md")


@pytest.mark.parametrize("flags", ["-t 0", "-t 1,", "-d x", "-p -1", "--batch 0", "-r 0", "-o sql"])
def test_wrong_flags_are_refused(flags: str) -> None:
    with pytest.raises(SystemExit) as end:
        parse(flags)
    assert end.value.code == 2


def test_rows_come_by_threads_then_depth_prompts_first() -> None:
    cases = all_cases((1, 2), (0, 2048), (512,), (128,), (1, 4))
    assert [(c.threads, c.name, c.sequences) for c in cases[:6]] == [
        (1, "pp512", 1),
        (1, "tg128", 1),
        (1, "tg128", 4),
        (1, "pp512 @ d2048", 1),
        (1, "tg128 @ d2048", 1),
        (1, "tg128 @ d2048", 4),
    ]
    assert [(c.threads, c.tokens, c.context) for c in cases[-2:]] == [(2, 128, 2176), (2, 512, 2176)]
    assert [c.name for c in all_cases((1,), (0,), (0,), (16,), (1,))] == ["tg16"]


def test_a_prompt_starts_from_its_depth_each_time(tiny: Model) -> None:
    stage, speed, samples = recorded(tiny, Case(1, 10, 11, 0, 1), repetitions=2)
    depth = [[(0, 0, 8, Want.NOTHING)], [(0, 8, 2, Want.TOKEN)]]
    prompt = [[(0, 10, 8, Want.NOTHING)], [(0, 18, 3, Want.TOKEN)]]
    assert stage.seen == depth + 3 * prompt  # one of the three warms up
    assert (len(samples), speed.asked) == (2, 0)
    assert min(samples) > 0


def test_sequences_generate_side_by_side(tiny: Model) -> None:
    stage, speed, samples = recorded(tiny, Case(1, 3, 0, 6, 2), repetitions=2)
    depth = [[(s, 0, 3, Want.TOKEN)] for s in range(2)]
    steps = [[(s, 3 + i, 1, Want.TOKEN) for s in range(2)] for i in range(6)]
    assert stage.seen == depth + steps[:4] + steps + steps
    assert (len(samples), speed.asked) == (2, 2)


def test_what_a_repetition_computes_and_reads(tiny: Model) -> None:
    layer, head, state = matrices()
    layers, hidden = CONFIG["num_hidden_layers"], CONFIG["hidden_size"]
    assert work(tiny, Case(1, 5, 12, 0, 1)) == (12 * layers * layer + head, 0)
    macs, read = work(tiny, Case(1, 5, 0, 3, 2))
    assert macs == 3 * 2 * (layers * layer + head)
    # f32: matrices, two norms a layer and the last one; of the embedding a row.
    step = 4 * (layers * (layer + 2 * hidden) + head + hidden + hidden)
    element = {"f16": 2, "f32": 4}[tiny.kv_dtype]
    assert read == 3 * step + 2 * (6 + 7 + 8) * layers * state * element


@pytest.mark.slow
def test_json_says_what_was_measured(tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(tiny, "-p 5 -n 3 -d 0,2 -t 1 -r 3 --batch 1,2 -o json --backend numpy") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["test"], row["n_sequences"]) for row in rows] == [
        ("pp5", 1), ("tg3", 1), ("tg3", 2), ("pp5 @ d2", 1), ("tg3 @ d2", 1), ("tg3 @ d2", 2)
    ]  # fmt: skip
    for row in rows:
        tokens = (row["n_prompt"] or row["n_gen"]) * row["n_sequences"]
        assert row["samples_ts"] == pytest.approx([tokens * 1e9 / ns for ns in row["samples_ns"]])
        assert row["avg_ts"] == pytest.approx(statistics.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(statistics.stdev(row["samples_ts"]))
        assert len(row["samples_ns"]) == 3
        assert (row["backends"], row["isa"], row["n_threads"]) == ("numpy", "numpy", 1)
        assert (row["loop_bytes_per_s"] is None) == (row["n_gen"] == 0)
        assert row["peak_macs_per_s"] is None  # numpy has no dot products of its own
        assert row["model_hash"] == tiny.hash
        assert row["load_ns"] > 0
        assert row["peak_rss"] > 1e7
    layer, head, _ = matrices()
    norms = (2 * CONFIG["num_hidden_layers"] + 1) * CONFIG["hidden_size"]
    shared = 1 if CONFIG["tie_word_embeddings"] else 2
    assert rows[0]["model_n_params"] == CONFIG["num_hidden_layers"] * layer + shared * head + norms


@pytest.mark.slow
def test_csv_and_table_have_a_line_a_row(tiny: Model, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "-p 4 -n 2 -r 1 -t 1 --backend numpy"
    assert bench(tiny, f"{flags} -o csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["test"], row["stddev_ts"], row["n_gen"]) for row in rows] == [
        ("pp4", "0.0", "0"),
        ("tg2", "0.0", "2"),
    ]
    assert bench(tiny, flags) == 0
    header, rule, *lines = capsys.readouterr().out.splitlines()
    assert [header.split("|")[i].strip() for i in (1, 8, 9)] == ["model", "test", "t/s"]
    assert set(rule) == set("|-:")
    assert [line.split("|")[8].strip() for line in lines] == ["pp4", "tg2"]
    assert {len(text.split("|")) for text in (header, rule, *lines)} == {19}


def test_too_long_and_nothing_are_errors_before_any_work(tiny: Model) -> None:
    with pytest.raises(ContextError, match=r"tg8 @ d100000 needs a context of 100008 tokens"):
        bench(tiny, "-p 0 -n 8 -d 100000")
    with pytest.raises(ShoalError, match="nothing to measure"):
        bench(tiny, "-p 0 -n 0")


@pytest.mark.parametrize("threads", [1, 3])
def test_the_read_loop_reads_each_line_once(threads: int) -> None:
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 1 << 63, size, dtype=np.uint64) for size in (100_000, 7, 19, 8)]
    whole = [array[: len(array) // 8 * 8] for array in arrays]  # lines of 64 bytes
    with Peaks(arrays, threads, None) as peaks:
        assert peaks.bytes == sum(array.nbytes for array in whole)
        for fetch in (False, True):
            seconds, seen = peaks.read(1, fetch=fetch)
            assert seconds > 0
            assert seen == np.bitwise_xor.reduce(np.concatenate(whole))
            assert [peaks.read(passes, fetch=fetch)[1] for passes in (2, 3)] == [0, seen]
        assert (peaks.bytes_per_s() or 0) > 0
        assert peaks.macs_per_s() is None


@pytest.mark.parametrize("isa", [name for name in isa_names() if name != "scalar"])
def test_every_instruction_set_has_a_loop_of_dot_products(isa: str) -> None:
    speeds = []
    for threads in (1, 2):
        with Peaks([], threads, isa) as peaks:
            speeds.append(peaks.macs_per_s() or 0)
            assert peaks.bytes_per_s() is None
    assert min(speeds) > 1e8
    assert max(speeds) < 1e14  # no machine computes so fast: the loop was not optimised away


def test_scalar_has_no_peak_and_no_library_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    with Peaks([np.zeros(64)], 1, "scalar") as peaks:
        assert peaks.macs_per_s() is None
    monkeypatch.setattr("shoal.peaks.available", lambda: "not built")
    with Peaks([np.zeros(64)], 1, "avx2") as peaks:
        assert (peaks.bytes_per_s(), peaks.macs_per_s()) == (None, None)


def test_prompts_are_held_against_dot_products(tiny: Model) -> None:
    with Stage(tiny, 0, tiny.n_units, StageOptions(backend="numpy")) as stage:
        assert time_case(stage, Case(1, 0, 4, 0, 1), 2, Speed(5e9))[1] == [5e9, 5e9]


def test_what_is_read_is_what_decoding_reads(tiny: Model) -> None:
    """All but the norms, and the table, of which a token reads one row."""
    layer, head, _ = matrices()
    with Stage(tiny, 0, tiny.n_units, StageOptions(threads=1)) as stage, peaks_of(stage) as peaks:
        assert peaks.bytes == pytest.approx(4 * (layer * CONFIG["num_hidden_layers"] + head), rel=0.01)


def test_peak_memory_counts_what_was_touched() -> None:
    held = np.ones(12_500_000)
    assert held.nbytes < peak_rss() < 100 * held.nbytes
