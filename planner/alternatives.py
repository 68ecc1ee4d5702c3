"""Chains that do without a device of a plan, or with one more: for telling why it is in or out, and, where no
search proves its plan, for finding a better one."""

from collections.abc import Callable, Sequence
from functools import partial

from . import dp, orders
from .dp import Chain
from .goal import Goal
from .tables import TimeTables

QUICK_EXACT = 5  # devices up to which these searches are exact; beyond, they try a few orders

Case = tuple[TimeTables, Goal]  # what a plan could be best at
Search = Callable[[TimeTables, Goal], Chain | None]


def without(j: int, devices: Sequence[int], fixed: bool = False) -> Search:
    """The best chain of the other devices; `fixed`: in this order."""
    others = [i for i in devices if i != j]
    if fixed:
        return lambda tables, goal: dp.best_chain(tables, goal, partial(dp.cheapest, order=others))
    return lambda tables, goal: orders.search_orders(
        tables, others, goal, exact_devices=QUICK_EXACT, trials=0
    )[0]


def with_it(j: int, chain: Chain, devices: Sequence[int], fixed: bool = False) -> Search:
    """The best chain with device j; `fixed`: in the devices' order. Of many devices: of a chain's devices in
    their order with j somewhere among them, and of all in a few orders."""
    used = [i for i, _, _ in chain.stages]

    def in_order(tables: TimeTables, goal: Goal) -> Chain | None:
        search = partial(dp.cheapest, order=devices, must=list(devices).index(j))
        return dp.best_chain(tables, goal, search)

    def exact(tables: TimeTables, goal: Goal) -> Chain | None:
        return dp.best_chain(tables, goal, partial(orders.cheapest_any_order, devices=devices, must=j))

    def search(tables: TimeTables, goal: Goal) -> Chain | None:
        chains = []
        for order in [
            *([*used[:at], j, *used[at:]] for at in range(len(used) + 1)),
            *orders.seed_orders(tables, devices),
        ]:
            found = dp.best_chain(tables, goal, partial(dp.cheapest, order=order, must=order.index(j)))
            chains += [found] if found is not None else []
        return min(chains, key=lambda found: dp.value(tables, goal, found), default=None)

    if fixed:
        return in_order
    return exact if len(devices) <= QUICK_EXACT else search
