"""The exact plan over devices, their order and their layers, as a mixed-integer linear program in PuLP
(imported when a problem is solved, not before: phones plan without it). Costs and room come from the tables
of the other searches.

Where layers are alike, a device needs only a *number* of layers, and eight devices solve in milliseconds
(`_Counts`). Where they are not, a chain is a path along ranges of units that devices hold (`_Path`). What is
known already bounds the problem: no chain counts that does not better it. For throughput that bound replaces
the busiest resource: the quickest lap in which all resources keep within the bound is a new bound, until
there is none. Each of those few problems solves like one for latency, where one with a variable for the
busiest resource, whose relaxation splits layers to make resources equal, took ten times as long at worst.
"""

import importlib
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from . import search
from .search import Chain
from .tables import INF, TimeTables

SCALE = 1000.0  # the objective's size in the solver's units, far above its absolute tolerances of 1e-6
BETTER = 1 - 1e-9  # of what is known: a chain within that is no better
ANY = 1  # any boundary: they are alike
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
    """PuLP with HiGHS, an installed CBC or the CBC that PuLP brings, the first that runs here; `only` asks
    for one: highs, cbc, bundled-cbc. SolverMissing says what to install."""
    from importlib import metadata  # only here: with it come email, csv and zipfile

    try:
        pulp = importlib.import_module("pulp")
    except ImportError as error:
        raise SolverMissing("the MILP needs PuLP and a solver: pip install 'shoal[plan]'") from error

    def highs(limit: float) -> Any:
        # Presolve of HiGHS 1.15.1 calls some of these problems infeasible that are not (its issue 3296).
        # Restarts and primal heuristics double the worst case of 8 devices x 32 layers, and thousands of cuts
        # at a time take the hardest a third longer.
        options = {"presolve": "off", "mip_allow_restart": False, "mip_heuristic_effort": 0.0}
        options |= {"mip_pool_soft_limit": 100, "threads": 1}
        return pulp.HiGHS(msg=False, gapRel=0.0, gapAbs=0.0, timeLimit=limit, **options)

    def coin(path: str | None) -> Any:
        return lambda limit: pulp.COIN_CMD(msg=False, gapRel=0.0, gapAbs=0.0, timeLimit=limit, path=path)

    choices = {"highs": ("HiGHS", highs), "cbc": ("CBC", coin(None))}
    with suppress(metadata.PackageNotFoundError):
        if metadata.version("highspy") in TALKATIVE:
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


def best_chain(
    tables: TimeTables,
    devices: Sequence[int],
    solver: Solver,
    *,
    known: Chain | None = None,
    time_limit: float = 60,
) -> tuple[Chain | None, bool]:
    """The best chain over `devices` in any order, and whether that is proved. `known`: a chain to be
    bettered, and the answer where none does. Gap 0; after `time_limit` seconds the best so far, unproved.
    (None, True): there is no chain."""
    if len(tables.pins) > sum(j in tables.pins for j in devices):
        return None, True
    goal = tables.goal
    until, best, bound = time.monotonic() + time_limit, known, INF
    while True:
        if best is not None:
            bound = search.value(tables, best) * BETTER
        left = max(0.0, until - time.monotonic())
        chain, proved = _solve(tables, devices, solver, bound, left)
        if chain is None:
            return best, proved
        lap, busiest = search.parts(tables, chain)
        if goal.value(lap, busiest) > bound:  # by the solver's tolerances alone it was within
            return best, proved
        if goal.objective != "throughput" or not proved or lap * goal.batch >= busiest * goal.streams:
            return chain, proved  # as quick as any lap can be here
        order = [j for j, _, _ in chain.stages]
        best, _ = search.best_chain(tables, partial(search.cheapest, order=order))
        assert best is not None, "the MILP's own chain is one of those that the DP sees"


def _solve(
    tables: TimeTables, devices: Sequence[int], solver: Solver, bound: float, time_limit: float
) -> tuple[Chain | None, bool]:
    """The best chain of a value below `bound`, or that with the quickest lap of those; and whether that, or
    that there is none, is proved."""
    pulp, goal = solver.pulp, tables.goal
    if goal.objective == "throughput" and bound < INF:
        tables = tables.within(bound * goal.batch)
    program = (_Counts if tables.alike else _Path)(tables, devices, pulp, bound)
    try:
        status = program.problem.solve(solver.make(time_limit))
    except pulp.PulpSolverError as error:
        raise SolverMissing(f"{solver.name} failed: {error}") from error
    if status != pulp.LpStatusOptimal:
        return None, status == pulp.LpStatusInfeasible
    stages = tuple(program.stages())
    lap, _ = search.parts(tables, Chain(stages, 0.0))
    return Chain(stages, lap), program.problem.sol_status == pulp.LpSolutionOptimal


class _Program:
    """One problem: what its formulations share."""

    def __init__(self, tables: TimeTables, devices: Sequence[int], pulp: Any, bound: float) -> None:
        self.tables, self.devices, self.pulp, self.bound = tables, devices, pulp, bound
        self.problem = pulp.LpProblem("plan", pulp.LpMinimize)
        self.add = _adder(self.problem, pulp)
        self.terms: list[Any] = []  # of the lap, each scaled
        self.resources: list[Any] = []  # of each stage and link, where the goal looks at them
        times = sorted(tables.stage(j, 0, tables.units) for j in devices)
        self.scale = SCALE / (times[len(times) // 2] or 1.0)  # roughly the size of the objective
        self.looks = tables.goal.objective == "first_token" and tables.goal.chunks > 1
        self.build()
        self.minimise()

    build: Callable[[], None]  # adds variables, constraints and costs
    stages: Callable[[], Iterable[tuple[int, int, int]]]  # the chain of the solved program

    def binary(self, name: str, possible: bool = True) -> Any:
        return self.add(name, 0, int(possible), self.pulp.LpInteger)

    def on(self, variable: Any) -> bool:
        return bool(round(variable.value()))

    def cost(self, seconds: float, taken: float, used: Any) -> None:
        """What an expression of 0 or 1 adds to the lap, and takes of a resource of its own."""
        if seconds == INF:
            self.problem += used == 0
            return
        self.terms.append(self.scale * seconds * used)
        if self.looks and taken:
            self.resources.append(self.scale * taken * used)

    def minimise(self) -> None:
        goal, what = self.tables.goal, self.pulp.lpSum(self.terms)
        most = self.scale * self.bound * (goal.streams if goal.objective == "throughput" else 1)
        if self.looks:
            longest = self.add("longest", 0)
            for seconds in self.resources:
                self.problem += seconds <= longest
            what += (goal.chunks - 1) * longest
        self.problem += what
        if self.bound < INF:
            self.problem += what <= most


class _Counts(_Program):
    """Layers that are alike: each used device has one role, first (embedding and n >= 0 layers), middle (n >=
    1), last (n >= 0 and the LM head) or sole (everything). Arcs join the roles to a path; layers flow along
    the arcs and each device takes its n, so that a ring off the path, whose middle devices take layers that
    never arrive, is impossible and the relaxation stays tight."""

    def build(self) -> None:
        self.layers = self.tables.units - 2
        self._roles()
        self._path()
        lap, busy = self.tables.lap, self.tables.busy
        for j in self.devices:
            self.terms.append(
                self.scale * self._sums(j, lap.overhead[j], lap.prefix[j], self.tables.relief[j])
            )
            if self.looks:
                self.resources.append(self.scale * self._sums(j, busy.overhead[j], busy.prefix[j]))
            self.cost(lap.enter[j], busy.enter[j], self.first[j] + self.sole[j])
            self.cost(lap.leave[j], busy.leave[j], self.last[j] + self.sole[j])
        for (i, j), arc in self.arc.items():
            hop, taken = lap.hop[i][j], busy.hop[i][j]
            assert hop is not None and taken is not None, "arcs are made only where there is a link"
            self.cost(hop[ANY], taken[ANY], arc)

    def _roles(self) -> None:
        sum_of, problem, units = self.pulp.lpSum, self.problem, self.tables.units
        self.first, self.middle, self.last, self.sole, self.count = {}, {}, {}, {}, {}
        for j, fit in ((j, self.tables.first_fit[j]) for j in self.devices):
            # How many layers there is room for: beside the embedding or the LM head, -1 if not even for that.
            room_first = max((c - 1 for c in range(1, units) if fit[c] == 0), default=-1)
            room_last = units - 1 - max(1, fit[units]) if fit[units] < units else -1
            room = max((c - max(1, fit[c]) for c in range(2, units)), default=0)
            self.first[j] = self.binary(f"first_{j}", room_first >= 0)
            self.last[j] = self.binary(f"last_{j}", room_last >= 0)
            self.middle[j] = self.binary(f"middle_{j}", room >= 1)
            self.sole[j] = self.binary(f"sole_{j}", fit[units] == 0)
            self.count[j] = self.add(
                f"layers_{j}", 0, max(0, room_first, room_last, room), self.pulp.LpInteger
            )
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

    def _path(self) -> None:
        """Arcs between used devices, and the layers still to be placed flowing along them."""
        sum_of, problem = self.pulp.lpSum, self.problem
        self.arc, flow = {}, {}
        for i in self.devices:
            for j in self.devices:
                hop = self.tables.lap.hop[i][j]
                # Cuts are alike, so one boundary tells whether the link is there and quick enough.
                if hop is None or hop[ANY] == INF or i == j:
                    continue
                self.arc[i, j] = self.binary(f"arc_{i}_{j}")
                flow[i, j] = self.add(f"flow_{i}_{j}", 0, self.layers)
                problem += flow[i, j] <= self.layers * self.arc[i, j]
        for j in self.devices:
            out = [(i, k) for i, k in self.arc if i == j]
            into = [(i, k) for i, k in self.arc if k == j]
            problem += sum_of(self.arc[a] for a in out) == self.first[j] + self.middle[j]
            problem += sum_of(self.arc[a] for a in into) == self.last[j] + self.middle[j]
            entering = self.layers * self.first[j] + sum_of(flow[a] for a in into)
            problem += entering - sum_of(flow[a] for a in out) == self.count[j]

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

    def stages(self) -> Iterable[tuple[int, int, int]]:
        j, first = next(j for j in self.devices if self.on(self.first[j]) or self.on(self.sole[j])), 0
        if self.on(self.sole[j]):
            return [(j, 0, self.tables.units)]
        stages = []
        while True:
            at_end = self.on(self.last[j])
            last = max(first, 1) + round(self.count[j].value()) + at_end
            stages.append((j, first, last))
            if at_end:
                assert last == self.tables.units, "the layers of all roles add up along the path"
                return stages
            j, first = next(k for (i, k), arc in self.arc.items() if i == j and self.on(arc)), last


class _Path(_Program):
    """Any layers: a path along ranges of units that devices hold and hops between them."""

    def build(self) -> None:
        tables, sum_of, units = self.tables, self.pulp.lpSum, self.tables.units
        self.holds = {
            (j, b, c): self.binary(f"holds_{j}_{b}_{c}")
            for j in self.devices
            for c in range(1, units + 1)
            for b in range(tables.first_fit[j][c], c)
            if tables.fits(j, b, c)
        }
        starts: dict[tuple[int, int], list[Any]] = {}
        ends: dict[tuple[int, int], list[Any]] = {}
        for (j, b, c), held in self.holds.items():
            starts.setdefault((j, b), []).append(held)
            ends.setdefault((j, c), []).append(held)
            self.terms.append(self.scale * tables.stage(j, b, c) * held)
        into: dict[tuple[int, int], list[Any]] = {}
        out: dict[tuple[int, int], list[Any]] = {}
        for i, c in ends:
            for j in self.devices:
                hop, taken = tables.lap.hop[i][j], tables.busy.hop[i][j]
                if (j, c) not in starts or i == j or hop is None or taken is None:
                    continue
                if hop[c] < INF:
                    passes = self.binary(f"hop_{i}_{j}_{c}")
                    self.cost(hop[c], taken[c], passes)
                    out.setdefault((i, c), []).append(passes)
                    into.setdefault((j, c), []).append(passes)
        for key, held in starts.items():
            if key[1] > 0:
                self.problem += sum_of(held) == sum_of(into.get(key, []))
        for key, held in ends.items():
            if key[1] < units:
                self.problem += sum_of(held) == sum_of(out.get(key, []))
        for j in self.devices:
            own = [(part, held) for part, held in self.holds.items() if part[0] == j]
            used = sum_of(held for _, held in own)
            self.problem += used == 1 if j in tables.pins else used <= 1
            self.cost(tables.lap.enter[j], tables.busy.enter[j], sum_of(starts.get((j, 0), [])))
            self.cost(tables.lap.leave[j], tables.busy.leave[j], sum_of(ends.get((j, units), [])))
            if self.looks:
                self.resources.append(
                    self.scale * sum_of(tables.busy.stage(*part) * held for part, held in own)
                )
        first = [held for (_, b, _), held in self.holds.items() if b == 0]
        self.problem += sum_of(first) == 1

    def stages(self) -> Iterable[tuple[int, int, int]]:
        return sorted((part for part, held in self.holds.items() if self.on(held)), key=lambda part: part[1])
