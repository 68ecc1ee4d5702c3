"""Predicted and simulated against measured tokens/s: `python -m bench.lab.validate RESULTS.json`.

Every set-up of setups.toml, for one stream and for several: devices and links are measured as `shoal plan
--nodes` does, the plan is made, predicted, simulated, and run. What stands in RESULTS.json is not done again;
with `--seconds` no set-up begins after so many. As root on Linux.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio
from bench.models import model_path
from bench.simulator import Request, Rules, simulate

from shoal import planner
from shoal.cluster_view import survey_cluster
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.engine.strict import convert
from shoal.planning import plan_or_error, planner_model

from .lab import Lab
from .results import Results
from .runs import CHUNK_ROWS, DISTURBED, PROMPT, TRIES, Timed, measure, median, tokens_for
from .spec import LabSpec, spec_of

SETUPS = Path(__file__).with_name("setups.toml")
CONTEXT = 128
MEASURE_SECONDS = 4.0
NEAR = 0.15
STEADY = 1.25
"""So far apart may runs of one plan be: else this machine changes more than predictions may be off, and all
is measured again, devices included."""


@dataclass(frozen=True, slots=True)
class Setup:
    """A lab and the model that runs there."""

    name: str
    model: str
    lab: LabSpec


def read_setups(path: Path) -> list[Setup]:
    """The set-ups of a file; in all of them devices take turns. ShoalError: as for read_spec."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8")).get("setup")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it needs a table of its own for each set-up: [[setup]]")
        return [_setup(**row) for row in rows]
    except (OSError, ValueError) as error:
        raise ShoalError(f"{path}: {error}") from error


def _setup(name: Any = None, model: Any = None, **lab: Any) -> Setup:
    for key, value in (("name", name), ("model", model)):
        if not isinstance(value, str):
            raise ValueError(f"[[setup]] {name}: {key} must be a text, not {value!r}")
    return Setup(name, model, spec_of({**lab, "turns": True}))


def simulated(question: planner.Question, stages: Sequence[planner.Assignment], tokens: int) -> float:
    """What the simulator says of the run that `measure` makes: all streams together, while all decode."""
    requests = [Request(0.0, PROMPT, tokens)] * question.workload.streams
    rules = Rules(chunk_rows=CHUNK_ROWS)
    outcome = simulate(question, stages, requests, rules=rules)
    first = [at for at in outcome.first_token_at if at is not None]
    done = [at for at in outcome.done_at if at is not None]
    # Between its first token and its last each stream's tokens come evenly.
    return sum((tokens - 1) / (b - a) for a, b in zip(first, done, strict=True))


def validate(
    setup: Setup, streams: Sequence[int], repeats: int, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A row for each number of streams, on devices whose caps have room for the most; those of the record
    `before` are kept."""
    rows = {row["streams"]: row for row in before["streams"]} if before else {}
    for count in missing(before, streams):
        rows[count] = _steady(setup, count, repeats, max(streams))
    return {"model": setup.model, "streams": [rows[count] for count in sorted(rows)]}


def missing(record: dict[str, Any] | None, streams: Sequence[int]) -> list[int]:
    """The numbers of streams that a record, if there is one, says nothing of."""
    there = {row["streams"] for row in record["streams"]} if record else set()
    return [count for count in streams if count not in there]


def _steady(setup: Setup, streams: int, repeats: int, most: int) -> dict[str, Any]:
    """Runs of a plan by what devices and links were measured to be right before. Up to TRIES attempts: until
    runs are steady, and nobody else is at work while devices measure themselves; else the steadiest."""
    attempts: list[tuple[float, dict[str, Any]]] = []
    while len(attempts) < TRIES:
        crowd, row = _record(setup, streams, repeats, most)
        speeds = [run["tokens_per_s"] for run in row["runs"]]
        spread = max(speeds) / min(speeds)
        attempts.append((spread + crowd, row))
        if spread <= STEADY and crowd <= DISTURBED:
            return row
    return min(attempts, key=lambda attempt: attempt[0])[1]


def _record(setup: Setup, streams: int, repeats: int, most: int) -> tuple[float, dict[str, Any]]:
    """How many cores others took while the devices measured themselves, and what came after."""
    model = Model.open(model_path(setup.model))
    rows = planner_model(model, StageOptions())
    options = ("--measure-seconds", str(MEASURE_SECONDS))
    with Lab.open(setup.lab, model.path, context=CONTEXT, sequences=most, options=options) as lab:
        cluster = survey_cluster(model, lab.addresses, insecure=True)
        crowd = lab.others()
        plan = plan_or_error(asked(rows, cluster, streams))
        tokens = tokens_for(plan.tokens_per_s, streams, CONTEXT)
        runs: list[Timed] = trio.run(measure, lab, model, plan.stages, streams, repeats, tokens)
    return crowd, {
        "streams": streams,
        "cluster": cluster_json(cluster),
        "stages": [[stage.device, stage.first, stage.last] for stage in plan.stages],
        **predictions(rows, cluster, plan.stages, streams),
        "measured": median(runs),
        "runs": [run.to_json() for run in runs],
    }


def predictions(
    rows: planner.ModelCosts, cluster: planner.Cluster, stages: Sequence[planner.Assignment], streams: int
) -> dict[str, Any]:
    """What planner and simulator say of stages."""
    question = asked(rows, cluster, streams)
    plan = planner.evaluate(question, stages)
    tokens = tokens_for(plan.tokens_per_s, streams, CONTEXT)
    return {
        "predicted": plan.tokens_per_s,
        "simulated": simulated(question, stages, tokens),
        "stage_seconds": [stage.seconds for stage in plan.stages],
        "hop_seconds": [hop.seconds for hop in plan.hops],
    }


def asked(rows: planner.ModelCosts, cluster: planner.Cluster, streams: int) -> planner.Question:
    """What is asked of the planner."""
    workload = planner.Workload(CONTEXT, sequences=streams, streams=streams, prompt_tokens=PROMPT)
    return planner.Question(rows, cluster, workload, "latency" if streams == 1 else "throughput")


def cluster_json(cluster: planner.Cluster) -> dict[str, Any]:
    """For a file of results."""
    links = [[*ends, link.latency_s, link.bytes_per_s] for ends, link in cluster.links.items()]
    return {
        "devices": [asdict(device) for device in cluster.devices],
        "links": links,
        "coordinator": cluster.coordinator,
    }


def cluster_of_json(body: dict[str, Any]) -> planner.Cluster:
    """What `cluster_json` gave."""
    devices = [
        convert(planner.Device, device, "a device of the results", defaults=True)
        for device in body["devices"]
    ]
    links = {(a, b): planner.LinkSpeed(latency, rate) for a, b, latency, rate in body["links"]}
    return planner.Cluster(tuple(devices), links, body["coordinator"])


def predicted_again(record: dict[str, Any]) -> dict[str, Any]:
    """A record with what today's planner and simulator say of the same stages on the same measurements."""
    rows = planner_model(Model.open(model_path(record["model"])), StageOptions())

    def again(row: dict[str, Any]) -> dict[str, Any]:
        stages = [planner.Assignment(*stage) for stage in row["stages"]]
        return {**row, **predictions(rows, cluster_of_json(row["cluster"]), stages, row["streams"])}

    return {**record, "streams": [again(row) for row in record["streams"]]}


def all_again(results: Results) -> None:
    """All records predicted again. ShoalError: some say nothing of their devices, and none was changed."""
    older = [
        name
        for name, record in results.rows.items()
        if any("cluster" not in row for row in record["streams"])
    ]
    if older:
        raise ShoalError(
            f"{', '.join(older)}: measured by an older version, which kept nothing of the devices to predict "
            "from: measure into another file"
        )
    for name, record in results.rows.items():
        results.put(name, predicted_again(record))


def render(rows: dict[str, Any]) -> str:
    """The records as a table, and what they say all together."""
    lines = [
        "| set-up | model | streams | units | measured t/s | predicted | of it | simulated | of it |",
        "|-|-|-:|-|-:|-:|-:|-:|-:|",
    ]
    errors: dict[tuple[str, int], list[float]] = {}
    for name, record in rows.items():
        for row in record["streams"]:
            cells = [f"{row['measured']:.2f}"]
            for kind in ("predicted", "simulated"):
                error = row[kind] / row["measured"] - 1
                errors.setdefault((kind, row["streams"]), []).append(abs(error))
                cells += [f"{row[kind]:.2f}", f"{error:+.0%}"]
            units = ", ".join(f"{device} {last - first}" for device, first, last in row["stages"])
            lines.append(f"| {name} | {record['model']} | {row['streams']} | {units} | {' | '.join(cells)} |")
    for (kind, streams), found in sorted(errors.items()):
        middle, worst = statistics.median(found), max(found)
        many = f"{streams} stream{'s' * (streams > 1)}"
        near = sum(error <= NEAR for error in found)
        lines.append(
            f"{kind}, {many}, {len(found)} set-ups: off by {middle:.1%} (median), {worst:.1%} (worst), "
            f"{near} within {NEAR:.0%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 when all set-ups that were asked for are there."""
    parser = argparse.ArgumentParser(prog="python -m bench.lab.validate", description=__doc__)
    parser.add_argument("results", type=Path, help="a JSON file, read and added to")
    parser.add_argument("--setups", type=Path, default=SETUPS, help="a TOML file (default: setups.toml here)")
    parser.add_argument("--only", help="the set-ups whose names hold this")
    parser.add_argument("--streams", default="1,4", help="answers at a time (default 1,4)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, for the median (default 5)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no set-up after so many")
    parser.add_argument(
        "--again",
        action="store_true",
        help="predict what stands in the file with today's planner, and no more",
    )
    args = parser.parse_args(arguments)
    setups, results = read_setups(args.setups), Results(args.results)
    streams, start = [int(count) for count in args.streams.split(",")], time.monotonic()
    if args.only is not None:
        setups = [setup for setup in setups if args.only in setup.name]
        if not setups:
            raise ShoalError(f"no set-up in {args.setups} has {args.only!r} in its name")
    if args.again:
        all_again(results)
        setups = []
    for setup in setups:
        before = results.rows.get(setup.name)
        if not missing(before, streams):
            continue
        if time.monotonic() - start > args.seconds:
            break
        results.put(setup.name, validate(setup, streams, args.repeats, before))
    print(render(results.rows))
    return 1 if any(missing(results.rows.get(setup.name), streams) for setup in setups) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ShoalError as error:
        sys.exit(f"bench.lab.validate: {error}")
