"""Which task a prompt belongs to, and which share of the prompts each task gets."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..config import TASK_MIXINGS, check_task_mixing
from ..hooks.callback import GRPOCallback
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch
from ..hooks.segments import group_mean_std
from ..host.nearest import nearest
from ..host.state import check_state
from .columns import column_values, known_names
from .outliers import UsualRange

MAX_TASKS = 100  # more names are no tasks, but something else, such as the prompts
MEMORY = 0.9  # weight of the past in what is known of a task, at each batch that holds it
TINY = 1e-12


def tasks_of(rows: Iterable[Mapping[str, Any]], column: str) -> list[str | None]:
    """
    The task of each dataset row; `None` where it names none.

    Example:

    ```python
    >>> tasks_of([{"task": "math"}, {"task": ""}, {"task": 3}, {}], "task")
    ['math', None, None, None]

    ```
    """
    values = (row.get(column) for row in rows)
    return [value if isinstance(value, str) and value else None for value in values]


def read_tasks(dataset: Dataset, column: str) -> list[str]:
    """
    Read and check a task column.

    Args:
        dataset ([`~datasets.Dataset`]):
            Training dataset.
        column (`str`):
            Its column with names of tasks, or the key under which a transform puts them into the rows.

    Returns:
        `list[str]`: the task of each row.

    Raises:
        `ValueError`: for a missing column, rows that name no task, and more names than tasks can be.

    Example:

    ```python
    >>> read_tasks(Dataset.from_dict({"prompt": ["1 + 1", "Hi"], "task": ["math", "chat"]}), "task")
    ['math', 'chat']

    ```
    """
    values = column_values(dataset, column)
    if values is None:
        names = known_names(dataset)
        raise ValueError(f"task_column={column!r} is not a column of the training dataset{said_instead(column, names)}")
    found = tasks_of([{column: value} for value in values], column)
    without = [row for row, task in enumerate(found) if task is None]
    if without:
        raise ValueError(
            f"{len(without)} of {len(found)} rows name no task: row {without[0]} has {column}="
            f"{values[without[0]]!r:.80}, and a task is a text that is not empty. Name their task, or filter them out"
        )
    tasks = [task for task in found if task is not None]
    if len({*tasks}) > MAX_TASKS:
        raise ValueError(
            f"Column {column!r} holds {len({*tasks})} different texts, such as {tasks[0]!r:.80}, and at most "
            f"{MAX_TASKS} can be tasks: name the column with the tasks in task_column"
        )
    return tasks


def said_instead(name: str, known: Iterable[str]) -> str:
    """
    The end of an error about a name that is unknown: what was probably meant, and what there is.

    Example:

    ```python
    >>> said_instead("maths", ["math", "chat"])
    ", which has 'math', 'chat': did you mean 'math'?"

    ```
    """
    known = list(known)
    near = nearest(name, known)
    meant = f"did you mean {near!r}?" if near else "use one of these"
    return f", which has {', '.join(map(repr, known[:20]))}: {meant}"


def mixed_weights(weights: Tensor, tasks: Tensor, shares: Tensor) -> Tensor:
    """
    Weights of prompts that give each task its share of the draws, and keep the proportions inside of a task.

    Args:
        weights (`torch.Tensor` of shape `(D,)`):
            Weights of the prompts, as a curriculum has made them.
        tasks (`torch.Tensor` of shape `(D,)`):
            Task of each prompt, integers in `[0, J)`.
        shares (`torch.Tensor` of shape `(J,)`):
            Share of each task, not negative. A task whose prompts all have weight 0 stays without.

    Returns:
        `torch.Tensor` of shape `(D,)`: weights, float32, of which those of a task add up to its share.

    Example:

    ```python
    >>> import torch
    >>> mixed_weights(torch.tensor([1.0, 1.0, 4.0]), torch.tensor([0, 0, 1]), torch.tensor([0.5, 0.5])).tolist()
    [0.25, 0.25, 0.5]

    ```
    """
    mass = torch.zeros(shares.numel(), dtype=torch.float64).index_add(0, tasks, weights.double())
    factor = torch.where(mass > 0, shares.double() / mass.clamp(min=1e-300), 0.0)
    return (weights.double() * factor[tasks]).float()


class TaskMixingCallback(GRPOCallback):
    """
    Which share of the prompts each task gets.

    Comes behind the curricula: they choose the prompts of a task, this the share of the task. `"adaptive"` gives a task
    what can be learnt of it now: the share of its rollouts that teach, times the spread inside of its groups relative
    to the largest that this spread has been. Neither depends on the scale of its rewards. A task not seen yet counts
    like one of which everything teaches. Logs `tasks/{name}/wanted`, the share of the prompts that a task shall get.

    Args:
        column (`str`):
            Dataset column with the names of the tasks.
        mixing (`str`, *optional*, defaults to `"adaptive"`):
            `"weights"`, `"size"` or `"adaptive"`.
        weights (`Mapping[str, float]`, *optional*):
            Weight of each task, for `"weights"`.
        power (`float`, *optional*, defaults to `0.5`):
            Power of the number of prompts, for `"size"`.
        floor (`float`, *optional*, defaults to `0.2`):
            Share of the prompts that all tasks share equally, for `"adaptive"`.
        memory (`float`, *optional*, defaults to `0.9`):
            Weight of the past at each batch, for `"adaptive"`.
    """

    is_unique = True
    reads_dataset = True

    def __init__(
        self,
        column: str,
        mixing: str = "adaptive",
        weights: Mapping[str, float] | None = None,
        power: float = 0.5,
        floor: float = 0.2,
        memory: float = MEMORY,
    ):
        if mixing not in TASK_MIXINGS[1:]:
            raise ValueError(f"mixing={mixing!r} is unknown: use one of {', '.join(map(repr, TASK_MIXINGS[1:]))}")
        if mixing == "weights" and weights is None:
            raise ValueError("mixing='weights' needs weights, such as {'math': 2, 'chat': 1}: pass them")
        check_task_mixing(weights, power, floor)
        if not 0 <= memory < 1:
            raise ValueError(f"memory={memory} must be at least 0 and below 1: try {MEMORY}")
        self.task_column, self.mixing, self.weights = column, mixing, weights
        self.power, self.floor, self.memory = power, floor, memory

    def on_setup(self, trainer: HookedTrainer, **kwargs: Any) -> None:
        assert self.task_column is not None
        tasks = read_tasks(trainer.train_dataset, self.task_column)
        self.names = sorted({*tasks})
        place = {name: position for position, name in enumerate(self.names)}
        self.tasks = torch.tensor([place[task] for task in tasks], dtype=torch.long)
        self.learnable, self.spread, self.largest = (torch.full((len(self.names),), -1.0).double() for _ in range(3))
        self.usual = [UsualRange() for _ in self.names]
        if self.mixing == "weights":
            check_known(self.weights or {}, self.names)

    def shares(self) -> Tensor:
        """Share of the prompts `(J,)` that each task shall get."""
        count = len(self.names)
        if self.mixing == "weights":
            assert self.weights is not None
            wanted = torch.tensor([float(self.weights[name]) for name in self.names]).double()
        elif self.mixing == "size":
            wanted = torch.bincount(self.tasks, minlength=count).double() ** self.power
        else:
            # -1 stands for a task that was not seen yet.
            relative = torch.where(self.largest > 0, self.spread / self.largest.clamp(min=TINY), 0.0)
            known = torch.where(self.learnable < 0, 1.0, self.learnable * relative)
            wanted = known if known.sum() > 0 else torch.ones_like(known)
            wanted = (1 - self.floor) * wanted / wanted.sum() + self.floor / count
        return wanted / wanted.sum()

    def on_prompt_weights(self, weights: Tensor, **kwargs: Any) -> Tensor:
        return mixed_weights(weights, self.tasks, self.shares())

    def on_rollouts(self, batch: RolloutBatch, **kwargs: Any) -> None:
        if self.mixing == "adaptive":
            self._learn(batch)
        for name, share in zip(self.names, self.shares().tolist(), strict=True):
            batch.metrics[f"tasks/{name}/wanted"] = share

    def _learn(self, batch: RolloutBatch) -> None:
        for position, name in enumerate(self.names):
            teaches, spreads = [], []
            for part in batch.parts:
                if name not in part.task_names:
                    continue
                number = part.task_names.index(name)
                teaches.append((~part.flat_completions()[part.tasks == number]).double())
                spreads.append(_spreads(part, part.group_tasks == number))
            seen = torch.cat(teaches) if teaches else torch.empty(0)
            if seen.numel() == 0:
                continue
            spread = self.usual[position].believed(torch.cat(spreads))
            if self.usual[position].is_spoilt():  # by one broken reward: the largest spread would never be reached
                self.spread[position] = self.largest[position] = -1.0
            for values, new in ((self.learnable, seen.mean()), (self.spread, spread.mean())):
                before = values[position]
                values[position] = new if before < 0 else self.memory * before + (1 - self.memory) * new
            self.largest[position] = torch.maximum(self.largest[position], self.spread[position])

    def state_dict(self) -> dict[str, Any]:
        usual = [usual.state_dict() for usual in self.usual]
        return {"names": list(self.names), "usual": usual, **{name: getattr(self, name) for name in KNOWN}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, names=list, usual=list)
        if state_dict["names"] != self.names:
            raise ValueError(
                f"'names' are {state_dict['names']} in the checkpoint and {self.names} in the dataset: resume with the "
                "dataset and the task_column of the interrupted run"
            )
        check_state(state_dict, **{name: getattr(self, name) for name in KNOWN})
        for name in KNOWN:
            setattr(self, name, state_dict[name].clone())
        for usual, state in zip(self.usual, state_dict["usual"], strict=True):
            usual.load_state_dict(state)


KNOWN = ("learnable", "spread", "largest")  # what is known of each task, -1 before it was seen


def _spreads(part: RolloutBatch, groups: Tensor) -> Tensor:
    """Standard deviation of the rewards inside of each of these groups; of groups of one, that among them."""
    mean, std, count = part.group_stats()
    alone = groups & (part.group_sizes == 1)
    if alone.any():
        among = group_mean_std(mean[alone], torch.zeros(int(alone.sum()), dtype=torch.long), 1)[1]
        std = torch.where(alone, among, std)
    return torch.where(count > 0, std, 0.0)[groups]


def check_known(given: Mapping[str, Any], names: Sequence[str], what: str = "task_weights") -> None:
    """Raise `ValueError` where what is given for tasks names one that the dataset lacks, or lacks one that it has."""
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(
            f"{what} names the task {unknown[0]!r}, unknown to the dataset{said_instead(unknown[0], names)}"
        )
    missing = [name for name in names if name not in given]
    if missing:
        raise ValueError(
            f"{what} leaves out the task {missing[0]!r} of the dataset: name all of {list(names)}, 0 for none"
        )
