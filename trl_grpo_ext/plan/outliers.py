"""What is believed of a number: one broken reward must not decide what is expected of every prompt."""

from typing import Any

import torch
from torch import Tensor

from ..host.state import check_state

RECENT = 256  # values that say what is usual
FEW = 7  # of them that may be broken: fewer of one kind could also be rare successes, and more are usual
ENOUGH = 6 * (FEW + 1)  # values of which the eighth smallest is a low one
FAR = 20.0  # usual distances from the median, beyond which a value is an outlier
ROUNDING = 4 * torch.finfo(torch.float32).eps  # of the median, by which equal rewards may differ
LARGEST = 1e300  # of doubles of any size, a difference of two must not overflow
NONE = 1.7e308  # stands for a value that is not known, since a checkpoint holds no infinity


class UsualRange:
    """
    Holds values to the range of those seen lately, and notices when an earlier outlier was taken for usual.

    The range is the median of the last 256 values, plus or minus 20 usual distances from that median. The usual
    distance is the eighth largest, or the median one where there are fewer than sixteen; values that equal the median,
    up to the rounding of float32, have none where others have one. So up to seven outliers do not move the range, and
    successes that are rare do.

    Example:

    ```python
    >>> import torch
    >>> usual = UsualRange()
    >>> usual.believed(torch.tensor([0.0, 1.0, 1.0, 0.0, 1e20])).tolist()
    [0.0, 1.0, 1.0, 0.0, 21.0]

    ```
    """

    def __init__(self) -> None:
        self.recent = torch.zeros(RECENT, dtype=torch.float64)
        self.seen = torch.zeros((), dtype=torch.int64)
        self.farthest = torch.zeros((), dtype=torch.float64)  # distance of what was believed since the last reset
        self.smallest = torch.full((FEW + 1,), NONE, dtype=torch.float64)  # of all values

    def believed(self, values: Tensor) -> Tensor:
        """
        Take in values and return them within the range.

        Args:
            values (`torch.Tensor` of shape `(M,)`):
                Values. Those that are not finite stay as they are and say nothing.

        Returns:
            `torch.Tensor` of shape `(M,)`: in float64.
        """
        values = values.double()
        finite = values[values.isfinite()]
        if finite.numel() == 0:
            return values
        self.recent = torch.cat([self.recent, finite.clamp(-LARGEST, LARGEST)])[-RECENT:]
        self.smallest = torch.cat([self.smallest, finite]).sort().values[: FEW + 1].clamp(min=-LARGEST)
        self.seen = (self.seen + finite.numel()).clamp(max=RECENT)
        center, limit = self._range()
        held = torch.where(values.isfinite(), values.clamp(center - limit, center + limit), values)
        self.farthest = torch.maximum(self.farthest, (held[values.isfinite()] - center).abs().max())
        return held

    def lowest(self) -> float:
        """
        The lowest value so far, of which seven may be broken: the eighth smallest, minus infinity as long as fewer than
        48 values are known, among which it would not be low.

        Example:

        ```python
        >>> usual = UsualRange()
        >>> _ = usual.believed(torch.tensor([-1e20] + 5 * [0.0, 1.0]))
        >>> usual.lowest()
        -inf
        >>> _ = usual.believed(torch.tensor(20 * [0.0, 1.0]))
        >>> usual.lowest()
        0.0

        ```
        """
        return self.smallest[-1].item() if self.seen >= ENOUGH else -torch.inf

    def is_spoilt(self) -> bool:
        """
        Whether something believed earlier is an outlier by now, so that statistics over it must begin anew.

        Forgets that value, so the answer is yes once.
        """
        _, limit = self._range()
        if self.farthest <= 2 * limit:  # the median may have moved a little
            return False
        self.farthest = torch.zeros_like(self.farthest)
        return True

    def _range(self) -> tuple[Tensor, Tensor]:
        known = self.recent[RECENT - int(self.seen) :]
        center = known.median()
        distance = (known - center).abs()
        is_real = distance > ROUNDING * center.abs()
        distance = distance[is_real if is_real.any() else distance > 0].sort(descending=True).values
        limit = FAR * distance[min(FEW, distance.numel() // 2)] if distance.numel() else torch.zeros_like(center)
        return center, limit

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent, "seen": self.seen, "farthest": self.farthest, "smallest": self.smallest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, **self.state_dict())
        self.recent, self.seen = state_dict["recent"].clone(), state_dict["seen"].clone()
        self.farthest, self.smallest = state_dict["farthest"].clone(), state_dict["smallest"].clone()
