"""Held-out evaluation: greedy answers, scored by each part of a reward, before and after training."""

import asyncio
import copy
import functools
import inspect
import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from ..hooks.callback import call_hook
from ..hooks.records import Answer
from ..host.processes import fail, gather_values
from ..host.seams import eos_token_ids_of
from ..rewards import Reward, as_reward
from ..rollouts.adapter import CallbackRollout

Row = dict[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """
    What a policy answers to held-out prompts and what that is worth.

    Args:
        questions (`list[str]`):
            What the user said last before each answer. Where a rollout has one scored answer for each prompt, the last
            message of the prompt.
        answers (`list[str]`):
            The greedy answer to each.
        scores (`dict[str, list[float | None]]`):
            For each part of the reward, and for `total`, the score of each answer.
        rows (`list[int]`, *optional*), turns (`list[int]`, *optional*):
            Position in the dataset of the prompt of each answer, and turn of the answer, from 1. Default to one answer
            for each prompt.
    """

    questions: list[str]
    answers: list[str]
    scores: dict[str, list[float | None]]
    rows: list[int] | None = None
    turns: list[int] | None = None

    @property
    def keys(self) -> list[tuple[int, int]]:
        """Position and turn of each answer."""
        count = len(self.answers)
        return list(zip(self.rows or range(count), self.turns or [1] * count, strict=True))

    def mean(self, name: str, turn: int | None = None) -> float:
        """Mean of a score over the answers that have it; with `turn`, over those of that turn. NaN without any."""
        scored = zip(self.scores[name], self.keys, strict=True)
        values = [value for value, (_, own) in scored if value is not None and turn in (None, own)]
        return sum(values) / len(values) if values else float("nan")

    def of_turn(self, turn: int) -> "HeldOut":
        """The answers of one turn."""
        places = [place for place, (_, own) in enumerate(self.keys) if own == turn]
        return HeldOut(
            questions=[self.questions[place] for place in places],
            answers=[self.answers[place] for place in places],
            scores={name: [values[place] for place in places] for name, values in self.scores.items()},
            rows=[self.keys[place][0] for place in places],
            turns=[turn] * len(places),
        )


def as_one_reward(reward: Any, weights: Sequence[float] | None = None) -> Reward:
    """
    What TRL takes as reward functions, as one reward whose total is TRL's.

    Args:
        reward (what [`~trl_grpo_ext.rewards.as_reward`] takes, or a list of that):
            Reward functions.
        weights (`Sequence[float]`, *optional*):
            Of the rewards of a list. Default to 1.

    Example:

    ```python
    >>> def short(completions, **kwargs):
    ...     return [-float(len(text)) for text in completions]
    >>> as_one_reward([short, short], [1.0, 0.5])(prompts=[""], completions=["abcd"])
    [-6.0]

    ```
    """
    if not isinstance(reward, list | tuple):
        return as_reward(reward)
    if not reward:
        raise ValueError("reward is an empty list: pass at least one reward function")
    parts = [as_reward(part) for part in reward]
    if weights is not None:
        if len(weights) != len(parts):
            raise ValueError(f"reward_weights={list(weights)} is for another number of rewards: pass {len(parts)}")
        parts = [weight * part for weight, part in zip(weights, parts, strict=True)]
    return functools.reduce(operator.add, parts)


def evaluate_held_out(trainer: GRPOTrainer, dataset: Dataset, reward: Any, batch_size: int = 48) -> HeldOut:
    """
    Answer held-out prompts greedily with the trainer's policy and score the answers.

    Greedy, so that nothing depends on luck and no random number of the training is used up; otherwise generated as in
    training with transformers, with its chat template and repetition penalty. Where a callback generates, such as
    `rollout="multi_turn"`, one conversation is held for each prompt, and every answer that the reward sees in training
    is reported. Schedules in the reward stand where they end, so that results before and after the training are of
    one reward. Processes share the work and all return the whole result. Tools are not called.

    Args:
        trainer ([`AdaptiveGRPOTrainer`] or [`~trl.GRPOTrainer`]):
            Trainer with the policy.
        dataset ([`~datasets.Dataset`]):
            Held-out prompts with the columns that the reward needs.
        reward ([`~trl_grpo_ext.rewards.Reward`], or what TRL takes as `reward_funcs`):
            Reward whose parts are reported.
        batch_size (`int`, *optional*, defaults to `48`):
            Prompts per generation call.

    Returns:
        [`HeldOut`]:
            Answers and scores, in the order of the dataset, and of the turns for each prompt.
    """
    accelerator, reward = trainer.accelerator, as_one_reward(reward, trainer.args.reward_weights)
    # Every rank answers the same number of prompts, because sharded models generate together.
    share = -(-len(dataset) // accelerator.num_processes)
    mine = [dataset[(accelerator.process_index * share + i) % len(dataset)] for i in range(share)]
    try:
        answers: list[list[Answer]] = []
        with _answering_greedily(trainer):
            for start in range(0, share, batch_size):
                answers += _answers(trainer, mine[start : start + batch_size])
        scored = [[answer for answer in own if answer.is_scored] for own in answers]
        scores = _scores(trainer, reward, mine, scored)
    except Exception as error:
        fail(error)
    told = [
        [(_said(row["prompt"]), _said(answer.prompt), answer.text, answer.turn + 1) for answer in own]
        for row, own in zip(mine, scored, strict=True)
    ]
    parts = gather_values((told, scores))
    by_row = [own for told, _ in parts for own in told][: len(dataset)]
    flat = [(number, *each) for number, own in enumerate(by_row) for each in own]
    has_one = all(len(own) <= 1 for own in by_row)
    return HeldOut(
        questions=[asked if has_one else said for _, asked, said, _, _ in flat],
        answers=[text for *_, text, _ in flat],
        scores={name: [value for _, values in parts for value in values[name]][: len(flat)] for name in scores},
        rows=[number for number, *_ in flat],
        turns=[1 if has_one else turn for *_, turn in flat],
    )


class HeldOutCallback(TrainerCallback):
    """
    Evaluate before the first step and after the last, and log the total as `eval_reward` and each part beside it.

    Args:
        trainer ([`AdaptiveGRPOTrainer`] or [`~trl.GRPOTrainer`]):
            Trainer with the policy.
        dataset ([`~datasets.Dataset`]), reward ([`~trl_grpo_ext.rewards.Reward`], or what TRL takes):
            As in [`evaluate_held_out`].

    Afterwards, `before` and `after` hold the results; `first_step` is the step of `before`, 0 but in a resumed run.
    """

    def __init__(self, trainer: GRPOTrainer, dataset: Dataset, reward: Any) -> None:
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
        names = [name for name in result.scores if name != "total"]
        logs = {f"eval_rewards/{name}/mean": result.mean(name) for name in names}
        turns = sorted({turn for _, turn in result.keys})
        if len(turns) > 1:
            logs |= {f"eval_rewards/{name}/turn_{t}/mean": result.mean(name, t) for name in names for t in turns}
        logs_completions, self.trainer.log_completions = self.trainer.log_completions, False  # those of the training
        try:
            self.trainer.log({"eval_reward": result.mean("total"), **logs})
        finally:
            self.trainer.log_completions = logs_completions
        return result


def _said(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _answers(trainer: GRPOTrainer, rows: list[Row]) -> list[list[Answer]]:
    """The answers to each of this process's rows: one, or those of the conversation that a callback holds."""
    rollout = getattr(trainer, "rollout", None)
    if isinstance(rollout, CallbackRollout):
        return [sequence.answers for sequence in call_hook(rollout.callback, "on_generate", trainer, rows=rows)]
    prompts = [row["prompt"] for row in rows]
    ids = _generate(trainer, _tokenize(trainer, prompts))
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    return [[Answer(*each)] for each in zip(prompts, ids, texts, strict=True)]


@contextmanager
def _answering_greedily(trainer: GRPOTrainer) -> Iterator[None]:
    """While open, what callbacks generate through the trainer is greedy, and what they log is forgotten."""
    was_training = trainer.model.training
    trainer.model.eval()
    replaced = {
        "generate": lambda prompt_ids: (_generate(trainer, prompt_ids), None),
        "log_metric": lambda name, value: None,
    }
    vars(trainer).update(replaced)
    try:
        yield
    finally:
        for name in replaced:
            del vars(trainer)[name]
        trainer.model.train(was_training)


def _tokenize(trainer: GRPOTrainer, prompts: list[Any]) -> list[list[int]]:
    ids: list[list[int]]
    if isinstance(prompts[0], str):
        ids = trainer.processing_class(text=prompts)["input_ids"]
    else:
        ids = trainer.processing_class.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            chat_template=trainer.chat_template,
            return_dict=False,
            **trainer.chat_template_kwargs,
        )
    return ids


def _generate(trainer: GRPOTrainer, prompt_ids: list[list[int]]) -> list[list[int]]:
    """The greedy completion of each prompt, up to and with the token that ends it."""
    tokenizer, eos_token_ids = trainer.processing_class, eos_token_ids_of(trainer)
    rows = [torch.tensor(ids) for ids in prompt_ids]
    input_ids = pad(rows, padding_value=tokenizer.pad_token_id, padding_side="left")
    mask = pad([torch.ones_like(row) for row in rows], padding_value=0, padding_side="left")
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
    answers = []
    for ids in output[:, input_ids.size(1) :].tolist():
        ends = [i for i, token in enumerate(ids) if token in eos_token_ids]
        answers.append(ids[: ends[0] + 1] if ends else ids)
    return answers


def _scores(
    trainer: GRPOTrainer, reward: Reward, rows: list[Row], answers: list[list[Answer]]
) -> dict[str, list[float | None]]:
    """Values of each leaf and the total for the answers to each row, from one call."""
    names = [*(leaf.name for leaf in reward.leaves()), "total"]
    asked = [(row, answer) for row, own in zip(rows, answers, strict=True) for answer in own]
    if not asked:
        return {name: [] for name in names}
    is_rollout = isinstance(getattr(trainer, "rollout", None), CallbackRollout)
    inputs = [{**row, **answer.columns} for row, answer in asked]
    if is_rollout:
        told = [{"turn": answer.turn + 1, "last_turn": answer.is_last} for _, answer in asked]
        inputs = [{**row, **turn} for row, turn in zip(inputs, told, strict=True)]
    state = copy.copy(trainer.state)
    state.global_step = state.max_steps = max(1, state.max_steps)
    columns: dict[str, list[float | None]] = {}
    is_text = isinstance(inputs[0]["prompt"], str)
    total = reward(
        prompts=[answer.prompt for _, answer in asked],
        completions=[answer.text if is_text else answer.completion for _, answer in asked],
        completion_ids=[answer.ids for _, answer in asked],
        trainer_state=state,
        log_extra=lambda column, values: columns.update({column: values}),
        log_metric=lambda name, value: None,
        **{name: [row[name] for row in inputs] for name in inputs[0] if name != "prompt"},
    )
    if inspect.iscoroutine(total):
        # On the loop on which the trainer calls it, since what a reward keeps open is bound to one.
        loop = getattr(trainer, "async_loop", None)
        total = asyncio.run_coroutine_threadsafe(total, loop).result() if loop else asyncio.run(total)
    parts = {leaf.name: columns[leaf.name] if leaf is not reward else total for leaf in reward.leaves()}
    return {**parts, "total": total}


def print_comparison(
    before: HeldOut, after: HeldOut, num_samples: int = 3, title: str = "Held-out prompts", first: str = "before"
) -> None:
    """
    Print the mean of each score before (a column called `first`) and after, and some answers side by side.

    Answers of several turns get a table for each turn.
    """
    turns = sorted({turn for _, turn in before.keys})
    if len(turns) <= 1:
        _print_turn(before, after, num_samples, title, first)
        return
    for turn in turns:
        _print_turn(before.of_turn(turn), after.of_turn(turn), num_samples, f"{title}, turn {turn}", first)


def _print_turn(before: HeldOut, after: HeldOut, num_samples: int, title: str, first: str) -> None:
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
    # A conversation may have come to this turn once and not the other time.
    later = dict(zip(after.keys, after.answers, strict=True))
    pairs = [
        (question, answer, later[key])
        for key, question, answer in zip(before.keys, before.questions, before.answers, strict=True)
        if key in later
    ]
    for pair in pairs[:: max(1, len(pairs) // num_samples)][:num_samples]:
        samples.add_row(*(Text(text.strip()) for text in pair))  # model output is text, not markup
    console.print(samples)
