"""The head's socket: what an app asks there has the same answers as in one process, and no client harms
another."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
from tests.models import tiny_chat_model

import shoal
from shoal.answering import LocalEngine
from shoal.engine.batch import Logprobs, Result, Sampling
from shoal.engine.errors import NoPlanError, ShoalError
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage
from shoal.grammars import GrammarError, Grammars, Masks
from shoal.local import choice, frames, server, unix_socket
from shoal.local.client import RemoteEngine, _Request, connect, running
from shoal.local.reconnecting import ReconnectingEngine
from shoal.local.server import Head, serve
from shoal.net.errors import AddressInUseError, MismatchError, NodeLostError
from shoal.results import Completion, Timings
from shoal.status import DeviceStatus, Status

CONTEXT, GREEDY = 300, Sampling()
GRAMMAR = """start: ("sea" | "ships")+ "!\\n\""""
LIVELY: Any = {"temperature": 1.2, "seed": 9, "end": ()}
LONG: Any = {"max_tokens": None, **LIVELY}
NOW = Status(
    1, "0.1.0", "tiny", "aa", 6, CONTEXT, "serving", "", 1, (DeviceStatus("laptop", "here:1", "ready"),),
    (), None, 0, 0.0, 0, 0, 0, (), (),
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.open(tiny_chat_model(tmp_path_factory.mktemp("socket")))


@pytest.fixture(scope="module")
def local(model: Model) -> Iterator[LocalEngine]:
    with Stage(model, 0, model.n_units) as stage:
        engine = LocalEngine(stage)
        yield engine
        engine.close()


@contextmanager
def head(directory: Path, model: Model, engine: LocalEngine, status: Callable[[], Status]) -> Iterator[Path]:
    directory.mkdir(mode=0o700)
    path = directory / "head.sock"
    with serve(path, Head(model, engine, lambda: CONTEXT, status)):
        yield path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Model, local: LocalEngine) -> Iterator[Path]:
    long = tmp_path_factory.mktemp("x" * 100)  # more than a socket's path may have
    with head(long / "run", model, local, lambda: NOW) as path:
        yield path


@contextmanager
def connected(path: Path) -> Iterator[RemoteEngine]:
    engine = connect(path)
    assert engine is not None
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture(scope="module")
def llms(served: Path, model: Model, local: LocalEngine) -> Iterator[tuple[shoal.LLM, shoal.LLM]]:
    """The model here, and the model behind the socket."""
    with connected(served) as engine:
        yield shoal.LLM.over(model, local, CONTEXT), shoal.LLM.over(model, engine, CONTEXT)


def masks(llm: shoal.LLM, grammar: str = GRAMMAR) -> Masks:
    return Grammars(llm.model, llm.tokenizer).masks(grammar)


def untimed(made: Any) -> Any:
    if isinstance(made, list):
        return [untimed(one) for one in made]
    if isinstance(made, Completion):
        usage = replace(made.usage, cached_tokens=0)  # depends on what was asked before
        return replace(made, timings=Timings(0, 0), usage=usage)
    return made.tolist() if isinstance(made, np.ndarray) else made


@pytest.mark.parametrize(
    "ask",
    [
        lambda llm: llm.generate("Once upon", max_tokens=20, **LIVELY),
        lambda llm: llm.chat(["Hello", "What is a shoal?", "The sea"], max_tokens=12, **LIVELY),
        lambda llm: llm.generate("Once upon", n=3, max_tokens=8, temperature=1.0, seed=5),
        lambda llm: llm.generate("Once", max_tokens=8, logprobs=3, repetition_penalty=1.3, **LIVELY),
        lambda llm: llm.generate("Once", max_tokens=6, logit_bias={70: 40.0, 71: -1e6}),
        lambda llm: llm.generate("Once", max_tokens=None, stop="e", **LIVELY),
        lambda llm: llm.score(["Ships sail on the sea.", " Paris"], prompt="The"),
        lambda llm: llm.embed(["A boat on the sea. " * 10, "Butter"], pooling="last"),
        lambda llm: llm.classify("The soup was cold.", ["good", "bad"]),
        lambda llm: llm.generate("Once", n=2, max_tokens=30, temperature=1.0, seed=1, allow=masks(llm)),
    ],
    ids=["one", "list", "draws", "logprobs", "bias", "stop", "score", "embed", "classify", "grammar"],
)
def test_answers_are_those_of_one_process(
    llms: tuple[shoal.LLM, shoal.LLM], ask: Callable[[shoal.LLM], Any]
) -> None:
    here, there = llms
    assert untimed(ask(there)) == untimed(ask(here))


def test_sessions_and_streams(llms: tuple[shoal.LLM, shoal.LLM]) -> None:
    chats = []
    for llm in llms:
        with llm.session(system="You are a fisherman.", max_tokens=8, **LIVELY) as session:
            first = session.send("Good morning!")
            second = session.send("And then?")
            assert second.usage.cached_tokens > first.usage.prompt_tokens
            pieces = session.stream("What did you catch?")
            next(pieces)
            pieces.close()  # how much of it was read is a matter of time
            assert session.send("Why?").tokens
            chats.append([message.content for message in session.messages[:5]])
    assert chats[0] == chats[1]


@pytest.mark.parametrize("cached", [None, 0, 77])
@pytest.mark.parametrize("logprobs", [(), (Logprobs(-0.5, ((3, -0.5),)),)])
def test_tokens_travel(cached: int | None, logprobs: tuple[Logprobs, ...]) -> None:
    token = frames.Token(5, 1234, logprobs, cached)
    data = frames.frame(token)
    kind, size = frames.announced(data[:12], requests=False)
    assert (kind, size) == (frames.Token, len(data) - 12)
    assert frames.decoded(kind, data[12:]) == token


def test_large_results_travel_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "ROWS_BYTES", 3 * 5 * 4)
    rows = np.arange(35, dtype=np.float32).reshape(7, 5)
    logprobs = tuple(Logprobs(-float(i), ((i, -0.5),)) for i in range(7))
    whole = Result(0, 20, 7, output=rows, tokens=tuple(range(7)), scores=(0.1,) * 7, logprobs=logprobs)
    parts = frames.parts_of(3, whole)
    assert [(part.request, part.first, part.rows) for part in parts] == [(3, 20, 3), (3, 23, 3), (3, 26, 1)]
    found = [frames.result_of(part) for part in parts]
    assert np.array_equal(np.concatenate([one.output for one in found if one.output is not None]), rows)
    assert sum((one.tokens for one in found), ()) == whole.tokens
    assert sum((one.scores for one in found), ()) == whole.scores
    assert sum((one.logprobs for one in found), ()) == whole.logprobs
    for lie in (replace(parts[0], rows=2), replace(parts[0], output="AAAA"), replace(parts[0], output="?")):
        with pytest.raises(ValueError, match=r"reshape|base64|has results of|buffer size"):
            frames.result_of(lie)


def test_errors_are_those_of_one_process(
    llms: tuple[shoal.LLM, shoal.LLM], tmp_path: Path, model: Model, local: LocalEngine
) -> None:
    for llm in llms:
        with pytest.raises(shoal.ContextError, match="prompt has"):
            llm.generate("x" * CONTEXT)
        with pytest.raises(shoal.ContextError, match="text has"):
            llm.embed("x" * (CONTEXT + 1))
        with pytest.raises(ValueError, match="100"):
            llm.generate("Once", logprobs=100)
    there = llms[1]
    with pytest.raises(ShoalError, match="`allow` is not possible through the head"):
        there.generate("Once", allow=lambda tokens: None)
    with pytest.raises(ShoalError, match="`allow` is not possible through the head"):
        there.session(allow=lambda tokens: None)
    with pytest.raises(GrammarError, match="the schema cannot be used"):
        there.generate("Once", allow=masks(there, "start: fish"))

    def status() -> Status:
        raise NoPlanError("12 MB are missing")

    with head(tmp_path / "run", model, local, status) as path, connected(path) as engine:
        assert shoal.LLM.over(model, engine, CONTEXT).generate("Once", max_tokens=1).tokens
        with pytest.raises(NoPlanError, match=r"^12 MB are missing$"):
            engine.status()


def test_the_head_tells_of_itself(served: Path, model: Model) -> None:
    welcome = running(served)
    assert welcome == frames.Welcome(os.getpid(), shoal.__version__, 0, str(model.path), model.hash, CONTEXT)
    with connected(served) as engine:
        assert (engine.status(), engine.welcome) == (NOW, welcome)


def test_who_waits_for_an_answer_is_told_why(
    tmp_path: Path, model: Model, local: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "LOOK_SECONDS", 0.01)
    now, said = [NOW], list[str]()
    with head(tmp_path / "run", model, local, lambda: now[0]) as path, connected(path) as engine:
        with choice.waiting_told(engine, said.append):
            engine._requests[0] = _Request(lambda message: None, lambda error: None)  # it never ends
            now[0] = replace(NOW, phase="waiting", reason="phone is lost")
            wait_for(lambda: len(said) == 1)
            now[0] = NOW
            wait_for(lambda: len(said) == 2)
        del engine._requests[0]
    assert said == ["the head is not ready (phone is lost): the answer comes when it is", "the head is ready"]


class Raw:
    """A client that says what it likes. Its `with` block ends the connection."""

    def __init__(self, path: Path) -> None:
        self.stream = socket.socket(socket.AF_UNIX)
        self.stream.settimeout(60)
        with unix_socket.short(path) as name:
            self.stream.connect(name)
        assert isinstance(self.receive(), frames.Welcome)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()

    def receive(self) -> object:
        """What is received next; None at the end."""
        with suppress(ConnectionResetError):  # the server has not read all that was sent
            return frames.receive(self.stream, requests=False)
        return None

    def begin(self, number: int, **changes: Any) -> None:
        fields: Any = {"sampling": Sampling(temperature=1.2), "context": CONTEXT, "max_tokens": None}
        asked: Any = {"end": "", "report": None, "session": None, "grammar": None, **fields, **changes}
        self.stream.sendall(frames.frame(frames.Begin(number, frames.packed([5, 6, 7]), **asked)))


def test_a_client_that_leaves_ends_its_work(tmp_path: Path, model: Model) -> None:
    with Stage(model, 0, model.n_units) as stage, ExitStack() as stack:
        engine = LocalEngine(stage, share_prefixes=False)
        stack.callback(engine.close)
        path = stack.enter_context(head(tmp_path / "run", model, engine, lambda: NOW))
        with Raw(path) as client:
            client.stream.sendall(frames.frame(frames.OpenSession(1, Sampling(temperature=1.2), CONTEXT)))
            client.begin(1)
            client.begin(2, session=1)
            seen = set()
            while seen != {1, 2}:
                token = client.receive()
                assert isinstance(token, frames.Token)
                seen.add(token.request)
            assert stage.kv_bytes > 0
        wait_for(lambda: stage.kv_bytes == 0 and not engine._batcher._scheduler.running)


def wait_for(true: Callable[[], bool]) -> None:
    never = threading.Event()
    for _ in range(6000):
        if true():
            return
        never.wait(0.01)
    raise AssertionError("it has not become true")


def test_a_client_that_does_not_read_loses_its_own_answers(
    served: Path, llms: tuple[shoal.LLM, shoal.LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "MOST_BACKLOG", 100 * 1024)
    with Raw(served) as stalled, llms[1].generate("Once upon", stream=True, **LONG) as stream:
        next(stream)
        for number in range(32):
            stalled.begin(number)
        assert list(stream) and stream.completion.finish_reason == "length"
        found = list(iter(stalled.receive, None))
        assert found and not any(isinstance(message, frames.End) for message in found)


def odd(code: int, body: bytes, magic: bytes = frames.MAGIC, size: int | None = None) -> bytes:
    length = len(body) if size is None else size
    return frames.HEADER.pack(magic, frames.VERSION, code, length) + body


def altered(**changes: Any) -> bytes:
    body = {
        "request": 1, "tokens": "AAAAAA==", "first": 0, "want": "scores", "context": 9, "report": None,
    }  # fmt: skip
    return odd(2, json.dumps(body | changes).encode())


def begin(
    prompt: Sequence[int] = (5,),
    sampling: Sampling = GREEDY,
    session: int | None = None,
    grammar: str | None = None,
    context: int = 9,
) -> bytes:
    ids = frames.packed(prompt)
    return frames.frame(frames.Begin(1, ids, sampling, context, None, "", None, session, grammar))


BEGUN = begin(context=CONTEXT)
ODD = {
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown type": odd(9, b"{}"),
    "a reply": frames.frame(frames.End(1, None, "")),
    "too long": odd(3, b"", size=1 << 20),
    "far too long": odd(1, b"", size=(1 << 32) - 1),
    "no JSON": odd(3, b"nonsense"),
    "another type": altered(first="0"),
    "unknown key": altered(more=1),
    "negative": altered(first=-1),
    "unknown want": altered(want="logits"),
    "the same number twice": BEGUN + BEGUN,
    "the same session twice": 2 * frames.frame(frames.OpenSession(1, Sampling(), 9)),
}
WRONG = {
    "no base64": altered(tokens="§"),
    "no u32": altered(tokens="AAAA"),
    "a token that the model has not": altered(tokens=frames.packed([1, 1 << 31])),
    "a longer text than the context": altered(tokens=frames.packed([1] * 10)),
    "a longer context than the model's": altered(context=1 << 30, tokens=frames.packed([1] * 200)),
    "a session that is not open": begin(session=77),
    "an empty prompt": begin([]),
    "a bias beyond the vocabulary": begin(sampling=Sampling(bias=((1 << 30, 1.0),))),
    "a grammar that is none": begin(grammar=frames.packed_text("start: fish")),
    "a grammar that is no base64": begin(grammar="§"),
    "a grammar that is no text": begin(grammar="/w=="),
    "a pattern that repeats too much": begin(grammar=frames.packed_text("start: /(a{999}){999}/")),
    "a schema that takes minutes": begin(
        grammar=frames.packed_text('start: %json {"type": "integer", "multipleOf": 1000000007}')
    ),
    "a grammar that is too large": begin(grammar=frames.packed_text("x" * ((1 << 20) + 1))),
}


def test_what_is_odd_is_refused_while_an_answer_goes_on(
    served: Path, llms: tuple[shoal.LLM, shoal.LLM]
) -> None:
    with llms[1].generate("Once upon", stream=True, **LONG) as stream:
        for name, data in ODD.items():
            with Raw(served) as client:
                client.stream.sendall(data)
                *_, last = iter(client.receive, None)
                assert isinstance(last, frames.Fault) and last.code, name
        for name, data in WRONG.items():
            with Raw(served) as client:
                client.stream.sendall(data)
                end = client.receive()
                assert isinstance(end, frames.End) and end.code is not None, (name, end)
                client.begin(2, max_tokens=1)
                assert isinstance(client.receive(), frames.Token), name
        assert next(stream) and list(stream)


def test_the_end_of_a_head_ends_what_was_asked(tmp_path: Path, model: Model, local: LocalEngine) -> None:
    with ExitStack() as stack:
        path = stack.enter_context(head(tmp_path / "run", model, local, lambda: NOW))
        engine = connect(path)
        assert engine is not None
        llm = shoal.LLM.over(model, engine, CONTEXT)
        stream = llm.generate("Once", stream=True, **LONG)
        next(stream)
        stack.close()
        with pytest.raises(NodeLostError, match="has ended"):
            list(stream)
        with pytest.raises(NodeLostError, match="has ended"):
            llm.generate("Once")
        engine.close()
    assert connect(path) is None
    assert not local._batcher._scheduler.running


def test_who_stays_asks_the_next_head(
    tmp_path: Path, model: Model, local: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = tmp_path / "shoal"
    with head(place, model, local, lambda: NOW):
        first = connect()
        assert first is not None
    with closing(ReconnectingEngine(first)) as engine:
        llm = shoal.LLM.over(model, engine, CONTEXT)
        with pytest.raises(NodeLostError, match="start `shoal up` again"):
            llm.generate("Once")
        session: Any = {"max_tokens": 5, **LIVELY}
        here, there = shoal.LLM.over(model, local, CONTEXT).session(**session), None
        for _ in range(2):
            place.rmdir()
            with head(place, model, local, lambda: NOW):
                assert llm.generate("Once", max_tokens=3, **LIVELY).usage.completion_tokens == 3
                there = there or llm.session(**session)
                for _ in range(2):
                    assert untimed(there.send("Hello")) == untimed(here.send("Hello"))
        place.rmdir()
        engine._engine.welcome = replace(engine._engine.welcome, hash="another")
        with (
            head(place, model, local, lambda: NOW),
            pytest.raises(MismatchError, match="another model now"),
        ):
            llm.generate("Once")


def test_there_is_one_head_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert connect() is None
    with unix_socket.claimed() as path:
        assert path == unix_socket.socket_path() == tmp_path / "shoal" / "head.sock"
        with pytest.raises(AddressInUseError, match=f"process {os.getpid()}"), unix_socket.claimed():
            pass
        with socket.socket(socket.AF_UNIX) as left:  # by a head that was killed
            left.bind(str(path))
        assert connect() is None
    (tmp_path / "shoal").chmod(0o755)
    with pytest.raises(ShoalError, match="other users may use"), unix_socket.claimed():
        pass
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert unix_socket.directory() == tmp_path / "cache" / "shoal" / "run"


def test_another_version_is_told(tmp_path: Path) -> None:
    path = tmp_path / "head.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def speak() -> None:
            with listener.accept()[0] as client:
                client.sendall(frames.HEADER.pack(frames.MAGIC, frames.VERSION + 1, 32, 0))

        threading.Thread(target=speak).start()
        with pytest.raises(MismatchError, match="restart `shoal up`"):
            connect(path)
