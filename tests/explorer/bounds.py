"""The bounds that are explored: each is a small world with its own faults, and all of its runs are followed.

All have three nodes and six units: the embedding, four layers, and the LM head.
"""

from __future__ import annotations

from .bound import Bound, Cut
from .coordinator import Question

THREE: Cut = ((0, 0, 3), (1, 3, 4), (2, 4, 6))
PLANS: dict[tuple[int, ...], Cut] = {
    (0, 1, 2): THREE,
    (0, 1): ((0, 0, 4), (1, 4, 6)),
    (0, 2): ((0, 0, 3), (2, 3, 6)),
    (1, 2): ((1, 0, 3), (2, 3, 6)),
}
MOVE: Cut = ((0, 0, 2), (1, 2, 4), (2, 4, 6))
"""The first node gives a layer to the second one."""
SHIFT: Cut = ((0, 0, 2), (1, 2, 3), (2, 3, 6))
"""Two boundaries move at once."""
DRAINED: Cut = ((0, 0, 3), (2, 3, 6))
"""The node in the middle gives all that it has."""
SPARE: dict[tuple[int, ...], Cut] = {
    (0, 1, 2): ((0, 0, 3), (1, 3, 6)),
    (0, 1): ((0, 0, 3), (1, 3, 6)),
    (0, 2): ((0, 0, 3), (2, 3, 6)),
    (1, 2): ((2, 0, 3), (1, 3, 6)),
}
"""A node has no units until another one is lost."""
HEAD: dict[tuple[int, ...], Cut] = {**SPARE, (0, 2): ((0, 0, 5), (2, 5, 6)), (1, 2): ((2, 0, 1), (1, 1, 6))}
"""Then it has the LM head or the embedding, and no layer."""
ONE = (Question((5, 6), 2),)
OTHER = (Question((7, 8), 2),)
TURNS = (Question((5, 6, 7), 2), Question((5, 9, 10), 2))
"""Two answers of a session that stays open. The second prompt goes back to position 1."""

ALIKE = (Question((5, 6, 9), 1),)
"""It begins as the first answer of ONE and of TURNS."""
SHORT = (Question((5,), 1),)
LONGER = (Question((5,), 2),)
CRASH, SNAP, LOAD = (frozenset({kind}) for kind in ("crash", "snap", "load"))
SOLO = {**PLANS, (0,): ((0, 0, 6),), (1,): ((1, 0, 6),), (2,): ((2, 0, 6),)}
"""Each node can hold the model."""
NEEDED = {nodes: cut for nodes, cut in PLANS.items() if 1 in nodes}
"""The others cannot hold the model without node 1."""

SMALL = {
    "answers": Bound((ONE, OTHER), PLANS, reduce=False),
    "move": Bound((ONE, OTHER), PLANS, moves=(MOVE,)),
    "move, every order": Bound((ONE,), PLANS, moves=(MOVE,), reduce=False),
    "drain and return": Bound((ONE,), PLANS, moves=(DRAINED, THREE)),
    "turns": Bound((TURNS,), PLANS, moves=(SHIFT,), keep=True),
    "leave": Bound((ONE, OTHER), PLANS, moves=(MOVE,), leaves=frozenset({0})),
    "leave and keep": Bound((TURNS, OTHER), PLANS, moves=(MOVE,), leaves=frozenset({0}), keep=True),
    "crash": Bound((ONE,), PLANS, faults=1, kinds=CRASH),
    "crash and kept rows": Bound((ONE,), PLANS, faults=1, kinds=CRASH, kept_rows=9),
    "crash and some kept rows": Bound((ONE,), PLANS, faults=1, kinds=CRASH, kept_rows=1),
    "step stuck": Bound((ONE,), PLANS, faults=1, kinds=frozenset({"stick"})),
    "alike": Bound((ONE, ALIKE), PLANS, share=True, reduce=False),
    "alike and move": Bound((ONE, ALIKE), PLANS, moves=(MOVE,), share=True),
    "alike, in turns and leave": Bound((TURNS, ALIKE), PLANS, leaves=frozenset({0}), share=True, keep=True),
    "penalised": Bound((ONE,), PLANS, moves=(MOVE,), penalised=True, reduce=False),
    "leaving": Bound((ONE,), PLANS, leaving=(1,)),
    "leaving, but needed": Bound((ONE,), NEEDED, leaving=(1,)),
    "added": Bound((ONE,), PLANS, late=1),
}
"""Explored in a few seconds, by each run of the tests."""

WHOLE = {
    **SMALL,
    "move, slow nodes": Bound((ONE,), PLANS, moves=(MOVE,), reduce=False, quick=False),
    "move and failed load": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=LOAD),
    "move and crash": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=CRASH, kept_rows=9),
    "move and step or bulk cut": Bound((SHORT,), PLANS, moves=(MOVE,), faults=1, kinds=SNAP),
    "move and step stuck": Bound((SHORT,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"stick"})),
    "move and leaving": Bound((ONE,), PLANS, moves=(MOVE,), leaving=(1,)),
    "move and early bounds": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"early"})),
    "move and standstill": Bound((SHORT,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"stall"})),
    "control cut": Bound((ONE,), PLANS, faults=1, kinds=frozenset({"cut"})),
    "control replaced": Bound((ONE,), PLANS, faults=1, kinds=frozenset({"redial"})),
    "step cut": Bound((ONE,), PLANS, faults=1, kinds=SNAP),
    "spare node and crash": Bound((ONE,), SPARE, faults=1, kinds=CRASH),
    "spare head and crash": Bound((ONE,), HEAD, faults=1, kinds=CRASH, kept_rows=9),
    "turns and crash": Bound((TURNS,), PLANS, faults=1, kinds=CRASH, kept_rows=2, keep=True),
    "two answers and crash": Bound((ONE, OTHER), PLANS, faults=1, kinds=CRASH, kept_rows=1),
    "alike, in turns and move": Bound((TURNS, ALIKE), PLANS, moves=(MOVE,), share=True, keep=True),
    "alike and crash": Bound((ONE, ALIKE), PLANS, faults=1, kinds=CRASH, kept_rows=1, share=True),
    "two crashes": Bound((LONGER,), SOLO, faults=2, kinds=CRASH),
    "crash and failed load": Bound((SHORT,), SOLO, faults=2, kinds=CRASH | LOAD),
    "crash and restart": Bound((SHORT,), PLANS, faults=1, kinds=CRASH, returns="may"),
    "penalised, two answers": Bound((ONE, OTHER), PLANS, penalised=True, reduce=False),
    "penalised, in turns and move": Bound(
        (TURNS,), PLANS, moves=(SHIFT,), keep=True, penalised=True, reduce=False
    ),
    "penalised and crash": Bound(
        (ONE,), PLANS, faults=1, kinds=CRASH, kept_rows=1, penalised=True, reduce=False
    ),
    "reload": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=CRASH, strategy="reload"),
}
"""Explored by `make check-protocol`."""

LONG = {
    "added and crash": Bound((SHORT,), PLANS, late=1, faults=1, kinds=CRASH),
    "two moves and failed load": Bound((SHORT,), PLANS, moves=(MOVE, SHIFT), faults=1, kinds=LOAD),
    "drain and crash": Bound((SHORT,), PLANS, moves=(DRAINED, THREE), faults=1, kinds=CRASH),
    "leaving and crash": Bound((SHORT,), SOLO, leaving=(1,), faults=1, kinds=CRASH),
    "needed and crash": Bound((SHORT,), NEEDED, leaving=(1,), faults=1, kinds=CRASH, returns="will"),
    "move and control replaced": Bound((SHORT,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"redial"})),
    "longer move and cut": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=SNAP),
    "move and control cut": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"cut"})),
}
"""Explored by hand: up to some minutes each."""
