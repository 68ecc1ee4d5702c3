"""What it costs to keep both ends of a model on the coordinator's device: predicted and measured, in the lab.

    python -m bench.private [SPEC ...] [--model smollm2-135m] [--repeats 3]

SPEC is a file of bench/lab whose coordinator is one of the devices (default: laptop+phones, phones, four).
The coordinator's device has a second range there. The best plan of all and the best one with both ends at
home are predicted from the same measurements and run in turns. Needs root, as the lab does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from shoal import planner
from shoal.cluster_view import survey_cluster
from shoal.engine.errors import ShoalError
from shoal.engine.model_directory import Model
from shoal.engine.stage import StageOptions
from shoal.planner.home import seconds_of
from shoal.planning import planner_model
from shoal.private import plan_ends
from shoal.store import resolve
from shoal.text_table import table

from .lab.lab import CONTEXT, Lab
from .lab.runs import PROMPT, TRIES, measure, tokens_for
from .lab.spec import read_spec

SPECS = tuple(Path(__file__).parent / "lab" / f"{name}.toml" for name in ("laptop+phones", "phones", "four"))
HEADER = ["set-up", "ends", "units", "predicted t/s", "measured t/s", "runs", "costs predicted", "measured"]


def rows_of(spec_path: Path, path: Path, repeats: int, tries: int) -> list[list[str]]:
    """Two rows of the table: the best plan of all, and with both ends at home."""
    spec, model = read_spec(spec_path), Model.open(path)
    home = spec.coordinator
    if home is None:
        raise ShoalError(f"{spec_path} has no device for the coordinator")
    with Lab.open(spec, path, both_ends=True) as lab:
        cluster = survey_cluster(model, lab.addresses, insecure=True)
        load = planner.Workload(CONTEXT, prompt_tokens=PROMPT)
        question = planner.Question(planner_model(model, StageOptions()), cluster, load)
        plans = [plan_ends(question, {home}, asked, shrink=False)[0] for asked in ("never", "always")]  # type: ignore[arg-type]
        runs: tuple[list[float], ...] = ([], [])
        for _ in range(repeats):
            for plan, found in zip(plans, runs, strict=True):
                tokens = tokens_for(plan.tokens_per_s, 1, CONTEXT)
                timed = trio.run(measure, lab, model, plan.stages, 1, 1, tokens, tries)
                found += [one.tokens_per_s for one in timed]
    free, kept = map(statistics.median, runs)
    costs = "", f"{1 - seconds_of(plans[0]) / seconds_of(plans[1]):.1%}", f"{1 - kept / free:.1%}"
    rows = []
    for at, (plan, found) in enumerate(zip(plans, runs, strict=True)):
        units = ", ".join(f"{stage.device} {stage.last - stage.first}" for stage in plan.stages)
        rows.append(
            [
                spec_path.stem, ("anywhere", f"on {home}")[at], units, f"{plan.tokens_per_s:.2f}",
                f"{(free, kept)[at]:.2f}", f"{min(found):.2f} to {max(found):.2f}",
                *(costs[1:] if at else ("", "")),
            ]
        )  # fmt: skip
    return rows


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.private", description=__doc__)
    parser.add_argument("specs", metavar="SPEC", type=Path, nargs="*", default=SPECS)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each plan, in turns (default 3)")
    parser.add_argument("--tries", type=int, default=TRIES, help="of each run, until nothing disturbs it")
    args = parser.parse_args(arguments)
    path, rows = resolve(args.model), list[list[str]]()
    for spec in args.specs:
        rows += rows_of(spec, path, args.repeats, args.tries)
        print(table(HEADER, rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
