"""[`Sampled`]: one generation batch on its way, with what TRL returned, what it logged, and what the hooks see."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..hooks.records import RolloutBatch, RolloutPlan
from ..shape.resampling import global_positions, replace_rows


@dataclass
class Sampled:
    """
    A generation batch between its plan and the loss.

    Args:
        plan ([`RolloutPlan`]):
            Groups and prompts.
        rows (`list[dict]`):
            This process's dataset rows.
        output (`dict[str, torch.Tensor]`):
            What TRL returned for them: this process's sequences.
        rewards (`torch.Tensor` of shape `(N, K)`):
            Raw rewards of the completions of all processes, on the CPU.
        is_ragged (`bool`):
            Whether TRL sampled one completion for each row, so that its own advantages and flat share mean nothing.
        num_rounds (`int`, *optional*, defaults to `0`):
            Rounds in which groups were replaced.

    Attributes:
        batch ([`RolloutBatch`]):
            What the hooks see; there once the rewards are shaped.
    """

    plan: RolloutPlan
    rows: list[dict[str, Any]]
    output: dict[str, Tensor]
    rewards: Tensor
    is_ragged: bool
    batch: RolloutBatch = field(init=False)
    num_rounds: int = 0

    @property
    def loss_mask(self) -> Tensor:
        """1 where a token of this process's sequences `(B, T)` is trained on."""
        mask: Tensor = self.output["completion_mask"] * self.output.get("tool_mask", 1)
        return mask

    @property
    def is_ours(self) -> bool:
        """Whether TRL's advantages are not those of this batch."""
        return self.is_ragged or self.num_rounds > 0 or self.batch.is_shaped

    def replace(
        self, plan: RolloutPlan, fresh: "Sampled", positions: list[Tensor], process: int, pad_token_id: int
    ) -> None:
        """
        Put freshly sampled rows in the place of others.

        Args:
            plan ([`RolloutPlan`]):
                The plan with its new prompts.
            fresh ([`Sampled`]):
                As many rows on every process; the first ones are used.
            positions (`list[torch.Tensor]`):
                For each process, the rows to replace among its own.
            process (`int`):
                This process.
            pad_token_id (`int`):
                What token ids are padded with.
        """
        mine = positions[process]
        self.plan = plan
        self.output = replace_rows(self.output, fresh.output, mine, pad_token_id)
        for position, row in zip(mine.tolist(), fresh.rows, strict=False):
            self.rows[position] = row
        where, source = global_positions(positions, plan.group_ids.numel(), len(fresh.rows))
        self.rewards = self.rewards.index_copy(0, where, fresh.rewards[source])
        self.num_rounds += 1


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, with NaN equal to NaN."""
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
