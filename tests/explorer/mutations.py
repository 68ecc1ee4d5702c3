"""Seeded bugs: changes of the real functions, each of which the explorer must find."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from shoal.net import chain, events, generation, members, messages, plans, session, transition
from shoal.net import stage_state as node

from .bounds import LONG, WHOLE
from .search import explore
from .world import Distributed

Original = Callable[..., Any]


@dataclass(frozen=True)
class Mutation:
    """A bug: the original function is replaced by what `change` makes of it. It is found in the bound with
    that name, by a violation that has the words `finds`."""

    owner: Any
    name: str
    change: Callable[[Original], Any]
    bound: str
    finds: str

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """The bug is there until the block ends."""
        original = getattr(self.owner, self.name)
        with patch.object(self.owner, self.name, self.change(original)):
            yield

    def found(self) -> bool:
        """Whether the explorer finds the bug, and in the way that is expected."""
        with self.seeded():
            report = explore(Distributed({**WHOLE, **LONG}[self.bound]))
        return report.found is not None and self.finds in report.found.what


def commits_at_once(original: Original) -> Original:
    """The coordinator commits as soon as all are prepared, and waits for nothing that is in flight."""

    def changed(self: chain.Chain, quiet: Any) -> None:
        self._closes, self.stopped = [], 0.0
        held = {number: session.held for number, session in self.sessions.items()}
        self._kept = {number: positions for number, positions in held.items() if positions}
        quiet(tuple(messages.Kept(number, positions) for number, positions in self._kept.items()))

    return changed


def hold_without_stop(original: Original) -> Original:
    """A chain that waits until it is quiet sends more Steps, and looks only at what was in flight first."""

    def changed(self: chain.Chain, quiet: Any) -> None:
        original(self, quiet)
        self.stopped = None

    return changed


def holds_too_early(original: Original) -> Original:
    """The coordinator does not wait for the last node that prepares."""

    def changed(state: Any, move: Any, now: float) -> Any:
        if len(move.prepared) >= len(move.members) - 1:
            move = replace(move, prepared=frozenset(move.members))
        return original(state, move, now)

    return changed


def serves_too_early(original: Original) -> Original:
    """The coordinator does not wait for the last node that changes."""

    def changed(state: Any, member: int, epoch: Any, now: float) -> Any:
        if state.transition is not None and len(state.loaded) == len(state.transition.members) - 2:
            state = replace(state, loaded=frozenset(state.transition.members) - {member})
        return original(state, member, epoch, now)

    return changed


def forgets_a_flow(original: Original) -> Original:
    """The coordinator tells nobody to send one of the units that move."""

    def changed(before: Any, after: Any) -> Any:
        moving, lost = original(before, after)
        return moving[1:], lost

    return changed


def forgets_the_lost(original: Original) -> Original:
    """The coordinator forgets that a unit is lost."""

    def changed(before: Any, after: Any) -> Any:
        moving, (first, last) = original(before, after)
        return moving, (first, max(first, last - 1))

    return changed


def never_resumes(original: Original) -> Original:
    """A transition that is given up leaves the chain held."""

    def changed(*args: Any, **how: Any) -> Any:
        state, commands = original(*args, **how)
        return state, tuple(command for command in commands if not isinstance(command, events.Resume))

    return changed


def never_aborts(original: Original) -> Original:
    """Nodes are not told that a transition was given up."""

    def changed(*args: Any, **how: Any) -> Any:
        state, commands = original(*args, **how)
        return state, tuple(command for command in commands if not isinstance(command, events.SendAbort))

    return changed


def epoch_given_twice(original: Original) -> Original:
    """An epoch that was given up has the number of the next one."""

    def changed(self: Any) -> Any:
        return replace(self.epoch, counter=self.epoch.counter + 1)

    return changed


def blames_for_abort(original: Original) -> Original:
    """A node that cannot prepare ends the chain that is served."""

    def changed(state: Any, event: Any, *more: Any) -> Any:
        return original(state, replace(event, epoch=state.epoch), *more)

    return changed


def change_without_pages(original: Original) -> Original:
    """A taker does not wait for the givers."""

    def changed(state: Any, commit: Any) -> Any:
        change = state.change
        if change is not None:
            givers = frozenset(take.giver for take in change.assign.takes)
            state = replace(state, change=replace(change, completed=givers))
        return original(state, commit)

    return changed


def fault_drops_all(original: Original) -> Original:
    """A fault of what is prepared drops the stage in force, too."""

    def changed(state: Any, fault: Any) -> Any:
        change = state.change
        if change is not None and change.assign.epoch == fault.epoch and change.commit is None:
            dropped, commands = node._dropped(state)
            return dropped, (*commands, node.Tell(fault, fault.epoch))
        return original(state, fault)

    return changed


def pages_before_assign(original: Original) -> Original:
    """Pages that arrive before the Assign of their transition are dropped."""

    def changed(self: Any, epoch: Any) -> bool:
        return False

    return changed


def runs_after_commit(original: Original) -> Original:
    """The loop of the stage goes on after Commit."""

    def changed(state: Any, commit: Any) -> Any:
        after, commands = original(state, commit)
        if after.change is None or after.change.phase != "moving" or after.force is None:
            return after, commands
        due = after.change.due - {node.LOOP}
        tails = node._tails(after.change) if node.LOOP in after.change.due else ()
        after = replace(after, force=state.force, change=replace(after.change, due=due))
        kept = tuple(command for command in commands if not isinstance(command, node.StopLoop))
        after, more = node._advanced(after)
        return after, (*kept, *tails, *more)

    return changed


def stage_gone_with_next(original: Original) -> Original:
    """A stage whose next node is lost is closed."""

    def changed(state: Any, fault: Any) -> Any:
        after, commands = original(state, fault)
        if after.force is not None and after.force.phase == "stopping" and after.change is None:
            dropped, more = node._dropped(after)
            return dropped, (*more, node.Tell(fault, fault.epoch))
        return after, commands

    return changed


def loaded_before_adopted(original: Original) -> Original:
    """A node says Loaded before it has changed."""

    def changed(state: Any, commit: Any) -> Any:
        after, commands = original(state, commit)
        return after, (*commands, node.Tell("loaded", commit.epoch)) if after.change is not None else commands

    return changed


def held_is_sent(original: Any) -> Any:
    """A session counts positions as held whose Results have not arrived."""
    return property(lambda self: self._sent)


def starts_again(original: Original) -> Original:
    """A carried session sends its last position again as if nothing were held."""

    def changed(self: Any, flow: Any, fill: Any = None) -> Any:
        opening = original(self, flow, fill)
        self._sent += 1
        return opening

    return changed


def takes_old_results(original: Original) -> Original:
    """A chain takes Results of other epochs."""

    def changed(self: Any, member: int, results: Any) -> None:
        original(self, member, [replace(result, epoch=self.flow.epoch) for result in results])

    return changed


def doubles_tokens(original: Original) -> Original:
    """A session gives the first token after a change of the chain twice."""

    def changed(self: Any, message: Any, **how: Any) -> Any:
        due = original(self, message, **how)
        if self._found and self._chain is not None and self._chain.flow.epoch.counter > 1:
            self._found.append(self._found[-1])
        return due

    return changed


def overtakes_kept_rows(original: Any) -> Any:
    """Steps that fill lost positions do not wait for the kept rows of earlier ones."""
    return property(lambda self: False)


def keeps_too_many(original: Original) -> Original:
    """The coordinator asks for one more kept row than a stage has."""

    def changed(self: Any, flow: Any, fill: Any = None) -> Any:
        if fill is not None and fill.kept:
            fill = replace(fill, kept=fill.kept + 1)
        return original(self, flow, fill)

    return changed


def closes_at_once(original: Original) -> Original:
    """A Close is sent to the old epoch after Commit."""

    def changed(self: Any, close: Any) -> None:
        kept, self._closes = self._closes, None
        original(self, close)
        self._closes = kept

    return changed


def opens_nothing(original: Original) -> Original:
    """A session is not opened again where its units were lost."""

    def changed(self: Any, flow: Any, fill: Any = None) -> Any:
        original(self, flow, fill)
        return None

    return changed


def fills_too_little(original: Original) -> Original:
    """The last lost position is not filled."""

    def changed(self: Any, flow: Any, fill: Any = None) -> Any:
        opening = original(self, flow, fill)
        if fill is not None:
            self._filled = min(1, self._lost)
        return opening

    return changed


def shares_too_much(original: Original) -> Original:
    """A session counts on one position more than it shares."""

    def changed(self: Any, flow: Any, source: int | None = None, positions: int = 0) -> Any:
        opening = original(self, flow, source, positions)
        self._sent += source is not None
        return opening

    return changed


def waits_for_ever(original: Original) -> Original:
    """After the loss of a node, nothing is planned."""

    def changed(state: Any, now: float, **how: Any) -> Any:
        return (state, ()) if state.served else original(state, now, **how)

    return changed


def moves_for_ever(original: Original) -> Original:
    """A transition that has ended is followed by another one."""

    def changed(state: Any, member: int, epoch: Any, now: float) -> Any:
        moved = state.transition is not None
        state, commands = original(state, member, epoch, now)
        if moved and state.transition is None:
            state, more = transition.begin(state, state.placement, "again", now)
            commands += more
        return state, commands

    return changed


def tells_once(original: Original) -> Original:
    """What the last node of one epoch was told counts for that of the next one."""

    def changed(self: generation.Generation, *where: Any) -> Any:
        before = self._updates
        opening = original(self, *where)
        self._updates = before
        return opening

    return changed


T, N, C, G = transition, node, chain.Chain, generation.Generation
MUTATIONS = (
    Mutation(C, "hold", commits_at_once, "move", "Commit is sent"),
    Mutation(T, "_held", holds_too_early, "move", "before it has heard"),
    Mutation(T, "loaded", serves_too_early, "move", "is in epoch 1"),
    Mutation(T, "flows", forgets_a_flow, "move", "changes to epoch 2 and has"),
    Mutation(T, "flows", forgets_the_lost, "crash", "changes to epoch 2 and has"),
    Mutation(T, "give_up", never_resumes, "move and early bounds", "answers are not complete"),
    Mutation(T, "give_up", never_aborts, "move and failed load", "still holds what a transition"),
    Mutation(members.ClusterState, "next_epoch", epoch_given_twice, "two moves and failed load", ""),
    Mutation(N, "_committed", change_without_pages, "move", "changes to epoch 2 and has"),
    Mutation(N, "_committed", runs_after_commit, "move and crash", "after Commit"),
    Mutation(N, "_committed", loaded_before_adopted, "move", "says Loaded"),
    Mutation(N, "_broken", fault_drops_all, "move and failed load", "does not leave the base"),
    Mutation(N, "_broken", stage_gone_with_next, "crash", "changes to epoch 2 and has"),
    Mutation(N.NodeState, "awaits", pages_before_assign, "move, every order", "changes to epoch 2 and has"),
    Mutation(G, "held", held_is_sent, "crash", "changes to epoch 2 and has"),
    Mutation(G, "carry", starts_again, "move", ""),
    Mutation(G, "carry", opens_nothing, "spare node and crash", "is not open"),
    Mutation(G, "carry", fills_too_little, "crash", "has only 0"),
    Mutation(G, "_refilling", overtakes_kept_rows, "crash and some kept rows", "has only 0"),
    Mutation(G, "carry", keeps_too_many, "crash and some kept rows", "is asked for 2 rows"),
    Mutation(G, "carry", tells_once, "penalised", "is told number"),
    Mutation(G, "start", shares_too_much, "alike", "answers are not complete"),
    Mutation(C, "deliver", takes_old_results, "crash", ""),
    Mutation(C, "leave", closes_at_once, "leave", "changes to epoch 2 and has"),
    Mutation(session.Session, "take", doubles_tokens, "move", "and the answer is"),
    Mutation(plans, "plan", waits_for_ever, "crash", "nothing can happen any more"),
    Mutation(T, "loaded", moves_for_ever, "move", "never settles"),
)
