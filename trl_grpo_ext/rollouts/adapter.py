"""A rollout that a callback generates in place of TRL: what TRL is told, how its answers are scored and credited."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from trl import GRPOTrainer
from trl.data_utils import is_conversational

from ..credit.turns import spread_over_tokens
from ..host.processes import fail, gather_rewards, gather_values
from ..plan.sampler import RolloutPlan
from .answers import Answer, AnswerIndex, RolloutRow, answer_of_token, describe, pack

if TYPE_CHECKING:
    from ..trainer.adaptive import AdaptiveGRPOTrainer


class Rollout:
    """
    Stands between TRL, which knows rows with one completion each, and a callback whose rows depend on each other or
    hold several answers.

    Args:
        trainer ([`AdaptiveGRPOTrainer`]):
            Trainer one of whose callbacks has `on_generate`.

    Raises:
        `ValueError`: for what cannot be combined with such a callback.
    """

    def __init__(self, trainer: "AdaptiveGRPOTrainer") -> None:
        check_rollout(trainer)
        self.trainer = trainer
        self.inputs: list[dict[str, Any]] = []
        self.rows: list[RolloutRow] = []
        self.index = AnswerIndex.build([], 0)

    @property
    def answers(self) -> list[tuple[int, Answer]]:
        """This process's answers with the numbers of their rows."""
        return [(number, answer) for number, row in enumerate(self.rows) for answer in row.answers]

    def generate(self, prompts: list[Any], trainer: "AdaptiveGRPOTrainer") -> dict[str, Any]:
        """TRL's `rollout_func`: the rows of the callback that generates."""
        try:
            self.rows = self._rows_of(trainer, len(prompts))
        except Exception as error:
            fail(error)
        self.index = AnswerIndex.build(gather_values(describe(self.rows)), len(self.rows))
        return pack(self.rows)

    def _rows_of(self, trainer: "AdaptiveGRPOTrainer", num_rows: int) -> list[RolloutRow]:
        for callback in trainer.grpo_callbacks:
            rows = callback.on_generate(trainer.args, trainer.state, trainer.control, rows=self.inputs)
            if rows is not None:
                break
        if rows is None or len(rows) != num_rows:
            raise ValueError(
                f"{type(callback).__name__}.on_generate returned {'nothing' if rows is None else f'{len(rows)} rows'}: "
                f"return one RolloutRow for each of the {num_rows} rows"
            )
        empty = [number for number, row in enumerate(rows) if not row.answers or not all(a.ids for a in row.answers)]
        if empty:
            raise ValueError(
                f"{type(callback).__name__}.on_generate returned row {empty[0]} with an answer of no tokens: end it "
                "with the end-of-turn token at least"
            )
        return rows

    def calculate_rewards(self, prompts: list[Any], completions: list[Any]) -> tuple[Tensor, Tensor]:
        """
        Score the answers.

        Args:
            prompts (`list`):
                TRL's list, which it logs: filled with the prompts of the rows.
            completions (`list`):
                TRL's list, which it logs: filled with all messages after those.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`:
                Rewards of the answers of all processes, shape `(A, K)`, and the sums of each row, shape `(N, K)`.
        """
        prompts[:] = [row.prompt for row in self.rows]
        completions[:] = [row.completion for row in self.rows]
        rewards, _ = self.score([(self.inputs[number], answer) for number, answer in self.answers])
        self._fit_extra_columns([number for number, answer in self.answers if answer.is_scored])
        self._log_turns(rewards)
        return rewards, self.index.per_row(rewards, len(prompts) * self.trainer.accelerator.num_processes)

    def score(
        self, answers: list[tuple[dict[str, Any], Answer]], spare: list[tuple[dict[str, Any], Answer]] | None = None
    ) -> tuple[Tensor, slice]:
        """
        Ask the reward functions about answers to dataset rows. Every process must call this, with any number of them.

        Args:
            answers (`list[tuple[dict, Answer]]`):
                This process's answers, each with its dataset row.
            spare (`list[tuple[dict, Answer]]`, *optional*):
                One to ask about, in vain, where this process may have no answers and others have some.

        Returns:
            `tuple[torch.Tensor, slice]`:
                Rewards `(A, K)` of all processes, in rank order, NaN for answers that are not scored; and which of them
                are this process's.
        """
        flags = gather_values([answer.is_scored for _, answer in answers])
        most = max(1, *(sum(rank) for rank in flags))  # TRL needs a row to ask about
        asked = [(row, answer) for row, answer in answers if answer.is_scored]
        # What is gathered must have one shape on all processes: some are asked about twice, and dropped below.
        asked += (asked or answers or spare or [])[:1] * (most - len(asked))
        rows = [
            {**row, **answer.columns, "turn": answer.turn + 1, "last_turn": answer.is_last} for row, answer in asked
        ]
        completion_ids = [answer.ids for _, answer in asked]
        calculate = partial(
            GRPOTrainer._calculate_rewards,
            self.trainer,
            rows,
            [a.prompt for _, a in asked],
            [a.completion for _, a in asked],
            completion_ids,
        )
        nothing = torch.zeros(len(asked), len(self.trainer.reward_funcs), device=self.trainer.accelerator.device)
        gathered = gather_rewards(self.trainer.accelerator, calculate, nothing)
        rewards = gathered.new_full((sum(map(len, flags)), gathered.size(1)), torch.nan)
        is_scored = torch.tensor([flag for rank in flags for flag in rank], dtype=torch.bool)
        position = [rank * most + i for rank, flagged in enumerate(flags) for i in range(sum(flagged))]
        rewards[is_scored.to(rewards.device)] = gathered[position]
        first = sum(map(len, flags[: self.trainer.accelerator.process_index]))
        return rewards, slice(first, first + len(answers))

    def plan_of_answers(self, plan: RolloutPlan) -> RolloutPlan:
        """The plan of the rows as one of the answers, grouped by group of the row and turn; see [`group_ids`]."""
        _, first, sizes = self._grouped(plan)
        prompt_index = None if plan.prompt_index is None else plan.prompt_index[first]
        return RolloutPlan(sizes, prompt_index)

    def group_ids(self, plan: RolloutPlan) -> Tensor:
        """Group `(A,)` of each answer. Those of one group need not follow one another."""
        return self._grouped(plan)[0]

    def _grouped(self, plan: RolloutPlan) -> tuple[Tensor, Tensor, Tensor]:
        num_turns = int(self.index.turns.max()) + 1
        key = plan.group_ids[self.index.rows] * num_turns + self.index.turns
        groups, group_ids, sizes = torch.unique(key, return_inverse=True, return_counts=True)
        return group_ids, groups // num_turns, sizes

    def lengths(self, loss_mask: Tensor) -> Tensor:
        """Tokens `(A,)` of each answer that are trained on, given the mask `(B, width)` of this process's rows."""
        is_trained: Tensor = self.trainer.accelerator.gather(loss_mask.sum(1) > 0).cpu()
        return self.index.lengths * is_trained[self.index.rows]

    def token_advantages(self, advantages: Tensor, width: int) -> Tensor:
        """Advantages `(B, width)` of this process's tokens, or `(B,)` where all tokens of each row have one."""
        own = advantages[self.index.own(self.trainer.accelerator.process_index)]
        if own.dim() == 1 and self.index.is_one_per_row:
            return own
        return spread_over_tokens(own, answer_of_token(self.rows, width))

    def _fit_extra_columns(self, row_of_answer: list[int]) -> None:
        # TRL's table has a line per row, which may have several answers. Lists everywhere, since a column holds one
        # type, and rows of training and evaluation meet in it.
        for values in self.trainer._pending_extra_logs.values():
            per_row: list[list[Any]] = [[] for _ in self.rows]
            for number, value in zip(row_of_answer, values, strict=False):
                per_row[number].append(value)
            values[:] = per_row

    def _log_turns(self, rewards: Tensor) -> None:
        turns = (self.index.turns[self.index.is_scored].unique() + 1).tolist()
        if len(turns) == 1:
            return
        metrics = self.trainer._metrics["train" if self.trainer.model.training else "eval"]
        for turn in turns:
            own = rewards[(self.index.turns + 1 == turn).to(rewards.device)]
            for k, name in enumerate(self.trainer.reward_func_names):
                metrics[f"rewards/{name}/turn_{turn}/mean"].append(own[:, k].nanmean().item())


def check_rollout(trainer: "AdaptiveGRPOTrainer") -> None:
    """Raise `ValueError` for a trainer whose generation no callback can replace."""
    callbacks = [callback for callback in trainer.grpo_callbacks if callback.overrides("on_generate")]
    name = type(callbacks[0]).__name__
    if len(callbacks) > 1:
        raise ValueError(f"{name} and {type(callbacks[1]).__name__} both generate: pass one of them")
    if trainer.rollout_func is not None and not isinstance(getattr(trainer.rollout_func, "__self__", None), Rollout):
        raise ValueError(f"{name} and rollout_func both generate: pass one of them")
    if trainer._is_vlm:
        raise ValueError(f"{name} does not support vision-language models: use a text model")
    if trainer.tools:
        raise ValueError(
            f"{name} does not support tools and environments, whose calls TRL makes while it generates: leave out "
            f"tools and environment_factory, or {name}"
        )
    replacing = next((callback for callback in trainer.grpo_callbacks if callback.overrides("on_resample")), None)
    if replacing is not None:
        raise ValueError(
            f"{type(replacing).__name__} replaces groups one by one, and {name} makes rows that depend on each other: "
            "set dynamic_sampling_rounds=0"
        )
    for place, dataset in {"train_dataset": trainer.train_dataset, **eval_datasets(trainer)}.items():
        if not is_conversational(next(iter(dataset))):
            raise ValueError(
                f"{name} needs conversational prompts, and those of {place} are not: make each prompt a list of "
                'messages, such as [{"role": "user", "content": "..."}]'
            )


def eval_datasets(trainer: "AdaptiveGRPOTrainer") -> dict[str, Any]:
    """The evaluation datasets of a trainer, by what they are called in errors."""
    given = trainer.eval_dataset
    if given is None:
        return {}
    if isinstance(given, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in given.items()}
    return {"eval_dataset": given}
