"""Which prompts: shuffled epochs, or weighted draws without replacement, the same on every rank."""

from typing import Any

import torch
from torch import Tensor

from ..host.state import check_state


class PromptSampler:
    """
    Draws prompts: shuffled epochs by default, weighted without replacement when there are weights.

    Every rank holds the same sampler and draws the same prompts. The order of the first epoch is that of TRL's
    `RepeatSampler` with the same seed.

    Args:
        num_prompts (`int`):
            Size of the dataset `D`.
        seed (`int`):
            Seed.
        shuffle (`bool`, *optional*, defaults to `True`):
            Whether epochs are shuffled.

    Example:

    ```python
    >>> sampler = PromptSampler(num_prompts=5, seed=0, shuffle=False)
    >>> sampler.draw(3).tolist(), sampler.draw(3).tolist()
    ([0, 1, 2], [3, 4, 0])

    ```
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool = True):
        self.num_prompts = num_prompts
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.position = 0
        self.draws = 0
        self.pending: list[int] = []
        self._order_of: tuple[int, Tensor] | None = None
        self._before_walk: dict[str, Any] | None = None

    def draw(self, count: int, weights: Tensor | None = None, exclude: Tensor | None = None) -> Tensor:
        """
        Draw distinct prompts.

        Args:
            count (`int`):
                How many, at most `D`.
            weights (`torch.Tensor` of shape `(D,)`, *optional*):
                Draw with probabilities proportional to these; walk the shuffled epochs when `None`.
            exclude (`torch.Tensor`, *optional*):
                Prompts to leave out as long as there are others; then the first of these come first.

        Returns:
            `torch.Tensor` of shape `(count,)`:
                Dataset rows, in the order of the draw.
        """
        excluded = torch.zeros(0, dtype=torch.long) if exclude is None else exclude
        if weights is not None:
            self._before_walk = None
            return self._draw_weighted(count, weights, excluded)
        self._before_walk = self.state_dict()
        return self._walk(count, excluded)

    def keep(self, count: int) -> None:
        """Use only the first `count` of the last draw. The others come next, so an epoch still visits every prompt."""
        if self._before_walk is not None:
            self.load_state_dict(self._before_walk)
            self._walk(count, torch.zeros(0, dtype=torch.long))

    def put_back(self, prompts: Tensor) -> None:
        """Some of the last draw were not used. They come first next time, so an epoch still visits every prompt."""
        if self._before_walk is not None:
            self.pending = prompts.tolist() + self.pending

    def _walk(self, count: int, excluded: Tensor) -> Tensor:
        blocked = set(excluded.tolist())
        taken: dict[int, None] = {}
        put_off: list[int] = []
        looked_at, limit = 0, len(self.pending) + 2 * self.num_prompts  # what is left of an epoch, and a whole one
        while len(taken) < count and looked_at < limit:
            looked_at += 1
            prompt = self.pending.pop(0) if self.pending else self._next()
            if prompt in blocked or prompt in taken:
                put_off.append(prompt)
            else:
                taken[prompt] = None
        # More are asked for than there are: take excluded ones after all.
        reused = [prompt for prompt in excluded.tolist() if prompt not in taken][: count - len(taken)]
        # What was passed over comes first next time, so an epoch still visits every prompt.
        self.pending = [prompt for prompt in dict.fromkeys(put_off + self.pending) if prompt not in reused]
        return torch.tensor(list(taken) + reused, dtype=torch.long)

    def _next(self) -> int:
        if self._order_of is None or self._order_of[0] != self.epoch:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            shuffled = torch.randperm(self.num_prompts, generator=generator) if self.shuffle else None
            self._order_of = (self.epoch, torch.arange(self.num_prompts) if shuffled is None else shuffled)
        prompt = int(self._order_of[1][self.position])
        self.position += 1
        if self.position == self.num_prompts:
            self.epoch, self.position = self.epoch + 1, 0
        return prompt

    def _draw_weighted(self, count: int, weights: Tensor, excluded: Tensor) -> Tensor:
        # Successive sampling: draw with replacement and pass over what was drawn before. One cumulative sum for many
        # draws, so that a million prompts take milliseconds.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.draws) % 2**63)
        self.draws += 1
        passed_over = set(excluded.tolist())
        taken: dict[int, None] = {}
        while len(taken) < count:
            cumulative = weights.cumsum(0, dtype=torch.float64)
            if not cumulative[-1] > 0:
                break
            points = torch.rand(4 * (count - len(taken)) + 64, generator=generator, dtype=torch.float64)
            drawn = torch.searchsorted(cumulative, points * cumulative[-1], right=True).clamp(max=self.num_prompts - 1)
            fresh = [p for p in dict.fromkeys(drawn[weights[drawn] > 0].tolist()) if p not in passed_over]
            taken |= dict.fromkeys(fresh[: count - len(taken)])
            passed_over |= taken.keys()
            if len(taken) < count:  # few prompts hold most of the weight: leave them out of the next round
                weights = weights.index_fill(0, torch.tensor(list(passed_over), dtype=torch.long), 0.0)
        chosen = torch.tensor(list(taken), dtype=torch.long)
        if chosen.numel() < count:  # then those of weight zero, and then excluded ones after all
            rest = torch.ones(self.num_prompts, dtype=torch.bool)
            rest[torch.cat([chosen, excluded])] = False
            rest_index = rest.nonzero().flatten()
            shuffled = rest_index[torch.randperm(rest_index.numel(), generator=generator)]
            reused = excluded[~torch.isin(excluded, chosen)]
            chosen = torch.cat([chosen, shuffled, reused])[:count]
        return chosen

    def state_dict(self) -> dict[str, Any]:
        counters = {"epoch": self.epoch, "position": self.position, "draws": self.draws}
        return {**counters, "pending": list(self.pending), "num_prompts": self.num_prompts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, epoch=int, position=int, draws=int, num_prompts=int, pending=list)
        if state_dict["num_prompts"] != self.num_prompts:
            raise ValueError(
                f"The checkpoint knows {state_dict['num_prompts']} prompts and the dataset has {self.num_prompts}: "
                "resume with the dataset of the interrupted run"
            )
        for key, values in {"position": [state_dict["position"]], "pending": state_dict["pending"]}.items():
            if not all(isinstance(value, int) and 0 <= value < self.num_prompts for value in values):
                raise ValueError(f"{key!r} is not among the {self.num_prompts} prompts of the dataset")
        self.epoch, self.position, self.draws = (state_dict[key] for key in ("epoch", "position", "draws"))
        self.pending = list(state_dict["pending"])
