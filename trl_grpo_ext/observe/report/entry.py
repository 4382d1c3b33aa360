"""One log of a run, kept small: a long run has hundreds of thousands of them, with a hundred metrics each."""

import math
from array import array
from collections.abc import Iterator, Mapping

# Names of the metrics of an entry -> where each of them is. Most entries of a run have the same.
Places = dict[tuple[str, ...], dict[str, int]]


class Entry(Mapping[str, float | None]):
    """
    The metrics of one step: finite numbers, or `None` where there was none. Takes 8 bytes for each of them.

    Args:
        values (`Mapping[str, float | None]`):
            `step` and the metrics.
        places (`dict`):
            Shared by the entries of a run, and filled by them.

    Example:

    ```python
    >>> entry = Entry({"step": 3, "reward": 0.5, "kl": None}, places={})
    >>> entry["step"], entry["reward"], entry["kl"], entry.get("loss"), len(entry)
    (3, 0.5, None, None, 3)

    ```
    """

    __slots__ = ("_places", "_values")

    def __init__(self, values: Mapping[str, float | None], places: Places):
        names = tuple(values)
        self._places = places.setdefault(names, {})
        if not self._places:
            self._places.update({name: place for place, name in enumerate(names)})
        self._values = array("d", [math.nan if value is None else value for value in values.values()])

    def __getitem__(self, name: str) -> float | None:
        value = self._values[self._places[name]]
        if math.isnan(value):
            return None
        return int(value) if name == "step" else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._values)
