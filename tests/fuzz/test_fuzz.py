"""Bytes of strangers, changed at random: no target crashes, hangs or allocates more than a frame may take.
The same inputs each time, 100,000 in all; `python -m tests.fuzz` has more."""

from __future__ import annotations

import pytest

from .runs import Bad, explore
from .target import Target, shares
from .targets import targets

NAMES = (
    "hello",
    "frames of a connection",
    "a whole connection",
    "frames of the head's port",
    "frames of the head's socket",
    "frames of pairing",
    "token of an invite",
    "certificate",
    "a pairing",
    "house.json",
    "last.json",
    "config.json",
    "safetensors",
    "gguf",
    "files of a checkpoint",
    "chat template",
    "index.json",
    "model of the head",
    "sums of a file",
    "record of a fetched file",
    "bodies of shoal serve",
    "HTTP of shoal serve",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return targets(tmp_path_factory.mktemp("fuzz"))


def test_all_targets_are_tested(found: dict[str, Target]) -> None:
    assert tuple(found) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_input_is_read_wrongly(found: dict[str, Target], name: str) -> None:
    assert explore(name, found[name], shares(found, 100_000)[name], seed=1) is None


@pytest.mark.parametrize(
    ("read", "how"),
    [
        (lambda data: data[50], "IndexError: index out of range"),
        (lambda data: bytearray(data[0] << 17), "it allocates"),
    ],
)
def test_what_reads_wrongly_is_found(read: object, how: str) -> None:
    target = Target(read, (bytes(100),), (ValueError,))  # type: ignore[arg-type]
    bad = explore("none", target, 10_000, seed=1)
    assert isinstance(bad, Bad)
    assert how in bad.how
