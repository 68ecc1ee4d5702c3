"""What a plan must keep to beside the RAM caps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .check import check_whole
from .rows import Cluster, Model


@dataclass(frozen=True, slots=True)
class Constraints:
    """Devices by name. `layers`: exactly so many layers (the embedding and the head are none); 0 leaves a
    device out. `first` holds the embedding, `last` the head."""

    exclude: frozenset[str] = frozenset()
    layers: Mapping[str, int] = field(default_factory=dict)
    first: str | None = None
    last: str | None = None

    def __post_init__(self) -> None:
        for name, count in self.layers.items():
            check_whole(f"the layers of {name}", count)
            if count and name in self.exclude:
                raise ValueError(f"{name} is excluded and has {count} layers as well")
        for end in (self.first, self.last):
            if end is not None and end in self.exclude:
                raise ValueError(f"{end} is excluded and holds an end of the model as well")
            if end is not None and self.layers.get(end) == 0:
                raise ValueError(
                    f"{end} gets no layers, which leaves it out, and an end of the model as well"
                )
        alone = self.first if self.first == self.last else None
        for name in self._needed() - {alone}:
            if alone is not None:
                raise ValueError(
                    f"{alone} holds both ends, so all of the model, and {name} is to have layers"
                )

    def _needed(self) -> set[str]:
        """Devices that have to be in the plan."""
        ends = {end for end in (self.first, self.last) if end is not None}
        return ends | {name for name, count in self.layers.items() if count}

    def check(self, model: Model, cluster: Cluster, order: Sequence[str] | None = None) -> None:
        """ValueError: a device that is not there, counts that cannot add up to the model's layers, or an
        order that contradicts."""
        ends = {end for end in (self.first, self.last) if end is not None}
        for name in sorted(self.exclude | set(self.layers) | ends):
            cluster.device(name)
        layers, pinned = len(model.units) - 2, sum(self.layers.values())
        free = [d.name for d in cluster.devices if d.name not in self.exclude and d.name not in self.layers]
        if pinned > layers or (pinned < layers and not free):
            raise ValueError(f"the given layers add up to {pinned}, and the model has {layers}")
        if not any(self.allowed(device.name) for device in cluster.devices):
            raise ValueError("all devices are left out")
        if order is not None:
            self._check_order(order)

    def _check_order(self, order: Sequence[str]) -> None:
        place = {name: at for at, name in enumerate(order)}
        for name in sorted(self._needed()):
            if name not in place:
                raise ValueError(f"{name} has to be in the plan, and the order leaves it out")
            for end, other in ((self.first, name), (name, self.last)):
                if end is not None and other is not None and place[end] > place[other]:
                    raise ValueError(f"{end} comes after {other} in the order, and has to come before it")

    def allowed(self, name: str) -> bool:
        """Whether a device may get anything."""
        return name not in self.exclude and self.layers.get(name) != 0
