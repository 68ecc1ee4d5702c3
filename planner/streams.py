"""What follows from the costs of a chain: the tokens/s of concurrent sequences, and when the first token of a
prompt is there.

Concurrent sequences are a formula (groups.py). The chunks of a prompt are followed along the chain, which
src/shoal/plan_svg.py draws.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

from . import cost
from .chunks import best_chunking
from .cost import PAUSE_SECONDS, StageCost, Step
from .groups import Way, best_groups, round_seconds
from .rows import Assignment, Question


def passage(way: Way, steps: Sequence[Step]) -> Iterator[list[tuple[float, float]]]:
    """The times, in seconds, of steps that are sent at 0 s, one after another, and follow each other along a
    chain that was idle before; each is a call of its own. For each step the (start, end) of the hop to the
    first stage, of that stage's call, of the next hop and so on, and last of the hop to the coordinator."""
    stages = way.stages
    free, link_free = [-math.inf] * len(stages), [0.0] * (len(stages) + 1)
    for step in steps:
        done, spans = 0.0, []
        for at, stage in enumerate(stages):
            left = max(done, link_free[at])
            link_free[at] = left + step[0] * way.busy[at]
            arrived = link_free[at] + way.latency[at]
            start = max(arrived, free[at])
            done = start + stage.call_seconds([step])
            if start - free[at] > PAUSE_SECONDS:
                done += stage.pause
            free[at] = done
            spans += [(left, arrived), (start, done)]
        left = max(done, link_free[-1])
        link_free[-1] = left + way.busy[-1]
        yield [*spans, (left, link_free[-1] + way.latency[-1])]


def first_token_seconds(way: Way, chunks: Sequence[tuple[int, int]]) -> float:
    """Seconds until the first token of a prompt is at the coordinator. `chunks`: (first position, rows)."""
    end = sum(chunks[-1])
    *_, last = passage(way, [(rows, at, at + rows == end) for at, rows in chunks])
    return last[-1][1]


class Follower:
    """Follows a question's workload along chains. Stages keep their costs from chain to chain."""

    def __init__(self, question: Question) -> None:
        self._question = question
        model, device = question.model, question.cluster.device
        self._cost = cache(lambda name, first, last: StageCost(model, device(name), first, last))

    def cost(self, stage: Assignment) -> StageCost:
        """What calls of that stage take."""
        return self._cost(stage.device, stage.first, stage.last)

    def way(self, stages: Sequence[Assignment]) -> Way:
        """The chain of such stages. ValueError: a link is not there."""
        cluster = self._question.cluster
        hops = cost.chain_hops(self._question.model, cluster, stages)
        names = [stage.device for stage in stages]
        beside = [cluster.device(name).beside for name in names]
        return Way(
            stages=[self.cost(stage) for stage in stages],
            latency=[link.latency_s for link, _ in hops],
            busy=[cost.link_busy_seconds(link, size) for link, size in hops],
            together=[(names.index(one), j) for j, one in enumerate(beside) if one in names],
        )

    def on_machines(self, stages: Sequence[Assignment]) -> Way:
        """The same with the stages that share a machine's memory. How sequences share calls depends on that;
        predictions take each device as a machine of its own, since it may stand for one."""
        hosts = [self._question.cluster.hosts.get(stage.device, stage.device) for stage in stages]
        several = [host for host in dict.fromkeys(hosts) if hosts.count(host) > 1]
        shared = [[i for i, host in enumerate(hosts) if host == one] for one in several]
        return replace(self.way(stages), shared=shared)

    def grouped(self, stages: Sequence[Assignment]) -> tuple[float, int]:
        """Seconds a token of all the concurrent sequences together on such stages, in the best number of
        groups, and the rows of the largest. ValueError: a link is not there."""
        way, load = self.way(stages), self._question.workload
        groups = best_groups(way, load.streams, load.decode_depth)
        seconds = round_seconds(way, load.streams, groups, load.decode_depth)
        return seconds / load.streams, -(-load.streams // groups)

    def first_token(self, stages: Sequence[Assignment]) -> float:
        """Seconds from the prompt's arrival at the coordinator to its first token there, in the chunks that
        are best for these stages, pipelined along them. ValueError: a link is not there."""
        way, load = self.way(stages), self._question.workload
        chunks = best_chunking(way, load.prompt_tokens, load.chunk_tokens).cut(0, load.prompt_tokens)
        return first_token_seconds(way, chunks)
