"""Plans and their implementations: a tree with two levels, each with credit of its own."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..config import AdaptiveGRPOConfig
from ..credit.turns import plan_share, returns, tree_advantages
from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer
from ..hooks.records import Answer, RolloutBatch, RolloutPlan, RolloutSequence
from ..plan.columns import fetched_rows, row_keys
from .adapter import eval_datasets
from .dialogue import Dialogue, Talk, read_turns, roll_out
from .template import Message

PLAN_TEMPLATE = "{prompt}\n\nFirst write a short plan of how you will answer. Do not answer yet."
IMPLEMENTATION_TEMPLATE = "Now answer, following your plan."


class HierarchicalCallback(GRPOCallback):
    """
    Sample plans for each prompt and implementations of each plan, and credit each level against its own group.

    The policy is asked for a plan, and then, in the same conversation, for what the plan is for. With `r_ij` the reward
    of implementation `j` of plan `i` and `V_i = mean_j r_ij`, implementations get `(r_ij - V_i) / σ_i` and plans get
    `(V_i - V̄) / σ_V` (`scale_rewards` as in TRL). A plan is one row of the loss and an implementation another, whose
    prompt holds the plan: so the tokens of a plan count once. A prompt takes `num_plans * (1 + num_implementations)`
    rows; `num_generations` has no effect. Reward functions see the implementations, with the plan in the prompt and in
    the columns `plan` (text) and `plan_ids`. Evaluation makes one plan and one implementation for each row.

    Args:
        num_plans (`int`, *optional*, defaults to `4`):
            Plans for each prompt.
        num_implementations (`int`, *optional*, defaults to `4`):
            Implementations of each plan.
        plan_template (`str`, *optional*):
            What the user says instead of the last message of the prompt, which stands for `{prompt}`.
        implementation_template (`str`, *optional*):
            What the user says after the plan; `{prompt}` may stand in it too.
        max_conversation_length (`int`, *optional*):
            Most tokens of prompt, plan and implementation. Defaults to what the model can hold. A plan after which
            there may be no room is not implemented.
    """

    reads_dataset = True

    def __init__(
        self,
        num_plans: int = 4,
        num_implementations: int = 4,
        plan_template: str = PLAN_TEMPLATE,
        implementation_template: str = IMPLEMENTATION_TEMPLATE,
        max_conversation_length: int | None = None,
    ):
        for name, value in {"num_plans": num_plans, "num_implementations": num_implementations}.items():
            if value < 2:
                raise ValueError(f"{name}={value} leaves nothing to compare with: use at least 2")
        if "{prompt}" not in plan_template:
            raise ValueError(f"plan_template={plan_template!r} does not say what to plan: put {{prompt}} into it")
        if not implementation_template:
            raise ValueError("implementation_template is empty: write what the user says after the plan")
        self.num_plans = num_plans
        self.num_implementations = num_implementations
        self.plan_template = plan_template
        self.implementation_template = implementation_template
        self.max_conversation_length = max_conversation_length

    @property
    def num_rows(self) -> int:
        """Rows of one prompt."""
        return self.num_plans * (1 + self.num_implementations)

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        return (
            *super().conflicts,
            Conflict(
                "normalize_then_sum",
                "A plan is worth the mean total reward of its implementations, which multi_objective_aggregation="
                "'normalize_then_sum' does not have: use 'sum_then_normalize'",
            ),
            Conflict(
                "on_group_sizes",
                "{other} changes the size of groups, and a tree has num_plans and num_implementations for all prompts: "
                "set group_size='fixed'",
            ),
        )

    # Hooks

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        self.trainer = trainer
        self.talk = Talk(trainer, self.max_conversation_length)
        own_rows = args.generation_batch_size // args.world_size
        if own_rows % self.num_rows:
            raise ValueError(
                f"A tree of num_plans={self.num_plans} and num_implementations={self.num_implementations} has "
                f"{self.num_rows} rows, and {own_rows} rows of a process are no multiple of that: change "
                "per_device_train_batch_size or steps_per_generation"
            )
        num_trees = args.generation_batch_size // self.num_rows
        if args.generation_batch_size // args.num_generations < num_trees:
            raise ValueError(
                f"num_generations={args.num_generations} has no effect on trees, but is too large to draw {num_trees} "
                f"prompts: set num_generations={self.num_implementations}"
            )
        for place, dataset in {"the training dataset": trainer.train_dataset, **eval_datasets(trainer)}.items():
            if isinstance(dataset, Dataset):
                _check_prompts(dataset, place)

    def on_plan(self, prompt_index: Tensor, num_rows: int, **kwargs: Any) -> RolloutPlan:
        prompts = prompt_index[: num_rows // self.num_rows]
        sizes = torch.tensor([self.num_plans] + [self.num_implementations] * self.num_plans)
        return RolloutPlan(sizes.repeat(prompts.numel()), prompts.repeat_interleave(sizes.numel()))

    def on_generate(self, rows: list[dict[str, Any]], **kwargs: Any) -> list[RolloutSequence]:
        if not self.trainer.model.training:
            rolled = roll_out(self.talk, self._begin(rows), self._next)
            without = sum(len(sequence.answers) == 1 for sequence in rolled) / len(rolled)
        else:
            rolled, without = self._grow(self._begin(rows[:: self.num_rows]))
        for sequence in rolled:
            plan = sequence.answers[0] if sequence.parent is None else rolled[sequence.parent].answers[0]
            for answer in sequence.answers:
                answer.is_scored = answer.is_scored and answer.turn == 1
                answer.columns = {"plan": plan.text, "plan_ids": plan.ids}
        self.trainer.log_metric("hierarchical/overflowed", without)
        return rolled

    def on_total_rewards(self, batch: RolloutBatch, **kwargs: Any) -> Tensor:
        return returns(batch.rewards, batch.parents)

    def on_advantages(self, batch: RolloutBatch, **kwargs: Any) -> Tensor:
        return tree_advantages(
            batch.rewards, batch.turns, batch.group_ids, batch.num_groups, self.trainer.scale_rewards
        )

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        is_plan = torch.eq(batch.turns, 0)
        number = is_plan.long().cumsum(0) - 1
        plan_ids = number[batch.parents[~is_plan]]
        _, prompts = batch.group_ids[is_plan].unique(return_inverse=True)
        across, within, share = plan_share(batch.rewards[~is_plan], plan_ids, prompts)
        batch.metrics["hierarchical/across_plans_std"] = across.item()
        batch.metrics["hierarchical/within_plan_std"] = within.item()
        batch.metrics["hierarchical/plan_share"] = share.item()

    # Rollout

    def _begin(self, rows: list[dict[str, Any]]) -> list[Dialogue]:
        asking = []
        for number, row in enumerate(rows):  # of a stream, none has been checked before
            _check_keys(row.keys(), f"row {number} of the batch")
            *before, last = _opening(row, f"Row {number} of the batch")
            said = {**last, "content": self.plan_template.replace("{prompt}", last["content"])}
            asking.append({**row, "prompt": [*before, said], "question": last["content"]})
        return self.talk.open(asking, [f"row {i} of the batch" for i in range(len(rows))])

    def _next(self, dialogue: Dialogue, answer: Answer) -> Dialogue | None:
        """Asks for the implementation of a plan, if there is room for one."""
        if dialogue.turn == 1:
            return None
        asked = self.implementation_template.replace("{prompt}", dialogue.row["question"])
        following = self.talk.carry_on(dialogue, answer, [{"role": "user", "content": asked}], [])
        return following if self.talk.has_room(following) else None

    def _grow(self, prompts: list[Dialogue]) -> tuple[list[RolloutSequence], float]:
        """All plans in one call, all implementations in another: the rows of each prompt, plans first."""
        asked = [dialogue for dialogue in prompts for _ in range(self.num_plans)]
        plans = self.talk.answer(asked)
        waiting = [self._next(dialogue, plan) for dialogue, plan in zip(asked, plans, strict=True)]
        going = [dialogue for dialogue in waiting if dialogue is not None]
        implemented = iter(self.talk.answer([dialogue for dialogue in going for _ in range(self.num_implementations)]))
        rolled: list[RolloutSequence] = []
        for first in range(0, len(plans), self.num_plans):
            tree = range(first, first + self.num_plans)
            start = len(rolled)
            rolled += [RolloutSequence(asked[i].ids, [plans[i]]) for i in tree]
            for i in tree:
                for _ in range(self.num_implementations):
                    following = waiting[i]
                    if following is not None:
                        answer = replace(next(implemented), glue_ids=[], is_last=True)
                        rolled.append(RolloutSequence(following.ids, [answer], parent=start + i - first))
                    else:
                        rolled.append(self._nothing(asked[i], plans[i], start + i - first))
        return rolled, 1 - len(going) / len(plans)

    def _nothing(self, dialogue: Dialogue, plan: Answer, parent: int) -> RolloutSequence:
        # Without a reward, this row gets no advantage and is in no baseline.
        prompt = dialogue.messages + plan.completion + [{"role": "user", "content": self.implementation_template}]
        return RolloutSequence(dialogue.ids, [replace(self.talk.nothing(dialogue), prompt=prompt, turn=1)], parent)


def _check_prompts(dataset: Dataset, place: str) -> None:
    _check_keys(row_keys(dataset), place)
    for number, row in enumerate(fetched_rows(dataset, ("prompt", "turns"))):
        _opening(row, f"Row {number} of {place}")


def _check_keys(keys: Collection[str], place: str) -> None:
    taken = sorted({"plan", "plan_ids", "turn", "last_turn"} & set(keys))
    if taken:
        raise ValueError(f"The columns {taken} of {place} would be replaced by those of the rollout: rename them")


def _opening(row: dict[str, Any], where: str) -> list[Message]:
    """The messages of a prompt of one turn, which ends in a text of the user."""
    try:
        opening, script = read_turns(row)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if script:
        raise ValueError(f"{where} has {len(script) + 1} turns: a plan is made for prompts of one turn")
    if not isinstance(opening[-1]["content"], str):
        raise ValueError(
            f"{where} does not end in a text of the user, which plan_template is made of: end the prompt with "
            '{"role": "user", "content": "..."}'
        )
    return opening
