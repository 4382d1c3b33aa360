"""[`check_run`]: sample a few dozen prompts and try one update, as the run would, and say what came of it."""

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from datasets import Dataset
from trl.data_utils import is_conversational

from ...config import AdaptiveGRPOConfig
from ...host.processes import gather_values
from ...trainer.adaptive import AdaptiveGRPOTrainer
from ...trainer.trial import Round, lengths_of, rounds, update
from ...trainer.untouched import untouched
from ..script import make_trainer
from .findings import Finding, findings_of
from .maths import component_of, informative_shares
from .measured import Measured, Plan, Setting
from .page import print_page, write_page
from .probes import as_text, probe, reference_column

NUM_PROMPTS = 24
SIZES = (2, 4, 8, 16)
MOST_ROWS = 5000  # of the dataset that are looked at
LONGER = 4  # times the budget, for a few answers


@dataclass(frozen=True)
class RunCheck:
    """
    What a check found.

    Args:
        measured ([`~trl_grpo_ext.recipe.run_check.measured.Measured`]):
            The numbers.
        findings (`list[Finding]`):
            What is wrong or would help, the worst first.
        page (`Path`, *optional*):
            The page, where one was written.
    """

    measured: Measured
    findings: list[Finding]
    page: Path | None = None

    @property
    def learns(self) -> bool:
        """Whether nothing was found that would keep the run from learning what is wanted."""
        return all(finding.level != "stop" for finding in self.findings)

    @property
    def names(self) -> list[str]:
        """Names of what was found, without options that would help."""
        return [finding.name for finding in self.findings if finding.level != "hint"]


def check_run(
    run: AdaptiveGRPOTrainer | Mapping[str, Any],
    reward: Any = None,
    training_args: AdaptiveGRPOConfig | None = None,
    model_args: Any = None,
    *,
    num_prompts: int = NUM_PROMPTS,
    num_answers: int | None = None,
    reference: str | None = None,
    output: str | Path | None = None,
    show: bool = True,
) -> RunCheck:
    """
    Check a run before it starts: sample, score and update as it would, and put everything back.

    Every process calls this, and all get the same result. The run afterwards is bit for bit the one without a check.

    Args:
        run ([`AdaptiveGRPOTrainer`] or `Mapping`):
            A trainer that has not begun to train; or prompts, with `reward`, `training_args` and `model_args` as
            [`~trl_grpo_ext.recipe.train_and_compare`] takes them.
        num_prompts (`int`, *optional*, defaults to `24`):
            Prompts to sample, rounded up to whole generation batches.
        num_answers (`int`, *optional*):
            Answers to each of them. Defaults to `num_generations`, but 4 to 8.
        reference (`str`, *optional*):
            Column with the references. Defaults to the first of `reference`, `answer`, `solution` and the like.
        output (`str` or `Path`, *optional*):
            Where to write the page as HTML.
        show (`bool`, *optional*, defaults to `True`):
            Whether to print the page.

    Returns:
        [`RunCheck`]:
            The numbers, and what was found.

    Raises:
        `ValueError`: where the weights are split over processes (FSDP, DeepSpeed), or a column is not there.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts} leaves nothing to sample: pass at least 1")
    if num_answers is not None and num_answers < 2:
        raise ValueError(f"num_answers={num_answers} leaves nothing to compare: pass at least 2")
    if isinstance(run, AdaptiveGRPOTrainer):
        trainer = run
    else:
        if training_args is None or model_args is None:
            raise ValueError("prompts need training_args and model_args beside them: pass both, or pass a trainer")
        trainer = make_trainer(run, reward, training_args, model_args)
    started = time.perf_counter()
    with untouched(trainer):
        measured = _measured(trainer, num_prompts, num_answers, reference)
    measured = replace(measured, seconds=max(gather_values(time.perf_counter() - started)))
    found = findings_of(measured)
    page = None
    if trainer.accelerator.is_main_process:
        if show:
            print_page(measured, found)
        page = None if output is None else write_page(measured, found, output)
    return RunCheck(measured, found, page)


def _measured(trainer: AdaptiveGRPOTrainer, num_prompts: int, num_answers: int | None, column: str | None) -> Measured:
    setting = _setting(trainer, column)
    answers_each = num_answers or min(max(trainer.args.num_generations, 4), 8)
    drawn: list[Round] = []
    error = None
    try:
        drawn = list(rounds(trainer, num_prompts, min(answers_each, trainer.args.generation_batch_size)))
    except Exception as raised:  # a run would stop here: a reward that fails, a column that is missing
        error = f"{type(raised).__name__}: {raised}"
    errors = gather_values(error)
    error = next((own for own in errors if own is not None), None)
    measured = Measured(setting, error=error)
    if error is not None:
        return measured
    measured.answers.extend(answer for one in drawn for answer in one.answers)
    asked = [pair for one in drawn for pair in one.asked]
    longer = _longer(trainer, measured, [answer.prompt for _, answer in asked])  # before the weights move
    tried = update(trainer, drawn[-1].sampled) if setting.num_trained else None
    return replace(
        measured,
        shares=informative_shares(
            [group for group in measured.totals if len(group) > 1] or measured.totals,
            sorted({*SIZES, setting.group_size}),
        ),
        components=_components(measured, len(trainer.reward_func_names)),
        update=tried,
        plan=_plan(trainer, setting, drawn, 0.0 if tried is None else tried.seconds),
        **longer,
        paid=probe(trainer, asked, setting.reference),
    )


def _components(measured: Measured, num_functions: int) -> list[Any]:
    groups = measured.groups
    names = list(groups[0][0].values) if groups else []
    if num_functions == 1:  # which is the total, whatever its parts are
        names = names[1:]
    parts = [component_of("total", measured.totals)]
    return parts + [
        component_of(name, [[answer.values.get(name) for answer in group] for group in groups]) for name in names
    ]


def _longer(trainer: AdaptiveGRPOTrainer, measured: Measured, prompts: list[Any]) -> dict[str, Any]:
    """A few answers with a longer budget, where many were cut."""
    if measured.ended > 0.95 or trainer.is_vlm:
        return {}
    distinct = list({repr(prompt): prompt for prompt in prompts}.values())[:8]
    count = min(gather_values(len(distinct)))
    longest = max(gather_values(max((len(ids) for ids in trainer.tokenize(distinct)), default=0)))
    room = getattr(trainer.model.config, "max_position_embeddings", None) or sys.maxsize
    budget = min(LONGER * measured.setting.budget, room - longest)
    if count == 0 or budget <= measured.setting.budget:
        return {}
    return {"trial_lengths": lengths_of(trainer, distinct[:count], budget), "trial_budget": budget}


def _setting(trainer: AdaptiveGRPOTrainer, column: str | None) -> Setting:
    args, dataset = trainer.args, trainer.train_dataset
    is_map = isinstance(dataset, Dataset)
    rows = dataset.select(range(min(len(dataset), MOST_ROWS))) if is_map else None
    first = dataset[0] if is_map else next(iter(dataset))
    reference = reference_column([first], column)
    texts = [as_text(value) for value in rows[reference]] if rows is not None and reference else [""]
    adapter = [p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name]
    return Setting(
        budget=trainer.max_completion_length,
        group_size=1
        if args.group_size == "single"
        else args.num_implementations
        if args.rollout == "hierarchical"
        else args.num_generations,
        learning_rate=args.learning_rate,
        temperature=args.temperature,
        compares_within=args.needs_siblings,
        masks_cut=args.mask_truncated_completions,
        columns=list(first),
        reference=reference,
        references=sum(text is not None for text in texts) / len(texts),
        distinct_prompts=0 if rows is None else len({repr(prompt) for prompt in rows["prompt"]}),
        num_rows=0 if rows is None else len(rows),
        num_trained=sum(parameter.requires_grad for parameter in trainer.model.parameters()),
        num_frozen_adapter=adapter.count(False),
        num_adapter=len(adapter),
        end_of_turn=_end_of_turn(trainer, first),
        samples_again=args.dynamic_sampling_rounds > 0,
        has_curriculum=args.curriculum != "none",
    )


def _end_of_turn(trainer: AdaptiveGRPOTrainer, row: dict[str, Any]) -> str | None:
    """What the template writes after an answer, where generation does not end at it."""
    if trainer.is_vlm or not is_conversational({"prompt": row["prompt"]}):
        return None
    mark = "ANSWER"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}]
    told = {"chat_template": trainer.chat_template, **trainer.chat_template_kwargs}
    try:
        text = trainer.processing_class.apply_chat_template(messages, tokenize=False, **told)
    except Exception:  # of a template that wants more than this, there is nothing to tell
        return None
    _, found, tail = str(text).rpartition(mark)
    if not found:
        return None
    ids = trainer.tokenizer(tail, add_special_tokens=False)["input_ids"]
    return None if set(ids) & set(trainer.eos_token_ids) else tail.strip() or "nothing"


def _plan(trainer: AdaptiveGRPOTrainer, setting: Setting, drawn: list[Round], update_seconds: float) -> Plan:
    args, dataset = trainer.args, trainer.train_dataset
    warm = drawn[1:] or drawn  # the first batch also loads and compiles
    updates = args.steps_per_generation * args.num_iterations / args.gradient_accumulation_steps
    groups = mean([one.sampled.batch.num_groups for one in drawn])
    per_batch = args.generation_batch_size / setting.group_size if args.rollout == "single" else groups
    prompts = per_batch / updates
    epoch = len(dataset) / prompts if isinstance(dataset, Dataset) else None
    on_gpu = torch.cuda.is_available() and trainer.accelerator.device.type == "cuda"
    used = (
        torch.cuda.max_memory_allocated() / 2**30
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    timed = gather_values((mean([one.seconds for one in warm]), mean([one.reward_seconds for one in warm]), used))
    sample_seconds, reward_seconds, memory = (max(own) for own in zip(*timed, strict=True))
    return Plan(
        rollouts=round(args.generation_batch_size / updates),
        prompts=prompts,
        steps=float(args.max_steps) if args.max_steps > 0 else args.num_train_epochs * (epoch or 0.0),
        steps_per_epoch=epoch,
        sample_seconds=sample_seconds / updates,
        reward_seconds=reward_seconds / updates,
        update_seconds=max(gather_values(update_seconds)) * args.gradient_accumulation_steps,
        memory=memory,
        on_gpu=on_gpu,
    )
