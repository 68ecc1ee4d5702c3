"""How a prompt is cut into chunks, so that its first token is there soonest.

Stages work on different chunks at the same time. Small chunks fill the chain quickly, and the last stage has
little left to do when the first one is done; large chunks read the weights less often. Later chunks attend to
more positions, so chunks of equal rows take longer and longer; chunks that shrink with the position take
equally long.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .groups import DEEP, Way
from .rows import LEAST_CHUNK, check_real, check_whole

SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of chunks that are tried: multiples of LEAST_CHUNK."""
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Prompts for which `chunkings` has the best chunks: up to so many tokens."""
SHORT = 256
"""Prompts up to so many tokens are cut into chunks of equal rows: their attention matters little."""
MOST_WINDOW = 64
NEAR = 1.01
"""Cuts whose first token takes at most so many times as long as with the best count as equal. The one with
the largest chunks is chosen: measured costs are not exact, and every message has a cost that no profile
has."""
CHUNKS_A_STAGE = 6
"""The most chunks of a prompt for each stage, and as many more: no profile makes a prompt creep."""


@dataclass(frozen=True, slots=True)
class Chunking:
    """A cut of prompts into chunks: `rows` at the beginning, and at position p a part of 1 / (1 + p · slope)
    of them."""

    rows: int
    slope: float = 0.0

    def __post_init__(self) -> None:
        check_whole("the rows of a chunk", self.rows, 1)
        check_real("the slope of chunks", self.slope, least=0)

    def at(self, position: int) -> int:
        """The rows of a chunk that begins at that position."""
        if not self.slope:
            return self.rows
        rows = LEAST_CHUNK * round(self.rows / (1 + position * self.slope) / LEAST_CHUNK)
        return min(self.rows, max(LEAST_CHUNK, rows))

    def cut(self, first: int, last: int) -> list[tuple[int, int]]:
        """The (first position, rows) of each chunk of positions [first, last)."""
        chunks = []
        while first < last:
            rows = min(self.at(first), last - first)
            chunks.append((first, rows))
            first += rows
        return chunks


Chunkings = Sequence[tuple[int, Chunking]]
"""The best cuts of prompts of up to so many tokens, shortest first."""


def of_length(table: Chunkings, tokens: int) -> Chunking:
    """The entry for a prompt of so many tokens; the last one for longer prompts."""
    return next((chunking for most, chunking in table if tokens <= most), table[-1][1])


def best_chunking(way: Way, tokens: int, most: int) -> Chunking:
    """The cut of a prompt of so many tokens with which its first token is there soonest, in chunks of at most
    `most` rows."""
    sizes = [size for size in SIZES if size <= most and size < tokens + LEAST_CHUNK] or [most]
    least = tokens / (CHUNKS_A_STAGE * (len(way.stages) + 1))
    sizes = [size for size in sizes if size >= least] or sizes[-1:]
    found = [(_first_token(way, tokens, chunking), chunking) for chunking in _candidates(way, tokens, sizes)]
    limit = NEAR * min(seconds for seconds, _ in found)
    near = [(chunking.rows, -seconds, chunking) for seconds, chunking in found if seconds <= limit]
    return max(near, key=lambda one: one[:2])[2]


def chunkings(way: Way, most: int, context: int) -> tuple[tuple[int, Chunking], ...]:
    """The best cuts of prompts of LENGTHS tokens, up to the first that is no shorter than the context."""
    count = sum(length < context for length in LENGTHS) + 1
    return tuple((length, best_chunking(way, length, most)) for length in LENGTHS[:count])


def window(way: Way) -> int:
    """How many chunks of a prompt must be in flight so that every stage always has one while results are on
    their way to the coordinator, even of the smallest chunks: one on each stage, one that waits, and as many
    as fit into the latency of the hops."""
    busiest = max(stage.call_seconds([(LEAST_CHUNK, 0, False)]) for stage in way.stages)
    hops = math.ceil(sum(way.latency) / busiest) if busiest else MOST_WINDOW
    return min(MOST_WINDOW, len(way.stages) + 1 + max(1, hops))


def _candidates(way: Way, tokens: int, sizes: Sequence[int]) -> list[Chunking]:
    """Chunks of all sizes, of equal rows and, for a prompt that is not short, of equal time."""
    found = [Chunking(size) for size in sizes]
    for size in sizes if tokens > SHORT and sizes[0] >= LEAST_CHUNK else ():
        start, deep = (
            max(stage.call_seconds([(size, position, False)]) for stage in way.stages)
            for position in (0, DEEP)
        )
        if deep > start > 0:
            found.append(Chunking(size, (deep / start - 1) / DEEP))
    return found


def _first_token(way: Way, tokens: int, chunking: Chunking) -> float:
    """About the seconds until the first token: for each stage, the first chunk on the stages before, all
    chunks on it, and the longer of the last two on the stages after; the most of these. This is exact where
    each stage takes the same share of every chunk's time."""
    positions: dict[int, list[int]] = {}
    chunks = chunking.cut(0, tokens)
    for position, rows in chunks:
        positions.setdefault(rows, []).append(position)
    # The time of chunks of equal rows is linear in the position, so the mean position has the mean time.
    alike = [(rows, len(found), sum(found) // len(found)) for rows, found in positions.items()]
    sums = [
        sum(count * stage.call_seconds([(rows, position, False)]) for rows, count, position in alike)
        for stage in way.stages
    ]
    firsts = [stage.call_seconds([(chunks[0][1], 0, False)]) for stage in way.stages]
    lasts = [
        max(stage.call_seconds([(rows, position, False)]) for position, rows in chunks[-2:])
        for stage in way.stages
    ]
    hops = sum(way.latency) + chunks[0][1] * sum(way.busy)
    # The last row alone passes the LM head.
    head = way.stages[-1].call_seconds([(1, 0, True)]) - way.stages[-1].call_seconds([(1, 0, False)])
    paths = (sum(firsts[:at]) + busy + sum(lasts[at + 1 :]) for at, busy in enumerate(sums))
    return max(paths) + hops + max(0.0, head)
