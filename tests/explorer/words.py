"""Actions and what follows from them in words, for traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.net.messages import (
    Abort,
    Assign,
    Broken,
    Carried,
    Close,
    Commit,
    Complete,
    Epoch,
    Loaded,
    Open,
    Pages,
    Prepared,
    Refill,
    Release,
    Result,
    SetSampling,
    Step,
    Tokens,
)

from .search import State
from .stage import COORDINATOR

if TYPE_CHECKING:
    from .world import Distributed


def name(i: int) -> str:
    return "coordinator" if i == COORDINATOR else f"node {i}"


def told(message: Any) -> str:
    """A message in a few words."""
    what = type(message).__name__
    match message:
        case Assign():
            base = "" if message.base is None else f" from {message.base}"
            moves = [f"gives [{g.first}, {g.last}) to {g.taker.name}" for g in message.gives]
            moves += [f"takes [{t.first}, {t.last})" for t in message.takes]
            return ", ".join(
                [f"Assign {message.epoch.counter}{base} units [{message.first}, {message.last})", *moves]
            )
        case Commit():
            kept = ", ".join(f"session {k.session}: {k.positions}" for k in message.sessions)
            lost = f", lost [{message.lost_first}, {message.lost_last})" if message.lost_last else ""
            return f"Commit {message.epoch.counter} ({kept}){lost}"
        case Step():
            part = "" if message.part is None else f" part {message.part}"
            last = message.first + message.rows
            return (
                f"Step {message.epoch.counter} session {message.session} rows [{message.first}, {last}){part}"
            )
        case Result():
            last = message.first + message.rows
            token = "" if message.token is None else f" token {message.token}"
            rows = f"rows [{message.first}, {last}){token}"
            return f"Result {message.epoch.counter} session {message.session} {rows}"
        case Open(source=int()):
            begins = f"begins with {message.positions} of {message.source}"
            return f"Open {message.epoch.counter} session {message.session} {begins}"
        case Tokens():
            last = message.first + len(message.tokens)
            return f"Tokens {message.epoch.counter} session {message.session} [{message.first}, {last})"
        case Open() | Close() | Carried() | SetSampling():
            return f"{what} {message.epoch.counter} session {message.session}"
        case Refill():
            units = f"units [{message.enter}, {message.until})"
            return f"Refill {message.epoch.counter} session {message.session} {units}"
        case Pages():
            return (
                f"Pages {message.epoch.counter} session {message.session} unit {message.unit} positions "
                f"[{message.first}, {message.last})"
            )
        case Broken():
            who = "" if message.peer is None else f" (by node {message.peer % 10})"
            return f"Broken {message.epoch.counter}{who}"
        case Loaded() | Prepared() | Release() | Abort() | Complete():
            return f"{what} {message.epoch.counter}"
        case Epoch():
            return f"epoch {message.counter}"
    return str(message)


def describe(model: Distributed, state: State, action: Any) -> str:
    """An action in a state."""
    value = model.value
    match action:
        case ("hear", i):
            return f"coordinator hears {told(value(value(state[model.reports + i])[0]))} of node {i}"
        case ("result", i):
            return f"coordinator gets {told(value(value(state[model.results + i])[0]))} of node {i}"
        case ("order", i):
            return f"node {i} gets {told(value(value(state[model.orders + i])[0]))}"
        case ("misload", i):
            return f"node {i} gets {told(value(value(state[model.orders + i])[0]))} and cannot load the units"
        case ("wire", wire):
            queue = next(queue for other, _, queue in value(state[model.WIRES]) if other == wire)
            return f"node {wire[2]} gets {told(value(queue[0])[0])} of {name(wire[1])}"
        case ("task", i, number) | ("fail", i, number):
            task = value(number)
            taker = getattr(task, "taker", getattr(task, "peer", None))
            to = "" if taker is None else f" ({getattr(taker, 'name', taker)})"
            return f"node {i}: {type(task).__name__}{to} {'is done' if action[0] == 'task' else 'fails'}"
        case ("notice", i, number):
            notice = value(number)
            if notice == "coordinator":
                return f"node {i} notices that the coordinator's connection has ended"
            (purpose, _, target, counter), _, again = notice
            end = "carries nothing" if again else "has ended"
            return f"node {i} notices that its {purpose} connection {counter} to node {target} {end}"
        case ("left", i):
            return f"coordinator notices that the connection to node {i} has ended"
        case ("add", i):
            return f"node {i} is added"
        case ("join", i):
            return f"node {i} joins"
        case ("broken", i, epoch, again):
            end = "carries nothing" if again else "has ended"
            return f"coordinator notices that its step connection {epoch.counter} to node {i} {end}"
        case ("dialled",):
            return "coordinator connects to the first node"
        case ("planned", (number, members)):
            cut = model.bound.plans.get(members)
            return f"plan {number} for nodes {members}: {'none' if cut is None else cut}"
        case ("measured",):
            return "links are measured"
        case ("settled",):
            return "some time passes: the coordinator looks for better plans"
        case ("tick", _):
            return "much time passes"
        case ("ask", i):
            return f"session {i} asks"
        case ("leave", i):
            return f"the user leaves the answer of session {i}"
        case ("propose", number):
            return f"move {model.bound.moves[number]} is proposed"
        case ("leaving", i):
            return f"node {i} asks to be emptied"
        case ("crash", i):
            return f"node {i} crashes"
        case ("return", i):
            return f"node {i} is started again"
        case ("cut", i):
            return f"the control connection of node {i} breaks"
        case ("snap", (purpose, source, target, counter)):
            return f"the {purpose} connection {counter} of {name(source)} to node {target} breaks"
        case ("stick", (purpose, source, target, counter)):
            return (
                f"the {purpose} connection {counter} of {name(source)} to node {target} carries nothing more"
            )
        case ("redial", i):
            return f"the control connection to node {i} is silent, and is made anew"
        case ("stalled",):
            return "the chain stands still for too long"
    return str(action)
