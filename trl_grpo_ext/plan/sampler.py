"""Which prompts, and how many completions each: the plan of one generation batch under a fixed number of rows."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..host.state import check_state


@dataclass(frozen=True)
class RolloutPlan:
    """
    The groups of one generation batch, the same on every rank.

    Args:
        group_sizes (`torch.Tensor` of shape `(P,)`):
            Number of completions of each group.
        prompt_index (`torch.Tensor` of shape `(P,)`, *optional*):
            Dataset row of each group, or `None` when TRL's sampler chose.

    Example:

    ```python
    >>> import torch
    >>> plan = RolloutPlan(group_sizes=torch.tensor([2, 3]), prompt_index=torch.tensor([7, 4]))
    >>> plan.group_ids.tolist(), plan.prompt_index[plan.group_ids].tolist()
    ([0, 0, 1, 1, 1], [7, 7, 4, 4, 4])

    ```
    """

    group_sizes: Tensor
    prompt_index: Tensor | None = None

    @property
    def group_ids(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(self.group_sizes.numel()), self.group_sizes)

    @classmethod
    def equal(cls, num_rows: int, group_size: int) -> "RolloutPlan":
        return cls(group_sizes=torch.full((num_rows // group_size,), group_size))

    def all_of_size(self, group_size: int) -> bool:
        return bool((self.group_sizes == group_size).all())


def num_groups_that_fit(wishes: Tensor, num_rows: int, min_size: int, max_size: int) -> int:
    """
    How many of the candidate groups to use, so that their wished sizes come as close to `num_rows` as the bounds allow.

    Args:
        wishes (`torch.Tensor` of shape `(C,)`):
            Wished size of each candidate, in the order of their draw.
        num_rows (`int`):
            Number of rows to fill.
        min_size (`int`):
            Smallest group.
        max_size (`int`):
            Largest group.

    Returns:
        `int`:
            Number of leading candidates to use.

    Example:

    ```python
    >>> import torch
    >>> num_groups_that_fit(torch.tensor([4.0, 4.0, 4.0, 4.0]), num_rows=12, min_size=2, max_size=8)
    3

    ```
    """
    filled = wishes.double().clamp(min_size, max_size).cumsum(0)
    wanted = int(torch.searchsorted(filled, num_rows - 1e-6)) + 1
    fewest, most = -(-num_rows // max_size), num_rows // min_size
    if wishes.numel() < fewest:
        raise ValueError(
            f"{wishes.numel()} candidate prompts with at most {max_size} completions each cannot fill {num_rows} rows: "
            "return sizes for more candidates from `on_group_sizes`"
        )
    return min(max(wanted, fewest), most, wishes.numel())


def fit_group_sizes(wishes: Tensor, num_rows: int, min_size: int, max_size: int) -> Tensor:
    """
    Integer group sizes, proportional to the wishes within bounds, that add up to exactly `num_rows`.

    One factor `c` is found by bisection such that `clip(c * wishes, min_size, max_size)` adds up, then sizes are
    rounded by largest remainder (ties: first come). Where all wishes are zero, groups share equally.

    Args:
        wishes (`torch.Tensor` of shape `(P,)`):
            Non-negative wishes, in any unit.
        num_rows (`int`):
            Number of rows to fill, with `P * min_size <= num_rows <= P * max_size`.
        min_size (`int`):
            Smallest group.
        max_size (`int`):
            Largest group.

    Returns:
        `torch.Tensor` of shape `(P,)`:
            Sizes, int64.

    Example:

    ```python
    >>> import torch
    >>> fit_group_sizes(torch.tensor([1.0, 1.0, 6.0]), num_rows=16, min_size=2, max_size=12).tolist()
    [2, 2, 12]

    ```
    """
    num_groups = wishes.numel()
    if not num_groups * min_size <= num_rows <= num_groups * max_size:
        raise ValueError(
            f"{num_groups} groups of {min_size} to {max_size} completions cannot add up to {num_rows} rows: change the "
            "bounds or the number of groups"
        )
    wishes = torch.nan_to_num(wishes.double(), nan=0.0, posinf=1e30).clamp(min=0)
    # A group without a wish still has to take what the others cannot hold.
    wishes = wishes / wishes.max() + 1e-9 if wishes.max() > 0 else torch.ones_like(wishes)
    low, high = 0.0, max_size / wishes.min().item()
    for _ in range(100):
        middle = (low + high) / 2
        if (middle * wishes).clamp(min_size, max_size).sum() < num_rows:
            low = middle
        else:
            high = middle
    exact = (high * wishes).clamp(min_size, max_size)
    sizes = (exact + 1e-6).floor().long()
    missing = num_rows - int(sizes.sum())
    room = exact - sizes
    sizes[room.argsort(descending=True, stable=True)[:missing]] += 1
    return sizes


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
