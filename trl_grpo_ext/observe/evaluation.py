"""Know when a run is best: held-out evaluation with metrics of one's own, paired with the start, and early stopping."""

import functools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import speed_metrics

from ..config import AdaptiveGRPOConfig, check_held_out
from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer
from ..host.checkpoints import step_of
from ..host.processes import gather_values
from ..host.state import check_state
from ..plan.tasks import tasks_of
from .effect import has_finite_weights
from .held_out import TOTAL, HeldOut, evaluate_held_out, reward_of
from .measures import REWARD, check_known, check_prompts, metrics_of, names_of, rows_of, values_of, values_of_tasks
from .paired import FEW_PROMPTS, Difference, num_since_best, paired
from .record import HeldOutRecord
from .tables import log_table

logger = logging.getLogger(__name__)


class HeldOutCallback(GRPOCallback):
    """
    Evaluate on held-out prompts in place of TRL's evaluation: before the first step, as `eval_strategy` says, and at
    the end.

    Answers are scored by the reward of the training and by further metrics, and each prompt is compared with itself at
    the start. The results go where those of TRL's evaluation go, with the prefix `eval_`: so `metric_for_best_model`,
    `load_best_model_at_end`, `save_strategy="best"` and `EarlyStoppingCallback` work with them. The answers are written
    to `held_out.jsonl` in `output_dir`. Training is bit for bit what it is without the evaluation.

    Args:
        metrics (`Sequence` or `Mapping[str, Any]`, *optional*):
            What else to measure: reward functions, rewards, or texts that stand for one, as
            [`~trl_grpo_ext.rewards.parse_reward`] reads them. A mapping gives each a name.
        num_samples (`int`, *optional*, defaults to `1`):
            Answers to each prompt.
        temperature (`float`, *optional*):
            0 is greedy. Defaults to that of the training for several samples, and to 0 for one.
        pass_at (`Sequence[int]`, *optional*):
            For which `k` to log how likely one of `k` answers passes, by each metric, or by the reward without any.
        pass_threshold (`float`, *optional*, defaults to `1.0`):
            From which value on an answer passes.
        patience (`int`, *optional*):
            Evaluations in a row without a new best lower bound of the gain since the start, after which the training
            stops. The gain is that of `metric_for_best_model`, or of the reward.
        batch_size (`int`, *optional*):
            Answers per generation call on each process. Defaults to `per_device_eval_batch_size`.

    After the training, `before` and `after` hold the first evaluation and that of the weights that are left.

    Raises:
        `ValueError`: for an `eval_dataset` that is missing, empty or a stream, for metrics that nobody knows, and for
            options that cannot work together.
    """

    is_unique = True

    def __init__(
        self,
        metrics: Sequence[Any] | Mapping[str, Any] = (),
        num_samples: int = 1,
        temperature: float | None = None,
        pass_at: Sequence[int] = (),
        pass_threshold: float = 1.0,
        patience: int | None = None,
        batch_size: int | None = None,
    ):
        check_held_out(num_samples, temperature, pass_at, pass_threshold, patience)
        self.given = metrics
        self.num_samples = num_samples
        self.temperature = 0.0 if temperature is None and num_samples == 1 else temperature
        self.pass_at, self.pass_threshold, self.patience = tuple(pass_at), pass_threshold, patience
        self.batch_size = batch_size

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        remedy = "which held-out answers are made without: leave the eval_ options of this package out"
        return (
            Conflict("vision-language models", f"The model reads images, {remedy}, and use TRL's evaluation"),
            Conflict("tools", f"tools and environments are called while TRL generates, {remedy}"),
            Conflict("rollout_func", f"rollout_func generates, {remedy}, or generate in a callback's on_generate"),
        )

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        self.trainer = trainer
        self.reward = reward_of(trainer)
        self.parts = [leaf.name for leaf in self.reward.leaves()]
        self.metrics = metrics_of(self.given, self.reward.leaves())
        self.best_metric = (args.metric_for_best_model or REWARD).removeprefix("eval_")
        datasets = self._datasets()
        tasks = {task for dataset in datasets.values() for task in self._tasks(dataset) or ()}
        self._check_options(args, {prefix: len(dataset) for prefix, dataset in datasets.items()}, tasks - {None})
        self._forget()
        evaluate = trainer.evaluate

        @functools.wraps(evaluate)
        def instead(
            eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
        ) -> dict[str, float]:
            return self.evaluate(eval_dataset, metric_key_prefix)

        trainer.evaluate = instead

    def _forget(self) -> None:
        self.starts: dict[str, HeldOut] = {}  # by the prefix of the dataset, usually "eval"
        self.latest: dict[str, HeldOut] = {}
        self.best: dict[str, HeldOut] = {}  # of the best checkpoint
        self.lows: list[float] = []  # lower bounds of the gain, for the patience
        self.evaluated: list[int] = []  # steps
        self._record: HeldOutRecord | None = None
        self._counted = -1  # step whose lower bound counts already

    # What is checked when the trainer is complete

    def _datasets(self) -> dict[str, Dataset]:
        """The evaluation datasets by the prefix of their metrics, all of which are checked."""
        given = self.trainer.eval_dataset
        if given is None:
            raise ValueError("Held-out evaluation has no prompts: pass eval_dataset to the trainer")
        found = (
            {f"eval_{name}": part for name, part in given.items()} if isinstance(given, Mapping) else {"eval": given}
        )
        column = self.trainer.args.task_column
        for prefix, dataset in found.items():
            place = f"eval_dataset[{prefix[5:]!r}]" if isinstance(given, Mapping) else "eval_dataset"
            check_prompts(dataset, place)
            if column is not None and column not in dataset.column_names:
                raise ValueError(
                    f"{place} has no column {column!r}, which task_column names, only {dataset.column_names}: add it, "
                    "so that held-out answers are told apart, too"
                )
        return found

    def _check_options(self, args: AdaptiveGRPOConfig, sizes: dict[str, int], tasks: set[Any]) -> None:
        if args.metric_for_best_model is not None:
            names = names_of(self.parts, [*self.metrics], self.pass_at, min(sizes.values()) >= FEW_PROMPTS)
            names += [f"tasks/{task}/{name}" for task in sorted(tasks) for name in (REWARD, *self.metrics)]
            check_known(args.metric_for_best_model, [f"{prefix}_{name}" for prefix in sizes for name in names])
        if self.patience is None:
            return
        if args.eval_strategy == "no":
            raise ValueError(
                f"eval_patience={self.patience} counts evaluations, and eval_strategy='no' makes none between the "
                "start and the end: set eval_strategy='steps' and eval_steps"
            )
        known = {prefix.removeprefix("eval").strip("_"): size for prefix, size in sizes.items()}
        dataset, name = self._split(self.best_metric, list(known))
        if name not in (REWARD, *self.metrics):
            raise ValueError(
                f"eval_patience={self.patience} reads the gain of metric_for_best_model={self.best_metric!r}, and only "
                f"{', '.join(map(repr, [REWARD, *self.metrics]))} have one: name one of them"
            )
        if known[dataset] < FEW_PROMPTS:
            raise ValueError(
                f"eval_patience={self.patience} reads the interval of a gain, and {known[dataset]} held-out prompts "
                f"are too few for one: use at least {FEW_PROMPTS}, or leave eval_patience out"
            )

    def _split(self, metric: str, datasets: list[str]) -> tuple[str, str]:
        """The dataset of a metric, and its name there."""
        found = next((name for name in datasets if name and metric.startswith(f"{name}_")), datasets[0])
        return found, metric.removeprefix(f"{found}_") if found else metric

    # The life of a run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control)
        if not self.is_attached:
            return
        if state.global_step == 0:
            self._forget()
        if state.is_world_process_zero:
            self._record = HeldOutRecord(Path(args.output_dir))
            self._record.start(state.global_step, self.evaluated)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Not as the training begins, when some trackers and views have not begun.
        if self.is_attached and not self.starts:
            self.trainer.evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.is_attached and (control.should_training_stop or state.global_step >= state.max_steps):
            control.should_evaluate = True

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.is_attached or self.patience is None or state.global_step <= self._counted:
            return
        smaller = args.greater_is_better is False
        low = (metrics or {}).get(f"eval_{self.best_metric}/gain_{'high' if smaller else 'low'}")
        if low is None:  # of another dataset, or of too few prompts with a value
            return
        # Of values that all processes share, so that all of them stop or none does.
        self._counted = state.global_step
        self.lows.append(-low if smaller else low)
        waited = num_since_best(self.lows)
        if waited >= self.patience:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    f"Step {state.global_step}: {waited} evaluations without a higher lower bound of the gain in "
                    f"{self.best_metric!r} than {max(self.lows):.4g}: training stops (eval_patience={self.patience})"
                )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.is_attached:
            return
        self._note_best()
        restored = bool(args.load_best_model_at_end and state.best_model_checkpoint is not None and self.best)
        if restored:
            self.latest = self.best
            kept = next(iter(self.best.values())).step
            if self._record is not None and kept != state.global_step:
                self._record.keep(state.global_step, kept)
        elif state.global_step not in self.evaluated and all(gather_values(has_finite_weights(self.trainer.model))):
            self.trainer.evaluate()  # of NaN, no answer can be sampled

    @property
    def before(self) -> HeldOut:
        """The first evaluation: of the start, or of the step at which a run without one went on."""
        return next(iter(self.starts.values()))

    @property
    def after(self) -> HeldOut:
        """The evaluation of the weights that are left at the end."""
        return next(iter(self.latest.values()))

    # One evaluation

    def evaluate(self, eval_dataset: Any = None, prefix: str = "eval") -> dict[str, float]:
        """
        What stands for `trainer.evaluate` : answer, score, compare with the start, and log.

        Args:
            eval_dataset ([`~datasets.Dataset`], a mapping of them, or the name of one, *optional*):
                Defaults to that of the trainer. Any other is measured, and compared with nothing.
            prefix (`str`, *optional*, defaults to `"eval"`):
                Of the metrics.

        Returns:
            `dict[str, float]`: the metrics, as transformers reads them.
        """
        trainer = self.trainer
        given = trainer.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, Mapping):
            found: dict[str, float] = {}
            for name, part in given.items():
                found |= self.evaluate(name if eval_dataset is None else part, f"{prefix}_{name}")
            return found
        is_own = eval_dataset is None or isinstance(eval_dataset, str)
        dataset = trainer.eval_dataset[given] if isinstance(given, str) else given
        check_prompts(dataset, "eval_dataset")
        started = time.time()
        result = self.answers_to(dataset)
        differences = self._take(result, prefix) if is_own else {}
        logged = values_of(result, differences, self.parts, [*self.metrics], self.pass_at, self.pass_threshold)
        if (tasks := self._tasks(dataset)) is not None:
            start = self.starts.get(prefix) if is_own else None
            logged |= values_of_tasks(result, start, tasks, [*self.metrics])
        metrics = {f"{prefix}_{name}": value for name, value in logged.items()}
        metrics |= speed_metrics(prefix, started, num_samples=len(dataset))
        self._log(result, metrics, prefix)
        wanted = f"eval_{self.best_metric}"
        if wanted.startswith(f"{prefix}_"):  # which transformers must find: NaN is never the best
            metrics.setdefault(wanted, math.nan)
        state, control = trainer.state, trainer.control
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, state, control, metrics)
        return metrics

    def _tasks(self, dataset: Dataset) -> list[str | None] | None:
        """The task of each row, where the run has several."""
        column = self.trainer.args.task_column
        return None if column is None else tasks_of(dataset.select_columns(column), column)

    def answers_to(self, dataset: Dataset) -> HeldOut:
        """The held-out answers to the prompts of a dataset, with their scores."""
        args = self.trainer.args
        return evaluate_held_out(
            self.trainer,
            dataset,
            self.reward,
            self.batch_size or args.per_device_eval_batch_size,
            self.metrics,
            self.num_samples,
            self.temperature,
        )

    def _take(self, result: HeldOut, prefix: str) -> dict[str, Difference]:
        """Keep an evaluation of the trainer's own prompts; the gain in each metric since the start."""
        self._note_best()
        if prefix in self.starts and not self.starts[prefix].asks_the_same_as(result):
            logger.warning(
                f"Step {result.step}: the held-out prompts are not those of the start, so gains are counted from here"
            )
            del self.starts[prefix]
        start = self.starts.setdefault(prefix, result)
        self.latest = {**self.latest, prefix: result}
        if result.step not in self.evaluated:
            self.evaluated.append(result.step)
        names = {REWARD: TOTAL} | {name: name for name in self.metrics}
        found = {
            name: paired(start.per_prompt(score), result.per_prompt(score))
            for name, score in names.items()
            if score in start.scores
        }
        if start is result and result.num_prompts < FEW_PROMPTS and self.trainer.accelerator.is_main_process:
            logger.warning(
                f"{result.num_prompts} held-out prompts are too few to tell a gain from noise: use at least "
                f"{FEW_PROMPTS}"
            )
        return found

    def _note_best(self) -> None:
        """Keep the last evaluation, if its step has become the best checkpoint since."""
        checkpoint = self.trainer.state.best_model_checkpoint
        if self.latest and checkpoint and step_of(Path(checkpoint)) == next(iter(self.latest.values())).step:
            self.best = self.latest

    def _log(self, result: HeldOut, metrics: dict[str, float], prefix: str) -> None:
        trainer = self.trainer
        was_training, logs_completions = trainer.model.training, trainer.log_completions
        trainer.model.eval()  # so that TRL takes what was logged for that of an evaluation
        trainer.log_completions = False  # those of the training
        try:
            trainer.log(dict(metrics))
        finally:
            trainer.log_completions = logs_completions
            trainer.model.train(was_training)
        dataset = prefix.removeprefix("eval").strip("_")
        if self._record is not None:
            self._record.log(result.step, dataset, rows_of(result))
        if logs_completions and trainer.accelerator.is_main_process:
            log_table(trainer.args.report_to, f"{prefix}_completions", result.step, list(rows_of(result)))

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        self._note_best()
        kept = {"starts": self.starts, "latest": self.latest, "best": self.best}
        plain = {key: {prefix: held_out.to_dict() for prefix, held_out in part.items()} for key, part in kept.items()}
        return {**plain, "lows": list(self.lows), "evaluated": list(self.evaluated)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, starts=dict, latest=dict, best=dict, lows=list, evaluated=list)
        for key in ("starts", "latest", "best"):
            held_out = {prefix: HeldOut.from_dict(data) for prefix, data in state_dict[key].items()}
            setattr(self, key, held_out)
        self.lows = [float(value) for value in state_dict["lows"]]
        self.evaluated = [int(step) for step in state_dict["evaluated"]]
        self._counted = self.evaluated[-1] if self.evaluated else -1
