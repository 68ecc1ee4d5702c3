"""A process of a measurement over a chain of nodes: a node that logs its calls, a coordinator that measures a
job, or one process that does the same job alone.

    python chain_worker.py node CALLS.log NODE-ARGUMENTS...
    python chain_worker.py head JSON
    python chain_worker.py alone JSON

This script imports only `shoal`, so bench/chain.py can run it with the library of another checkout (by
PYTHONPATH) and compare two versions. Times are seconds of CLOCK_MONOTONIC, which all processes of a Linux
machine share. Prompts are random token ids; a prompt's seed is the number of its stream, or its length."""

from __future__ import annotations

import functools
import json
import os
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.engine.batch import Run, Sampling, Want
from shoal.engine.generate import prompt_runs
from shoal.engine.model_directory import Model
from shoal.engine.stage import Stage, StageOptions

CALL = struct.Struct("<ddqq")
"""A call of a stage in a log: its start and end, its rows, and the first position of its first sequence."""
_WARM_TOKENS = 4


def prompt_of(model: Model, seed: int, length: int) -> list[int]:
    """Token ids by seed."""
    return [int(t) for t in np.random.default_rng(seed).integers(3, model.program.vocab, length)]


# --- a node


def node(log: str, arguments: Sequence[str]) -> int:
    """`shoal node`, which appends each call of its stage to `log`."""
    from shoal.cli import main

    file, run, now = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), Stage.run, time.monotonic

    @functools.wraps(run)
    def logged(self: Stage, batch: Sequence[Run], *more: Any, **named: Any) -> Any:
        start = now()
        try:
            return run(self, batch, *more, **named)
        finally:
            rows = sum(len(one.tokens) for one in batch)
            os.write(file, CALL.pack(start, now(), rows, batch[0].first if batch else 0))

    Stage.run = logged  # type: ignore[method-assign]
    return main(["node", *arguments])


# --- a coordinator


def plans_of(model: Model, job: dict[str, Any]) -> Any:
    """The planner of `shoal run`, held to the nodes' order and the layers of the job. NetworkPlanner of an
    older checkout has no such option, and its question is changed instead."""
    from shoal import planner

    try:
        from shoal.network_planner import NetworkPlanner
    except ModuleNotFoundError:  # an older checkout
        from shoal.distributed import NetworkPlanner  # type: ignore[import-not-found,no-redef]

    streams = job.get("streams", 1)
    context = min(model.config.context, job["context"])
    workload = planner.Workload(context, sequences=job.get("sequences", streams), streams=streams)
    objective: planner.Objective = "latency" if streams == 1 else "throughput"
    try:
        return NetworkPlanner(model, workload, objective, layers=job["layers"])
    except TypeError:
        names = tuple(job["names"])
        held = planner.Constraints(layers=dict(zip(names, job["layers"], strict=True)), order=names)

        class Held(NetworkPlanner):
            def _question(self, *asked: Any) -> planner.Question:
                return replace(super()._question(*asked), constraints=held)

        return Held(model, workload, objective)


async def head(job: dict[str, Any]) -> dict[str, Any]:
    """Opens the chain and does the job; returns its measurements and answers."""
    from shoal.arguments import address
    from shoal.net.coordinator import Coordinator, CoordinatorOptions
    from shoal.net.identity import shape_of

    try:
        from shoal.cluster_view import coordinator_identity
    except ModuleNotFoundError:  # an older checkout
        from shoal.distributed import coordinator_identity  # type: ignore[no-redef]

    model = Model.open(Path(job["model"]))
    plans, nodes = plans_of(model, job), [address(text) for text in job["nodes"]]
    start = time.monotonic()
    options = CoordinatorOptions(share_prefixes=False)  # each answer computes its prompt
    async with Coordinator.open(
        nodes, coordinator_identity(model), shape_of(model), plans, options
    ) as coordinator:
        opened = time.monotonic() - start
        found = await JOBS[job["do"]](coordinator, model, job)
        if job["do"] == "press" and hasattr(plans, "beside"):  # not in an older checkout
            predicted = plans.beside(coordinator.nodes, coordinator.links, job["long"])
            found["predicted"] = [predicted.gap, predicted.prompt]
        return {
            "open_s": opened,
            "stages": [[s.device, s.first, s.last] for s in coordinator.placement.stages],
            **found,
        }


async def _answer(
    coordinator: Any,
    prompt: Sequence[int],
    tokens: int,
    told: list[tuple[float, int]],
    after: Callable[[], object] = lambda: None,
) -> None:
    """One answer: each token with the time at which it came is added to `told`, and `after` is called."""
    context = len(prompt) + tokens
    async with coordinator.generate(prompt, Sampling(), max_tokens=tokens, context=context) as answer:
        async for token in answer:
            told.append((time.monotonic(), token))
            after()


async def _decode(coordinator: Any, model: Model, job: dict[str, Any]) -> dict[str, Any]:
    """Streams that decode at once: times and tokens of each, and the mean rows of each stage's decode
    calls."""
    import trio

    prompts = [prompt_of(model, seed, job["prompt"]) for seed in range(job["streams"])]
    await _answer(coordinator, prompts[0], _WARM_TOKENS, [])
    told: list[list[tuple[float, int]]] = [[] for _ in prompts]
    before = await coordinator.stats()
    async with trio.open_nursery() as nursery:
        for prompt, one in zip(prompts, told, strict=True):
            nursery.start_soon(_answer, coordinator, prompt, job["tokens"], one)
    after = await coordinator.stats()
    work = [(b.stats.decode, a.stats.decode) for b, a in zip(before, after, strict=True)]
    rows = [(a.rows - b.rows) / max(a.steps - b.steps, 1) for b, a in work]
    return {**_told(told), "rows": rows}


async def _first(coordinator: Any, model: Model, job: dict[str, Any]) -> dict[str, Any]:
    """Prompts of several lengths, one after another, each after a warm one: seconds to the first token, and
    the mean rows of a call of the first stage."""
    seconds, tokens, rows = [], [], []
    for length in job["lengths"]:
        prompt = prompt_of(model, length, length)
        for _ in range(2):
            told: list[tuple[float, int]] = []
            before = (await coordinator.stats())[0].stats.prefill
            start = time.monotonic()
            await _answer(coordinator, prompt, 1, told)
            took = told[0][0] - start
        after = (await coordinator.stats())[0].stats.prefill
        seconds.append(took)
        tokens.append([told[0][1]])
        rows.append((after.rows - before.rows) / max(after.steps - before.steps, 1))
    return {"seconds": seconds, "tokens": tokens, "rows": rows}


async def _press(coordinator: Any, model: Model, job: dict[str, Any]) -> dict[str, Any]:
    """A long prompt alone; then streams that decode, alone for a while and beside that prompt. `from` and
    `to`: when the prompt arrived, and when its first token came."""
    import trio

    long = prompt_of(model, job["long"], job["long"])  # that of `first`
    shorts = [prompt_of(model, seed, job["prompt"]) for seed in range(job["streams"])]
    await _answer(coordinator, shorts[0], _WARM_TOKENS, [])
    alone: list[tuple[float, int]] = []
    start = time.monotonic()
    await _answer(coordinator, long, 1, alone)
    alone_s = alone[0][0] - start
    told: list[list[tuple[float, int]]] = [[] for _ in shorts]
    beside: list[tuple[float, int]] = []
    most, lot = min(model.config.context, job["context"]) - job["prompt"], trio.lowlevel.ParkingLot()

    async def reached(counts: Sequence[int]) -> None:
        """Waits until each stream has so many tokens. RuntimeError: its context is full before."""
        if max(counts) > most:
            raise RuntimeError(
                "a stream fills its context before the prompt's first token: shorten the prompt"
            )
        while any(len(one) < count for one, count in zip(told, counts, strict=True)):
            await lot.park()

    async with trio.open_nursery() as nursery:
        for prompt, one in zip(shorts, told, strict=True):
            nursery.start_soon(_answer, coordinator, prompt, most, one, lot.unpark_all)
        await reached([job["quiet_tokens"]] * len(told))
        arrived = time.monotonic()
        await _answer(coordinator, long, 1, beside)
        await reached([len(one) + 1 for one in told])  # the gap in which the prompt ended has an end
        nursery.cancel_scope.cancel()
    return {
        **_told(told), "alone_s": alone_s, "from": arrived, "to": beside[0][0],
        "long_tokens": [alone[0][1], beside[0][1]],
    }  # fmt: skip


async def _rest(coordinator: Any, model: Model, job: dict[str, Any]) -> dict[str, Any]:
    """An open chain without work: the share of a core that each process uses."""
    import trio

    await _answer(coordinator, prompt_of(model, 0, 8), _WARM_TOKENS, [])
    await trio.sleep(1.0)
    before = [cpu_seconds(pid) for pid in job["pids"]]
    await trio.sleep(job["seconds"])
    return {"cpu": [(cpu_seconds(p) - b) / job["seconds"] for p, b in zip(job["pids"], before, strict=True)]}


async def _open(coordinator: Any, model: Model, job: dict[str, Any]) -> dict[str, Any]:
    """A first token alone, since the time to open the chain is part of every job's result."""
    told: list[tuple[float, int]] = []
    start = time.monotonic()
    await _answer(coordinator, prompt_of(model, 0, 8), 1, told)
    return {"first_s": told[0][0] - start, "tokens": [[told[0][1]]]}


Job = Callable[[Any, Model, dict[str, Any]], Awaitable[dict[str, Any]]]
JOBS: dict[str, Job] = {"decode": _decode, "first": _first, "press": _press, "rest": _rest, "open": _open}


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text("ascii", "replace").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _told(told: Sequence[Sequence[tuple[float, int]]]) -> dict[str, Any]:
    return {"times": [[at for at, _ in one] for one in told], "tokens": [[t for _, t in one] for one in told]}


# --- one process


def alone(job: dict[str, Any]) -> dict[str, Any]:
    """What `head` answers to the jobs `decode` and `first`, of one stage that holds all units. A `decode` has
    several numbers of streams, one after another, each decoded together."""
    model = Model.open(Path(job["model"]))
    options = StageOptions("native", threads=1, max_wanted=max(32, *job.get("batches", [1])))
    with Stage(model, 0, model.n_units, options) as stage:
        if job["do"] == "first":
            return _alone_first(stage, job)
        found = [_alone_decode(stage, range(streams), job) for streams in job["batches"]]
        return {"runs": found}


def _alone_first(stage: Stage, job: dict[str, Any]) -> dict[str, Any]:
    seconds, tokens = [], []
    for length in job["lengths"]:
        prompt = prompt_of(stage.model, length, length)
        for _ in range(2):
            start = time.monotonic()
            token = _alone_prompt(stage, 0, prompt, length + 1)
            took = time.monotonic() - start
            stage.close_sequence(0)
        seconds.append(took)
        tokens.append([token])
    return {"seconds": seconds, "tokens": tokens}


def _alone_decode(stage: Stage, seeds: Sequence[int], job: dict[str, Any]) -> dict[str, Any]:
    told: list[list[tuple[float, int]]] = []
    for seed in seeds:
        prompt = prompt_of(stage.model, seed, job["prompt"])
        token = _alone_prompt(stage, seed, prompt, job["prompt"] + job["tokens"])
        told.append([(time.monotonic(), token)])
    for position in range(job["prompt"], job["prompt"] + job["tokens"] - 1):
        results = stage.run([Run(s, position, [told[s][-1][1]], Want.TOKEN) for s in seeds])
        now = time.monotonic()
        for one, result in zip(told, results, strict=True):
            assert result.token is not None
            one.append((now, result.token))
    for seed in seeds:
        stage.close_sequence(seed)
    return _told(told)


def _alone_prompt(stage: Stage, sequence: int, prompt: Sequence[int], context: int) -> int:
    stage.open_sequence(sequence, Sampling(), context)
    for run in prompt_runs(sequence, 0, prompt, stage.options.max_rows):
        results = stage.run([run])
    token = results[0].token
    assert token is not None
    return token


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["node", log, *more]:
            return node(log, more)
        case ["head", job]:
            import trio

            print(json.dumps(trio.run(head, json.loads(job))))
        case ["alone", job]:
            print(json.dumps(alone(json.loads(job))))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
