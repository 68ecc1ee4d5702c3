"""Rounds of measurements of several engines, and ratios of pairs: speeds drift, so that only what ran one
right after the other is compared. Knows no engine; what measures comes in as a function."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shoal.text_table import table

OURS = "shoal"
_MB = 1e6


@dataclass(frozen=True, slots=True)
class Reached:
    """What one process reached in one test."""

    tokens_per_s: float
    peak_rss: int
    """Bytes of the whole process at its highest."""


Measure = Callable[[str, int], Mapping[str, Reached]]
"""(engine, threads) -> by the name of the test, what fresh processes of that engine reached."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One test of one engine in one round."""

    round: int
    engine: str
    threads: int
    test: str
    tokens_per_s: float
    peak_rss: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """shoal over a peer, of the pairs of all rounds in which both ran."""

    test: str
    threads: int
    peer: str
    peer_threads: int
    """The number of threads, up to `threads`, with which the peer is faster by its median."""
    shoal_tokens_per_s: float
    peer_tokens_per_s: float
    """Medians."""
    median: float
    low: float
    high: float
    rounds: int
    shoal_rss: int
    peer_rss: int
    """Medians of the processes' highest, in bytes."""


def sample(
    measure: Measure, engines: Sequence[str], threads: Sequence[int], rounds: range
) -> Iterator[Sample]:
    """All rounds. In each, for each number of threads, the engines one after the other; the first of one
    round is the last of the next."""
    for number in rounds:
        order = engines if number % 2 == 0 else engines[::-1]
        for count in threads:
            for engine in order:
                for test, reached in measure(engine, count).items():
                    yield Sample(number, engine, count, test, reached.tokens_per_s, reached.peak_rss)


def ratios(samples: Sequence[Sample]) -> list[Ratio]:
    """A ratio for each test, peer and number of threads that has a pair; pairs are of the same round."""
    found = []
    peers = sorted({item.engine for item in samples} - {OURS})
    for test, threads in sorted({(item.test, item.threads) for item in samples if item.engine == OURS}):
        shoal = _by_round(samples, OURS, test, threads)
        for peer in peers:
            counts = {i.threads for i in samples if i.engine == peer and i.test == test}
            by_count = {count: _by_round(samples, peer, test, count) for count in counts if count <= threads}
            if by_count:
                best = max(by_count, key=lambda count: _median(by_count[count].values(), "tokens_per_s"))
                found.append(_ratio(shoal, by_count[best]))
    return found


def _ratio(shoal: Mapping[int, Sample], peer: Mapping[int, Sample]) -> Ratio:
    ours, theirs = next(iter(shoal.values())), next(iter(peer.values()))
    both = sorted(shoal.keys() & peer.keys())
    pairs = [shoal[number].tokens_per_s / peer[number].tokens_per_s for number in both]
    return Ratio(
        test=ours.test,
        threads=ours.threads,
        peer=theirs.engine,
        peer_threads=theirs.threads,
        shoal_tokens_per_s=_median(shoal.values(), "tokens_per_s"),
        peer_tokens_per_s=_median(peer.values(), "tokens_per_s"),
        median=statistics.median(pairs),
        low=min(pairs),
        high=max(pairs),
        rounds=len(pairs),
        shoal_rss=round(_median(shoal.values(), "peak_rss")),
        peer_rss=round(_median(peer.values(), "peak_rss")),
    )


def _by_round(samples: Sequence[Sample], engine: str, test: str, threads: int) -> dict[int, Sample]:
    key = (engine, test, threads)
    return {i.round: i for i in samples if (i.engine, i.test, i.threads) == key}


def _median(samples: Any, field: str) -> float:
    return float(statistics.median(getattr(item, field) for item in samples))


def report(found: Sequence[Ratio]) -> str:
    """A table; the spread is that of the pairs, smallest to largest."""
    header = (
        "test",
        "threads",
        "peer",
        "shoal t/s",
        "peer t/s",
        "its threads",
        "ratio",
        "smallest",
        "largest",
    )
    rows = [
        (
            r.test,
            str(r.threads),
            r.peer,
            f"{r.shoal_tokens_per_s:.1f}",
            f"{r.peer_tokens_per_s:.1f}",
            str(r.peer_threads),
            *(f"{value:.2f}" for value in (r.median, r.low, r.high)),
            str(r.rounds),
            f"{r.shoal_rss / _MB:.0f}",
            f"{r.peer_rss / _MB:.0f}",
        )
        for r in found
    ]
    return table((*header, "pairs", "shoal MB", "peer MB"), rows)


def save(path: Path, what: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """A JSON document: `what` was measured, the ratios, and every sample."""
    document = {
        **what,
        "ratios": [asdict(ratio) for ratio in ratios(samples)],
        "samples": [asdict(item) for item in samples],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load(path: Path, what: Mapping[str, Any]) -> list[Sample]:
    """The samples of a saved document, to add more to them; none when there is no file. ValueError: it is of
    something else than `what`."""
    if not path.exists():
        return []
    document = json.loads(path.read_text(encoding="utf-8"))
    for key, value in what.items():
        if document.get(key) != value:
            raise ValueError(f"{path} is of another run: its {key} is {document.get(key)!r}, not {value!r}")
    return [Sample(**item) for item in document["samples"]]
