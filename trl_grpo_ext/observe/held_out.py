"""Held-out answers: what a policy says to prompts that it is not trained on, and what that is worth."""

import asyncio
import copy
import functools
import inspect
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from datasets import Dataset

from ..hooks.ground import HookedTrainer
from ..hooks.records import Answer
from ..host.processes import fail, gather_values
from ..host.sampling import evaluating
from ..rewards import Reward, RewardModel, as_reward

Row = dict[str, Any]
Failures = tuple[list[bool], str]  # whether a score failed on each answer, and the first error
TOTAL = "total"  # the name of the reward of the training among the scores


@dataclass(frozen=True)
class HeldOut:
    """
    What a policy answers to held-out prompts and what that is worth.

    Args:
        questions (`list[str]`):
            What the user said last before each answer. Where a rollout has one scored answer for each prompt, the last
            message of the prompt.
        answers (`list[str]`):
            Each answer.
        scores (`dict[str, list[float | None]]`):
            For each part of the reward, for `total` and for each further metric, the score of each answer; `None`
            where it does not apply or failed.
        rows (`list[int]`, *optional*), turns (`list[int]`, *optional*), samples (`list[int]`, *optional*):
            Position in the dataset of the prompt of each answer, turn of the answer from 1, and which of the samples
            of the prompt it is, from 0. Default to one answer for each prompt.
        lengths (`list[int]`, *optional*), is_cut (`list[bool]`, *optional*):
            Tokens of each answer, and whether it reached the limit before it ended.
        failed (`dict[str, int]`, *optional*):
            Answers for which a score failed, by its name.
        step (`int`, *optional*, defaults to `0`):
            Optimizer steps before the evaluation.
    """

    questions: list[str]
    answers: list[str]
    scores: dict[str, list[float | None]]
    rows: list[int] | None = None
    turns: list[int] | None = None
    samples: list[int] | None = None
    lengths: list[int] | None = None
    is_cut: list[bool] | None = None
    failed: dict[str, int] | None = None
    step: int = 0

    @property
    def keys(self) -> list[tuple[int, int]]:
        """Position and turn of each answer."""
        count = len(self.answers)
        return list(zip(self.rows or range(count), self.turns or [1] * count, strict=True))

    @property
    def num_prompts(self) -> int:
        """Prompts with an answer."""
        return len({row for row, _ in self.keys})

    def values_of(self, name: str, turn: int | None = None) -> dict[int, list[float]]:
        """The values of a score for each prompt that has any, by its position; with `turn`, those of that turn."""
        found: dict[int, list[float]] = {}
        for value, (row, own) in zip(self.scores[name], self.keys, strict=True):
            if value is not None and turn in (None, own):
                found.setdefault(row, []).append(value)
        return found

    def per_prompt(self, name: str, turn: int | None = None) -> dict[int, float]:
        """Mean of a score over the answers to each prompt, by the position of the prompt in the dataset."""
        return {row: sum(values) / len(values) for row, values in self.values_of(name, turn).items()}

    def mean(self, name: str, turn: int | None = None) -> float:
        """Mean over the prompts of that of their answers; with `turn`, over those of that turn. NaN without any."""
        values = self.per_prompt(name, turn).values()
        return sum(values) / len(values) if values else math.nan

    def of_turn(self, turn: int) -> "HeldOut":
        """The answers of one turn."""
        places = [place for place, (_, own) in enumerate(self.keys) if own == turn]
        return HeldOut(
            questions=[self.questions[place] for place in places],
            answers=[self.answers[place] for place in places],
            scores={name: [values[place] for place in places] for name, values in self.scores.items()},
            rows=[self.keys[place][0] for place in places],
            turns=[turn] * len(places),
            step=self.step,
        )

    def asks_the_same_as(self, other: "HeldOut") -> bool:
        """Whether both have answers to the same prompts."""
        asked: list[dict[int, str]] = []
        for held_out in (self, other):
            questions = reversed(list(zip(held_out.keys, held_out.questions, strict=True)))
            asked.append({row: question for (row, _), question in questions})  # the first of each
        return asked[0] == asked[1]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> "HeldOut":
        """What [`to_dict`] gave. Raises `ValueError` for anything else."""
        if not isinstance(data, dict) or data.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{data!r:.80} is no held-out evaluation")
        columns = [data["questions"], data["answers"], *(dict(data["scores"]).values())]
        columns += [data[name] or data["answers"] for name in ("rows", "turns", "samples", "lengths", "is_cut")]
        if any(len(column) != len(data["answers"]) for column in columns):
            raise ValueError("a held-out evaluation has columns of different lengths")
        return cls(**data)


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


def reward_of(trainer: HookedTrainer) -> Reward:
    """The reward that a trainer trains on, as one expression: what it gives the same name as TRL's logs."""
    functions = []
    told = (trainer.reward_funcs, trainer.reward_processing_classes, trainer.reward_func_names)
    for function, tokenizer, name in zip(*told, strict=True):
        function = getattr(function, "__wrapped__", function)  # an async reward with TRL 1.13
        is_model = hasattr(function, "named_parameters")
        functions.append(RewardModel(function, tokenizer, name=name) if is_model else as_reward(function))
    weights = [float(weight) for weight in trainer.reward_weights]
    return as_one_reward(functions[0] if weights == [1.0] else functions, None if weights == [1.0] else weights)


def evaluate_held_out(
    trainer: HookedTrainer,
    dataset: Dataset,
    reward: Any = None,
    batch_size: int = 48,
    metrics: Mapping[str, Any] | None = None,
    num_samples: int = 1,
    temperature: float | None = 0.0,
) -> HeldOut:
    """
    Answer held-out prompts with the trainer's policy and score the answers, without moving the training.

    Answers come from the trainer's own generation, with its chat template, its engine and its limits, so that they are
    those of the policy as it is trained. Where a callback generates, such as `rollout="multi_turn"`, one conversation
    is held for each sample, and every answer that the reward sees in training is reported. No random number of the
    training is used up. Schedules in the reward stand where they end, so that results before and after the training
    are of one reward. Processes share the work and all return the whole result. Tools are not called.

    A score that fails on some answers is `None` there, and counted in `failed`.

    Args:
        trainer ([`AdaptiveGRPOTrainer`]):
            Trainer with the policy.
        dataset ([`~datasets.Dataset`]):
            Held-out prompts with the columns that the reward needs.
        reward ([`~trl_grpo_ext.rewards.Reward`], or what TRL takes as `reward_funcs`, *optional*):
            Reward whose parts are reported. Defaults to that of the training.
        batch_size (`int`, *optional*, defaults to `48`):
            Answers per generation call on each process.
        metrics (`Mapping[str, Reward]`, *optional*):
            What else to score, by name.
        num_samples (`int`, *optional*, defaults to `1`):
            Answers to each prompt.
        temperature (`float`, *optional*, defaults to `0.0`):
            0 is greedy; `None` is the temperature of the training.

    Returns:
        [`HeldOut`]:
            Answers and scores, in the order of the dataset, then of the samples, then of the turns.

    Raises:
        `ValueError`: where a score fails on every answer, on every process.
    """
    accelerator = trainer.accelerator
    # Every rank answers the same number of prompts, because sharded models generate together.
    share = -(-len(dataset) // accelerator.num_processes)
    numbers = [(accelerator.process_index * share + i) % len(dataset) for i in range(share)]
    try:
        whole = reward_of(trainer) if reward is None else as_one_reward(reward, trainer.args.reward_weights)
        asked = [dataset[number] for number in numbers for _ in range(num_samples)]
        answers: list[list[Answer]] = []
        with evaluating(trainer, temperature, trainer.args.seed + accelerator.process_index):
            for start in range(0, len(asked), batch_size):
                answers += trainer.rollout.answers_to(asked[start : start + batch_size])
            scored = [[answer for answer in own if answer.is_scored] for own in answers]
            scores, failures = score_answers(trainer, whole, asked, scored, metrics)
    except Exception as error:
        fail(error)
    told = [
        [
            (said_last(row["prompt"]), said_last(answer.prompt), answer.text, answer.turn + 1, *_size(trainer, answer))
            for answer in own
        ]
        for row, own in zip(asked, scored, strict=True)
    ]
    parts = gather_values((told, scores, failures))
    check_scored(parts)
    kept = len(dataset) * num_samples
    by_sample = [own for told, _, _ in parts for own in told][:kept]
    flat = [(place, *each) for place, own in enumerate(by_sample) for each in own]
    has_one = all(len(own) <= 1 for own in by_sample)
    return HeldOut(
        questions=[first if has_one else said for _, first, said, *_ in flat],
        answers=[text for _, _, _, text, *_ in flat],
        scores={name: [value for _, values, _ in parts for value in values[name]][: len(flat)] for name in scores},
        rows=[place // num_samples for place, *_ in flat],
        turns=[1 if has_one else turn for _, _, _, _, turn, *_ in flat],
        samples=[place % num_samples for place, *_ in flat],
        lengths=[length for *_, length, _ in flat],
        is_cut=[is_cut for *_, is_cut in flat],
        failed={
            name: sum([flag for _, _, found in parts for flag in found[name][0]][: len(flat)]) for name in failures
        },
        step=trainer.state.global_step,
    )


def said_last(prompt: Any) -> str:
    """A plain prompt as it is, or the last message of a conversation."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _size(trainer: HookedTrainer, answer: Answer) -> tuple[int, bool]:
    """Tokens of an answer, and whether it was cut off."""
    return len(answer.ids), not answer.ids or answer.ids[-1] not in trainer.eos_token_ids


# Scores


def score_answers(
    trainer: HookedTrainer,
    reward: Reward,
    rows: list[Row],
    answers: list[list[Answer]],
    metrics: Mapping[str, Any] | None = None,
) -> tuple[dict[str, list[float | None]], dict[str, Failures]]:
    """
    Score given answers of this process, which need not be those of the policy.

    Args:
        trainer ([`HookedTrainer`]):
            Trainer, on whose loop async rewards run.
        reward ([`~trl_grpo_ext.rewards.Reward`]):
            Each leaf and the total are reported, from one call.
        rows (`list[dict]`), answers (`list[list[Answer]]`):
            Dataset rows, and the answers to each.
        metrics (`Mapping[str, Reward]`, *optional*):
            What else to score, by name.

    Returns:
        `tuple`: values of each score, and for each on which answers it failed, with the first error.
    """
    asked = [(row, answer) for row, own in zip(rows, answers, strict=True) for answer in own]
    parts = [leaf.name for leaf in reward.leaves()]
    wanted = {TOTAL: reward} | {name: metric for name, metric in (metrics or {}).items() if name not in parts}
    names = {name: parts if name == TOTAL else [] for name in wanted}
    if not asked:
        return {each: [] for name in wanted for each in (*names[name], name)}, dict.fromkeys(wanted, ([], ""))
    call = _call_of(trainer, asked)
    scores: dict[str, list[float | None]] = {}
    failures: dict[str, Failures] = {}
    for name, each in wanted.items():
        columns, failures[name] = _values(trainer, each, call, names[name])
        scores |= {part: columns[part] for part in names[name]} | {name: columns[TOTAL]}
    return scores, failures


def _call_of(trainer: HookedTrainer, asked: list[tuple[Row, Answer]]) -> dict[str, Any]:
    """What TRL would call a reward function with, at the end of the training."""
    inputs = [{**row, **answer.columns} for row, answer in asked]
    if not trainer.rollout.strides:  # a callback generates
        told = [{"turn": answer.turn + 1, "last_turn": answer.is_last} for _, answer in asked]
        inputs = [{**row, **turn} for row, turn in zip(inputs, told, strict=True)]
    state = copy.copy(trainer.state)
    state.global_step = state.max_steps = max(1, state.max_steps)
    is_text = isinstance(inputs[0]["prompt"], str)
    return {
        **{name: [row[name] for row in inputs] for name in inputs[0] if name != "prompt"},
        "prompts": [answer.prompt for _, answer in asked],
        "completions": [answer.text if is_text else answer.completion for _, answer in asked],
        "completion_ids": [list(answer.ids) for _, answer in asked],
        "trainer_state": state,
    }


def _values(
    trainer: HookedTrainer, reward: Reward, call: dict[str, Any], parts: list[str]
) -> tuple[dict[str, list[float | None]], Failures]:
    """The total and the parts for each answer, and on which a reward failed, with the first error."""
    count = len(call["completions"])
    try:
        return _asked(trainer, reward, call, parts), ([False] * count, "")
    except Exception as error:  # of any reward function: one answer may be to blame, so each is asked about alone
        first = f"{type(error).__name__}: {error}"
    columns: dict[str, list[float | None]] = {name: [] for name in (*parts, TOTAL)}
    failed = [False] * count
    for place in range(count):
        own = {name: [v[place]] if isinstance(v, list) and len(v) == count else v for name, v in call.items()}
        try:
            values = _asked(trainer, reward, own, parts)
        except Exception:
            values, failed[place] = {name: [None] for name in columns}, True
        for name in columns:
            columns[name] += values[name]
    return columns, (failed, first)


def _asked(
    trainer: HookedTrainer, reward: Reward, call: dict[str, Any], parts: list[str]
) -> dict[str, list[float | None]]:
    """The total and the parts for each answer, from one call."""
    columns: dict[str, list[float | None]] = {}
    total = reward(
        **call,
        log_extra=lambda column, values: columns.update({column: values}),
        log_metric=lambda name, value: None,
    )
    if inspect.iscoroutine(total):
        # On the loop on which the trainer calls it, since what a reward keeps open is bound to one.
        loop = getattr(trainer, "async_loop", None)
        total = asyncio.run_coroutine_threadsafe(total, loop).result() if loop else asyncio.run(total)
    only = reward.leaves()[0] is reward
    return {name: total if only else columns[name] for name in parts} | {TOTAL: total}


def check_scored(parts: list[tuple[Any, dict[str, list[float | None]], dict[str, Failures]]]) -> None:
    """Raise `ValueError`, on every process, where a score failed on all answers of all processes."""
    for name in parts[0][2]:
        failed = [flag for _, _, failures in parts for flag in failures[name][0]]
        if failed and all(failed):
            error = next(failures[name][1] for _, _, failures in parts if any(failures[name][0]))
            what = "the reward" if name == TOTAL else f"the metric {name!r}"
            raise ValueError(f"{what} failed on each of {len(failed)} held-out answers, {error}")
