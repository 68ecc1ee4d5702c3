"""Copies of neighbours' boundary layers in spare RAM: with the weights there already, a boundary moves for
the price of a layer's keys and values."""

from collections.abc import Sequence

from . import cost
from .rows import Cluster, Model, Stage, Workload


def spare_copies(
    model: Model, cluster: Cluster, workload: Workload, stages: Sequence[Stage], seconds: Sequence[float]
) -> tuple[tuple[int, ...], ...]:
    """Per stage, the units of its neighbours that its spare RAM can hold beside its own, with their state,
    ascending. `seconds`: what each stage takes.

    Layers only, from the boundary inwards, at most half of a neighbour's (beyond, that one would be the idle
    one); from the slower neighbour first, in turn. An end of the model stays where it is.
    """
    copies = []
    for at, stage in enumerate(stages):
        device = cluster.device(stage.device)
        sides = [
            (-seconds[other], _boundary(model, stages[other], before=other < at))
            for other in (at - 1, at + 1)
            if 0 <= other < len(stages)
        ]
        lines = [list(line) for _, line in sorted(sides)]
        first, last, taken = stage.first, stage.last, []
        while any(lines):
            for line in lines:
                if not line:
                    continue
                unit = line.pop(0)
                low, high = min(first, unit), max(last, unit + 1)
                if cost.range_ram_bytes(model, device, workload, low, high) > device.ram_bytes:
                    line.clear()
                    continue
                first, last = low, high
                taken.append(unit)
        copies.append(tuple(sorted(taken)))
    return tuple(copies)


def _boundary(model: Model, stage: Stage, *, before: bool) -> list[int]:
    """The layers of a neighbour that lie nearest, nearest first; `before`: it is the one before."""
    layers = list(range(max(stage.first, 1), min(stage.last, len(model.units) - 1)))
    nearest = layers[::-1] if before else layers
    return nearest[: len(layers) // 2]
