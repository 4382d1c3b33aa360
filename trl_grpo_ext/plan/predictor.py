"""A guess for prompts never seen: ridge regression with forgetting, on features of the prompt."""

import re
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..host.state import check_state
from .outliers import UsualRange

RIDGES = (0.3, 3.0, 30.0, 300.0)  # penalties among which past errors decide, in completions
WIDTH = 64  # of the features of a text


class RidgePredictor:
    """
    Predicts a number from features, and learns from every batch, while older batches fade.

    Ridge regression on decayed sums (recursive least squares with a forgetting factor). Features are centred and
    measured in their own standard deviation, so their unit has no effect. Several penalties predict side by side, and
    the one whose predictions of batches to come were best so far is used. The plain mean of the targets is among them:
    where features say nothing, the predictor becomes that mean. Targets are held to their [`UsualRange`], so that one
    broken reward does not decide all predictions.

    Args:
        num_features (`int`):
            Features `d`. Memory and state are `d * d` numbers, the time of a batch is `d ** 3`.
        forget (`float`, *optional*, defaults to `0.9`):
            Weight of the past at each batch, in `[0, 1]`.

    Example:

    ```python
    >>> import torch
    >>> features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> predictor = RidgePredictor(num_features=1)
    >>> predictor.predict(features).tolist()  # knows nothing
    [nan, nan, nan, nan]
    >>> for _ in range(20):
    ...     predictor.learn(features, 2 * features[:, 0] + 1)
    >>> [round(y, 1) for y in predictor.predict(torch.tensor([[1.0], [2.5]])).tolist()]
    [3.0, 6.0]

    ```
    """

    def __init__(self, num_features: int, forget: float = 0.9):
        if not 0 <= forget <= 1:
            raise ValueError(f"forget={forget} must be between 0 (only the last batch) and 1 (never forget): try 0.9")
        self.forget, self._num_features = forget, num_features
        self.usual = UsualRange()
        self._forget_all()

    def _forget_all(self) -> None:
        num_features = self._num_features
        self.count = torch.zeros((), dtype=torch.float64)
        self._sum_x = torch.zeros(num_features, dtype=torch.float64)
        self._sum_y = torch.zeros((), dtype=torch.float64)
        self._sum_xx = torch.zeros(num_features, num_features, dtype=torch.float64)
        self._sum_xy = torch.zeros(num_features, dtype=torch.float64)
        # Decayed squared errors of each penalty and of the mean alone, on batches before they were learnt.
        self.errors = torch.zeros(len(RIDGES) + 1, dtype=torch.float64)

    def predict(self, features: Tensor) -> Tensor:
        """Predictions `(M,)` for features `(M, d)`, float32; NaN as long as nothing was learnt."""
        if not self.count > 0:
            return torch.full((len(features),), torch.nan)
        centred, weights, mean = self._fitted(features)
        return (mean + centred @ weights[int(self.errors.argmin())]).float()

    def learn(self, features: Tensor, targets: Tensor) -> None:
        """
        Take in a batch.

        Args:
            features (`torch.Tensor` of shape `(M, d)`):
                Features. Rows that are not finite are left out.
            targets (`torch.Tensor` of shape `(M,)`):
                Targets. Those that are not finite are left out.
        """
        known = targets.isfinite() & features.isfinite().all(1)
        x, y = features[known].double(), self.usual.believed(targets[known])
        if y.numel() == 0:
            return
        if self.usual.is_spoilt():
            self._forget_all()
        if self.count > 0:
            centred, weights, mean = self._fitted(x)
            missed = torch.stack([(mean + centred @ w - y).square().sum() for w in weights])
            self.errors = self.forget * self.errors + missed
        self.count = self.forget * self.count + y.numel()
        self._sum_x = self.forget * self._sum_x + x.sum(0)
        self._sum_y = self.forget * self._sum_y + y.sum()
        self._sum_xx = self.forget * self._sum_xx + x.T @ x
        self._sum_xy = self.forget * self._sum_xy + x.T @ y

    def _fitted(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features `(M, d)` in their own units, weights `(R + 1, d)` of the penalties and of the mean alone, mean."""
        mean_x, mean_y = self._sum_x / self.count, self._sum_y / self.count
        covariance = self._sum_xx / self.count - torch.outer(mean_x, mean_x)
        variance = covariance.diagonal().clamp(min=0)
        # A feature that never varied has no unit and no say.
        scale = torch.where(variance > 1e-12 * mean_x.square() + 1e-30, variance.sqrt(), torch.inf)
        correlation = covariance / torch.outer(scale, scale)
        target = (self._sum_xy / self.count - mean_x * mean_y) / scale
        eigenvalues, vectors = torch.linalg.eigh(correlation)
        rotated = vectors.T @ target
        weights = [vectors @ (rotated / (eigenvalues.clamp(min=0) + ridge / self.count)) for ridge in RIDGES]
        return (features.double() - mean_x) / scale, torch.stack([*weights, torch.zeros_like(target)]), mean_y

    @classmethod
    def from_state(cls, state_dict: dict[str, Any], forget: float) -> "RidgePredictor":
        """A predictor as wide as the one whose `state_dict` a checkpoint holds; `ValueError` where it holds none."""
        check_state(state_dict, sum_x=Tensor)
        predictor = cls(state_dict["sum_x"].numel(), forget)
        predictor.load_state_dict(state_dict)
        return predictor

    def state_dict(self) -> dict[str, Any]:
        sums = {"sum_x": self._sum_x, "sum_y": self._sum_y, "sum_xx": self._sum_xx, "sum_xy": self._sum_xy}
        return {"count": self.count, "errors": self.errors, **sums, "usual": self.usual.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, **{**self.state_dict(), "usual": dict})
        self.usual.load_state_dict(state_dict["usual"])
        self.count, self.errors = state_dict["count"].clone(), state_dict["errors"].clone()
        self._sum_x, self._sum_y = state_dict["sum_x"].clone(), state_dict["sum_y"].clone()
        self._sum_xx, self._sum_xy = state_dict["sum_xx"].clone(), state_dict["sum_xy"].clone()


def explained_variance(guess: Tensor, values: Tensor) -> float | None:
    """
    Share of the variance of the values `(M,)` that a guess foresaw; what is not finite in either is left out.

    1: all of it, 0: no more than their mean, below 0: worse than that. `None` where the values do not differ.

    Example:

    ```python
    >>> import torch
    >>> explained_variance(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]))
    0.75

    ```
    """
    known = guess.isfinite() & values.isfinite()
    spread = values[known].var(correction=0).item() if known.any() else 0.0
    return 1 - (values - guess)[known].square().mean().item() / spread if spread > 1e-12 else None


def text_features(texts: Iterable[str], width: int = WIDTH) -> Tensor:
    """
    Features of texts without a model: hashed words and groups of three letters, and the length.

    Args:
        texts (`Iterable[str]`):
            `D` texts.
        width (`int`, *optional*, defaults to `64`):
            Features of a text.

    Returns:
        `torch.Tensor` of shape `(D, width)`:
            Features, float32, of norm 1 but for the length in the last column.

    Example:

    ```python
    >>> one, same, other = text_features(["add 2 and 3", "add 2 and 3", "what rhymes with cat?"])
    >>> bool((one == same).all()), bool((one == other).all())
    (True, False)

    ```
    """
    rows = []
    for text in texts:
        row = torch.zeros(width)
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        pieces = words + [text[i : i + 3] for i in range(len(text) - 2)] + [f"start {word}" for word in words[:1]]
        codes = torch.tensor([zlib.crc32(piece.encode()) for piece in pieces], dtype=torch.long)
        # The sign keeps pieces that share a column from adding up.
        row.index_add_(0, codes % (width - 1), 1.0 - 2.0 * (codes >> 20 & 1))
        row /= row.norm().clamp(min=1e-6)
        row[-1] = len(text) ** 0.5 / 10
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros(0, width)


def prompt_text(prompt: Any) -> str:
    """
    The text of a prompt, a string or messages.

    Example:

    ```python
    >>> prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    'Be brief.\\nWhy?'

    ```
    """
    if isinstance(prompt, str):
        return prompt
    contents = [message.get("content") for message in prompt if isinstance(message, dict)]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "\n".join(str(text) for text in texts if text)
