"""Chains that do without a device of a plan, or with one more: for telling why it is in or out, and, where no
search proves its plan, for finding a better one."""

from collections.abc import Callable, Sequence
from functools import partial

from . import dp, orders
from .dp import Chain
from .goal import Goal
from .tables import TimeTables

QUICK_EXACT = 5  # devices up to which "without it" is exact; beyond, the best of a few orders

Case = tuple[TimeTables, Goal]  # what a plan could be best at
Search = Callable[[TimeTables, Goal], Chain | None]


def without(j: int, devices: Sequence[int]) -> Search:
    """The best chain of the other devices."""
    others = [i for i in devices if i != j]
    return lambda tables, goal: orders.search_orders(
        tables, others, goal, exact_devices=QUICK_EXACT, trials=0
    )[0]


def with_it(j: int, chain: Chain) -> Search:
    """The best chain of a chain's devices in their order with device j somewhere among them."""
    used = [i for i, _, _ in chain.stages]

    def search(tables: TimeTables, goal: Goal) -> Chain | None:
        chains = []
        for at in range(len(used) + 1):
            order = [*used[:at], j, *used[at:]]
            found = dp.best_chain(tables, goal, partial(dp.cheapest, order=order, must=at))
            chains += [found] if found is not None else []
        return min(chains, key=lambda found: dp.value(tables, goal, found), default=None)

    return search
