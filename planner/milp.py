"""The exact plan over devices, their order and their layer counts, as a mixed-integer linear program in PuLP.

Made for models whose layers are alike: a device then needs only a *number* of layers, not a yes or no per
layer, and eight devices solve in milliseconds. Each used device has one role: first (embedding and n >= 0
layers), middle (n >= 1), last (n >= 0 and the head), or sole (everything). Binary arcs join the roles to a
path; layers flow along the arcs and each device takes its n, so that a ring off the path, whose middle
devices take layers that never arrive, is impossible and the relaxation stays tight. All costs and room come
from the same tables as the DP's.

What is known already bounds the problem: no chain counts that does not better it. For throughput that bound
stands in for the slowest place, which is no variable: the quickest round in which all places keep within the
bound is a new bound, until there is none. Each of those few problems solves like one for latency, where one
with the variable, whose relaxation splits layers to make places equal, took ten times as long at worst.

PuLP is imported when a problem is solved, not before: phones plan without it.
"""

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import Any

from . import dp
from .dp import Chain
from .goal import Goal
from .rows import Model
from .tables import INF, TimeTables

SCALE = 1000.0  # the objective's size in the solver's units, far above its absolute tolerances of 1e-6
BETTER = 1 - 1e-9  # of what is known: a chain within that is no better
BOUNDARY = 1  # any cut stands for all: layers_alike
TALKATIVE = ("1.16.0",)  # versions of HiGHS that print a banner, into an answer that goes down a pipe


class SolverMissing(ImportError):
    """PuLP is absent, or no solver that it could use is here and runs; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Solver:
    """PuLP and one of its solvers."""

    pulp: Any
    name: str
    make: Any  # (time limit in seconds) -> a PuLP solver with gap 0


def load_solver(only: str | None = None) -> Solver:
    """PuLP with HiGHS, an installed CBC or the CBC that PuLP brings, the first that runs here.

    `only` asks for one: highs, cbc, bundled-cbc. SolverMissing says what to install.
    """
    try:
        pulp = importlib.import_module("pulp")
    except ImportError as error:
        raise SolverMissing("the MILP needs PuLP and a solver: pip install 'shoal[plan]'") from error

    def highs(limit: float) -> Any:
        # Presolve of HiGHS 1.15.1 calls some of these problems infeasible that are not (its issue 3296);
        # without it they take as long. Restarts and primal heuristics only lose: they double the worst case
        # of 8 devices x 32 layers. Nor do so small problems need more than some hundred cuts at a time: to
        # choose among thousands takes the hardest a third longer.
        options = {
            "presolve": "off",
            "mip_allow_restart": False,
            "mip_heuristic_effort": 0.0,
            "mip_pool_soft_limit": 100,
        }
        return pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=0.0, threads=1, timeLimit=limit, **options)

    def coin(path: str | None) -> Any:
        return lambda limit: pulp.COIN_CMD(msg=False, gapRel=0.0, gapAbs=0.0, timeLimit=limit, path=path)

    choices = {"highs": ("HiGHS", highs), "cbc": ("CBC", coin(None))}
    if _version("highspy") in TALKATIVE:
        del choices["highs"]
    # PULP_CBC_CMD itself warns that it goes away in PuLP 4; the path of its program does not.
    bundled = getattr(getattr(pulp, "PULP_CBC_CMD", None), "pulp_cbc_path", None)
    if bundled:
        choices["bundled-cbc"] = ("PuLP's CBC", coin(bundled))
    for key, (name, make) in choices.items():
        if only in (None, key) and _runs(pulp, make):
            return Solver(pulp, name, make)
    what = "no solver that runs here" if only is None else f"no {only} that runs here"
    raise SolverMissing(
        f"PuLP finds {what}: pip install 'highspy!={TALKATIVE[0]}' (Termux: pkg install coinor-cbc)"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _runs(pulp: Any, make: Any) -> bool:
    """Whether a solver is there and solves: PuLP's own CBC is a program for glibc, which Android has not."""
    if not make(5.0).available():
        return False
    problem = pulp.LpProblem("probe", pulp.LpMinimize)
    x = _adder(problem, pulp)("x", 0, 3, pulp.LpInteger)
    problem += x
    problem += 2 * x >= 3
    try:
        return bool(problem.solve(make(5.0)) == pulp.LpStatusOptimal and round(x.value()) == 2)
    except (pulp.PulpSolverError, OSError):
        return False


def _adder(problem: Any, pulp: Any) -> Any:
    """What makes a problem's variables: PuLP 4 attaches them, before 3.3 there was only the constructor."""
    return getattr(problem, "add_variable", pulp.LpVariable)


def layers_alike(model: Model) -> bool:
    """Whether counts say everything: all layers have the same costs, and any two boundaries pass the same
    bytes."""
    costs = {replace(unit, name="layer", cut_bytes=0) for unit in model.units[1:-1]}
    return len(costs) <= 1 and len({unit.cut_bytes for unit in model.units[:-1]}) == 1


def best_chain(
    tables: TimeTables,
    devices: Sequence[int],
    goal: Goal,
    solver: Solver,
    *,
    ordered: bool = False,
    known: Chain | None = None,
    time_limit: float = 60.0,
) -> tuple[Chain | None, bool]:
    """The best chain over `devices` in any order (or in the given order, any left out), and whether that is
    proved.

    The model's layers must be alike. `known`: a chain to be bettered, and the answer where
    none does. Gap 0; after `time_limit` seconds the best so far, unproved. (None, True): there is no chain.
    """
    if len(tables.pins) > sum(j in tables.pins for j in devices):
        return None, True
    until, best, bound = time.monotonic() + time_limit, known, INF
    while True:
        if best is not None:
            bound = dp.value(tables, goal, best) * BETTER
        chain, proved = _solve(
            tables, devices, goal, solver, ordered, bound, max(0.0, until - time.monotonic())
        )
        if chain is None:
            return best, proved
        round_s, slowest = dp.parts(tables, chain)
        if goal.value(round_s, slowest) > bound:  # by the solver's tolerances alone it was within
            return best, proved
        if goal.objective != "throughput" or not proved or round_s * goal.batch >= slowest * goal.streams:
            return chain, proved  # as quick as any round can be here
        order = [j for j, _, _ in chain.stages]
        best = dp.best_chain(tables, goal, partial(dp.cheapest, order=order))
        assert best is not None, "the MILP's own chain is one of those that the DP sees"


def _solve(
    tables: TimeTables,
    devices: Sequence[int],
    goal: Goal,
    solver: Solver,
    ordered: bool,
    bound: float,
    time_limit: float,
) -> tuple[Chain | None, bool]:
    """The best chain of a value below `bound`, or that with the quickest round of those; and whether that,
    or that there is none, is proved."""
    if goal.objective == "throughput" and bound < INF:
        tables = tables.within(bound * goal.batch)
    program = _Program(tables, devices, goal, solver.pulp, ordered, bound)
    pulp = solver.pulp
    try:
        status = program.problem.solve(solver.make(time_limit))
    except pulp.PulpSolverError as error:
        raise SolverMissing(f"{solver.name} failed: {error}") from error
    if status == pulp.LpStatusOptimal:
        chain = program.chain()
        return chain, program.problem.sol_status == pulp.LpSolutionOptimal
    return None, status == pulp.LpStatusInfeasible


class _Program:
    """The variables and constraints of one problem."""

    def __init__(
        self,
        tables: TimeTables,
        devices: Sequence[int],
        goal: Goal,
        pulp: Any,
        ordered: bool,
        bound: float,
    ) -> None:
        self.tables, self.devices, self.pulp = tables, devices, pulp
        self.layers = tables.units - 2
        self.problem = pulp.LpProblem("plan", pulp.LpMinimize)
        self._add = _adder(self.problem, pulp)
        self._roles()
        self._path(ordered)
        self._cost(goal, bound)

    def _binary(self, name: str, possible: bool = True) -> Any:
        return self._add(name, 0, int(possible), self.pulp.LpInteger)

    def _most_layers(self, j: int, first: bool, last: bool) -> int:
        """How many layers device j has room for, beside the embedding (first) or the head (last); -1: not
        even those.

        Read off the same windows as the DP's; more layers never take less room.
        """
        units, fit = self.tables.units, self.tables.first_fit[j]
        if last:
            return units - 1 - max(1, fit[units]) if fit[units] < units else -1
        if first:
            return max((c for c in range(1, units) if fit[c] == 0), default=0) - 1
        return max((c - max(1, fit[c]) for c in range(2, units)), default=0)

    def _roles(self) -> None:
        sum_of, problem = self.pulp.lpSum, self.problem
        self.first, self.middle, self.last, self.sole, self.count = {}, {}, {}, {}, {}
        for j in self.devices:
            room_first = self._most_layers(j, True, False)
            room_last = self._most_layers(j, False, True)
            room = self._most_layers(j, False, False)
            fits_all = self.tables.first_fit[j][self.tables.units] == 0
            self.first[j] = self._binary(f"first_{j}", room_first >= 0)
            self.last[j] = self._binary(f"last_{j}", room_last >= 0)
            self.middle[j] = self._binary(f"middle_{j}", room >= 1)
            self.sole[j] = self._binary(f"sole_{j}", fits_all)
            most = max(0, room_first, room_last, room)
            self.count[j] = self._add(f"layers_{j}", 0, most, self.pulp.LpInteger)
            used = self.first[j] + self.middle[j] + self.last[j] + self.sole[j]
            if j in self.tables.pins:
                problem += used == 1
                problem += self.count[j] + self.layers * self.sole[j] == self.tables.pins[j]
            else:
                problem += used <= 1
            problem += self.count[j] >= self.middle[j]
            problem += self.count[j] <= (
                max(0, room_first) * self.first[j] + max(0, room_last) * self.last[j] + room * self.middle[j]
            )
        alone = sum_of(self.sole.values())
        problem += sum_of(self.first.values()) + alone == 1
        problem += sum_of(self.last.values()) + alone == 1
        problem += sum_of(self.count.values()) + self.layers * alone == self.layers

    def _path(self, ordered: bool) -> None:
        """Arcs between used devices, and the layers still to be placed flowing along them."""
        sum_of, problem = self.pulp.lpSum, self.problem
        place = {j: at for at, j in enumerate(self.devices)}
        self.arc, flow = {}, {}
        for i in self.devices:
            for j in self.devices:
                hop = self.tables.hop[i][j]
                # Cuts are alike, so one boundary tells whether the link is there and quick enough.
                if hop is None or hop[BOUNDARY] == INF or (ordered and place[i] >= place[j]):
                    continue
                self.arc[i, j] = self._binary(f"arc_{i}_{j}")
                flow[i, j] = self._add(f"flow_{i}_{j}", 0, self.layers)
                problem += flow[i, j] <= self.layers * self.arc[i, j]
        for j in self.devices:
            out = [(i, k) for i, k in self.arc if i == j]
            into = [(i, k) for i, k in self.arc if k == j]
            problem += sum_of(self.arc[a] for a in out) == self.first[j] + self.middle[j]
            problem += sum_of(self.arc[a] for a in into) == self.last[j] + self.middle[j]
            entering = self.layers * self.first[j] + sum_of(flow[a] for a in into)
            problem += entering - sum_of(flow[a] for a in out) == self.count[j]

    def _cost(self, goal: Goal, bound: float) -> None:
        tables, sum_of = self.tables, self.pulp.lpSum
        scale = SCALE / self._guess()
        each = self.devices
        rounds = [scale * self._sums(j, tables.overhead[j], tables.prefix[j], tables.relief[j]) for j in each]
        busy: list[Any] = []
        slowest_counts = goal.objective == "first_token" and goal.chunks > 1
        if slowest_counts:
            busy = [scale * self._sums(j, tables.place_overhead[j], tables.place_prefix[j]) for j in each]
        for j in self.devices:
            ends = (
                (tables.enter[j], tables.busy_enter[j], self.first[j] + self.sole[j]),
                (tables.leave[j], tables.busy_leave[j], self.last[j] + self.sole[j]),
            )
            for seconds, taken, used in ends:
                if seconds == INF:
                    self.problem += used == 0
                else:
                    rounds.append(scale * seconds * used)
                    busy += [scale * taken * used] if taken else []
        for (i, j), arc in self.arc.items():
            hop, taken_by = tables.hop[i][j], tables.busy[i][j]
            assert hop is not None and taken_by is not None, "arcs are made only where there is a link"
            rounds.append(scale * hop[BOUNDARY] * arc)
            busy += [scale * taken_by[BOUNDARY] * arc] if taken_by[BOUNDARY] else []
        if not slowest_counts:
            tokens = goal.streams if goal.objective == "throughput" else 1
            self._make_least(sum_of(rounds), scale * bound * tokens)
            return
        longest = self._add("longest", 0)
        for seconds in busy:
            self.problem += seconds <= longest
        self._make_least(sum_of(rounds) + (goal.chunks - 1) * longest, scale * bound)

    def _make_least(self, what: Any, bound: float) -> None:
        self.problem += what
        if bound < INF:
            self.problem += what <= bound

    def _sums(self, j: int, step: float, prefix: Sequence[float], relief: float = 0.0) -> Any:
        """What device j takes, as an expression of its roles and layers: `step` and the units it holds, less
        `relief` where it holds all."""
        units = self.tables.units
        layer = prefix[2] - prefix[1] if self.layers else 0.0
        return (
            layer * self.count[j]
            + (step + prefix[1]) * self.first[j]
            + step * self.middle[j]
            + (step + prefix[units] - prefix[units - 1]) * self.last[j]
            + (step + prefix[units] - relief) * self.sole[j]
        )

    def _guess(self) -> float:
        """The size of the objective, roughly: the whole model and its hops on a middling device."""
        tables = self.tables
        times = sorted(tables.stage(j, 0, tables.units) for j in self.devices)
        return times[len(times) // 2] or 1.0

    def chain(self) -> Chain:
        """The chain of the solved program, its round summed afresh from the tables."""

        def on(variable: Any) -> bool:
            return bool(round(variable.value()))

        tables, units = self.tables, self.tables.units
        stages: list[tuple[int, int, int]] = []
        j, first = next(j for j in self.devices if on(self.first[j]) or on(self.sole[j])), 0
        if on(self.sole[j]):
            return Chain(((j, 0, units),), tables.enter[j] + tables.stage(j, 0, units) + tables.leave[j])
        total = tables.enter[j]
        while True:
            at_end = on(self.last[j])
            last = max(first, 1) + round(self.count[j].value()) + at_end
            stages.append((j, first, last))
            total += tables.stage(j, first, last)
            if at_end:
                assert last == units, "the layers of all roles add up along the path"
                return Chain(tuple(stages), total + tables.leave[j])
            following = next(k for (i, k), arc in self.arc.items() if i == j and on(arc))
            hop = tables.hop[j][following]
            assert hop is not None, "arcs are made only where there is a link"
            total += hop[last]
            j, first = following, last
