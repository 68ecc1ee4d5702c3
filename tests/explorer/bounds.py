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
ONE = (Question((5, 6), 2),)
OTHER = (Question((7, 8), 2),)
TURNS = (Question((5, 6, 7), 2), Question((5, 9, 10), 2))
"""Two answers of a session that stays open. The second prompt goes back to position 1."""

SMALL = {
    "answers": Bound((ONE, OTHER), PLANS, reduce=False),
    "move": Bound((ONE, OTHER), PLANS, moves=(MOVE,)),
    "move, every order": Bound((ONE,), PLANS, moves=(MOVE,), reduce=False),
    "drain and return": Bound((ONE,), PLANS, moves=(DRAINED, THREE)),
    "turns": Bound((TURNS,), PLANS, moves=(SHIFT,), keep=True),
    "leave": Bound((ONE, OTHER), PLANS, moves=(MOVE,), leaves=frozenset({0})),
    "leave and keep": Bound((TURNS, OTHER), PLANS, moves=(MOVE,), leaves=frozenset({0}), keep=True),
    "crash": Bound((ONE,), PLANS, faults=1, kinds=frozenset({"crash"})),
}
"""Explored in a few seconds, by each run of the tests."""

WHOLE = {
    **SMALL,
    "move, slow nodes": Bound((ONE,), PLANS, moves=(MOVE,), reduce=False, quick=False),
    "move and failed load": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"load"})),
    "move and crash": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"crash"})),
    "control cut": Bound((ONE,), PLANS, faults=1, kinds=frozenset({"cut"})),
    "control replaced": Bound((ONE,), PLANS, faults=1, kinds=frozenset({"redial"})),
    "step cut": Bound((ONE,), PLANS, faults=1, kinds=frozenset({"snap"})),
    "spare node and crash": Bound((ONE,), SPARE, faults=1, kinds=frozenset({"crash"})),
    "reload": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"crash"}), strategy="reload"),
}
"""Explored by `make check-protocol`."""

LONG = {
    "two moves and failed load": Bound(
        (ONE,), PLANS, moves=(MOVE, SHIFT), faults=1, kinds=frozenset({"load"})
    ),
    "move and step cut": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"snap"})),
    "move and control cut": Bound((ONE,), PLANS, moves=(MOVE,), faults=1, kinds=frozenset({"cut"})),
}
"""Explored by hand: minutes each."""
