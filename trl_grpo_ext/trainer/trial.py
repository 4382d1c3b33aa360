"""A trial of a run: sample and update as the run does. Use it inside [`~trl_grpo_ext.trainer.untouched.untouched`]."""

import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..hooks.callback import call_hook
from ..hooks.records import Answer, RolloutPlan
from ..hooks.segments import total_rewards
from ..host.calls import own_copy
from ..host.processes import gather_values
from ..rollouts.adapter import CallbackRollout
from ..shape.resampling import take_logs
from .adaptive import AdaptiveGRPOTrainer
from .sampled import Sampled


@dataclass
class Drawn:
    """
    An answer that was sampled, on whatever process.

    Args:
        group (`int`):
            Group of the trial whose answers are compared.
        prompt (`Any`), text (`str`):
            Text or messages before the answer, and the answer.
        length (`int`), ended (`bool`):
            Tokens, and whether it ended by itself.
        is_scored (`bool`):
            Whether reward functions see it.
        total (`float`, *optional*):
            Total reward, `None` where none applies.
        values (`dict[str, float | None]`):
            What each part of the reward paid.
    """

    group: int
    prompt: Any
    text: str
    length: int
    ended: bool
    is_scored: bool
    total: float | None = None
    values: dict[str, float | None] = field(default_factory=dict)


@dataclass
class Round:
    """One generation batch of a trial: the answers of all processes, this process's own with their rows, and times."""

    sampled: Sampled
    answers: list[Drawn]
    asked: list[tuple[dict[str, Any], Answer]]
    seconds: float
    reward_seconds: float


def prompts_of(trainer: AdaptiveGRPOTrainer, count: int) -> Sequence[int] | list[dict[str, Any]]:
    """Positions of so many prompts of the training dataset, drawn by its seed; the first rows of a stream."""
    dataset = trainer.train_dataset
    if isinstance(dataset, Dataset):
        return random.Random(trainer.args.seed).sample(range(len(dataset)), min(count, len(dataset)))
    return list(itertools.islice(iter(dataset), count))


def rounds(trainer: AdaptiveGRPOTrainer, num_prompts: int, num_answers: int) -> Iterator[Round]:
    """
    Sample answers to prompts, in generation batches of the size of the run. Use it inside [`untouched`].

    Args:
        trainer ([`AdaptiveGRPOTrainer`]):
            The trainer.
        num_prompts (`int`):
            Least number of prompts. A dataset with fewer is gone through again.
        num_answers (`int`):
            Answers to each prompt, where no callback lays the rows out.
    """
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    prompts = prompts_of(trainer, num_prompts)
    if not prompts:
        raise ValueError("train_dataset is empty: pass at least one prompt")
    done, first_group = 0, 0
    endless = itertools.cycle(prompts)
    while done < num_prompts:
        count = trainer.args.generation_batch_size
        candidates = list(itertools.islice(endless, max(1, count // num_answers)))
        plan, rows = _laid_out(trainer, candidates, count, num_answers)
        drawn = _round(trainer, plan, rows, first_group)
        used = plan.prompt_index.unique().numel() if plan.prompt_index is not None else len(candidates)
        done += max(1, used)
        first_group += drawn.sampled.batch.num_groups
        yield drawn


def _laid_out(
    trainer: AdaptiveGRPOTrainer, candidates: list[Any], num_rows: int, num_answers: int
) -> tuple[RolloutPlan, list[dict[str, Any]]]:
    """The plan of a batch, and this process's rows of it."""
    num_processes = trainer.accelerator.num_processes
    if not isinstance(candidates[0], int):  # rows of a stream
        plan = RolloutPlan(_sizes(len(candidates), num_rows))
        own = plan.group_ids.view(num_processes, -1)[trainer.accelerator.process_index]
        return plan, [own_copy(candidates[number]) for number in own.tolist()]
    index = torch.tensor(candidates)
    arguments = {"prompt_index": index.repeat(num_answers), "num_rows": num_rows, "num_processes": num_processes}
    arguments["sizes"] = None
    for callback in trainer.grpo_callbacks:
        planned = call_hook(callback, "on_plan", trainer, **arguments)
        if planned is not None:
            return planned, trainer._rows_of(planned)
    plan = RolloutPlan(_sizes(len(candidates), num_rows), index)
    return plan, trainer._rows_of(plan)


def _sizes(num_groups: int, num_rows: int) -> Tensor:
    sizes = torch.full((num_groups,), num_rows // num_groups)
    sizes[: num_rows % num_groups] += 1
    return sizes


def _round(trainer: AdaptiveGRPOTrainer, plan: RolloutPlan, rows: list[dict[str, Any]], first_group: int) -> Round:
    take_logs(trainer._logs)
    rollout, spent, calculate = trainer.rollout, [0.0], trainer.rollout.calculate_rewards

    def timed(*args: Any, **kwargs: Any) -> Tensor:
        began = time.perf_counter()
        try:
            return calculate(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - began

    rollout.calculate_rewards = timed  # type: ignore[method-assign]
    start = time.perf_counter()
    try:
        sampled = trainer._generate_and_score(plan, rows, is_extra=True)
    finally:
        del rollout.calculate_rewards
    seconds = time.perf_counter() - start
    trainer._shape(sampled)
    asked = _asked(trainer, sampled)
    told = [
        (answer.prompt, answer.text, len(answer.ids), _ends(trainer, answer.ids), answer.is_scored)
        for _, answer in asked
    ]
    everyone = [Drawn(0, *one) for process in gather_values(told) for one in process]
    totals = total_rewards(sampled.rewards, trainer.reward_weights.cpu())
    columns = _columns(trainer, sampled, [answer.is_scored for answer in everyone])
    for number, answer in enumerate(everyone):
        answer.group = first_group + int(sampled.batch.group_ids[number])
        answer.total = _number(totals[number])
        answer.values = {name: column[number] for name, column in columns.items()}
    return Round(sampled, everyone, asked, seconds, spent[0])


def _asked(trainer: AdaptiveGRPOTrainer, sampled: Sampled) -> list[tuple[dict[str, Any], Answer]]:
    """This process's answers, each with its row."""
    if isinstance(trainer.rollout, CallbackRollout):
        return trainer.rollout.answers
    ids, mask = sampled.output["completion_ids"], sampled.output["completion_mask"]
    found = []
    for row, own, counts in zip(sampled.rows, ids.tolist(), mask.tolist(), strict=True):
        # What ends too late may be masked as a whole.
        length = sum(counts) if any(counts) else len(own)
        text = trainer.tokenizer.decode(own[:length], skip_special_tokens=True)
        found.append((row, Answer(row["prompt"], own[:length], text, is_last=True)))
    return found


def _ends(trainer: AdaptiveGRPOTrainer, ids: list[int]) -> bool:
    return bool(ids) and ids[-1] in {*trainer.eos_token_ids, trainer.tokenizer.pad_token_id}


def _columns(trainer: AdaptiveGRPOTrainer, sampled: Sampled, is_scored: list[bool]) -> dict[str, list[float | None]]:
    """What each reward function, and each part of one, paid for the answers of all processes."""
    columns = {
        name: [_number(value) for value in sampled.rewards[:, k]] for k, name in enumerate(trainer.reward_func_names)
    }
    for name, logged in trainer._logs["extra"].items():
        values = list(logged)
        if isinstance(trainer.rollout, CallbackRollout):  # lists of those that were scored
            values = [value for own in values for value in own]
        if not all(value is None or isinstance(value, int | float) for value in values):
            continue  # a column that a reward function logs for its reader
        if len(values) == sum(is_scored):
            left = iter(values)
            columns[name] = [_number(next(left)) if scored else None for scored in is_scored]
    return columns


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


@contextmanager
def budget_of(trainer: AdaptiveGRPOTrainer, max_completion_length: int) -> Iterator[None]:
    """While open, `trainer.generate` writes so many tokens at most."""
    owner, name = (
        (trainer.vllm_generation, "max_completion_length")
        if trainer.use_vllm
        else (trainer.generation_config, "max_new_tokens")
    )
    before = getattr(owner, name)
    setattr(owner, name, max_completion_length)
    try:
        yield
    finally:
        setattr(owner, name, before)


def lengths_of(trainer: AdaptiveGRPOTrainer, prompts: list[Any], budget: int) -> list[tuple[int, bool]]:
    """
    How long answers are with another budget, and whether they end, for the prompts of all processes.

    Every process must call this with as many prompts as the others.
    """
    with budget_of(trainer, budget):
        ids, _ = trainer.generate(trainer.tokenize(prompts))
    return [pair for own in gather_values([(len(one), _ends(trainer, one)) for one in ids]) for pair in own]


@dataclass(frozen=True)
class Reach:
    """
    What an update does to a parameter, on whatever process.

    Args:
        name (`str`):
            Name of the parameter.
        gradient (`float`):
            Largest norm of its gradient, in the first update and in the second.
        num_pulled (`int`), num_moved (`int`):
            Weights with a gradient in the first update, and how many of them it changed.
        is_zero (`bool`):
            Whether all of it is zero after that update.
    """

    name: str
    gradient: float
    num_pulled: int
    num_moved: int
    is_zero: bool


@dataclass(frozen=True)
class Update:
    """An update of a trial: its parameters, the learning rate, whether advantages were made up, and the seconds."""

    parameters: list[Reach]
    learning_rate: float
    is_stand_in: bool
    seconds: float


def update(trainer: AdaptiveGRPOTrainer, sampled: Sampled) -> Update:
    """
    One update on a micro-batch, and the gradient of a second one. Use it inside [`untouched`].

    The second gradient is there for what begins with the second update: an adapter's A, whose B begins at zero.
    Where no answer has an advantage, made-up ones of both signs stand in.
    """
    model = trainer.accelerator.unwrap_model(trainer.model).train()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for _, parameter in named]
    inputs, is_stand_in = _micro_batch(trainer, sampled)
    optimizer = trainer.optimizer or trainer.create_optimizer()
    rates = [group["lr"] for group in optimizer.param_groups]
    start = time.perf_counter()
    first = _gradients(trainer, model, named, inputs)
    if trainer.args.max_grad_norm:
        nn.utils.clip_grad_norm_([parameter for _, parameter in named], trainer.args.max_grad_norm)
    optimizer.step()
    seconds = time.perf_counter() - start
    pulled = [torch.zeros_like(p) if p.grad is None else p.grad for _, p in named]
    counts = [
        (int(is_pulled.sum()), int(((parameter != old) & is_pulled).sum()))
        for (_, parameter), old, is_pulled in zip(named, before, (gradient != 0 for gradient in pulled), strict=True)
    ]
    second = _gradients(trainer, model, named, inputs)
    own = [
        Reach(name, max(one, other), *count, is_zero=not bool(parameter.any()))
        for (name, parameter), count, one, other in zip(named, counts, first, second, strict=True)
    ]
    return Update(_joined(gather_values(own)), max(rates), is_stand_in, seconds)


def _joined(per_process: list[list[Reach]]) -> list[Reach]:
    return [
        Reach(
            same[0].name,
            # NaN stays NaN
            next((one.gradient for one in same if one.gradient != one.gradient), max(one.gradient for one in same)),
            max(one.num_pulled for one in same),
            max(one.num_moved for one in same),
            all(one.is_zero for one in same),
        )
        for same in zip(*per_process, strict=True)
    ]


def _gradients(
    trainer: AdaptiveGRPOTrainer, model: nn.Module, named: list[tuple[str, nn.Parameter]], inputs: dict[str, Any]
) -> list[float]:
    model.zero_grad(set_to_none=True)
    with trainer.accelerator.autocast():
        loss = trainer._compute_loss(model, inputs)
    if loss.requires_grad:
        loss.backward()
    return [0.0 if parameter.grad is None else parameter.grad.float().norm().item() for _, parameter in named]


def _micro_batch(trainer: AdaptiveGRPOTrainer, sampled: Sampled) -> tuple[dict[str, Any], bool]:
    """What the loss reads of as many rows as a device trains at once, those with the largest advantages first."""
    trainer._credit(sampled)
    output = trainer._finish(sampled)
    advantages = output["advantages"]
    is_stand_in = not bool(sampled.batch.teaches.any())
    count, size = advantages.size(0), trainer.args.per_device_train_batch_size
    if is_stand_in:
        signs = torch.ones(count).to(advantages)
        signs[1::2] = -1.0
        output["advantages"] = signs
        mask = output["completion_mask"]
        if not mask.any():  # all masked, for example because all were cut
            output["completion_mask"] = (output["completion_ids"] != trainer.tokenizer.pad_token_id).to(mask)
            output["num_items_in_batch"] = output["completion_mask"].sum() * trainer.accelerator.num_processes
    strength = output["advantages"].abs().reshape(count, -1).sum(1)
    rows = strength.argsort(descending=True, stable=True)[:size]
    picked = {
        name: value[rows] if isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == count else value
        for name, value in output.items()
    }
    return picked, is_stand_in
