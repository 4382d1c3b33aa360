"""Advantages where a run has several tasks: each completion against its own task, in the unit of that task.

Tasks differ in the level and in the scale of their rewards. A mean over all of them says which task a completion
belongs to, and not whether it is a good one; a standard deviation over all of them is that of the task with the largest
rewards, and makes the advantages of the others small.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..config import BASELINES, AdaptiveGRPOConfig
from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch
from ..host.state import check_state
from ..plan.outliers import UsualRange
from ..plan.predictor import RidgePredictor, explained_variance
from .baselines import (
    MEMORY,
    errors_of_guess,
    largest_of_others_of,
    mean_of_others,
    shrunk_baseline,
    std_of,
    std_of_others_of,
)
from .groups import EPS, group_advantages


class Moments:
    """
    Mean and standard deviation of values of each task, over the batches so far, of which the newest counts most.

    Values are held to their [`UsualRange`], so that one broken reward does not decide them.

    Args:
        forget (`float`):
            Weight of the past at each batch that holds the task.

    Example:

    ```python
    >>> import torch
    >>> moments = Moments(forget=0.9)
    >>> moments.add(["math"], torch.tensor([0, 0]), torch.tensor([1.0, 3.0]))
    >>> moments.mean(["chat", "math"]).tolist(), [round(s, 3) for s in moments.std(["chat", "math"]).tolist()]
    ([nan, 2.0], [nan, 1.414])

    ```
    """

    def __init__(self, forget: float):
        self.forget = forget
        self.of: dict[str, list[float]] = {}  # name -> count, mean, sum of squares around it
        self.usual: dict[str, UsualRange] = {}

    def add(self, names: list[str], tasks: Tensor, values: Tensor) -> None:
        """Take in values `(N,)` of the tasks `(N,)`, positions in `names`; what is not finite is left out."""
        for position, name in enumerate(names):
            new = values[(tasks == position) & values.isfinite()].double()
            if new.numel() == 0:
                continue
            usual = self.usual.setdefault(name, UsualRange())
            new = usual.believed(new)
            if usual.is_spoilt():
                self.of.pop(name, None)
            count, mean, squares = self.of.get(name, [0.0, 0.0, 0.0])
            count, squares = self.forget * count, self.forget * squares
            total = count + new.numel()
            gap = new.mean().item() - mean
            squares += (new - new.mean()).square().sum().item() + gap * gap * count * new.numel() / total
            self.of[name] = [total, mean + gap * new.numel() / total, squares]

    def mean(self, names: list[str]) -> Tensor:
        """Means `(J,)`, NaN of tasks without values."""
        return torch.tensor([self.of[name][1] if name in self.of else torch.nan for name in names]).double()

    def std(self, names: list[str]) -> Tensor:
        """Standard deviations `(J,)` with Bessel's correction, NaN of tasks with less than two values."""
        found = [self.of.get(name, [0.0, 0.0, 0.0]) for name in names]
        return torch.tensor(
            [(part[2] / (part[0] - 1)) ** 0.5 if part[0] >= 2 else torch.nan for part in found]
        ).double()

    def lowest(self, names: list[str]) -> Tensor:
        """Usual lowest values `(J,)`, minus infinity of tasks of which too little is known."""
        return torch.tensor([self.usual[name].lowest() if name in self.usual else -math.inf for name in names]).double()

    def state_dict(self) -> dict[str, Any]:
        usual = {name: usual.state_dict() for name, usual in self.usual.items()}
        return {"of": {name: list(values) for name, values in self.of.items()}, "usual": usual}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, of=dict, usual=dict)
        check_state(state_dict["of"], **dict.fromkeys(state_dict["of"], list))
        for name, values in state_dict["of"].items():
            if len(values) != 3 or not all(isinstance(value, float) and math.isfinite(value) for value in values):
                raise ValueError(f"{name!r} is {values}: not a count, a mean and a sum of squares")
        self.of = {name: list(values) for name, values in state_dict["of"].items()}
        self.usual = {name: UsualRange() for name in state_dict["usual"]}
        for name, usual in self.usual.items():
            usual.load_state_dict(state_dict["usual"][name])


class TaskAdvantagesCallback(GRPOCallback):
    """
    Compare each completion with its own task: what the options `baseline` and `scale_rewards` mean, task by task.

    The baselines are those of [`BaselineCallback`], and `"group"`. The mean of the other rewards of the batch is that
    of the task, or where a completion is the only one of its task, the mean of the task in earlier batches. The guess
    is of how far a prompt lies above the mean of its task, in standard deviations of the task. With
    `scale_rewards="batch"`, advantages are divided by a running standard deviation of their task. Completions whose
    rows name no task are a task of their own. A baseline never reads the completion that it belongs to. Logs
    `tasks/{name}/scale`, and what [`BaselineCallback`] logs.

    Args:
        column (`str`):
            Dataset column with the names of the tasks.
        baseline (`str`, *optional*, defaults to `"group"`):
            One of those of the option `baseline`.
        shift (`float`, *optional*, defaults to `0.0`):
            How far below, in running standard deviations of the rewards of the task. Not for `"group"`.
        forget (`float`, *optional*, defaults to `0.9`):
            Weight of the past at each batch that holds the task.
    """

    is_unique = True

    def __init__(self, column: str, baseline: str = "group", shift: float = 0.0, forget: float = MEMORY):
        if baseline not in BASELINES:
            raise ValueError(f"baseline={baseline!r} is unknown: use one of {', '.join(map(repr, BASELINES))}")
        self.task_column, self.baseline, self.shift, self.forget = column, baseline, shift, forget

    @property
    def reads_prompt_features(self) -> bool:
        return self.baseline in ("predicted", "shrunk")

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        name = "task_advantages"
        return (
            Conflict("on_generate", f"{name} and {{other}} both turn rewards into advantages: leave one of them out"),
            Conflict("CriticBaseline", f"{name} and CriticBaseline are two baselines: leave one of them out"),
            Conflict("BaselineCallback", f"{name} and BaselineCallback are two baselines: leave one of them out"),
            Conflict(
                "normalize_then_sum",
                f"{name} compares total rewards, and multi_objective_aggregation='normalize_then_sum' has none: use "
                "'sum_then_normalize'",
            ),
        )

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        if args.scale_rewards == "group":
            raise ValueError(
                "task_advantages has no effect on scale_rewards='group', which compares the completions of one prompt "
                "with each other: set scale_rewards='batch' or 'none'"
            )
        self.predictor: RidgePredictor | None = None  # as wide as the features, which the first batch shows
        self.rewards, self.differences = Moments(self.forget), Moments(self.forget)
        self.errors: dict[str, float] = {}  # running, of the guess: within, between

    def on_advantages(self, args: AdaptiveGRPOConfig, batch: RolloutBatch, **kwargs: Any) -> Tensor:
        # Rows that name no task, -1, are the last one.
        names = [*batch.task_names, ""]
        tasks = torch.where(batch.tasks < 0, len(batch.task_names), batch.tasks)
        if self.baseline == "group":
            ids, count = batch.group_ids, batch.num_groups
            differences = group_advantages(batch.rewards.double(), ids, count, "none").double()
            spread_of = batch.rewards  # as TRL does: flat groups count in the spread
        else:
            baseline = self._baseline(batch, names, tasks)
            lowest = self.rewards.lowest(names)[tasks]
            has_failed = largest_of_others_of(batch.rewards, tasks, len(names)) <= lowest
            baseline = torch.where(has_failed, torch.maximum(baseline, lowest), baseline)
            differences = spread_of = batch.rewards.double() - baseline
            batch.metrics["baseline/mean"] = baseline.nanmean().item()
            batch.metrics["baseline/residual_std"] = std_of(differences)
        self.rewards.add(names, tasks, batch.rewards)
        self.differences.add(names, tasks, spread_of)
        if args.scale_rewards == "batch":
            scale = self.differences.std(names)
            for position, name in enumerate(batch.task_names):
                if scale[position].isfinite():
                    batch.metrics[f"tasks/{name}/scale"] = scale[position].item()
            # A task of which one reward is known has no unit yet: nothing is learnt of it.
            differences = differences / (torch.where(scale.isfinite(), scale, torch.inf)[tasks] + EPS)
        return torch.nan_to_num(differences, nan=0.0).to(batch.rewards.dtype)

    def _baseline(self, batch: RolloutBatch, names: list[str], tasks: Tensor) -> Tensor:
        """What each reward `(N,)` is compared with, from the others of the batch and from earlier batches."""
        rewards, count = batch.rewards, len(names)
        mean, std = self.rewards.mean(names)[tasks], self.rewards.std(names)[tasks]
        others = mean_of_others(rewards, tasks, count)
        others = torch.where(others.isnan(), mean, others)
        unit = torch.where(std.isnan(), std_of_others_of(rewards, tasks, count), std).nan_to_num(nan=0.0)
        low = others - self.shift * unit
        if self.baseline == "leave_one_out":
            return mean_of_others(rewards, batch.group_ids, batch.num_groups) - self.shift * unit
        if self.baseline == "batch":
            return low
        features = batch.prompt_features
        if self.predictor is None:
            self.predictor = RidgePredictor(features.size(1), self.forget)
        guess = mean + std * self.predictor.predict(features).double()[batch.group_ids]
        self._learn(batch, names, tasks, guess)
        floored = torch.fmin(guess, low)  # of a task that was not seen yet, the batch alone decides
        if self.baseline == "predicted":
            return floored
        # In standard deviations of the task, because errors of all tasks are counted together.
        scale = torch.where(std > 0, std, 1.0)
        errors = (self.errors.get("within", 1.0), self.errors.get("between", 1.0))
        place = (batch.group_ids, batch.num_groups)
        baseline = scale * shrunk_baseline(rewards.double() / scale, floored / scale, *place, *errors)
        found = errors_of_guess(rewards.double() / scale, floored / scale, *place)
        for name, value in zip(("within", "between"), found or (), strict=False):
            before = self.errors.get(name, value)
            self.errors[name] = self.forget * before + (1 - self.forget) * value
        return baseline

    def _learn(self, batch: RolloutBatch, names: list[str], tasks: Tensor, guess: Tensor) -> None:
        """Let the predictor learn from a batch for which it has guessed."""
        assert self.predictor is not None
        of_prompts, _, _ = batch.group_stats()
        of_group = torch.zeros(batch.num_groups, dtype=torch.long).scatter(0, batch.group_ids, tasks)
        explained = explained_variance(
            of_prompts.new_zeros(batch.num_groups).scatter(0, batch.group_ids, guess), of_prompts
        )
        if explained is not None:
            batch.metrics["baseline/explained_variance"] = explained
        after = Moments(self.forget)
        after.load_state_dict(self.rewards.state_dict())
        after.add(names, tasks, batch.rewards)
        std = after.std(names)[of_group]
        target = (of_prompts - after.mean(names)[of_group]) / std
        self.predictor.learn(batch.prompt_features, torch.where(std > 0, target, torch.nan))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"errors": dict(self.errors)}
        state |= {"rewards": self.rewards.state_dict(), "differences": self.differences.state_dict()}
        if self.predictor is not None:
            state["predictor"] = self.predictor.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, errors=dict, rewards=dict, differences=dict)
        names = {"within", "between"} & set(state_dict["errors"])
        check_state(state_dict["errors"], **dict.fromkeys(names, float))
        self.errors = {name: float(state_dict["errors"][name]) for name in names}
        self.rewards.load_state_dict(state_dict["rewards"])
        self.differences.load_state_dict(state_dict["differences"])
        if "predictor" in state_dict:
            check_state(state_dict, predictor=dict)
            self.predictor = RidgePredictor.from_state(state_dict["predictor"], self.forget)
