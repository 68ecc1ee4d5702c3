"""What a plan is to make least: one formula per objective over the three sums of a chain."""

import math
from dataclasses import dataclass

from .rows import Objective, Workload
from .stagecost import CALL_STEPS


@dataclass(frozen=True, slots=True)
class Goal:
    """An objective with its numbers. Values are seconds: of a token, or until the first one.

    latency: a round of one stream. throughput: `streams` tokens a round, of which a stage takes `batch` in
    one call; a place that is taken longer than their share holds all of them up. first_token: a round of one
    chunk, and for every other of the prompt's `chunks` the time of the slowest place.
    """

    objective: Objective
    streams: int = 1
    batch: int = 1
    chunks: int = 1

    def value(self, round_s: float, slowest: float) -> float:
        """Of a chain: seconds of a round and of its slowest place."""
        if self.objective == "latency":
            return round_s
        if self.objective == "throughput":
            return max(round_s / self.streams, slowest / self.batch)
        return round_s + (self.chunks - 1) * slowest

    @property
    def looks_at_places(self) -> bool:
        """Whether the slowest place counts."""
        return self.objective == "throughput" or (self.objective == "first_token" and self.chunks > 1)


def goals(objective: Objective, workload: Workload) -> list[Goal]:
    """The goals whose best chains a plan chooses from. Waiting streams share a call, so for throughput there
    is one for each of some numbers of streams in a call; what they settle to is streams.py's to say."""
    if objective == "latency":
        return [Goal(objective)]
    if objective == "first_token":
        return [Goal(objective, chunks=math.ceil(workload.prompt_tokens / workload.chunk_tokens))]
    most = workload.streams
    largest = min(most, CALL_STEPS)
    sizes = [size for size in (1, 2, 4, 8, 16) if size < largest]
    return [Goal(objective, most, batch) for batch in [*sizes, largest]]
