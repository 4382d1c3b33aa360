"""What travels through the life of a batch: the plan, the answers, the batch."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .segments import flat_groups, group_mean_std


@dataclass(frozen=True)
class RolloutPlan:
    """
    The groups of one generation batch, the same on every rank.

    Args:
        group_sizes (`torch.Tensor` of shape `(P,)`):
            Number of completions of each group.
        prompt_index (`torch.Tensor` of shape `(P,)`, *optional*):
            Position in the dataset of each group's prompt, or `None` when TRL's sampler chose.

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


@dataclass
class Answer:
    """
    One answer of the model: what is scored, and what gets one advantage.

    Args:
        prompt (`list[dict]`):
            Messages before the answer.
        ids (`list[int]`):
            Tokens as they were generated.
        text (`str`):
            The same as text.
        logprobs (`list[float]`, *optional*):
            Log-probability of each token when it was sampled, as vLLM gives it.
        glue_ids (`list[int]`, *optional*):
            Tokens between the answer before in the sequence and this one: the end of that turn if it was cut off, what
            the user says, and the beginning of the assistant's turn. They are never trained on.
        turn (`int`, *optional*, defaults to `0`):
            Turn of the conversation, or level of the tree, from 0.
        is_last (`bool`, *optional*, defaults to `False`):
            Whether the conversation ends here.
        is_scored (`bool`, *optional*, defaults to `True`):
            Whether reward functions see it. Without a reward of its own, it may get credit for what follows.
        columns (`dict[str, Any]`, *optional*):
            What the reward functions get in place of the dataset's columns of that name, or besides them.
    """

    prompt: list[dict[str, Any]]
    ids: list[int]
    text: str
    logprobs: list[float] | None = None
    glue_ids: list[int] = field(default_factory=list)
    turn: int = 0
    is_last: bool = False
    is_scored: bool = True
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def completion(self) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": self.text}]


@dataclass
class RolloutSequence:
    """
    One sequence of the loss: a prompt, and the answers that follow it with what the user says in between.

    Args:
        prompt_ids (`list[int]`):
            Tokens before the first answer.
        answers (`list[Answer]`):
            At least one.
        parent (`int`, *optional*):
            Position among this process's sequences of the one whose last answer this sequence carries on from.
    """

    prompt_ids: list[int]
    answers: list[Answer]
    parent: int | None = None

    @property
    def prompt(self) -> list[dict[str, Any]]:
        return self.answers[0].prompt

    @property
    def completion(self) -> list[dict[str, Any]]:
        last = self.answers[-1]
        return (last.prompt + last.completion)[len(self.prompt) :]


@dataclass
class RolloutBatch:
    """
    One generation batch: what was sampled, how it scored, what it is worth.

    Where a rollout has several turns, the answer of each turn is a completion, also when several lie in one sequence.

    All tensors are on the CPU and cover **all** processes, in rank order, so a callback that keeps state keeps the
    same state on every rank. Only `rows` and `tokens` are this process's own. Axes: `N` completions, `P` groups, `K`
    reward functions, `T` tokens.

    Args:
        step (`int`):
            Optimizer step at which the batch was sampled.
        group_ids (`torch.Tensor` of shape `(N,)`):
            Group of each completion.
        group_sizes (`torch.Tensor` of shape `(P,)`):
            Number of completions of each group.
        prompt_index (`torch.Tensor` of shape `(P,)`, *optional*):
            Position of each group's prompt in the training dataset. `None` when TRL's own sampler chose the prompts,
            which is so as long as no callback asks for prompts, group sizes or resampling.
        rewards_per_func (`torch.Tensor` of shape `(N, K)`):
            Reward of each function after the `on_rewards` hooks, NaN where it does not apply.
        raw_rewards_per_func (`torch.Tensor` of shape `(N, K)`):
            The same as the functions returned it.
        reward_names (`list[str]`):
            Names of the `K` reward functions.
        rewards (`torch.Tensor` of shape `(N,)`):
            Weighted total; there from `on_total_rewards` on.
        advantages (`torch.Tensor` of shape `(N,)` or `(N, T)`):
            Advantages, one for each completion or one for each of its tokens; there from `on_advantages` on.
        completion_lengths (`torch.Tensor` of shape `(N,)`):
            Tokens that the model generated and that are trained on, so 0 where `mask_truncated_completions` masks a
            completion; there from `on_advantages` on.
        rows (`list[dict]`):
            This process's dataset rows, one for each completion.
        tokens (`dict[str, torch.Tensor]`):
            This process's sequences, on its device: `prompt_ids` and `prompt_mask` of shape `(B, L)`, padded on the
            left, `completion_ids` and `completion_mask` of shape `(B, T)`, padded on the right. One for each
            completion, unless a rollout puts several turns into one sequence. There from `on_advantages` on; read only.
        turns (`torch.Tensor` of shape `(N,)`):
            Turn of the conversation, or level of the tree, from 0.
        parents (`torch.Tensor` of shape `(N,)`):
            Completion that each one carries on from, an earlier one; -1 where a conversation begins.
        tasks (`torch.Tensor` of shape `(N,)`):
            Task of each completion, a position in `task_names`; -1 where its row names none. There where a callback has
            a `task_column`, else empty.
        task_names (`list[str]`):
            Names of the tasks of this batch, in order.
        prompt_features (`torch.Tensor` of shape `(P, d)`):
            The policy's hidden state at the end of the prompt of each group, float32, at most 256 wide. Where a
            sequence holds several turns, that is the prompt before the first. There from
            `on_advantages` on, where a callback says that it reads them (`reads_prompt_features`).
        is_shaped (`bool`):
            Whether a hook changed the rewards.
        discarded ([`RolloutBatch`], *optional*):
            Groups that were sampled and then replaced (dynamic sampling). They are scored but never trained on.
        metrics (`dict[str, float]`):
            What a callback puts here is logged with the training metrics. Setting a key again overwrites it.
    """

    step: int
    group_ids: Tensor
    group_sizes: Tensor
    prompt_index: Tensor | None
    rewards_per_func: Tensor
    raw_rewards_per_func: Tensor
    reward_names: list[str]
    rewards: Tensor = field(default_factory=lambda: torch.empty(0))
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))
    completion_lengths: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: list[dict[str, Any]] = field(default_factory=list)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    turns: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    parents: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    tasks: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    task_names: list[str] = field(default_factory=list)
    prompt_features: Tensor = field(default_factory=lambda: torch.empty(0))
    is_shaped: bool = False
    discarded: "RolloutBatch | None" = None
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def num_groups(self) -> int:
        return self.group_sizes.numel()

    @property
    def parts(self) -> "list[RolloutBatch]":
        """This batch and, where groups were replaced, what was discarded: everything that was sampled."""
        return [self] if self.discarded is None else [self, self.discarded]

    @property
    def token_mask(self) -> Tensor:
        """`True` where a completion has a token, shape `(N, T)`."""
        width = int(self.completion_lengths.max()) if self.completion_lengths.numel() else 0
        return torch.arange(width) < self.completion_lengths[:, None]

    @property
    def token_advantages(self) -> Tensor:
        """
        Advantages `(N, T)` of the tokens, 0 behind the end of a completion.

        Where each completion has one advantage, they are `(N, 1)`.
        """
        per_token = self.advantages if self.advantages.dim() == 2 else self.advantages[:, None]
        if self.advantages.dim() == 2:
            return per_token.where(self.token_mask, torch.zeros_like(per_token))
        return per_token

    @property
    def mean_advantages(self) -> Tensor:
        """
        Advantage of each completion `(N,)`; where there is one for each token, their mean.

        Example:

        ```python
        >>> import torch
        >>> ids, sizes = torch.tensor([0, 0]), torch.tensor([2])
        >>> batch = RolloutBatch(0, ids, sizes, None, torch.ones(2, 1), torch.ones(2, 1), ["reward"])
        >>> batch.advantages, batch.completion_lengths = torch.tensor([[1.0, 3.0], [4.0, 9.0]]), torch.tensor([2, 1])
        >>> batch.mean_advantages.tolist()
        [2.0, 4.0]

        ```
        """
        if self.advantages.dim() == 1:
            return self.advantages
        return self.token_advantages.sum(1) / self.completion_lengths.clamp(min=1)

    @property
    def teaches(self) -> Tensor:
        """Which completions `(N,)` have an advantage that is not zero, and so a gradient."""
        return (self.token_advantages != 0).any(1)

    @property
    def group_tasks(self) -> Tensor:
        """Task of each group `(P,)`, as in `tasks`."""
        return torch.full((self.num_groups,), -1).scatter(0, self.group_ids, self.tasks)

    def flat_groups(self) -> Tensor:
        """Which groups `(P,)` have rewards that are all equal, or no reward. A group of one is flat."""
        return flat_groups(self.rewards, self.group_ids, self.num_groups)

    def flat_completions(self) -> Tensor:
        """
        Which completions `(N,)` teach nothing: those of groups whose rewards are all equal.

        A completion that is alone in its group has no others to be compared with. A baseline beyond the group may teach
        it all the same, so its advantage decides. What was discarded has no advantages, and then it taught nothing.
        """
        flat = self.flat_groups()[self.group_ids]
        if self.advantages.numel() == 0:
            return flat
        is_alone = (self.group_sizes == 1)[self.group_ids]
        return torch.where(is_alone, ~self.teaches, flat)

    def group_stats(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, standard deviation and number of the rewards of each group, each `(P,)`, in float64."""
        return group_mean_std(self.rewards, self.group_ids, self.num_groups)

    def select(self, groups: Tensor) -> "RolloutBatch":
        """The groups that are `True` in `groups`, shape `(P,)`, renumbered; without `rows` and `metrics`."""
        kept = groups[self.group_ids]
        new_id = groups.long().cumsum(0) - 1
        return RolloutBatch(
            step=self.step,
            group_ids=new_id[self.group_ids[kept]],
            group_sizes=self.group_sizes[groups],
            prompt_index=None if self.prompt_index is None else self.prompt_index[groups],
            rewards_per_func=self.rewards_per_func[kept],
            raw_rewards_per_func=self.raw_rewards_per_func[kept],
            reward_names=self.reward_names,
            rewards=self.rewards[kept],
            tasks=self.tasks[kept] if self.tasks.numel() else self.tasks,
            task_names=self.task_names,
        )

    def append(self, other: "RolloutBatch") -> None:
        """Add the groups of another batch behind those of this one."""
        self.group_ids = torch.cat([self.group_ids, other.group_ids + self.num_groups])
        if self.prompt_index is not None and other.prompt_index is not None:
            self.prompt_index = torch.cat([self.prompt_index, other.prompt_index])
        # The names of each round are those of its own rows.
        names = sorted({*self.task_names, *other.task_names})
        renumbered = [_renumbered(batch.tasks, batch.task_names, names) for batch in (self, other)]
        self.tasks, self.task_names = torch.cat(renumbered), names
        for name in ("group_sizes", "rewards_per_func", "raw_rewards_per_func", "rewards"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)]))


def _renumbered(tasks: Tensor, names: list[str], wanted: list[str]) -> Tensor:
    """Positions in `wanted` of tasks that are positions in `names`; -1 stays."""
    return torch.tensor([*(wanted.index(name) for name in names), -1])[tasks]
