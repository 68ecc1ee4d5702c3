"""A chain of nodes behind blocking calls: the network runs in an event loop in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial

import trio

from . import planner
from .answering import Put, Settings, Stop, most_tokens
from .cluster_view import coordinator_identity
from .engine.batch import ReadRequest, Result
from .engine.batcher import PutResult
from .engine.errors import ShoalError, ignore
from .engine.generate import check_text
from .engine.model_directory import Model
from .engine.request_scheduler import Report
from .net.coordinator import Coordinator, CoordinatorOptions
from .net.identity import shape_of
from .net.liveness import DEFAULT_TIMING
from .net.members import Moves
from .net.moves import Move
from .net.placement import StageReport
from .net.session import Answer, Session
from .network_planner import NetworkPlanner
from .network_rebalancer import NetworkRebalancer
from .portal import Portal, logging_thread, open_portal
from .private import Private
from .reporting import StepTimes, status_of
from .status import Status

STATS_SECONDS = 1.0
"""How long stages are asked for their measurements."""


def _room(context: int, prompt: Sequence[int]) -> int:
    """The most tokens that an answer may have in the context of the plan in force."""
    return max(1, context - len(prompt))


async def _planned(coordinator: Coordinator) -> None:
    """Waits for the first plan, which has the context length."""
    if not coordinator.placement.stages:
        await coordinator.chain()


class NodeSession:
    """An answering.Session on nodes. `context()` is the context length of the plan in force, which may have
    become less since the session began: an answer ends there at the latest."""

    def __init__(self, portal: Portal[Coordinator], session: Session, context: Callable[[], int]) -> None:
        self._portal, self._session, self._context = portal, session, context
        self._scope = trio.CancelScope()

    def answer(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        end: Collection[int],
        report: Report | None = None,
    ) -> Generator[int, None, None]:
        """As answering.Session. ContextError: the nodes have no room for the prompt. NodeLostError: a node is
        lost, and the others cannot hold the model."""
        self._scope = scope = trio.CancelScope()

        async def feed(put: Callable[[int], None]) -> None:
            with scope:
                await _planned(self._portal.opened)
                most = min(max_tokens, _room(self._context(), prompt))
                async with self._session.answer(prompt, max_tokens=most, end=end) as tokens:
                    async for token in tokens:
                        if report is not None:
                            report.cached = tokens.cached
                        put(token)

        return self._portal.stream(feed)

    def stop(self) -> None:
        """Ends the answer under way, if there is one; in any thread."""
        self._portal.tell(self._scope.cancel)

    def close(self) -> None:
        """Frees the session's keys and values on all nodes."""
        self._portal.tell(self._session.close)


class Nodes:
    """A chain of nodes behind blocking calls. The network runs in an event loop in a thread of its own."""

    def __init__(self, portal: Portal[Coordinator], plans: NetworkPlanner) -> None:
        self._portal, self._plans, self._times = portal, plans, StepTimes()

    @property
    def plan(self) -> planner.Plan:
        """The plan in force."""
        plan = self._portal.opened.placement.detail
        assert isinstance(plan, planner.Plan), "NetworkPlanner records its plans"
        return plan

    def moves(self) -> Sequence[Move]:
        """What became of the latest changes of the plan while answers were computed, the oldest first."""
        return tuple(self._portal.opened.moves)

    @property
    def context(self) -> int:
        """The context length of the plan, in tokens."""
        return self._portal.opened.placement.context

    def session(self, settings: Settings) -> NodeSession:
        """A new session on the nodes."""
        coordinator = self._portal.opened
        session = coordinator.session(settings.sampling, context=settings.context, allow=settings.allow)
        return NodeSession(self._portal, session, lambda: self.context)

    def begin(
        self, prompt: Sequence[int], settings: Settings, put: Put, report: Report | None = None
    ) -> Stop:
        """See answering.Engine."""

        begun: list[Answer] = []

        async def feed(give: Callable[[int], None]) -> None:
            await _planned(self._portal.opened)
            answer = self._portal.opened.generate(
                prompt,
                settings.sampling,
                max_tokens=min(most_tokens(prompt, settings), _room(self.context, prompt)),
                end=settings.end,
                context=settings.context,
                report=None if report is None else report.count,
                allow=settings.allow,
            )
            async with answer as tokens:
                begun.append(tokens)
                async for token in tokens:
                    if report is not None:
                        report.cached = tokens.cached
                        report.found.extend(tokens.logprobs)
                    give(token)

        return partial(self._end, self._portal.start(feed, put), begun)

    def read(self, request: ReadRequest, put: PutResult) -> Stop:
        """See answering.Engine."""
        check_text(request.tokens, request.context)

        async def feed(give: Callable[[Result], None]) -> None:
            async with self._portal.opened.read(request) as results:
                async for result in results:
                    give(result)

        return partial(self._end, self._portal.start(feed, put), ())

    def _end(
        self, stop: partial[None], begun: Sequence[Answer], *, wait: bool = True, keep: bool = False
    ) -> None:
        """See answering.Stop."""

        def rest() -> None:
            for answer in begun:
                answer.rest()

        if keep:
            self._portal.tell(rest)
        stop(wait=wait)

    def status(self) -> Status:
        """What is known at the moment of nodes, links and answers. Measurements of stages that do not answer
        soon are left out."""
        return self._portal.call(self._status)

    async def _status(self) -> Status:
        coordinator, reports = self._portal.opened, tuple[StageReport, ...]()
        with trio.move_on_after(STATS_SECONDS), suppress(ShoalError):
            reports = await coordinator.stats()
        overview, plan = coordinator.overview(), coordinator.placement.detail
        if isinstance(plan, planner.Plan):
            with suppress(ValueError):  # a node of the plan is lost: it is as it was predicted
                now = partial(self._plans.now, coordinator.nodes, overview.links, plan=plan)
                plan = await trio.to_thread.run_sync(now)
        known = plan if isinstance(plan, planner.Plan) else None
        return status_of(self._plans.model, overview, known, self._times.look(reports))

    def stats(self) -> tuple[Sequence[StageReport], planner.Plan]:
        """Measurements of each stage, and the plan's prediction by the latest measurements of nodes and
        links. NodeLostError: a node was lost meanwhile."""

        async def ask() -> tuple[Sequence[StageReport], planner.Plan]:
            coordinator = self._portal.opened
            now = self._plans.now(coordinator.nodes, coordinator.links, plan=self.plan)
            return await coordinator.stats(), now

        return self._portal.call(ask)


@contextmanager
def open_nodes(
    model: Model,
    addresses: Sequence[tuple[str, int]],
    workload: planner.Workload,
    *,
    shrink: bool = False,
    wait: float = DEFAULT_TIMING.patience,
    moves: Moves = "move",
    share_prefixes: bool = True,
    insecure: bool = False,
    private: Private = "auto",
    log: Callable[[str], object] = ignore,
) -> Iterator[Nodes]:
    """A chain of nodes that run the model; `shrink` as for NetworkPlanner. Lost nodes that the model needs
    are waited for, at most `wait` seconds. `moves`: how the plan changes while answers are computed
    (net.members.Moves). `share_prefixes` is as in CoordinatorOptions, `insecure` as for coordinator_identity,
    `private` as for NetworkPlanner.
    `log` is called with sentences about nodes that are lost or come back, in a thread of its own.
    NoPlanError: the nodes cannot hold the model.
    NetError: a node cannot be reached."""
    plans = NetworkPlanner(model, workload, shrink=shrink, private=private)
    with logging_thread(log) as say:
        options = CoordinatorOptions(
            timing=replace(DEFAULT_TIMING, patience=wait),
            moves=moves,
            share_prefixes=share_prefixes,
            rebalancer=None if moves == "off" else NetworkRebalancer(plans),
            log=say,
        )
        who, shape = coordinator_identity(model, insecure=insecure), shape_of(model)
        opening = partial(Coordinator.open, addresses, who, shape, plans, options)
        with open_portal(opening) as portal:
            yield Nodes(portal, plans)
