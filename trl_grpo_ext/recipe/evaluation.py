"""Held-out evaluation for the recipes: greedy answers, scored by each part of a reward, before and after training."""

import asyncio
import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import pad

from ..host.processes import fail, gather_values
from ..host.seams import eos_token_ids_of
from ..rewards import Reward
from ..rollouts.dialogue import read_turns


@dataclass(frozen=True)
class HeldOut:
    """
    What a policy answers to held-out prompts and what that is worth.

    Args:
        questions (`list[str]`):
            The last user message of each prompt.
        answers (`list[str]`):
            The greedy answer to each.
        scores (`dict[str, list[float | None]]`):
            For each part of the reward, and for `total`, the score of each answer.
    """

    questions: list[str]
    answers: list[str]
    scores: dict[str, list[float | None]]

    def mean(self, name: str) -> float:
        values = [value for value in self.scores[name] if value is not None]
        return sum(values) / len(values) if values else float("nan")


def evaluate_held_out(trainer: GRPOTrainer, dataset: Dataset, reward: Reward, batch_size: int = 48) -> HeldOut:
    """
    Answer held-out prompts greedily with the trainer's policy and score the answers.

    Greedy, so that nothing depends on luck and no random number of the training is used up; otherwise generated as in
    training with transformers, with its chat template and repetition penalty. Schedules in the reward stand where they
    end, so that results before and after the training are of one reward. Processes share the work and all return the
    whole result. Tools are not called.

    Args:
        trainer ([`AdaptiveGRPOTrainer`] or [`~trl.GRPOTrainer`]):
            Trainer with the policy.
        dataset ([`~datasets.Dataset`]):
            Held-out prompts with the columns that the reward needs; `prompt` is conversational.
        reward ([`~trl_grpo_ext.rewards.Reward`]):
            Reward whose parts are reported.
        batch_size (`int`, *optional*, defaults to `48`):
            Prompts per generation call.

    Returns:
        [`HeldOut`]:
            Answers and scores, in the order of the dataset.
    """
    accelerator = trainer.accelerator
    # Every rank answers the same number of prompts, because sharded models generate together.
    share = -(-len(dataset) // accelerator.num_processes)
    mine = dataset.select([(accelerator.process_index * share + i) % len(dataset) for i in range(share)])
    token_ids: list[list[int]] = []
    for start in range(0, share, batch_size):
        token_ids += _answer(trainer, list(mine["prompt"][start : start + batch_size]))
    texts = trainer.processing_class.batch_decode(token_ids, skip_special_tokens=True)
    try:
        scores = _scores(trainer, reward, mine, texts, token_ids)
    except Exception as error:
        fail(error)
    parts = gather_values((texts, scores))
    return HeldOut(
        questions=[prompt[-1]["content"] for prompt in dataset["prompt"]],
        answers=[text for texts, _ in parts for text in texts][: len(dataset)],
        scores={name: [value for _, own in parts for value in own[name]][: len(dataset)] for name in scores},
    )


class HeldOutCallback(TrainerCallback):
    """
    Evaluate before the first step and after the last, and log the total as `eval_reward` and each part beside it.

    Args:
        trainer ([`AdaptiveGRPOTrainer`] or [`~trl.GRPOTrainer`]):
            Trainer with the policy.
        dataset ([`~datasets.Dataset`]), reward ([`~trl_grpo_ext.rewards.Reward`]):
            As in [`evaluate_held_out`].

    Afterwards, `before` and `after` hold the results; `first_step` is the step of `before`, 0 but in a resumed run.
    """

    def __init__(self, trainer: GRPOTrainer, dataset: Dataset, reward: Reward) -> None:
        self.trainer, self.dataset, self.reward = trainer, dataset, reward

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.before, self.first_step = self._evaluate(), state.global_step

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.after = self._evaluate()

    def _evaluate(self) -> HeldOut:
        result = evaluate_held_out(self.trainer, self.dataset, self.reward)
        parts = {f"eval_rewards/{name}/mean": result.mean(name) for name in result.scores if name != "total"}
        logs_completions, self.trainer.log_completions = self.trainer.log_completions, False  # those of the training
        try:
            self.trainer.log({"eval_reward": result.mean("total"), **parts})
        finally:
            self.trainer.log_completions = logs_completions
        return result


def evaluate_conversations(
    trainer: GRPOTrainer, dataset: Dataset, reward: Reward, turn_columns: Sequence[str]
) -> list[HeldOut]:
    """
    Hold held-out conversations greedily, and score every turn.

    Args:
        trainer ([`AdaptiveGRPOTrainer`] or [`~trl.GRPOTrainer`]):
            Trainer with the policy.
        dataset ([`~datasets.Dataset`]):
            Held-out conversations, as [`~trl_grpo_ext.MultiTurnCallback`] takes them.
        reward ([`~trl_grpo_ext.rewards.Reward`]):
            Reward whose parts are reported.
        turn_columns (`Sequence[str]`):
            Columns with a list of one value per turn.

    Returns:
        `list[HeldOut]`:
            Answers and scores of each turn, of the conversations that have it.
    """
    going = [
        {"row": row, "prompt": opening, "script": script} for row in dataset for opening, script in [read_turns(row)]
    ]
    turns: list[HeldOut] = []
    while going:
        turn = len(turns)
        asked = []
        for talk in going:
            values = {name: talk["row"][name][turn] for name in turn_columns}
            last = not talk["script"]
            asked.append({**talk["row"], **values, "prompt": talk["prompt"], "turn": turn + 1, "last_turn": last})
        turns.append(evaluate_held_out(trainer, Dataset.from_list(asked), reward))
        for talk, answer in zip(going, turns[-1].answers, strict=True):
            if talk["script"]:
                talk["prompt"] = [*talk["prompt"], {"role": "assistant", "content": answer}, *talk["script"][0]]
        going = [{**talk, "script": talk["script"][1:]} for talk in going if talk["script"]]
    return turns


def _answer(trainer: GRPOTrainer, prompts: list[Any]) -> list[list[int]]:
    tokenizer, eos_token_ids = trainer.processing_class, eos_token_ids_of(trainer)
    rendered = tokenizer.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        chat_template=trainer.chat_template,
        return_dict=False,
        **trainer.chat_template_kwargs,
    )
    rows = [torch.tensor(ids) for ids in rendered]
    input_ids = pad(rows, padding_value=tokenizer.pad_token_id, padding_side="left")
    mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left")
    was_training = trainer.model.training
    trainer.model.eval()
    with (
        torch.no_grad(),
        unwrap_model_for_generation(
            trainer.model_wrapped, trainer.accelerator, gather_deepspeed3_params=trainer.args.ds3_gather_for_generation
        ) as model,
    ):
        output = model.generate(
            input_ids=input_ids.to(trainer.accelerator.device),
            attention_mask=mask.to(trainer.accelerator.device),
            max_new_tokens=trainer.max_completion_length,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=trainer.repetition_penalty,
            eos_token_id=eos_token_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
    trainer.model.train(was_training)
    answers = []
    for ids in output[:, input_ids.size(1) :].tolist():
        ends = [i for i, token in enumerate(ids) if token in eos_token_ids]
        answers.append(ids[: ends[0] + 1] if ends else ids)
    return answers


def _scores(
    trainer: GRPOTrainer, reward: Reward, rows: Dataset, texts: list[str], token_ids: list[list[int]]
) -> dict[str, list[float | None]]:
    """Values of each leaf and the total, from one call."""
    state = copy.copy(trainer.state)
    state.global_step = state.max_steps = max(1, state.max_steps)
    columns: dict[str, list[float | None]] = {}
    total = reward(
        prompts=list(rows["prompt"]),
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=token_ids,
        trainer_state=state,
        log_extra=lambda column, values: columns.update({column: values}),
        log_metric=lambda name, value: None,
        **{name: list(rows[name]) for name in rows.column_names if name != "prompt"},
    )
    if inspect.iscoroutine(total):
        # On the loop on which the trainer calls it, since what a reward keeps open is bound to one.
        loop = getattr(trainer, "async_loop", None)
        total = asyncio.run_coroutine_threadsafe(total, loop).result() if loop else asyncio.run(total)
    return {leaf.name: columns[leaf.name] if leaf is not reward else total for leaf in reward.leaves()} | {
        "total": total
    }


def print_comparison(
    before: HeldOut, after: HeldOut, num_samples: int = 3, title: str = "Held-out prompts", first: str = "before"
) -> None:
    """Print the mean of each score before (a column called `first`) and after, and some answers side by side."""
    console = Console(width=None if Console().is_terminal else 110)
    table = Table(title=f"{title} ({len(before.answers)}, greedy answers)", title_justify="left")
    table.add_column("")
    for title in (first, "after", "change"):
        table.add_column(title, justify="right")
    for name in before.scores:
        old, new = before.mean(name), after.mean(name)
        if math.isnan(old) or math.isnan(new):  # it applies to none of these answers
            continue
        digits = 1 if abs(old) >= 10 else 3
        table.add_row(name, f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new - old:+.{digits}f}")
    console.print(table)
    samples = Table(title="Sample answers", title_justify="left", show_lines=True)
    for title in ("prompt", first, "after"):
        samples.add_column(title, ratio=1, overflow="fold")
    step = max(1, len(before.answers) // num_samples)
    for i in range(0, len(before.answers), step)[:num_samples]:
        # Model output is text, not markup.
        samples.add_row(*(_plain(text) for text in (before.questions[i], before.answers[i], after.answers[i])))
    console.print(samples)


def _plain(text: str) -> Text:
    return Text(text.strip())
