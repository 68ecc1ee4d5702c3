"""What is simulated, and what came of it: requests, what happens to devices, rules, the
outcome."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from shoal.planner.check import check_name, check_real, check_whole
from shoal.planner.rows import Cluster, Stage


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt of so many tokens that arrives at a time, and the tokens of its answer."""

    at: float
    prompt: int
    answer: int

    def __post_init__(self) -> None:
        check_real("a request's arrival", self.at)
        check_whole("a request's prompt", self.prompt, 1)
        check_whole("a request's answer", self.answer, 1)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens to a device: it takes `factor` times as long as at the start, or it dies."""

    at: float
    device: str
    kind: Literal["slow", "die"]
    factor: float = 1.0

    def __post_init__(self) -> None:
        check_real("an event's time", self.at)
        check_name("an event's device", self.device)
        if self.kind not in ("slow", "die"):
            raise ValueError(f"an event is of kind slow or die, not {self.kind!r}")
        check_real("an event's factor", self.factor, above=0)


@dataclass(frozen=True, slots=True)
class Rules:
    """How the system behaves. `replan` gives the stages for the devices that are left; `recover_s` passes
    between a death and the new assignment. `steal_every_s`: how often neighbours compare themselves; 0 never.
    A layer moves when the slower of the two gains at least `steal_gain`."""

    chunk_rows: int = 128
    window: int = 4  # chunks of one prompt in flight
    recover_s: float = 1.0
    replan: Callable[[Cluster], Sequence[Stage]] | None = None
    steal_every_s: float = 0.0
    steal_gain: float = 0.1

    def __post_init__(self) -> None:
        check_whole("chunk_rows", self.chunk_rows, 1)
        check_whole("window", self.window, 1)
        check_real("recover_s", self.recover_s)
        check_real("steal_every_s", self.steal_every_s)
        check_real("steal_gain", self.steal_gain)


@dataclass(slots=True)
class Outcome:
    """What happened. Lists go by request; a time is None where it never came."""

    seconds: float = 0.0
    tokens: int = 0
    first_token_at: list[float | None] = field(default_factory=list)
    done_at: list[float | None] = field(default_factory=list)
    steals: int = 0
    recoveries: int = 0
    calls: int = 0
    stages: tuple[Stage, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """All answers together, over the whole time."""
        return self.tokens / self.seconds if self.seconds else 0.0


def random_requests(
    seed: int, count: int, per_s: float, prompt: tuple[int, int], answer: tuple[int, int]
) -> list[Request]:
    """Requests that arrive as a Poisson process, lengths uniform within the bounds."""
    rng, at, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        at += rng.expovariate(per_s)
        requests.append(Request(at, rng.randint(*prompt), rng.randint(*answer)))
    return requests
