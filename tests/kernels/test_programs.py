"""Whole programs: a row's result depends on that row and its history, never on the batch, the threads, the
instruction set or the caller's floating-point environment."""

from __future__ import annotations

import os
import shutil
import subprocess
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest

from .harness import FLAGS, ROOT, Program, Rows, describe, ffi, isas, library_path, pointer, same
from .weights import f32, f64, floats, random_weight

VOCAB = 133


def llama(kind, heads=6, kv_heads=2, dim=32, hidden=97, inner=160, max_rows=300):
    """Two layers and a head; matrices take turns to be int8, int4 and int4 with mins. Queries and values have
    a bias, and each head of queries and keys a norm."""
    rng = np.random.default_rng(1)
    p = Program(max_rows=max_rows)
    kinds = cycle(("Q8", "Q4", "Q4M"))
    weight = lambda rows, cols: p.weight(random_weight(next(kinds), rng, rows, cols))  # noqa: E731
    table, frequencies = weight(VOCAB, hidden), p.weight(f64(1e4 ** (-np.arange(dim // 2) / (dim // 2))))
    x = p.op("EMBED", p.buffer(hidden), -1, table)
    angles = p.op("ANGLES", p.buffer(dim), -1, frequencies)
    normed, gated = p.buffer(hidden, "Q8"), p.buffer(inner, "Q8")
    qkv, both = p.buffer((heads + 2 * kv_heads) * dim), p.buffer(2 * inner)
    attended, attended_q8 = p.buffer(heads * dim), p.buffer(heads * dim, "Q8")
    for _ in range(2):
        norm, state = p.weight(f32(rng.uniform(0.5, 1.5, hidden))), p.state(kv_heads, dim, kind)
        p.op("NORM", normed, x, norm, epsilon=1e-5)
        p.op(
            "MATMUL",
            qkv,
            normed,
            weight(heads * dim, hidden),
            weight(kv_heads * dim, hidden),
            weight(kv_heads * dim, hidden),
            n_biases=3,
            biases=[p.weight(f32(floats(rng, heads * dim))), -1, p.weight(f32(floats(rng, kv_heads * dim)))],
        )
        for at, n in ((0, heads), (heads * dim, kv_heads)):
            norm_of_heads = p.weight(f32(rng.uniform(0.5, 1.5, dim)))
            p.op("HEAD_NORM", qkv, -1, norm_of_heads, column=at, heads=n, head_dim=dim, epsilon=1e-6)
        p.op("ROPE", qkv, -1, angles=angles, heads=heads + kv_heads, head_dim=dim)
        p.op("STORE", -1, qkv, state=state, key=heads * dim, value=(heads + kv_heads) * dim)
        p.op("ATTEND", attended, qkv, state=state, heads=heads, scale=dim**-0.5)
        p.op("QUANTISE", attended_q8, attended)
        p.op("MATMUL", x, attended_q8, weight(hidden, heads * dim), accumulate=1)
        p.op("NORM", normed, x, norm, epsilon=1e-5)
        p.op("MATMUL", both, normed, weight(inner, hidden), weight(inner, hidden))
        p.op("GATE", gated, both)
        p.op("MATMUL", x, gated, weight(hidden, inner), accumulate=1)
    last = p.op("NORM", p.buffer(hidden, "Q8", "WANTED_ROWS"), x, norm, epsilon=1e-5)
    logits = p.op("MATMUL", p.output(p.buffer(VOCAB, "F32", "WANTED_ROWS")), last, table)
    p.op("SAMPLE", -1, logits)
    return p


def row_by_row(executor, tokens):
    sequence, logits = Rows(1, wanted=1), []
    for sequence.first in range(len(tokens)):
        logits.append(executor.run([sequence], tokens=tokens[sequence.first : sequence.first + 1]).outputs[0])
    return np.concatenate(logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "F32", "Q8"])
def test_batches_drawn_at_random_give_the_bits_of_one_row_at_a_time(kind):
    rng = np.random.default_rng(0)
    lengths = (290, 130, 75, 260)
    tokens = [rng.integers(0, VOCAB, n).astype(np.int32) for n in lengths]
    p = llama(kind)
    one = p.open()
    expected = [row_by_row(one, t) for t in tokens]
    for isa in isas():
        for threads in (1, 2, 3):
            executor = p.open(isa, threads)
            done, got = [Rows(0, wanted=0) for _ in lengths], [[] for _ in lengths]
            while open_ := [i for i, s in enumerate(done) if s.first + s.rows < lengths[i]]:
                chosen = [i for i in open_ if rng.random() < 0.7] or open_[:1]
                for i in chosen:
                    s = done[i]
                    s.first += s.rows
                    s.rows = int(min(rng.choice([1, 1, 2, 5, 9, 33, 64]), lengths[i] - s.first))
                    s.wanted = s.rows
                batch = np.concatenate(
                    [tokens[i][done[i].first : done[i].first + done[i].rows] for i in chosen]
                )
                logits = executor.run([done[i] for i in chosen], tokens=batch).outputs[0]
                for i, part in zip(
                    chosen, np.split(logits, np.cumsum([done[i].rows for i in chosen])[:-1]), strict=True
                ):
                    got[i].append(part)
            for parts, whole in zip(got, expected, strict=True):
                same(np.concatenate(parts), whole)


def test_rewinding_and_running_again_changes_nothing():
    p = llama("F16")
    executor, tokens = p.open(isas()[-1], 2), np.arange(100, dtype=np.int32)
    sequence = Rows(100, wanted=100)
    first = executor.run([sequence], tokens=tokens).outputs[0]
    sequence.first = sequence.rows = sequence.wanted = 50
    same(executor.run([sequence], tokens=tokens[50:]).outputs[0], first[50:])


def test_buffers_that_never_live_together_share_memory():
    p = Program(max_rows=64)
    x = p.input(64)
    for _ in range(50):
        x = p.op("NORM", p.buffer(64), x, p.weight(f32(np.ones(64))), epsilon=0.0)
    p.output(x)
    executor = p.open()
    assert executor.workspace_bytes() == 2 * 64 * 64 * 4
    data = floats(np.random.default_rng(0), 64, 64)
    wide = data.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True))
    np.testing.assert_allclose(executor.run([Rows(64)], [data]).outputs[0], expected, rtol=1e-5)


def resident_bytes():
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def test_few_rows_touch_little_of_a_large_workspace():
    """Of 1200 buffers, all alive at the end, two rows are 150 kB, or one huge page: not a small page of each
    buffer, which would be 5 MB."""
    p = Program(max_rows=4096)
    x, weight = p.input(16), p.weight(f32(np.ones(16)))
    for _ in range(1200):
        p.output(p.op("NORM", p.buffer(16), x, weight, epsilon=0.0))
    warm, executor = p.open(), p.open()
    assert executor.workspace_bytes() == 1201 * 4096 * 16 * 4
    few = floats(np.random.default_rng(0), 2, 16)
    warm.run([Rows(2)], [few], want=False)
    before = resident_bytes()
    executor.run([Rows(2)], [few], want=False)
    assert resident_bytes() - before < 3 * 2**20


def test_a_cancelled_run_stops_between_two_ops():
    p = llama("F16")
    flag = ffi.new("int32_t *", 1)
    for threads in (1, 3):
        executor = p.open("auto", threads)
        batch, keep = p_batch(p)
        batch.cancel = flag
        times = ffi.new("uint64_t[]", len(p.ops))
        batch.op_ns = times
        with pytest.raises(Exception, match="CANCELLED"):
            executor.run_raw(batch)
        assert times[len(p.ops) - 1] == 0
        batch.cancel = ffi.NULL
        executor.run_raw(batch)  # what was cancelled can be run again
        assert all(times[i] > 0 for i in range(len(p.ops)) if p.ops[i]["kind"] != 9)
        assert keep


def p_batch(p):
    """A batch of one row at position 0, with everything that it points at."""
    keep: list[object] = []
    batch = ffi.new("shoal_batch *")
    batch.sequences, batch.n_sequences = describe(p, [Rows(1, wanted=1)], keep), 1
    batch.tokens = pointer(keep, "int32_t[]", np.zeros(1, np.int32))
    outputs = ffi.new("float *[]", 1)
    batch.outputs = outputs
    batch.drawn = pointer(keep, "int32_t[]", np.zeros(1, np.int32))
    return batch, [outputs, keep]


def test_inputs_and_logits_must_be_finite():
    p = Program(max_rows=4)
    x = p.input(32)
    p.output(p.op("MATMUL", p.buffer(3), x, p.weight(f32(np.full((3, 32), 3e38)))))
    for isa in isas():
        executor = p.open(isa)
        for bad in (np.nan, np.inf, -np.inf):
            data = np.zeros((2, 32), np.float32)
            data[1, 31] = bad
            with pytest.raises(Exception, match="NONFINITE: input 0"):
                executor.run([Rows(2)], [data])
        with pytest.raises(Exception, match="NONFINITE: output 0"):
            executor.run([Rows(2)], [np.ones((2, 32))])


@pytest.mark.slow
def test_flush_to_zero_set_by_the_caller_changes_nothing(tmp_path):
    """The driver of tests/arm over two shapes: all sets, 1 to 3 threads, with and without flush-to-zero."""
    driver = tmp_path / "driver"
    shutil.copy(library_path(), tmp_path / "libshoal.so")
    source = ROOT / "tests" / "arm" / "driver.c"
    command = [
        "cc",
        *FLAGS,
        str(source),
        "-o",
        str(driver),
        "-L",
        str(tmp_path),
        "-lshoal",
        f"-Wl,-rpath,{tmp_path}",
    ]
    subprocess.run(command, check=True)

    def lines(isa, threads, flush):
        command = [str(driver), isa, str(threads), str(flush), "20", "22"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    expected = lines("scalar", 1, 0)
    assert expected.count("\n") > 100
    assert lines("scalar", 2, 1) == expected
    for isa in isas()[1:]:
        for threads in (1, 2, 3):
            for flush in (0, 1):
                assert lines(isa, threads, flush) == expected, (isa, threads, flush)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", isas())
def test_outputs_that_are_not_asked_for_change_no_others(isa, threads):
    """The first is written for nothing else, so its op is left out; the second is read on the way to the
    third, and the fourth is changed after it was written: their ops have to run."""
    rng = np.random.default_rng(4)
    p, cols = Program(max_rows=40), 70
    x, norm = p.input(cols), p.weight(f32(rng.uniform(0.5, 1.5, cols)))
    p.op("NORM", p.output(p.buffer(cols)), x, norm, epsilon=1e-5)
    read = p.op("NORM", p.output(p.buffer(cols)), x, norm, epsilon=1e-3)
    matrix = p.weight(f32(floats(rng, 50, cols)))
    p.op("MATMUL", p.output(p.buffer(50)), read, matrix)
    changed = p.op("NORM", p.output(p.buffer(cols)), x, norm, epsilon=1e-2)
    head_norm = p.weight(f32(rng.uniform(0.5, 1.5, 10)))
    p.op("HEAD_NORM", changed, -1, head_norm, column=10, heads=3, head_dim=10, epsilon=1e-6)
    executor, data = p.open(isa, threads), floats(rng, 40, cols)
    whole = executor.run([Rows(40)], [data]).outputs
    assert len({output.tobytes() for output in whole}) == 4
    for asked in ([0], [1], [2], [3], [0, 2], [1, 3], [2, 3], []):
        executor.run([Rows(40)], [floats(rng, 40, cols)])  # what the workspace held before is of no use
        found = executor.run([Rows(40)], [data], want=asked).outputs
        for i, output in enumerate(found):
            same(output, whole[i] if i in asked else np.full_like(output, np.nan))
