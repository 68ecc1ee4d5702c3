"""What the library refuses: hostile programs and batches, each with words that name the culprit."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import numpy as np
import pytest
from tests.patience import LIMIT

from .harness import (
    ROOT,
    Program,
    Refused,
    Rows,
    describe,
    ffi,
    library,
    library_path,
    pointer,
    pointers,
    pool,
)
from .test_programs import VOCAB, llama
from .weights import ENUM, PAGE, f32, f64

BIG = 2**31 - 1


def kind(name):
    return ENUM[f"OP_{name}"]


def first(p, name):
    """The first op of a kind, in the C table."""
    return next(op for op in (p.ops + i for i in range(p.n_ops)) if op.kind == kind(name))


def op(name, **fields):
    def change(p):
        row = first(p, name)
        for field, value in fields.items():
            if field in ("w", "b"):
                {"w": row.weights, "b": row.biases}[field][0] = value
            else:
                setattr(row, {"x": "in"}.get(field, field), value)

    return change


def row(table, at, **fields):
    def change(p):
        for field, value in fields.items():
            setattr(getattr(p, table)[at], field, value)

    return change


def top(**fields):
    def change(p):
        for field, value in fields.items():
            setattr(p, field, value)

    return change


def listed(table, *values):
    def change(p):
        array = ffi.new("int32_t[]", values)
        KEEP.append(array)
        setattr(p, table, array)
        setattr(p, f"n_{table}", len(values))

    return change


KEEP: list[object] = []
# In llama(): buffers 0 x, 1 angles, 2 normed q8, 3 gated q8, 4 qkv, 5 gate|up, 6 attended, 7 attended q8,
# 8 final q8, 9 logits (both wanted rows); weights 0 the table q8, 1 the frequencies f64, 2 a norm, 3 q.
PROGRAMS = {
    "negative count": (top(n_ops=-1), "ops"),
    "too many ops": (top(n_ops=1 << 15), "ops"),
    "table missing": (top(ops=ffi.NULL), "table of ops is NULL"),
    "no weights table": (top(weights=ffi.NULL), "table of weights is NULL"),
    "no rows": (top(max_rows=0), "max_rows"),
    "too many rows": (top(max_rows=BIG), "max_rows"),
    "more wanted than rows": (top(max_wanted=65), "max_wanted"),
    "buffer type": (row("buffers", 0, type=2), "buffer 0: type"),
    "buffer without columns": (row("buffers", 0, cols=0), "buffer 0: 0 columns"),
    "buffer too wide": (row("buffers", 0, cols=BIG), "buffer 0"),
    "buffer domain": (row("buffers", 0, domain=2), "buffer 0: no domain"),
    "state type": (row("states", 0, type=3), "state 0: type"),
    "head_dim not a multiple": (row("states", 0, head_dim=24), "state 0: head_dim"),
    "head_dim too large": (row("states", 0, head_dim=1024), "state 0: head_dim"),
    "no kv heads": (row("states", 0, kv_heads=0), "kv heads"),
    "kv heads overflow": (row("states", 0, kv_heads=BIG), "kv heads"),
    "weight type": (row("weights", 0, type=9), "weight 0: no type"),
    "weight rows": (row("weights", 0, rows=BIG), "weight 0: shape"),
    "weight cols": (row("weights", 0, cols=-5), "weight 0: shape"),
    "weight short": (row("weights", 0, data_bytes=100), "weight 0: 100 bytes"),
    "weight larger than told": (row("weights", 0, rows=VOCAB + 100), "weight 0"),
    "weight NULL": (row("weights", 0, data=ffi.NULL), "weight 0: 0 bytes"),
    "scales NULL": (row("weights", 0, scales=ffi.NULL), "scales"),
    "scales short": (row("weights", 0, scales_bytes=2), "scales"),
    "scales where none belong": (row("weights", 2, scales_bytes=2), "weight 2"),
    "mins where none belong": (row("weights", 0, mins_bytes=2), "weight 0: 2 bytes of mins"),
    "int8 said to be int4": (row("weights", 0, type=ENUM["Q4"]), "weight 0"),
    "kind": (op("EMBED", kind=77), "no such kind"),
    "negative kind": (op("EMBED", kind=-1), "no such kind"),
    "out missing": (op("EMBED", out=-1), "writes no buffer"),
    "out beyond": (op("NORM", out=99), "writes no buffer"),
    "in beyond": (op("NORM", x=99), "reads no buffer"),
    "in not written": (op("NORM", x=6), "not written"),
    "in is out": (op("NORM", x=0, out=0), "reads what it writes"),
    "matmul in place": (op("MATMUL", out=2), "reads what it writes"),
    "weight beyond": (op("NORM", w=999), "no such weight"),
    "weight negative": (op("NORM", w=-1), "no such weight"),
    "no weights": (op("MATMUL", n_weights=0), "number of weights"),
    "five weights": (op("MATMUL", n_weights=5), "number of weights"),
    "negative weights": (op("NORM", n_weights=-1), "number of weights"),
    "embed into q8": (op("EMBED", out=2), "type of the output"),
    "embed from f64": (op("EMBED", w=1, out=1), "type of a weight"),
    "embed other columns": (op("EMBED", out=4), "columns"),
    "angles of another width": (op("ANGLES", out=0), "columns"),
    "angles of f32": (op("ANGLES", w=2), "type of a weight"),
    "norm by a matrix": (op("NORM", w=0), "type of a weight"),
    "norm epsilon": (op("NORM", epsilon=float("nan")), "epsilon"),
    "norm negative epsilon": (op("NORM", epsilon=-1.0), "epsilon"),
    "norm into other columns": (op("NORM", out=3), "columns"),
    "norm scatters": (row("buffers", 0, domain=1), "rows that the output holds"),
    "matmul parts too many rows": (op("MATMUL", n_weights=2, n_biases=0), "rows"),
    "matmul of f32 by q8": (op("MATMUL", x=0), "does not fit the input's"),
    "matmul adds to nothing": (op("MATMUL", accumulate=1), "was not written"),
    "matmul accumulates twice": (op("MATMUL", accumulate=2), "neither 0 nor 1"),
    "biases of some parts": (op("MATMUL", n_biases=2), "number of biases"),
    "five biases": (op("MATMUL", n_biases=5, n_weights=5), "number of"),
    "negative biases": (op("MATMUL", n_biases=-1), "number of biases"),
    "bias beyond": (op("MATMUL", b=999), "no such bias"),
    "bias below": (op("MATMUL", b=-2), "no such bias"),
    "bias of other rows": (op("MATMUL", b=2), "bias is no f32 vector"),
    "bias a matrix": (op("MATMUL", b=0), "bias is no f32 vector"),
    "bias of f64": (op("MATMUL", b=1), "bias is no f32 vector"),
    "head norm of nothing": (op("HEAD_NORM", out=5), "was not written"),
    "head norm of q8": (op("HEAD_NORM", out=2), "type of the output"),
    "head norm by a matrix": (op("HEAD_NORM", w=0), "type of a weight"),
    "head norm of another width": (op("HEAD_NORM", w=2), "columns are not those of a head"),
    "head norm of too many heads": (op("HEAD_NORM", heads=11), "heads do not fit"),
    "head norm of no heads": (op("HEAD_NORM", heads=0), "heads do not fit"),
    "head norm beyond": (op("HEAD_NORM", column=129), "heads do not fit"),
    "head norm below": (op("HEAD_NORM", column=-1), "heads do not fit"),
    "head norm overflow": (op("HEAD_NORM", heads=BIG, head_dim=BIG), "heads do not fit"),
    "head norm of narrow heads": (op("HEAD_NORM", head_dim=0), "heads do not fit"),
    "head norm epsilon": (op("HEAD_NORM", epsilon=float("nan")), "epsilon"),
    "rope without angles": (op("ROPE", angles=-1), "no angles"),
    "rope by itself": (op("ROPE", angles=4), "no angles"),
    "rope of too many heads": (op("ROPE", heads=999), "heads"),
    "rope heads overflow": (op("ROPE", heads=BIG, head_dim=BIG), "heads"),
    "rope of narrow heads": (op("ROPE", head_dim=16), "heads"),
    "rope of nothing": (op("ROPE", out=5), "was not written"),
    "state beyond": (op("STORE", state=2), "no such state"),
    "state negative": (op("ATTEND", state=-1), "no such state"),
    "keys beyond": (op("STORE", key=300), "beyond"),
    "values beyond": (op("STORE", value=BIG), "beyond"),
    "keys negative": (op("STORE", key=-1), "beyond"),
    "queries beyond": (op("ATTEND", column=200), "query heads"),
    "queries no multiple": (op("ATTEND", heads=5), "query heads"),
    "no queries": (op("ATTEND", heads=0), "query heads"),
    "queries overflow": (op("ATTEND", heads=BIG - 1), "query heads"),
    "attend scale": (op("ATTEND", scale=float("inf")), "scale"),
    "attend into itself": (op("ATTEND", out=4), "reads what it writes"),
    "quantise into f32": (op("QUANTISE", out=0), "type of the output"),
    "gate of odd columns": (op("GATE", x=6), "twice"),
    "gate activation": (op("GATE", activation=7), "activation"),
    "sample of all rows": (op("SAMPLE", x=0), "rows that the input holds"),
    "input of q8": (listed("inputs", 2), "input 0"),
    "input beyond": (listed("inputs", 99), "input 0"),
    "input twice": (listed("inputs", 6, 6), "twice"),
    "input of wanted rows": (listed("inputs", 9), "all rows"),
    "output of q8": (listed("outputs", 2), "output 0"),
    "output negative": (listed("outputs", -1), "output 0"),
}


def refusal(p):
    handle, error = ffi.new("shoal_executor **"), ffi.new("char[]", 256)
    status = library().shoal_open(p, pool(1), ENUM["ISA_SCALAR"], handle, error, 256)
    assert handle[0] == ffi.NULL
    assert status == ENUM["E_PROGRAM"]
    return ffi.string(error).decode()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_is_refused(name):
    change, words = PROGRAMS[name]
    keep: list[object] = []
    p = llama("F16", max_rows=64).table(keep)
    change(p)
    assert re.search(words, refusal(p)), refusal(p)


def test_frequencies_must_be_ones_that_angles_are_exact_for():
    for bad in (float("nan"), 1.5, float("inf")):
        p = Program()
        p.output(p.op("ANGLES", p.buffer(4), -1, p.weight(f64([1.0, bad]))))
        with pytest.raises(Refused, match="inverse frequency"):
            p.open()


def test_an_output_that_nothing_writes():
    p = Program()
    p.output(p.buffer(4))
    with pytest.raises(Refused, match="never written"):
        p.open()


def test_a_set_that_is_not_here():
    for isa in (3, 6, 7, 8, -1, BIG):
        if library().shoal_isa_available(isa):
            continue
        handle, error = ffi.new("shoal_executor **"), ffi.new("char[]", 256)
        keep: list[object] = []
        assert (
            library().shoal_open(llama("F16").table(keep), pool(1), isa, handle, error, 256) == ENUM["E_ISA"]
        )
        assert b"no kernels" in ffi.string(error)


def test_null_handles_and_short_messages():
    lib, error = library(), ffi.new("char[]", 8)
    assert lib.shoal_open(ffi.NULL, pool(1), 0, ffi.new("shoal_executor **"), error, 8) == ENUM["E_PROGRAM"]
    assert ffi.string(error) == b"the pro"
    assert lib.shoal_open(ffi.NULL, pool(1), 0, ffi.NULL, ffi.NULL, 0) == ENUM["E_PROGRAM"]
    assert lib.shoal_run(ffi.NULL, ffi.NULL, ffi.NULL, 0) == ENUM["E_PROGRAM"]
    lib.shoal_close(ffi.NULL)
    lib.shoal_pool_close(ffi.NULL)
    assert lib.shoal_pool_open(0) == ffi.NULL
    assert lib.shoal_pool_open(100000) == ffi.NULL


SEQUENCES = {
    "no rows": ({"rows": 0}, "0 rows"),
    "negative first": ({"first": -1}, "position -1"),
    "positions overflow": ({"first": BIG - 1}, "position"),
    "too many rows": ({"rows": 70, "wanted": 1, "history": ffi.NULL}, "more than 64 rows"),
    "wanted": ({"wanted": 2}, "wanted 2"),
    "draws from nothing": ({"wanted": 0}, "logits of 0 rows"),
    "sample": ({"sample": 2}, "draws"),
    "pages NULL": ({"pages": ffi.NULL}, "table of pages"),
    "pages too few": ({"first": PAGE}, "table of pages"),
    "stride": ({"pages_stride": 2**62}, "pages_stride"),
    "no history": ({"history": ffi.NULL}, "no history"),
}
SAMPLING = {
    "temperature": (float("nan"), "finite"),
    "top_p": (0.0, "top_p"),
    "min_p": (1.5, "min_p"),
    "repetition_penalty": (0.0, "repetition penalty"),
    "top_k": (-1, "top_k"),
    "presence_penalty": (float("inf"), "finite"),
    "frequency_penalty": (float("nan"), "finite"),
    "n_biases": (1, "tables that are NULL"),
}


def batch_of(p, n=1, tokens=(1, 2, 3)):
    """n sequences of three rows, as C sees them, and what must stay alive."""
    keep: list[object] = []
    batch = ffi.new("shoal_batch *")
    sampling = {"temperature": 1.0, "repetition_penalty": 1.2}
    rows = [Rows(3, 0, 3, 1, history=np.zeros(3, np.int32), sampling=sampling) for _ in range(n)]
    batch.sequences, batch.n_sequences = describe(p, rows, keep), n
    batch.tokens = pointer(keep, "int32_t[]", np.array(tokens * n, np.int32))
    batch.outputs = pointers(keep, [np.zeros((3 * n, VOCAB), np.float32)])
    batch.drawn = pointer(keep, "int32_t[]", np.zeros(3 * n, np.int32))
    return batch, keep


@pytest.fixture(scope="module")
def opened():
    p = llama("F16", max_rows=64)
    return p, p.open()


def writable(batch, at=0):
    return ffi.cast("shoal_sequence *", batch.sequences) + at


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_hostile_sequence_is_refused(opened, name):
    p, executor = opened
    fields, words = SEQUENCES[name]
    batch, _keep = batch_of(p)
    executor.run_raw(batch)
    for field, value in fields.items():
        setattr(writable(batch), field, value)
    with pytest.raises(Refused, match=words):
        executor.run_raw(batch)


@pytest.mark.parametrize("name", SAMPLING)
def test_hostile_sampling_is_refused(opened, name):
    p, executor = opened
    value, words = SAMPLING[name]
    batch, _keep = batch_of(p)
    setattr(writable(batch).sampling, name, value)
    with pytest.raises(Refused, match=words):
        executor.run_raw(batch)


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        ({VOCAB: 1.0}, f"token {VOCAB}"),
        ({-1: 1.0}, "token -1"),
        ({3: float("nan")}, "token 3 is not finite"),
        (dict.fromkeys(range(VOCAB + 1), 1.0), "biases"),
    ],
    ids=["beyond", "negative", "not finite", "too many"],
)
def test_hostile_biases_are_refused(opened, bias, words):
    _p, executor = opened
    rows = Rows(3, 0, 3, 1, history=np.zeros(3, np.int32), sampling={"bias": bias})
    with pytest.raises(Refused, match=words):
        executor.run([rows], tokens=[1, 2, 3])


def test_a_mask_allows_a_token(opened):
    _p, executor = opened
    rows = Rows(3, 0, 3, 1, history=np.zeros(3, np.int32), sampling={"allowed": np.zeros(VOCAB, bool)})
    with pytest.raises(Refused, match="no token is allowed"):
        executor.run([rows], tokens=[1, 2, 3])


@pytest.mark.parametrize(("reported", "most"), [(-1, 9), (66, 99), (5, 4)])
def test_hostile_numbers_of_log_probabilities_are_refused(opened, reported, most):
    p, executor = opened
    batch, keep = batch_of(p)
    batch.most_reported = most
    batch.reports = pointer(keep, "int32_t[]", np.zeros(99, np.int32))
    batch.logprobs = pointer(keep, "float[]", np.zeros(99, np.float32))
    writable(batch).reported = reported
    with pytest.raises(Refused, match=f"log-probabilities of {reported} tokens"):
        executor.run_raw(batch)
    batch.most_reported, writable(batch).reported, batch.logprobs = 9, 2, ffi.NULL
    with pytest.raises(Refused, match="tables are NULL"):
        executor.run_raw(batch)


@pytest.mark.parametrize(
    ("given", "reported", "sample", "words"),
    [
        ([0, 1, VOCAB], 1, 0, f"the given token {VOCAB}"),
        ([0, -1, 2], 1, 0, "the given token -1"),
        ([0, 1, 2], 0, 0, "none to report"),
        ([0, 1, 2], 1, 1, "or drawn ones"),
        ([0, 1, 2], 1, 3, "or drawn ones"),
    ],
)
def test_hostile_given_tokens_are_refused(opened, given, reported, sample, words):
    _p, executor = opened
    rows = Rows(3, 0, 3, sample, reported=reported, given=given)
    with pytest.raises(Refused, match=words):
        executor.run([rows], tokens=[1, 2, 3])


@pytest.mark.parametrize("token", [-1, VOCAB, BIG, -BIG])
def test_tokens_that_are_not_in_the_vocabulary(opened, token):
    p, executor = opened
    batch, _keep = batch_of(p, tokens=(1, token, 3))
    with pytest.raises(Refused, match=f"token {token}"):
        executor.run_raw(batch)
    batch, _keep = batch_of(p)
    history = ffi.new("int32_t[]", [0, 0, token])
    writable(batch).history = history
    with pytest.raises(Refused, match=f"token {token} at position 2"):
        executor.run_raw(batch)


def test_a_history_must_fit_every_sampler():
    p = llama("F16", max_rows=64)
    hidden = p.buffers[0][1]
    assert hidden < VOCAB
    few = p.buffer(hidden, "F32", "WANTED_ROWS")
    p.op("SAMPLE", -1, p.op("NORM", few, 0, p.weight(f32(np.ones(hidden))), epsilon=1e-5))
    executor = p.open()
    batch, _keep = batch_of(p)
    executor.run_raw(batch)
    history = ffi.new("int32_t[]", [0, 0, VOCAB - 1])
    writable(batch).history = history
    with pytest.raises(Refused, match=f"token {VOCAB - 1} at position 2"):
        executor.run_raw(batch)


def test_two_sequences_must_not_write_one_page(opened):
    p, executor = opened
    batch, _keep = batch_of(p, n=2)
    executor.run_raw(batch)
    writable(batch, 1).pages = writable(batch, 0).pages
    with pytest.raises(Refused, match="sequences 0 and 1 write the same page"):
        executor.run_raw(batch)


@pytest.mark.parametrize("field", ["sequences", "tokens", "outputs", "drawn"])
def test_missing_tables_of_a_batch(opened, field):
    p, executor = opened
    batch, _keep = batch_of(p)
    setattr(batch, field, ffi.NULL)
    with pytest.raises(Refused, match="PROGRAM"):
        executor.run_raw(batch)


def test_a_missing_page_and_a_missing_input(opened):
    p, executor = opened
    batch, _keep = batch_of(p)
    pages = ffi.new("void *[]", 2)  # both states, one page each, NULL
    writable(batch).pages = pages
    with pytest.raises(Refused, match="page 0 of state 0 is NULL"):
        executor.run_raw(batch)
    p = Program()
    p.output(p.input(4))
    executor = p.open()
    for table in (ffi.NULL, ffi.new("float *[1]")):
        batch, _keep = batch_of(p)
        batch.inputs = table
        with pytest.raises(Refused, match="input 0 is NULL"):
            executor.run_raw(batch)


@pytest.mark.slow
def test_programs_changed_at_random_never_crash():
    command = [sys.executable, "-m", "tests.kernels.fuzz", "0", "1500", str(library_path())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = ast.literal_eval(done.stdout)
    assert outcomes["open E_PROGRAM"] > 500
    assert outcomes["run OK"] > 200
    assert outcomes["run E_PROGRAM"] > 100
