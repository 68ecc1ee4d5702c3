"""The different units of a model: most layers cost the same, whatever their names, so a value is computed
once a kind and not once a unit."""

from collections.abc import Callable

from .rows import Model, Unit


class Kinds:
    """The units of a model, equal ones together."""

    def __init__(self, model: Model) -> None:
        index: dict[tuple[int, ...], int] = {}
        self._units: list[Unit] = []
        self._of: list[int] = []
        for unit in model.units:
            key = (
                unit.bytes,
                unit.read_bytes,
                unit.macs,
                unit.kv_bytes_per_token,
                unit.fixed_state_bytes,
                unit.attend_macs,
            )
            if key not in index:
                index[key] = len(self._units)
                self._units.append(unit)
            self._of.append(index[key])

    def each(self, value: Callable[[Unit], float]) -> list[float]:
        """The value of every unit."""
        values = [value(unit) for unit in self._units]
        return [values[kind] for kind in self._of]
