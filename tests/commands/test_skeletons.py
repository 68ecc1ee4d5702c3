"""The skeleton of a model: what arrives is what was sent, or one of our errors."""

from __future__ import annotations

import hashlib
import shutil
import struct
import time
from pathlib import Path

import pytest
import trio
from tests.models import TINY
from trio.testing import memory_stream_pair

from shoal import skeletons
from shoal.engine.convert import convert
from shoal.engine.errors import ModelFileError
from shoal.engine.index import CONFIG
from shoal.engine.model_directory import Model
from shoal.net.errors import NodeLostError, RemoteProtocolError
from shoal.skeletons import MOST_BYTES, Skeleton, SkeletonSource, receive_skeleton, skeleton_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("models") / "tiny"
    convert(TINY, path)
    return Model.open(path)


def received(data: bytes) -> Skeleton:
    """What a node makes of these bytes, in pieces of any size, and the end of the stream."""

    async def main() -> Skeleton:
        here, there = memory_stream_pair()
        async with trio.open_nursery() as tasks:

            async def send() -> None:
                for first in range(0, len(data), 1000):
                    await there.send_all(data[first : first + 1000])
                await there.send_eof()

            tasks.start_soon(send)
            return await receive_skeleton(here, "laptop")

    try:
        return trio.run(main)
    except ExceptionGroup as group:
        (error,) = group.exceptions
        raise error from None


def test_a_skeleton_has_all_files_but_those_of_units(model: Model) -> None:
    found = received(skeleton_of(model))
    assert found.hash == model.hash and set(found.files) == {CONFIG, *model.index.common}
    for name, data in found.files.items():
        assert hashlib.sha256(data).hexdigest() == model.index.files[name].sha256


def test_of_a_model_that_is_here_only_the_index_is_read(model: Model) -> None:
    data, asked = skeleton_of(model), list[str]()

    async def main() -> Skeleton:
        here, there = memory_stream_pair()
        size = struct.unpack_from("<I", data)[0]
        await there.send_all(data[: 4 + size])  # and nothing follows

        def is_here(model_hash: str) -> bool:
            asked.append(model_hash)
            return True

        with trio.fail_after(10):
            return await receive_skeleton(here, "laptop", is_here)

    found = trio.run(main)
    assert (found.hash, found.files, asked) == (model.hash, {}, [model.hash])


def test_devices_that_ask_at_once_get_one_and_it_is_not_kept(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []

    def make(model: Model) -> bytes:
        time.sleep(0.05)
        made.append(skeleton_of(model))
        return made[-1]

    monkeypatch.setattr(skeletons, "skeleton_of", make)
    source = SkeletonSource(model)

    async def ask() -> None:
        async with source.body() as body:
            assert body is made[-1]
            await trio.sleep(0.05)

    async def main() -> None:
        async with trio.open_nursery() as tasks:
            for _ in range(32):
                tasks.start_soon(ask)

    trio.run(main)
    assert len(made) == 1 and source._body is None
    trio.run(ask)
    assert made[1:] == made[:1]


@pytest.mark.parametrize(
    ("lie", "error", "why"),
    [
        (lambda data: struct.pack("<I", MOST_BYTES + 1), RemoteProtocolError, "more than are allowed"),
        (lambda data: data[:-1], NodeLostError, "before its model was sent"),
        (lambda data: data[:2], NodeLostError, "before its model was sent"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), RemoteProtocolError, "than its index says"),
        (lambda data: struct.pack("<I", 2) + b"{}", RemoteProtocolError, "the index that laptop sent"),
    ],
)
def test_a_skeleton_that_is_none_is_refused(model: Model, lie: object, error: type, why: str) -> None:
    assert callable(lie)
    with pytest.raises(error, match=why):
        received(lie(skeleton_of(model)))


def test_an_index_that_announces_too_much_is_refused_before_it_is_read(model: Model) -> None:
    index = (model.path / "index.json").read_bytes()
    size = model.index.files[CONFIG].size
    entry = f'"size": {size}'.encode()
    assert index.count(entry) == 1
    larger = index.replace(entry, b'"size": %d' % (MOST_BYTES + 1))
    with pytest.raises(RemoteProtocolError, match="announced files of more than"):
        received(struct.pack("<I", len(larger)) + larger)


def test_a_model_that_was_changed_on_the_head_is_not_sent(model: Model, tmp_path: Path) -> None:
    shutil.copytree(model.path, tmp_path / "copy")
    copy = Model.open(tmp_path / "copy")
    (copy.path / "index.json").write_text("{}")
    with pytest.raises(ModelFileError, match="has changed"):
        skeleton_of(copy)
