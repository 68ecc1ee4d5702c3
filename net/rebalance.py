"""The rebalancer: proposes to move layers while answers are computed. It does no I/O and reads no clock.

`look` is called twice a second with what has been measured. A device whose pace has changed for good makes
other placements better than the one in force: the stages that wait for it are offered its boundary layers
(planner/moves.py), and a whole new plan is one more candidate. Of these the one that saves most time over
the tokens that the answers should still need is proposed, if it saves clearly more than the change costs.

Changes that do not pay would be worse than none, so there are brakes:

- Measurements are smoothed, and nothing happens while one of them is changing (net/levels.py).
- A gain must exceed a threshold, which grows with the noise of the measurements. A small one must last.
- A device that swings is expected to swing again, so a change must pay until then.
- The way back is easier: stages that were right are remembered with the paces for which they were. When the
  devices are as quick as then, a smaller gain leads back to them.
- Changes may cost a small share of the time, whatever they gain.
- After a change its gain is measured. One that brought nothing is undone, and not proposed again until
  something else has changed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

from ..planner import Assignment, LinkSpeed, Question
from ..planner.evaluation import token_seconds
from ..planner.moves import replans, room, room_beside, steals, travel, way
from ..planner.streams import Follower
from .levels import JUMP, UNSETTLED_SECONDS, Level
from .pace import slowed
from .placement import Outcome, Placement, Proposal, Usage
from .trials import JUDGE_WITHIN, Speed, Stages, Trial, Verdict, distance

USUAL_TOKENS = 64
"""An answer that has just begun is expected to have so many tokens."""
LEAST_GAIN, NOISES = 0.06, 2.0
"""The part of a token's time that a change must save after the pace of a device has jumped, and how many
times the noise of the devices more."""
MOST_NOISE = 0.15
"""The most by which noise raises the gain that a change must have: averages have less noise."""
DRIFT_GAIN, SURE_GAIN, LASTING_SECONDS = 0.1, 0.15, 3.0
"""The part of a token's time that a change must save if no pace has jumped. A gain below SURE_GAIN must then
have been there for so long."""
RETURN_GAIN = 0.03
"""The part of a token's time that a change must save, whatever the noise, if it leads back to stages that
were right for the paces to which the devices have jumped. What the model does not know of these stages has
not kept anybody from using them before."""
KEPT_RIGHT = 4
"""The number of such stages that are remembered."""
JUMPED_SECONDS = 10.0
"""The time for which a jump counts."""
WORTH = 2.0
"""A change must save so many times its cost."""
BUDGET, MINUTE = 0.04, 60.0
"""The share of a minute that changes may cost, if there are several."""
GRACE_SECONDS, AGAIN_SECONDS, BACK_SECONDS = 1.0, 2.0, 8.0
"""After a change: the time in which nothing is measured, until another change, and until one back, unless the
change was to try a device."""
KEPT_LOOKS = 20
"""The speed before a change is that of so many looks."""
MOST_BETWEEN = 2.0
"""Between two looks that are farther apart, no speed is measured."""
VAIN_SECONDS, FAILED_WEIGHT = 2.0, 3
"""After a proposal in vain there is none for so long; if no pace has jumped, twice as long after each next
one. A change that was made, and brought nothing, counts as several."""
KEPT_FAILURES = 16
"""The number of such changes that are remembered."""
REST_SECONDS, COMMON = 10.0, 1.25
"""For how long a device without a stage rests until half of its slowness, as a logarithm, is forgotten; twice
as long each next time. And the most by which it is expected to be as slow as the others."""
REMEMBERED = 600.0
"""How long a change that has failed is remembered."""
SIMILAR, DEEPER = 0.03, 1.25
"""Another search is needed when a measurement has changed by more than this part and the noise, or the depth
by this factor."""
LOAD_BYTES_PER_S = 200e6
"""The rate at which a device loads weights that it does not hold."""
BULK_SHARE = 0.5
"""The share of a link that keys and values may take."""
TAIL_POSITIONS = 96
"""Positions of a session that are sent while its answer stands still: those of an incomplete chunk, and those
that were computed while the last chunk was sent."""
FIXED_SECONDS, DELAY_SECONDS, COPYING = 0.03, 0.2, 0.1
"""What every change costs: the standstill, the time that it takes, and the share of the speed that is lost
meanwhile."""
WAITS_MORE = 0.1
"""A stage that waits for a share of the time larger by this than another one's is not relieved by that."""
LOOK_SECONDS = 0.5
"""The time between two steps of a change."""
NEARLY = 1.03
"""A change is as good as another one if tokens take at most so many times as long after it."""
NOTABLY = 1.1
"""A device that takes so many times as long as offered is slow enough to be named."""
NEAR_SECONDS = 0.0005
"""Seconds that are added to latencies before they are compared: shorter ones do not matter, and vary most."""

Key = tuple[str, ...]


def expected_tokens(made: int, most: int) -> int:
    """The tokens that an answer should need still, after `made` of at most `most`. Its length is unknown, and
    one that has lasted long will last longer: it is expected to double."""
    return max(0, min(most - made, max(made, USUAL_TOKENS)))


@dataclass(frozen=True, slots=True)
class View:
    """What has been measured until `now`. `question`: devices as offered, links as measured, and the workload
    and objective of what the chain is used for. `slower`: how many times as long as offered each device
    takes."""

    question: Question
    slower: Mapping[str, float]
    stages: Stages
    usage: Usage
    now: float


@dataclass(frozen=True, slots=True)
class Search:
    """The stages that were found, and for what. `ways`: the stages between, where there is no room for a
    single change."""

    values: Mapping[Key, float]
    usage: Usage
    found: tuple[Stages, ...]
    ways: Mapping[Stages, tuple[Stages, ...]]


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a change: its stages, the predicted seconds of a token before and after, the seconds that it
    costs, and the bytes that travel."""

    stages: Stages
    seconds_before: float
    seconds_after: float
    cost_s: float
    bytes: int


@dataclass(frozen=True, slots=True)
class Right:
    """Stages that nothing was better than, when the devices took so many times as long as offered."""

    stages: Stages
    slower: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Memory:
    """What is known from earlier looks, of which `seen` is the last. `settled`: when no pace was changing.
    `speeds` are those of the last looks with the same stages and streams. `quiet`: until when nothing is
    measured. `wanted`: since when a change has been worth it. `asked` is the last proposal, and `outcome`
    what became of it. `goal` is the change of which it is a part, for the reason `why`, and `way` has the
    steps that follow. `trial` is a change whose effect is measured, and `changed` the last change. `costs`:
    the times and costs of the last minute's changes. `failed`: changes that brought nothing or could not be
    made, with the time, and `vain` their number since one that was good. `left`: when each device without a
    stage lost it, and how often it has. `right`: stages to which a change may lead back, the last ones first.
    `scale`: by how much standstills exceed the estimate. `verdict` is that of this look."""

    seen: View | None = None
    settled: float = -math.inf
    levels: Mapping[Key, Level] = field(default_factory=dict)
    speeds: tuple[Speed, ...] = ()
    quiet: float = -math.inf
    wanted: float | None = None
    search: Search | None = None
    asked: Trial | None = None
    outcome: Outcome | None = None
    goal: Trial | None = None
    why: str = ""
    way: tuple[Step, ...] = ()
    trial: Trial | None = None
    changed: Trial | None = None
    costs: tuple[tuple[float, float], ...] = ()
    failed: tuple[tuple[Stages, Stages, float], ...] = ()
    vain: int = 0
    left: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    right: tuple[Right, ...] = ()
    scale: float = 1.0
    verdict: Verdict | None = None


def happened(memory: Memory, outcome: Outcome) -> Memory:
    """The memory after what became of the last proposal."""
    scale = memory.scale
    if memory.asked is not None and outcome.committed and outcome.standstill > 0:
        ratio = outcome.standstill * scale / memory.asked.cost_s
        scale = min(8.0, max(0.25, scale + (ratio - scale) / 3))
    return replace(memory, outcome=outcome, scale=scale)


def look(memory: Memory, view: View) -> tuple[Memory, Proposal | None]:
    """The memory after a look at the measurements, and a proposal if a change of the stages pays."""
    memory = _after_changes(replace(memory, verdict=None), view)
    before, memory = memory.seen, replace(memory, seen=view)
    if memory.way:  # also if the answer has ended: stages on the way may be worse than those before it
        return _stepped(memory, view)
    if view.now < memory.quiet or not view.usage.streams:
        return memory, None
    levels = _levels(memory, view)
    memory = replace(memory, levels=levels)
    question = _smoothed(memory, view)
    follower = Follower(question)
    try:
        seconds = token_seconds(question, view.stages, follower)
    except ValueError:  # a link of the chain is not known any more
        return memory, None
    if all(levels["pace", stage.device].settled(view.now) for stage in view.stages):
        memory = replace(_counted(memory, before, view, seconds), settled=view.now)
    elif view.now - memory.settled < UNSETTLED_SECONDS:
        return memory, None
    memory, undo = _judged(memory, question, view, seconds)
    if undo is not None:
        return _asked(memory, view, undo, "the last change has brought nothing", undoes=True)
    memory = _searched(memory, question, view, follower)
    assert memory.search is not None
    back = tuple(_returns(memory, question, view))
    others = dict.fromkeys((*memory.search.found, *back))
    found = (_change(memory, question, view, seconds, one, follower) for one in others)
    able = (one for one in found if one is not None and not _barred(memory, view, one.stages))
    best = _best(view, [one for one in able if _pays(memory, view, one, follower, back)])
    if best is None:
        return _rested(replace(memory, wanted=None), view), None
    wanted = view.now if memory.wanted is None else memory.wanted
    memory = replace(memory, wanted=wanted)
    lasting = _jumped(memory, view) or view.now - wanted >= LASTING_SECONDS
    if best.gain < SURE_GAIN and (memory.trial is not None or not lasting):
        return memory, None
    if view.now < _next_time(memory, best.stages) or not _in_budget(memory, view, best):
        return memory, None
    return _asked(memory, view, best, _why(view, levels, best))


# --- what has been measured


def _after_changes(memory: Memory, view: View) -> Memory:
    """The memory after the last proposal was carried out or not, or the stages have changed for another
    reason."""
    asked, outcome, seen = memory.asked, memory.outcome, memory.seen
    memory = replace(memory, asked=None, outcome=None)
    if seen is None or seen.stages == view.stages:
        if asked is not None and outcome is not None and not outcome.committed:
            assert memory.goal is not None
            # Another change to nearly the same stages may be possible.
            memory = _in_vain(memory, replace(memory.goal, old=memory.goal.new), view.now, 1)
        memory = replace(memory, way=())
        if seen is None or seen.usage.streams == view.usage.streams:
            return memory
        return replace(memory, speeds=(), trial=None)
    old, new = ({stage.device for stage in stages} for stages in (seen.stages, view.stages))
    left = {name: (view.now, memory.left.get(name, (0.0, 0))[1] + 1) for name in old - new}
    memory = replace(
        memory,
        speeds=(),
        trial=None,
        wanted=None,
        search=None,
        quiet=view.now + GRACE_SECONDS,
        left={**memory.left, **left},
        levels={key: memory.levels[key] for key in memory.levels.keys() - {("pace", n) for n in new - old}},
    )
    if asked is None or asked.new != view.stages:
        return replace(memory, way=())
    if memory.way:
        return memory
    assert memory.goal is not None
    done = replace(memory.goal, since=view.now)
    costs = tuple(one for one in memory.costs if one[0] > view.now - MINUTE)
    return replace(memory, trial=done, changed=done, costs=(*costs, (view.now, done.cost_s)))


def _measurements(view: View) -> Iterable[tuple[Key, float]]:
    """What is smoothed: the paces of devices with a stage, which alone are measured, and all links."""
    for stage in view.stages:
        yield ("pace", stage.device), view.slower.get(stage.device, 1.0)
    for ends, link in view.question.cluster.links.items():
        yield ("latency", *ends), link.latency_s + NEAR_SECONDS
        if link.bytes_per_s < math.inf:
            yield ("rate", *ends), link.bytes_per_s


def _levels(memory: Memory, view: View) -> dict[Key, Level]:
    levels = dict(memory.levels)
    for key, measured in _measurements(view):
        level = levels.get(key)
        paces = [right.slower for right in memory.right] if key[0] == "pace" else []
        known = [slower[key[1]] for slower in paces if key[1] in slower]
        levels[key] = Level.of(measured) if level is None else level.seen(measured, view.now, known)
    return levels


def _factor(memory: Memory, view: View, name: str) -> float:
    """How many times as long as offered a device takes. One without a stage is not measured. It should take
    at least as long as the quickest of those that are, within COMMON, since what slows these down may concern
    all; and it may have recovered, the more likely the longer it rests."""
    level = memory.levels.get(("pace", name))
    if level is not None and any(stage.device == name for stage in view.stages):
        return level.measured
    others = (memory.levels.get(("pace", stage.device)) for stage in view.stages)
    quickest = min((other.measured for other in others if other is not None), default=1.0)
    common = min(COMMON, max(1.0, quickest))
    since, times = memory.left.get(name, (-math.inf, 1))
    last = view.slower.get(name, 1.0) if level is None else level.measured
    rests = (view.now - since) / (REST_SECONDS * 2 ** (times - 1))
    return max(common, math.pow(last, 1 / (1 + rests * rests)))


def _smoothed(memory: Memory, view: View) -> Question:
    """The question with what the measurements have settled to."""
    cluster, levels = view.question.cluster, memory.levels
    devices = []
    for device in cluster.devices:
        factor = _factor(memory, view, device.name)
        devices.append(device if factor == 1.0 else slowed(device, factor))

    def smoothed(ends: tuple[str, str], link: LinkSpeed) -> LinkSpeed:
        latency, rate = levels["latency", *ends], levels.get(("rate", *ends))
        if latency.steady and (rate is None or rate.steady):
            return link
        seconds = max(0.0, latency.measured - NEAR_SECONDS)
        return LinkSpeed(seconds, link.bytes_per_s if rate is None else rate.measured)

    links = {ends: smoothed(ends, link) for ends, link in cluster.links.items()}
    return replace(view.question, cluster=replace(cluster, devices=tuple(devices), links=links))


def _counted(memory: Memory, before: View | None, view: View, seconds: float) -> Memory:
    """The memory with the tokens since the last look, if they tell how fast these stages are."""
    if before is None or (before.stages, before.usage.streams) != (view.stages, view.usage.streams):
        return memory
    passed = view.now - before.now
    if before.now < memory.quiet or passed > MOST_BETWEEN or before.usage.reading or view.usage.reading:
        return memory
    speed = Speed(view.usage.tokens - before.usage.tokens, passed, passed / seconds)
    return replace(memory, speeds=(*memory.speeds, speed)[-KEPT_LOOKS:])


def _judged(memory: Memory, question: Question, view: View, seconds: float) -> tuple[Memory, _Change | None]:
    """The memory with a verdict on the last change, once there is one; and the change that undoes it, if it
    should be undone."""
    trial = memory.trial
    if trial is None:
        return memory, None
    verdict = trial.judged(sum(memory.speeds, Speed()))
    if verdict is None:
        late = view.now - trial.since > JUDGE_WITHIN
        return (replace(memory, trial=None) if late else memory), None
    memory = replace(memory, trial=None, verdict=verdict)
    if not verdict.failed:
        return (memory if trial.undoes else replace(memory, vain=0)), None
    memory = _in_vain(memory, trial, view.now, FAILED_WEIGHT)
    if not verdict.undo:
        return memory, None
    return memory, _change(memory, question, view, seconds, trial.old, Follower(question))


def _in_vain(memory: Memory, trial: Trial, now: float, weight: int) -> Memory:
    """The memory of a change that could not be made, or that brought nothing, which has more weight."""
    failed = (*memory.failed, (trial.old, trial.new, now))[-KEPT_FAILURES:]
    return replace(memory, failed=failed, vain=memory.vain + weight)


# --- what could change


@dataclass(frozen=True, slots=True)
class _Change:
    """Other stages: the predicted seconds of a token before and after, the seconds that the change costs, and
    those that it saves over the time that counts. `steps`: how it is made, of which the last one has these
    stages."""

    stages: Stages
    seconds_before: float
    seconds_after: float
    cost_s: float
    saved: float
    steps: tuple[Step, ...]

    @property
    def gain(self) -> float:
        """The part of a token's time that is saved."""
        return 1 - self.seconds_after / self.seconds_before


def _searched(memory: Memory, question: Question, view: View, follower: Follower) -> Memory:
    """The memory with the result of a search for the measurements as they are now."""
    values: dict[Key, float] = {
        ("pace", d.name): math.log(_factor(memory, view, d.name)) for d in question.cluster.devices
    }
    values.update((key, level.value) for key, level in memory.levels.items() if key[0] != "pace")
    search = memory.search
    if (
        search is not None
        and search.usage.streams == view.usage.streams
        and search.values.keys() == values.keys()
    ):
        depths = sorted((max(1, search.usage.depth), max(1, view.usage.depth)))

        def similar(key: Key) -> bool:
            level = memory.levels.get(key)
            return abs(values[key] - search.values[key]) <= SIMILAR + (0.0 if level is None else level.noise)

        if depths[1] <= DEEPER * depths[0] and all(map(similar, values)):
            return memory
    beside = partial(room_beside, question, view.stages, positions=_positions(view.usage))
    found = dict.fromkeys(steal.stages for steal in steals(question, view.stages, follower, beside))
    found |= dict.fromkeys(replans(question, view.stages))
    found.pop(view.stages, None)
    ways = _ways(question, view, follower, found)
    return replace(memory, search=Search(values, view.usage, tuple(found), ways))


def _ways(
    question: Question, view: View, follower: Follower, found: Iterable[Stages]
) -> dict[Stages, tuple[Stages, ...]]:
    """The way to the best stages, if there is no room for a single change to them, and they are clearly
    better than all others for which there is."""
    positions = _positions(view.usage)
    beside = partial(room_beside, question, view.stages, positions=positions)
    seconds = {one: token_seconds(question, one, follower) for one in (view.stages, *found)}
    best = min(seconds, key=seconds.__getitem__)
    single = min(value for one, value in seconds.items() if one == view.stages or beside(one))
    if seconds[best] > single * (1 - LEAST_GAIN):
        return {}
    between = way(question, view.stages, best, positions, follower)
    return {} if between is None else {best: between}


def _rested(memory: Memory, view: View) -> Memory:
    """The memory after a look that found nothing better than the stages in force, once a change to them has
    been judged."""
    if memory.trial is not None:
        return memory
    paces = {stage.device: _factor(memory, view, stage.device) for stage in view.stages}
    others = (one for one in memory.right if one.stages != view.stages)
    return replace(memory, right=(Right(view.stages, paces), *others)[:KEPT_RIGHT])


def _returns(memory: Memory, question: Question, view: View) -> Iterator[Stages]:
    """The stages that were right for the paces that the devices have now. One of them has jumped since the
    last change: without that, nothing leads back."""
    if memory.changed is None or _last_jump(memory) <= memory.changed.since:
        return
    names = {device.name for device in question.cluster.devices if question.allowed(device.name)}
    for right in memory.right:
        if (
            right.stages != view.stages
            and names.issuperset(right.slower)
            and question.constraints.keeps_ends(right.stages)
            and all(
                abs(math.log(_factor(memory, view, name) / factor)) <= JUMP
                for name, factor in right.slower.items()
            )
        ):
            yield right.stages


def _positions(usage: Usage) -> int:
    """The positions of all sessions."""
    return max(usage.positions, usage.streams * usage.depth)


def _change(
    memory: Memory, question: Question, view: View, seconds: float, stages: Stages, follower: Follower
) -> _Change | None:
    """What a change to other stages brings and costs. None: a device or a link is not there, or has no
    room."""
    between = () if memory.search is None else memory.search.ways.get(stages, ())
    fits, positions, usage = room(question), _positions(view.usage), view.usage
    now, delay, cost, steps = seconds, 0.0, 0.0, list[Step]()
    try:
        for old, new in pairwise((view.stages, *between, stages)):
            if not fits(old, new) or not room_beside(question, old, new, positions):
                return None
            took, costs, sent = _step(memory, question, view, now, old, new)
            took += LOOK_SECONDS * bool(steps)
            costs += took * max(0.0, 1 - seconds / now)  # of a step before, answers are slower
            after = token_seconds(question, new, follower)
            delay, cost = delay + took, cost + costs
            steps.append(Step(new, now, after, costs, sent))
            now = after
    except ValueError:
        return None
    lasts = min(
        (
            level.lasts(view.now)
            for stage in (*view.stages, *stages)
            if (level := memory.levels.get(("pace", stage.device))) is not None
        ),
        default=math.inf,
    )
    horizon = min(usage.remaining * seconds, lasts)
    saved = max(0.0, horizon - delay) * (1 - now / seconds) - cost
    return _Change(stages, seconds, now, cost, saved, tuple(steps))


def _step(
    memory: Memory, question: Question, view: View, seconds: float, old: Stages, new: Stages
) -> tuple[float, float, int]:
    """The time that a single change takes, with `seconds` a token meanwhile; what it costs, in seconds; and
    the bytes that travel."""
    usage, link = view.usage, question.cluster.link
    positions = _positions(usage)
    needed = travel(question, old, new, usage.copies)
    load = max(needed.weights.values(), default=0) / LOAD_BYTES_PER_S
    lap = seconds * usage.streams
    copy = tail = 0.0
    for ends, size in needed.state.items():
        there = link(*ends)
        rate = math.inf if there is None else there.bytes_per_s
        copy = max(copy, positions * size / (BULK_SHARE * rate))
        rest = min(positions, TAIL_POSITIONS * usage.streams) * size / rate
        tail = max(tail, rest + (0.0 if there is None else there.latency_s))
    delay = DELAY_SECONDS + max(load, copy)
    cost = memory.scale * (FIXED_SECONDS + lap + tail) + COPYING * delay
    return delay, cost, positions * sum(needed.state.values())


# --- whether it should


def _best(view: View, changes: Sequence[_Change]) -> _Change | None:
    """The change that saves most time. Of those that are nearly as good, one that keeps all devices in use,
    so that it is known when they are quick again, and moves little."""
    if not changes:
        return None
    most = max(changes, key=lambda one: one.saved)

    def moves(one: _Change) -> tuple[int, int]:
        left = {stage.device for stage in view.stages} - {stage.device for stage in one.stages}
        return len(left), distance(view.stages, one.stages)

    return min((one for one in changes if one.seconds_after <= NEARLY * most.seconds_after), key=moves)


def _pays(memory: Memory, view: View, change: _Change, follower: Follower, back: Collection[Stages]) -> bool:
    """Whether a change gains enough to be one, and saves enough. The noise of a device matters as far as
    tokens need its time; not if the change leads `back`."""
    noise = 0.0
    for stages in (view.stages, change.stages):
        seconds = {one.device: follower.cost(one).decode_seconds(1, view.usage.depth) for one in stages}
        most = max(seconds.values())
        levels = ((memory.levels.get(("pace", name)), time / most) for name, time in seconds.items())
        noise = max(noise, *(share * level.noise for level, share in levels if level is not None), 0.0)
    least = LEAST_GAIN if _jumped(memory, view) else DRIFT_GAIN
    least = RETURN_GAIN if change.stages in back else least + min(MOST_NOISE, NOISES * noise)
    if change.gain < least or change.saved < (WORTH - 1) * change.cost_s:
        return False
    if view.question.objective != "throughput":
        return True
    giver, taker = _ends(view.stages, change.stages)
    waiting = view.usage.waiting
    return giver not in waiting or taker not in waiting or waiting[giver] <= waiting[taker] + WAITS_MORE


def _barred(memory: Memory, view: View, stages: Stages) -> bool:
    """Whether stages lead to where an earlier change has failed, and nothing has jumped since."""
    return any(
        since > max(_last_jump(memory), view.now - REMEMBERED)
        and (stages == new or distance(stages, new) < distance(stages, old))
        for old, new, since in memory.failed
    )


def _last_jump(memory: Memory) -> float:
    """When the pace of any device has jumped last."""
    jumps = (level.jumps[-1] for key, level in memory.levels.items() if key[0] == "pace" and level.jumps)
    return max(jumps, default=-math.inf)


def _jumped(memory: Memory, view: View) -> bool:
    return view.now - _last_jump(memory) < JUMPED_SECONDS


def _next_time(memory: Memory, stages: Stages) -> float:
    """When a change to these stages may follow the last change."""
    wait = -math.inf
    if memory.failed and memory.vain:
        since = memory.failed[-1][2]
        wait = since + VAIN_SECONDS * (1 if _last_jump(memory) > since else 2 ** (memory.vain - 1))
    done = memory.changed
    if done is None:
        return wait
    back = distance(stages, done.old) < distance(done.new, done.old)
    tried = {stage.device for stage in done.new} - {stage.device for stage in done.old}
    return max(wait, done.since + (BACK_SECONDS if back and not tried else AGAIN_SECONDS))


def _in_budget(memory: Memory, view: View, change: _Change) -> bool:
    spent = [cost for when, cost in memory.costs if when > view.now - MINUTE]
    return not spent or sum(spent) + change.cost_s <= BUDGET * MINUTE


def _asked(
    memory: Memory, view: View, change: _Change, why: str, *, undoes: bool = False
) -> tuple[Memory, Proposal]:
    trial = Trial(
        view.stages,
        change.stages,
        change.seconds_before,
        change.seconds_after,
        change.cost_s,
        view.usage.streams,
        sum(memory.speeds, Speed()),
        undoes,
    )
    return _stepped(replace(memory, goal=trial, why=why, way=change.steps, wanted=None), view)


def _stepped(memory: Memory, view: View) -> tuple[Memory, Proposal]:
    """Proposes the next step of a change."""
    goal, (step, *rest) = memory.goal, memory.way
    assert goal is not None
    why = f"{memory.why}, and it makes room for what follows" if rest else memory.why
    before, after = step.seconds_before, step.seconds_after
    proposal = Proposal(Placement(step.stages), why, before, after, step.cost_s, step.bytes)
    asked = replace(goal, old=view.stages, new=step.stages, cost_s=step.cost_s)
    return replace(memory, asked=asked, outcome=None, way=tuple(rest)), proposal


def _ends(old: Stages, new: Stages) -> tuple[str, str]:
    """The device that loses most units, and the one that gets most."""
    more: dict[str, int] = {}
    for sign, stages in ((-1, old), (1, new)):
        for stage in stages:
            more[stage.device] = more.get(stage.device, 0) + sign * (stage.last - stage.first)
    return min(more, key=more.__getitem__), max(more, key=more.__getitem__)


def _size(stage: Assignment) -> int:
    return stage.last - stage.first


def _why(view: View, levels: Mapping[Key, Level], change: _Change) -> str:
    """The reason for a change, as a clause."""
    _, taker = _ends(view.stages, change.stages)
    waits, after = view.usage.waiting.get(taker), {one.device: one for one in change.stages}
    givers = [
        (levels["pace", one.device].measured, one.device)
        for one in view.stages
        if one.device not in after or _size(after[one.device]) < _size(one)
    ]
    slow, giver = max(givers, default=(1.0, taker))  # none: devices exchange stages of equal size
    if slow >= NOTABLY:
        why = f"{giver} takes {slow:.1f} times as long as offered"
    elif all(stage.device != taker for stage in view.stages):
        why = f"{taker} can take part"
    else:
        why = f"{taker} can do more"
    return why if waits is None else f"{why} and {taker} waits {waits:.0%} of the time"
