"""The wire without I/O: every message there and back in pieces of any size, and what hostile bytes do."""

import json
import random
import struct
from dataclasses import replace

import numpy as np
import pytest

from shoal.engine.batch import Logprobs, Sampling, Want
from shoal.net.errors import LocalProtocolError, MismatchError, NetError, RemoteProtocolError
from shoal.net.message_table import BY_KIND, MESSAGES
from shoal.net.messages import (
    FILE_BYTES,
    PROTOCOL,
    Abort,
    Assign,
    Broken,
    Carried,
    Close,
    Commit,
    Complete,
    Condition,
    Data,
    Epoch,
    Error,
    Failed,
    Fetch,
    FileBytes,
    GetBytes,
    GetStats,
    GetSums,
    Gift,
    Held,
    Hello,
    House,
    Kept,
    Loaded,
    Mask,
    Measure,
    Measured,
    Message,
    Offer,
    Open,
    Pace,
    Pages,
    PairedDevice,
    Peer,
    Ping,
    Pong,
    Prepared,
    Progress,
    Refill,
    Release,
    Result,
    Room,
    Rows,
    SetSampling,
    Shared,
    Source,
    Spare,
    Spares,
    Stats,
    Step,
    Sums,
    Take,
    Tokens,
    Work,
)
from shoal.net.packed import max_step_rows
from shoal.net.tags import counted
from shoal.net.wire import CLOSED, NEED_DATA, WireProtocol
from shoal.planner import Device, LinkSpeed
from shoal.planner.groups import Grouping

TOP = (1 << 64) - 1
EPOCH = Epoch(TOP, (1 << 32) - 1)
OFFER = Offer(
    Device("büro", 10**9, 1.5e10, 2e11, 10**7, 1e-4, 2e-4, ((1, 1e9), (8, 8e9)), 1e9, 2e9),
    *(256, 4, "native (avx2)", True),
)  # fmt: skip
PEER = Peer("Jürgens Pi", "fe80::1", 7001, 12, TOP)
HIDDEN = np.arange(6, dtype=np.float32).reshape(3, 2) - 2.5

EXAMPLES: list[Message] = [
    Hello("control", "büro", TOP, "0.1.0", 1, "ab" * 32, OFFER, TOP),
    Error(9, "it sent garbage"),
    Ping(TOP),
    Pong(0),
    Pong(1, Pace(EPOCH, 2.5, LinkSpeed(1e-3, 1e7, 2e-3))),
    Pong(2, Pace(EPOCH, 1.0, None)),
    Pong(3, Pace(EPOCH, 1.0, None), Progress(EPOCH, 12, 2.5, 0.004, 4096)),
    Pong(4, None, Progress(EPOCH, 0, None, None, 0)),
    Assign(EPOCH, 0, 12, PEER, 128, TOP),
    Assign(EPOCH, 12, 32, None, 1, 0),
    Assign(EPOCH, 0, 12, PEER, 128, 1, (Grouping(1), Grouping(1, 0.004), Grouping(2, 1.5))),
    Assign(EPOCH, 0, 12, PEER, 128, 1, base=6, gives=(Gift(PEER, 12, 14, True),), takes=(Take(3, 4, 5),)),
    Assign(EPOCH, 0, 0, None, 128, 1, base=6, gives=(Gift(PEER, 0, 14),)),
    Prepared(EPOCH, 0.5, 10**9),
    Commit(EPOCH, (Kept(TOP, 12), Kept(1, 0))),
    Commit(EPOCH, (), 4, 12),
    Abort(EPOCH),
    Spare((4, 12)),
    Spares(()),
    Refill(TOP, EPOCH, 0, 1200, 4, 12),
    Carried(TOP, EPOCH, 2048, 4, 130, (1, TOP)),
    Complete(EPOCH),
    House((PairedDevice("laptop", "head", "MIIB"), PairedDevice("phone", "device", "MIIC"))),
    Pages(TOP, EPOCH, 12, 64, 90, b"keys and values"),
    Pong(5, condition=Condition(0.6, True, "the battery is at 20 %")),
    Loaded(EPOCH, 0.25, 10**9, None, (Kept(1, 1200),)),
    Step(7, EPOCH, 3, (1,), Want.NOTHING, part=(0, 12)),
    Release(EPOCH),
    Loaded(EPOCH, 0.25, 10**9),
    Loaded(EPOCH, 0.25, 10**9, Room(40, 256)),
    Broken(EPOCH, 10, "gone", TOP),
    Broken(EPOCH, 10, "stalled", TOP, again=True),
    Broken(EPOCH, 3, "a shard is missing", None),
    Measure(PEER),
    Measured(12, LinkSpeed(1e-4, 1e9), ""),
    Measured(12, None, "refused"),
    GetStats(),
    Stats(EPOCH, Work(3, 3, 0.5), Work(1, 200, 0.25)),
    Stats(None, Work(0, 0, 0.0), Work(0, 0, 0.0)),
    Open(TOP, EPOCH, 2048),
    Open(TOP, EPOCH, 2048, TOP - 1, 1984),
    SetSampling(TOP, EPOCH, 1, Sampling(0.8, 40, 0.9, 0.05, 1.1, TOP, bias=((5, -1.5), (9, 2.0)))),
    Tokens(TOP, EPOCH, (1 << 32) - 1, 0, (0, (1 << 31) - 1)),
    Tokens(1, EPOCH, 2, (1 << 31) - 8192, (5,) * 8192),
    Close(TOP, EPOCH),
    Failed(1, EPOCH, 5, "no room"),
    Step(TOP, EPOCH, 0, (1, 2, 3), Want.NOTHING),
    Step(7, EPOCH, 3, (1,), Want.TOKEN, more=True),
    Step(7, EPOCH, (1 << 31) - 3, (0, (1 << 31) - 1, 5), Want.TOKEN, tags=(5,)),
    Step(7, EPOCH, (1 << 31) - 3, (), Want.TOKEN, HIDDEN, tags=(5,)),
    Step(7, EPOCH, 62, (), Want.NOTHING, HIDDEN, tags=(TOP,)),
    Step(7, EPOCH, 60, (1,) * 200, Want.NOTHING, tags=(0, 1, 2, TOP)),
    Result(TOP, EPOCH, 9, 3, None),
    Result(1, EPOCH, 9, 1, (1 << 31) - 1),
    Step(7, EPOCH, 3, (1, 2), Want.TOKENS, report=64),
    Step(7, EPOCH, 3, (), Want.SCORES, HIDDEN, report=0, told=5),
    Step(7, EPOCH, 3, (1,) * 32, Want.ROWS),
    Step(7, EPOCH, 3, (1, 2), Want.TOKEN, report=0, told=(1 << 32) - 1, masked=True),
    Result(1, EPOCH, 9, 4, 5, logprobs=(Logprobs(-0.5, ()),)),
    Result(1, EPOCH, 9, 4, 5, logprobs=(Logprobs(-0.5, ((7, -0.25), (5, -0.5))),)),
    Result(1, EPOCH, 9, 2, None, tokens=(5, 0)),
    Result(1, EPOCH, 9, 2, None, scores=(-1.5, 0.0)),
    Result(
        *(TOP, EPOCH, 9, 2, None),
        scores=(-1.5, -2.0),
        logprobs=(Logprobs(-1.5, ((1 << 30, -0.25),)), Logprobs(-2.0, ((0, 0.0),))),
    ),
    Rows(TOP, EPOCH, 9, HIDDEN),
    Shared(TOP, EPOCH, 7, 128),
    Mask(TOP, EPOCH, 1, b"\x01\xff"),
    Data(64 * 1024),
    Data(0),
    Hello("control", "phone", 1, "0.1.0", 1, "ab" * 32, replace(OFFER, held=(0, 4)), 1),
    Fetch((0, 4, 5), (Source(PEER, (0, 4)), Source(PEER, (5,)))),
    Fetch((), ()),
    Held((0, 4), 10**9, 10**8, "no space is left"),
    GetBytes("unit-000.safetensors", 2**40, 2**40 + FILE_BYTES),
    GetSums("unit-000.safetensors"),
    FileBytes(2**40, True, b"weights"),
    FileBytes(0, False, bytes(FILE_BYTES)),
    Sums("unit-000.safetensors", b""),
    Sums("unit-000.safetensors", bytes(range(64))),
]


def hello(purpose: str, offer: Offer | None = None) -> Hello:
    return Hello(purpose, "laptop", 1, "0.1.0", 1, "ab" * 32, offer)  # type: ignore[arg-type]


def greeted(message_kind: type, from_dialler: bool | None = None) -> tuple[WireProtocol, WireProtocol]:
    """(sender, receiver) that have greeted each other on a connection where the message may be sent."""
    entry = BY_KIND[message_kind]
    if from_dialler is None:
        from_dialler = bool(entry.down)
    purpose = sorted(entry.down if from_dialler else entry.up)[0]
    dialler, other = WireProtocol(True), WireProtocol(False)
    other.receive_data(b"".join(dialler.send(hello(purpose))))
    assert isinstance(other.next_message(), Hello)
    dialler.receive_data(b"".join(other.send(hello(purpose, OFFER))))
    assert isinstance(dialler.next_message(), Hello)
    return (dialler, other) if from_dialler else (other, dialler)


def same(a: Message, b: object) -> bool:
    if isinstance(a, Step) and isinstance(b, Step) and a.hidden is not None:
        return a == b and b.hidden is not None and np.array_equal(a.hidden, b.hidden)
    if isinstance(a, Rows) and isinstance(b, Rows):
        return a == b and np.array_equal(a.output, b.output)
    return a == b


def frame(message: Message) -> bytes:
    if isinstance(message, Hello):
        return b"".join(WireProtocol(True).send(message))
    return b"".join(greeted(type(message))[0].send(message))


def receiver(message: Message) -> WireProtocol:
    return WireProtocol(False) if isinstance(message, Hello) else greeted(type(message))[1]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_message_arrives_whole_in_bytes_and_with_more_behind_it(message: Message) -> None:
    data = frame(message)

    whole = receiver(message)
    whole.receive_data(data)
    assert same(message, whole.next_message())
    assert whole.next_message() is NEED_DATA

    bytewise, pieces = receiver(message), data if len(data) < 1000 else data[:200]
    for i in range(len(pieces)):
        assert bytewise.next_message() is NEED_DATA
        bytewise.receive_data(pieces[i : i + 1])
    bytewise.receive_data(data[len(pieces) :] or b"S")  # the start of another frame
    assert same(message, bytewise.next_message())

    trailed = receiver(message)
    follow = frame(Error(1, "end"))
    trailed.receive_data(data + follow)
    assert same(message, trailed.next_message())
    assert trailed.next_message() == Error(1, "end")
    trailed.receive_data(b"")
    assert trailed.next_message() is CLOSED


def test_the_examples_are_every_message_and_codes_are_unique() -> None:
    assert {type(message) for message in EXAMPLES} == {entry.kind for entry in MESSAGES}
    assert len({entry.code for entry in MESSAGES}) == len(MESSAGES)


def test_hidden_rows_arrive_aligned_and_writable() -> None:
    sender, other = greeted(Step)
    other.receive_data(b"".join(sender.send(Step(1, EPOCH, 0, (), Want.TOKEN, HIDDEN[::-1]))))
    step = other.next_message()
    assert isinstance(step, Step) and step.hidden is not None
    assert step.hidden.flags.writeable and step.hidden.flags.aligned and step.hidden.flags.c_contiguous
    assert np.array_equal(step.hidden, HIDDEN[::-1])


def header(code: int, size: int, version: int = PROTOCOL, magic: bytes = b"SHOL") -> bytes:
    return struct.pack("<4sHHI", magic, version, code, size)


def control(code: int, body: object) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return header(code, len(data)) + data


def step_body(
    rows: int = 1,
    tokens: tuple[int, ...] = (5,),
    want: int = 1,
    cols: int = 0,
    first: int = 0,
    more: int = 0,
    extra: int = 0,
    masked: int = 0,
    part: tuple[int, int] = (0, 0),
    report: int = 0,
    told: int = 0,
) -> bytes:
    fixed = (1, 2, 3, first, rows, want, more, report, masked, cols, *part, told)
    return struct.pack("<QQIIIBBBBIHHI", *fixed) + struct.pack(f"<{len(tokens)}i", *tokens) + bytes(extra)


PING, ASSIGN, LOADED, OPEN, STEP, RESULT, DATA = 3, 5, 7, 13, 32, 33, 34
GET_BYTES, FILE, SUMS = 28, 38, 39
PAGES, ROWS, MASK, TOKENS = 35, 36, 37, 40


def tokens_body(number: int = 1, first: int = 4, count: int = 2, ids: tuple[int, ...] = (5, 6)) -> bytes:
    return struct.pack("<QQIIII", 1, 2, 3, number, first, count) + struct.pack(f"<{len(ids)}i", *ids)


GOOD_OPEN = {
    "session": 1,
    "epoch": {"coordinator": 1, "counter": 1},
    "context": 10, "source": None, "positions": 0,
}  # fmt: skip


SET_SAMPLING = 30
GOOD_SAMPLING = {
    "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "bias": [],
}  # fmt: skip


def sampling(**changes: object) -> bytes:
    body = {"session": 1, "epoch": GOOD_OPEN["epoch"], "number": 1, "sampling": {**GOOD_SAMPLING, **changes}}
    return json.dumps(body).encode()


def opening(**changes: object) -> dict[str, object]:
    return {**GOOD_OPEN, **changes}


def result_body(
    rows: int = 1, token: int = -1, what: int = 0, report: int = 0, rest: bytes = b"", first: int = 4
) -> bytes:
    return struct.pack("<QQIIIiBB", 1, 2, 3, first, rows, token, what, report) + rest


HOSTILE: dict[str, tuple[bytes, type, str]] = {
    "another protocol": (b"GET / HTTP/1.1\r\n", Ping, "does not speak shoal's protocol"),
    "almost the magic": (b"SHO\x00", Ping, "does not speak shoal's protocol"),
    "one wrong byte": (b"\x00", Ping, "does not speak shoal's protocol"),
    "unknown type": (header(99, 0), Ping, "unknown type 99"),
    "4 GB of rows": (header(STEP, 0xFFFFFFFF), Step, "announced a Step of 4294967295 bytes"),
    "4 GB of JSON": (header(PING, 0xFFFFFFFF), Ping, "the limit is 65536"),
    "a step just too large": (header(STEP, 4 * 2**20 + 1), Step, "the limit is 4194304"),
    "bulk just too large": (header(DATA, 2**16 + 1), Data, "the limit is 65536"),
    "a message of another connection": (control(OPEN, GOOD_OPEN), Ping, "sent Open on a control connection"),
    "a message of the other side": (control(LOADED, {}), Ping, "sent Loaded on a control connection"),
    "a second Hello": (control(1, {}), Ping, "Hello out of turn"),
    "too many bytes of a file": (
        control(GET_BYTES, {"name": "a", "first": 1, "last": 2 + FILE_BYTES}), GetBytes, "are not 1 to 262144"
    ),
    "a file backwards": (control(GET_BYTES, {"name": "a", "first": 2, "last": 2}), GetBytes, "are not 1 to"),
    "no bytes of a file": (header(FILE, 9) + bytes(9), FileBytes, "have 0 bytes of a file"),
    "a busy file": (header(FILE, 10) + bytes(8) + b"\2x", FileBytes, "busy = 2"),
    "half a sum": (header(SUMS, 33) + b"\1a" + bytes(31), Sums, "have not a name and 32"),
    "sums of nothing": (header(SUMS, 33) + bytes(33), Sums, "no file's"),
    "no sums": (header(SUMS, 0), Sums, "of 0 bytes"),
    "no JSON": (control(PING, b"{"), Ping, "Expecting property name"),
    "nothing": (control(PING, b""), Ping, "Expecting value"),
    "not UTF-8": (control(PING, b'{"nonce":"\xff"}'), Ping, "decode"),
    "UTF-16": (control(PING, '{"nonce":1}'.encode("utf-16")), Ping, "decode"),
    "not an object": (control(PING, [1]), Ping, "Ping is not an object"),
    "trailing text": (control(PING, b'{"nonce":1} x'), Ping, "Extra data"),
    "a missing key": (control(PING, {"answers": False}), Ping, "lacks 'nonce'"),
    "an unknown key": (control(PING, {"nonce": 1, "answers": False, "x": 2}), Ping, "unknown key 'x'"),
    "a key twice": (control(PING, b'{"nonce":1,"nonce":2}'), Ping, "duplicate key"),
    "a float for an integer": (control(PING, {"nonce": 1.0, "answers": False}), Ping, "not an integer"),
    "a boolean for an integer": (control(PING, {"nonce": True, "answers": False}), Ping, "not an integer"),
    "text for an integer": (control(PING, {"nonce": "1", "answers": False}), Ping, "not an integer"),
    "null for an integer": (control(PING, {"nonce": None, "answers": False}), Ping, "not an integer"),
    "a negative number": (control(PING, {"nonce": -1, "answers": False}), Ping, "not between"),
    "a number of 65 bits": (control(PING, {"nonce": 1 << 64, "answers": False}), Ping, "not between"),
    "a number of 5000 digits": (control(PING, b'{"nonce":' + b"9" * 5000 + b"}"), Ping, "4300"),
    "NaN": (control(OPEN, b'{"session":NaN}'), Open, "NaN is not a number"),
    "infinity": (control(OPEN, b'{"session":-Infinity}'), Open, "-Infinity is not a number"),
    "deep lists": (control(PING, b"[" * 30000 + b"]" * 30000), Ping, "nested too deeply"),
    "deep objects": (control(PING, b'{"a":' * 10000 + b"1" + b"}" * 10000), Ping, "nested too deeply"),
    "sampling: 1e999": (
        control(SET_SAMPLING, sampling().replace(b'"top_p": 1.0', b'"top_p": 1e999')),
        SetSampling,
        "SetSampling.sampling.top_p is not finite",
    ),
    "sampling: out of range": (
        control(SET_SAMPLING, sampling(top_p=1.5)),
        SetSampling,
        "top_p = 1.5",
    ),
    "sampling: a huge integer": (
        control(SET_SAMPLING, sampling(top_p=10**400)),
        SetSampling,
        "top_p is not finite",
    ),
    "context 0": (control(OPEN, opening(context=0)), Open, "Open.context = 0"),
    "a source that is no number": (control(OPEN, opening(source="1")), Open, "Open.source"),
    "negative positions": (control(OPEN, opening(source=1, positions=-1)), Open, "Open.positions = -1"),
    "an epoch that is no epoch": (control(OPEN, opening(epoch=[1, 2])), Open, "Open.epoch is not an object"),
    "text that moves the cursor": (control(2, {"code": 9, "text": "\x1b[2J"}), Ping, "cannot be printed"),
    "a lone surrogate": (control(2, b'{"code":9,"text":"\\ud800"}'), Ping, "cannot be printed"),
    "endless text": (control(2, {"code": 9, "text": "a" * 1001}), Ping, "1001 characters"),
    "a step shorter than its header": (header(STEP, 3) + bytes(3), Step, "of 3 bytes: the fixed part"),
    "no rows": (control(STEP, step_body(0, ())), Step, "0 rows"),
    "too many rows": (control(STEP, step_body(4097, (1,) * 4097)), Step, "4097 rows"),
    "rows that are not there": (control(STEP, step_body(2)), Step, "2 rows and 0 columns has 48 bytes"),
    "bytes too many": (control(STEP, step_body(extra=4)), Step, "has 52 bytes, not 48"),
    "columns that are not there": (control(STEP, step_body(cols=9)), Step, "not 80"),
    "sizes that overflow": (control(STEP, step_body(4096, (1,), cols=0xFFFFFFFF)), Step, "columns are more"),
    "logits": (control(STEP, step_body(want=2)), Step, "want = 2"),
    "neither more nor not": (control(STEP, step_body(more=2)), Step, "more = 2 and masked = 0"),
    "neither masked nor not": (control(STEP, step_body(masked=2, told=1)), Step, "masked = 2"),
    "a tag too few": (control(STEP, step_body(first=63)), Step, "has 48 bytes, not 56"),
    "tags that are not there": (control(STEP, step_body(4096, (1,))), Step, "has 48 bytes, not 16940"),
    "a part without units": (control(STEP, step_body(part=(4, 4))), Step, "units [4, 4) are no part"),
    "a part that ends before it begins": (control(STEP, step_body(part=(4, 3))), Step, "are no part"),
    "pages shorter than their header": (header(PAGES, 3) + bytes(3), Pages, "Pages of 3 bytes"),
    "pages of no positions": (
        control(PAGES, struct.pack("<QQIIII", 1, 2, 3, 4, 8, 8)), Pages, "of unit 4 are out of range",
    ),
    "pages of a unit out of range": (
        control(PAGES, struct.pack("<QQIIII", 1, 2, 3, 1 << 17, 0, 8)), Pages, "are out of range",
    ),
    "pages of positions out of range": (
        control(PAGES, struct.pack("<QQIIII", 1, 2, 3, 4, 0, (1 << 31) + 1)), Pages, "are out of range",
    ),
    "4 GB of pages": (header(PAGES, 0xFFFFFFFF), Pages, "announced a Pages of 4294967295 bytes"),
    "an unknown want": (control(STEP, step_body(want=255)), Step, "want = 255"),
    "a negative token": (control(STEP, step_body(tokens=(-1,))), Step, "token id -1"),
    "a position out of range": (control(STEP, step_body(first=1 << 31)), Step, "position"),
    "a result of the wrong size": (header(RESULT, 4) + bytes(4), Result, "a Result of 4 bytes"),
    "a result with token -2": (control(RESULT, result_body(token=-2, what=1)), Result, "token id -2"),
    "a result without rows": (control(RESULT, result_body(0)), Result, "0 rows"),
    "a result without its token": (control(RESULT, result_body(what=1)), Result, "token id -1, and what = 1"),
    "a result with a token of nothing": (control(RESULT, result_body(token=3)), Result, "what = 0"),
    "a result of logits": (control(RESULT, result_body(what=2)), Result, "what = 2"),
    "a result of rows": (control(RESULT, result_body(what=5)), Result, "what = 5"),
    "a result with bytes too many": (
        control(RESULT, result_body(token=3, what=1, rest=bytes(4))), Result, "has 38 bytes, not 34",
    ),
    "scores that are not there": (
        control(RESULT, result_body(3, what=4, rest=bytes(8))), Result, "has 42 bytes, not 46",
    ),
    "scores of 4096 rows with all likeliest": (
        control(RESULT, result_body(4096, what=4, report=65)), Result, "not 2129954",
    ),
    "a score that is NaN": (
        control(RESULT, result_body(1, what=4, rest=struct.pack("<f", float("nan")))), Result, "NaN or",
    ),
    "a log-probability that is infinite": (
        control(RESULT, result_body(1, 3, 1, 1, struct.pack("<f", -float("inf")))), Result, "NaN or infinity",
    ),
    "tokens that are negative": (
        control(RESULT, result_body(1, what=3, rest=struct.pack("<i", -9))), Result, "token id -9",
    ),
    "a likeliest token that is negative": (
        control(RESULT, result_body(1, 3, 1, 2, struct.pack("<fif", -1, -9, -1))), Result, "token id -9",
    ),
    "more likeliest than there may be": (control(RESULT, result_body(1, 3, 1, 66)), Result, "of 65 tokens"),
    "log-probabilities of nothing": (control(RESULT, result_body(1, report=1)), Result, "of 0 tokens"),
    "rows shorter than their header": (header(ROWS, 3) + bytes(3), Rows, "Rows of 3 bytes"),
    "rows that are not wanted": (
        control(ROWS, struct.pack("<QQIIII", 1, 2, 3, 4, 33, 1) + bytes(132)), Rows, "33 rows",
    ),
    "rows without columns": (control(ROWS, struct.pack("<QQIIII", 1, 2, 3, 4, 1, 0)), Rows, "0 columns"),
    "rows of too few bytes": (
        control(ROWS, struct.pack("<QQIIII", 1, 2, 3, 4, 2, 3) + bytes(20)), Rows, "have 52 bytes, not 56",
    ),
    "rows that are NaN": (
        control(ROWS, struct.pack("<QQIIIIf", 1, 2, 3, 4, 1, 1, float("nan"))), Rows, "NaN or infinity",
    ),
    "a mask shorter than its header": (header(MASK, 3) + bytes(3), Mask, "a Mask of 3 bytes"),
    "a mask without bits": (control(MASK, struct.pack("<QQII", 1, 2, 3, 4)), Mask, "0 bytes of bits"),
    "a mask without a number": (control(MASK, struct.pack("<QQIIB", 1, 2, 3, 0, 1)), Mask, "number 0"),
    "a mask that is too large": (header(MASK, 2**16 + 1), Mask, "the limit is 65536"),
    "scores of too many rows": (
        control(STEP, step_body(33, (1,) * 33, 4, told=1)), Step, "33 rows want something each",
    ),
    "rows wanted of a part": (control(STEP, step_body(want=5, part=(0, 4))), Step, "rows of a part do"),
    "nothing, and something told": (control(STEP, step_body(want=0, told=7)), Step, "was told 7 things"),
    "a mask that was not told": (control(STEP, step_body(masked=1)), Step, "a mask, which is number 0"),
    "tokens without a number": (control(TOKENS, tokens_body(number=0)), Tokens, "the number 0"),
    "no tokens": (control(TOKENS, tokens_body(count=0)), Tokens, "0 from position 4"),
    "more tokens than there are": (control(TOKENS, tokens_body(count=8192)), Tokens, "not 32800"),
    "too many tokens": (control(TOKENS, tokens_body(count=8193)), Tokens, "8193 from position 4"),
    "tokens beyond all positions": (control(TOKENS, tokens_body(first=(1 << 31) - 1)), Tokens, "2 from"),
    "told tokens that are negative": (control(TOKENS, tokens_body(ids=(5, -5))), Tokens, "token id -5"),
    "tokens shorter than their header": (header(TOKENS, 3) + bytes(3), Tokens, "Tokens of 3 bytes"),
    "reports of rows": (control(STEP, step_body(want=5, report=1)), Step, "log-probabilities of 0 tokens"),
    "reports of nothing": (control(STEP, step_body(want=0, report=9)), Step, "log-probabilities of 8 tokens"),
    "too many reports": (control(STEP, step_body(report=66)), Step, "log-probabilities of 65 tokens"),
    "a mask for scores": (control(STEP, step_body(want=4, told=1, masked=1)), Step, "want = 4 with a mask"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_the_peers_fault_and_say_what_is_wrong(name: str) -> None:
    data, kind, words = HOSTILE[name]
    other = greeted(kind)[1]
    other.receive_data(data)
    with pytest.raises(RemoteProtocolError) as caught:
        other.next_message()
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300
    with pytest.raises(RemoteProtocolError):  # it stays so, whatever comes
        other.next_message()


def test_an_announced_size_is_refused_before_a_byte_of_it_has_come() -> None:
    other = greeted(Step)[1]
    other.receive_data(header(STEP, 0xFFFFFFFF)[:11])
    assert other.next_message() is NEED_DATA
    other.receive_data(header(STEP, 0xFFFFFFFF)[11:])
    with pytest.raises(RemoteProtocolError):
        other.next_message()


@pytest.mark.parametrize(("more", "older"), [(6, "this one"), (-1, "that device")])
def test_another_protocol_version_names_both_and_the_older_device(more: int, older: str) -> None:
    other = WireProtocol(False)
    other.receive_data(header(1, 10, version=PROTOCOL + more))
    both = f"version {PROTOCOL + more} of shoal's protocol and this device {PROTOCOL}"
    with pytest.raises(MismatchError, match=f"{both}: upgrade shoal on {older}"):
        other.next_message()


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 39])
def test_an_end_in_the_middle_of_a_frame_is_the_peers_fault(cut: int) -> None:
    sender, other = greeted(Step)
    data = b"".join(sender.send(Step(1, EPOCH, 0, (1,), Want.TOKEN)))
    other.receive_data(data[:cut])
    assert other.next_message() is NEED_DATA
    other.receive_data(b"")
    with pytest.raises(RemoteProtocolError, match=f"ended after {cut} bytes"):
        other.next_message()


def test_the_first_message_is_hello() -> None:
    other = WireProtocol(False)
    other.receive_data(control(PING, {"nonce": 1}))
    with pytest.raises(RemoteProtocolError, match="Ping out of turn"):
        other.next_message()
    with pytest.raises(LocalProtocolError, match="Ping out of turn"):
        WireProtocol(True).send(Ping(1))


def test_an_answer_for_another_purpose_is_refused() -> None:
    dialler = WireProtocol(True)
    dialler.send(hello("control"))
    dialler.receive_data(b"".join(WireProtocol(True).send(hello("step"))))
    with pytest.raises(RemoteProtocolError, match="Hello for step answers one for control"):
        dialler.next_message()


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Result(1, EPOCH, 0, 1, 3), "may not send Result on a step connection"),
        (Step(1, EPOCH, 0, (), Want.TOKEN), "0 rows"),
        (Step(1, EPOCH, 0, (1, 2, 3), Want.TOKEN, HIDDEN), "3 token ids beside hidden rows"),
        (Step(1, EPOCH, 0, (1, 2), Want.TOKEN, tags=(5,)), "has 1 tags, not 0"),
        (Step(1, EPOCH, 0, (1, 2), Want.TOKEN, told=1 << 32), "Step"),
        (Step(1, EPOCH, 0, (1, 2), Want.NOTHING, told=1), "the last node was told 1 things"),
        (Step(1, EPOCH, 0, (1, 2), Want.TOKEN, masked=True), "with a mask, which is number 0"),
        (Step(1, EPOCH, 0, (1,), Want.LOGITS), "want = 2"),
        (Step(1, EPOCH, 0, (1 << 31,), Want.TOKEN), "Step"),
        (Step(1 << 64, EPOCH, 0, (1,), Want.TOKEN), "Step"),
        (
            Step(1, EPOCH, 0, (), Want.TOKEN, np.zeros((4096, 257), np.float32), tags=(1,) * 64),
            "the limit is 4194304",
        ),
        (Close(-1, EPOCH), "Close.session = -1"),
        (Open(1, EPOCH, 0), "Open.context = 0"),
        (Error(0, ""), "Error.code = 0"),
        (Step(1, EPOCH, 0, (1,) * 33, Want.ROWS), "33 rows want something each"),
        (Step(1, EPOCH, 0, (1,), Want.TOKEN, report=65), "log-probabilities of 65 tokens"),
    ],
)
def test_our_own_mistakes_are_ours(message: Message, words: str) -> None:
    sender, _ = greeted(Step)
    with pytest.raises(LocalProtocolError) as caught:
        sender.send(message)
    assert words in str(caught.value)


def test_data_after_the_end_is_our_mistake() -> None:
    connection = WireProtocol(False)
    connection.receive_data(b"")
    with pytest.raises(LocalProtocolError):
        connection.receive_data(b"x")


def filled(first: int, rows: int, cols: int) -> Step:
    hidden, tags = np.zeros((rows, cols), np.float32), (1,) * counted(first, first + rows)
    return Step(1, EPOCH, first, (), Want.TOKEN, hidden, tags=tags)


@pytest.mark.parametrize("cols", [1, 2, 576, 2048, 8192, 65536])
def test_the_largest_step_fits_and_one_row_more_does_not(cols: int) -> None:
    rows = max_step_rows(cols)
    sender, _ = greeted(Step)
    for first in (0, 63):
        sender.send(filled(first, rows, cols))
    with pytest.raises(LocalProtocolError, match=r"the limit is 4194304|rows are out of range"):
        sender.send(filled(0, rows + 1, cols))


def test_fuzz_a_mutated_stream_gives_messages_or_one_of_our_errors() -> None:
    rng = random.Random(1)
    streams = [(type(m), frame(m)) for m in EXAMPLES if not isinstance(m, Hello | Data)]
    outcomes = set()
    for _ in range(800):
        kind, data = rng.choice(streams)
        mutated = bytearray(data * rng.randint(1, 2))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(mutated))
            match rng.randrange(4):
                case 0:
                    mutated[at] = rng.randrange(256)
                case 1:
                    del mutated[at : at + rng.randint(1, 8)]
                case 2:
                    mutated[at:at] = rng.randbytes(rng.randint(1, 8))
                case _:
                    mutated[at] ^= 1 << rng.randrange(8)
            if not mutated:
                mutated = bytearray(b"S")
        other = greeted(kind)[1]
        at = 0
        try:
            while at < len(mutated):
                piece = mutated[at : at + rng.randint(1, 64)]
                other.receive_data(piece)
                at += len(piece)
                while other.next_message() is not NEED_DATA:
                    pass
            other.receive_data(b"")
            outcomes.add(other.next_message())
        except NetError as error:
            outcomes.add(type(error))
    assert outcomes == {CLOSED, RemoteProtocolError, MismatchError}
