"""Conversations: a group from one history per turn, or whole trajectories with credit per turn."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from ..config import AdaptiveGRPOConfig
from ..credit.turns import leave_one_out_advantages, returns
from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer
from ..hooks.records import Answer, RolloutBatch, RolloutPlan, RolloutSequence
from ..host.state import check_state
from .adapter import eval_datasets
from .dialogue import Dialogue, Message, RolloutError, Talk, read_turns, roll_out

HISTORIES = ("shared", "independent")
CARRIES = ("random", "best")

User = Callable[[list[Message]], Message | str | None]
Carry = Callable[[list[Message], list[str]], int]


class MultiTurnCallback(GRPOCallback):
    """
    Train on conversations, each turn with credit of its own.

    A dataset row holds the user's side: `prompt` up to the first answer and `turns` with what the user says after each
    answer, or a `prompt` with assistant messages whose content is missing. Reward functions score every turn: they are
    called with the history as the prompt, the answer as the completion, and the columns `turn` (from 1) and
    `last_turn`. What the user says is never trained on. Evaluation follows one conversation per row.

    Args:
        history (`str`, *optional*, defaults to `"shared"`):
            `"shared"` samples, at each turn, a group of answers to one history and carries one of them on: plain GRPO
            at every turn. `"independent"` samples `num_generations` whole conversations; the tokens of a turn are
            credited with the rewards from it on, against the mean of the other conversations that came as far.
        user (`Callable`, *optional*):
            A simulated user, called with the messages so far once a row has no more turns. It returns the next message
            (or its text), or `None` to end the conversation.
        carry (`str` or `Callable`, *optional*, defaults to `"random"`):
            For `"shared"`: which answer is carried on. `"best"` is the one with the highest reward, which is computed
            once more for that; a function gets the history and the texts of the answers and returns a position.
        max_turns (`int`, *optional*):
            Most turns of a conversation; needed with `user`.
        turn_columns (`Sequence[str]`, *optional*):
            Dataset columns with a list of one value per turn, such as references. Reward functions get the value of
            the turn.
        max_conversation_length (`int`, *optional*):
            Most tokens of a conversation. Defaults to what the model can hold. A conversation ends before an answer for
            which there may be no room.

    Example:

    ```python
    >>> def curious(history):
    ...     return None if "because" in history[-1]["content"] else "Why?"
    >>> callback = MultiTurnCallback(history="independent", user=curious, max_turns=4)

    ```
    """

    def __init__(
        self,
        history: str = "shared",
        user: User | None = None,
        carry: str | Carry = "random",
        max_turns: int | None = None,
        turn_columns: Sequence[str] = (),
        max_conversation_length: int | None = None,
    ):
        if history not in HISTORIES:
            raise ValueError(f"history={history!r} is unknown: use one of {', '.join(map(repr, HISTORIES))}")
        if not callable(carry) and carry not in CARRIES:
            raise ValueError(f"carry={carry!r} is unknown: use 'random', 'best' or a function")
        if user is not None and not callable(user):
            raise ValueError(f"user={user!r} cannot be called: pass a function of the messages so far")
        if user is not None and max_turns is None:
            raise ValueError("user is given, so a conversation may go on for ever: set max_turns, for example to 4")
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns={max_turns} leaves no turn: set at least 1")
        self.history = history
        self.user = user
        self.carry = carry
        self.max_turns = max_turns
        self.turn_columns = tuple(turn_columns)
        self.max_conversation_length = max_conversation_length

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        if self.history == "shared":
            return (
                *super().conflicts,
                Conflict(
                    "on_group_sizes",
                    "{other} sizes groups by prompt, and history='shared' has a group for each turn: set "
                    "group_size='fixed', or history='independent'",
                ),
            )
        return (
            *super().conflicts,
            Conflict(
                "ThresholdGroupSizeCallback",
                "group_size='threshold' moves the size of a prompt by one group, and a conversation has one for each "
                "turn: use group_size='variance'",
            ),
            Conflict(
                "normalize_then_sum",
                "history='independent' sums rewards over turns before it compares them, which "
                "multi_objective_aggregation='normalize_then_sum' does not: use 'sum_then_normalize', or "
                "history='shared'",
            ),
        )

    # Hooks

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        self.trainer = trainer
        self.talk = Talk(trainer, self.max_conversation_length)
        self.num_turns = self._read(trainer.train_dataset)
        if self.num_turns.max() == 1:
            raise ValueError(
                "Every conversation has one turn: put what the user says later into a column `turns`, pass user, or "
                "leave out the multi-turn rollout"
            )
        needed = {"turns", *self.turn_columns} & set(trainer.train_dataset.column_names)
        if args.remove_unused_columns and needed:
            raise ValueError(
                f"remove_unused_columns=True takes {sorted(needed)} out of the rows, which the conversations need: "
                "leave it out, as TRL does"
            )
        for place, dataset in eval_datasets(trainer).items():
            if isinstance(dataset, Dataset):
                self._read(dataset, place)
        self.num_batches = self._num_overflows = 0
        self._layout: list[list[tuple[int, list[int]]]] = []
        self._lengths: list[int] = []
        if self.history == "shared":
            own_rows = args.generation_batch_size // args.world_size
            longest = int(self.num_turns.max())
            if longest * args.num_generations > own_rows:
                raise ValueError(
                    f"A conversation of {longest} turns with num_generations={args.num_generations} needs "
                    f"{longest * args.num_generations} rows on one process, which has {own_rows}: raise "
                    "per_device_train_batch_size or steps_per_generation, or lower num_generations or max_turns"
                )

    def on_plan(
        self, args: AdaptiveGRPOConfig, prompt_index: Tensor, num_rows: int, num_processes: int, **kwargs: Any
    ) -> RolloutPlan | None:
        if self.history == "independent":
            return None
        turns = self.num_turns[prompt_index].tolist()
        chosen = fill_with_conversations(turns, num_rows // num_processes, args.num_generations, num_processes)
        self._layout = [[(int(prompt_index[position]), sizes) for position, sizes in own] for own in chosen]
        groups = [(index, size) for own in self._layout for index, sizes in own for size in sizes]
        indices, sizes = torch.tensor(groups).T
        return RolloutPlan(group_sizes=sizes, prompt_index=indices)

    def on_generate(self, args: AdaptiveGRPOConfig, rows: list[dict[str, Any]], **kwargs: Any) -> list[RolloutSequence]:
        self._lengths, self._num_overflows = [], 0
        if self.trainer.model.training and self.history == "shared":
            rolled = self._share_history(rows, args.seed)
            self.num_batches += 1
        else:
            where = [f"row {i} of the batch, which begins {_beginning(row)}" for i, row in enumerate(rows)]
            rolled = roll_out(self.talk, self.talk.open(rows, where), self._next)
            self._lengths = [len(row.answers) for row in rolled]
            for row, inputs in zip(rolled, rows, strict=True):
                for answer in row.answers:
                    answer.columns = self._columns_of(inputs, answer.turn)
        self.trainer.log_metric("multi_turn/turns", sum(self._lengths) / len(self._lengths))
        self.trainer.log_metric("multi_turn/overflowed", self._num_overflows / len(self._lengths))
        return rolled

    def on_advantages(self, batch: RolloutBatch, **kwargs: Any) -> Tensor | None:
        if self.history == "independent":
            following = returns(batch.rewards, batch.parents)
            return leave_one_out_advantages(following, batch.group_ids, batch.num_groups, self.trainer.scale_rewards)
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, num_batches=int)
        self.num_batches = state_dict["num_batches"]

    # Rollout

    def _share_history(self, rows: list[dict[str, Any]], seed: int) -> list[RolloutSequence]:
        process = self.trainer.accelerator.process_index
        own = self._layout[process]
        firsts = [sum(sum(sizes) for _, sizes in own[:slot]) for slot in range(len(own))]
        fresh = self.talk.open([rows[first] for first in firsts], [f"row {index} of the dataset" for index, _ in own])
        waiting: list[Dialogue] = list(fresh)
        carried: list[int | None] = [None] * len(own)
        rolled: list[RolloutSequence] = []
        order: list[int] = []  # where each rolled row belongs
        spare: list[tuple[dict[str, Any], Answer]] = []  # each process has an answer in the first step at least
        # As many generation calls on every process as the longest conversation of all of them has turns.
        for step in range(max(len(sizes) for layout in self._layout for _, sizes in layout)):
            slots = [slot for slot, (_, sizes) in enumerate(own) if step < len(sizes)]
            asked = [(slot, waiting[slot]) for slot in slots for _ in range(own[slot][1][step])]
            answers = self.talk.answer([dialogue for _, dialogue in asked])
            for (_, dialogue), answer in zip(asked, answers, strict=True):
                answer.columns = self._columns_of(dialogue.row, answer.turn)
                answer.is_last = not dialogue.script and self.user is None
            scored = [(dialogue.row, answer) for (_, dialogue), answer in zip(asked, answers, strict=True)]
            spare = spare or scored[:1]
            rewards = self._rewards_of(scored, spare)
            for slot in slots:
                sizes = own[slot][1]
                start = sum(sizes[:step])
                where = [i for i, (other, _) in enumerate(asked) if other == slot]
                group = [answers[i] for i in where]
                for number, answer in enumerate(group):
                    answer.glue_ids = []  # the row's prompt holds it
                    rolled.append(RolloutSequence(waiting[slot].ids, [answer], carried[slot]))
                    order.append(firsts[slot] + start + number)
                draw = random.Random(f"{seed} {self.num_batches} {process} {slot} {step}")
                choice = self._choose(waiting[slot], group, rewards[where], draw)
                following = self._next(waiting[slot], group[choice])
                for answer in group:
                    answer.is_last = following is None
                carried[slot] = None if following is None else len(rolled) - len(group) + choice
                if following is None or step + 1 == len(sizes):
                    self._lengths.append(waiting[slot].turn + 1)
                # A conversation that ended early begins again: the number of rows is fixed.
                waiting[slot] = following or fresh[slot]
        return _in_order(rolled, order)

    def _next(self, dialogue: Dialogue, answer: Answer) -> Dialogue | None:
        """The conversation after an answer, or `None` where it ends."""
        if not answer.is_scored:  # the prompt left no room for an answer
            self._num_overflows += 1
            return None
        if self.max_turns is not None and dialogue.turn + 1 >= self.max_turns:
            return None
        if dialogue.script:
            said, script = dialogue.script[0], dialogue.script[1:]
        elif self.user is not None:
            asked = self._ask(self.user, dialogue, answer)
            if asked is None:
                return None
            said, script = [asked], []
        else:
            return None
        following = self.talk.carry_on(dialogue, answer, said, script)
        if not self.talk.has_room(following):
            self._num_overflows += 1
            return None
        return following

    def _ask(self, user: User, dialogue: Dialogue, answer: Answer) -> Message | None:
        place = f"user, {dialogue.where}, turn {dialogue.turn + 1}"
        try:
            said = user(dialogue.messages + answer.completion)
        except Exception as error:
            raise RolloutError(f"{place}: raised {type(error).__name__}: {error}") from error
        if isinstance(said, str):
            said = {"role": "user", "content": said}
        is_message = isinstance(said, dict) and isinstance(said.get("content"), str) and said.get("role") != "assistant"
        if said is not None and not (is_message and "role" in said):
            raise RolloutError(
                f"{place}: returned {said!r:.80}: return a message of the user, its text, or None to end the "
                "conversation"
            )
        return said

    def _choose(self, dialogue: Dialogue, group: list[Answer], rewards: Tensor, draw: random.Random) -> int:
        if self.carry == "best":
            return int(rewards.nan_to_num(-torch.inf).argmax())
        if self.carry == "random":
            return draw.randrange(len(group))
        assert callable(self.carry)
        choice = self.carry(dialogue.messages, [answer.text for answer in group])
        if not isinstance(choice, int) or not 0 <= choice < len(group):
            raise RolloutError(
                f"carry, {dialogue.where}, turn {dialogue.turn + 1}: returned {choice!r}: return a position from 0 to "
                f"{len(group) - 1}"
            )
        return choice

    def _rewards_of(
        self, answers: list[tuple[dict[str, Any], Answer]], spare: list[tuple[dict[str, Any], Answer]]
    ) -> Tensor:
        """Total reward of each of this process's answers, if the choice needs it."""
        if self.carry != "best":
            return torch.zeros(len(answers))
        # What reward functions log is for the answers as a whole, which are scored once more.
        return self.trainer.score(answers, spare)

    def _columns_of(self, row: dict[str, Any], turn: int) -> dict[str, Any]:
        return {name: row[name][turn] if turn < len(row[name] or []) else None for name in self.turn_columns}

    def _read(self, dataset: Dataset, place: str = "the training dataset") -> Tensor:
        """Number of turns of each row, all of which are checked."""
        missing = [name for name in self.turn_columns if name not in dataset.column_names]
        if missing:
            raise ValueError(
                f"turn_columns names {missing[0]!r}, which is not a column of {place}, only {dataset.column_names}: "
                "name those with one value per turn"
            )
        taken = sorted({"turn", "last_turn"} & set(dataset.column_names))
        if taken:
            raise ValueError(f"Column {taken[0]!r} of {place} is what reward functions are told: rename it")
        columns = [name for name in ("prompt", "turns", *self.turn_columns) if name in dataset.column_names]
        counts = []
        for number, row in enumerate(dataset.select_columns(columns)):
            try:
                _, script = read_turns(row)
            except ValueError as error:
                raise ValueError(f"Row {number} of {place}: {error}") from error
            for name in self.turn_columns:
                if not isinstance(row[name], list) or len(row[name]) != len(script) + 1:
                    raise ValueError(
                        f"Row {number} of {place} has {len(script) + 1} turns and {name}={row[name]!r}: give a list "
                        "with one value for each turn"
                    )
            longest = len(script) + 1 if self.max_turns is None else min(len(script) + 1, self.max_turns)
            counts.append(self.max_turns if self.user is not None and self.max_turns is not None else longest)
        return torch.tensor(counts)


def fill_with_conversations(
    turns: list[int], num_rows: int, group_size: int, num_processes: int
) -> list[list[tuple[int, list[int]]]]:
    """
    Which conversations each process takes, and how large the groups of their turns are, so that all rows are filled.

    A conversation lies on one process. Each process takes the first candidates that still fit with `group_size` rows
    a turn; rows that are left over make the first groups larger.

    Args:
        turns (`list[int]`):
            Turns of each candidate, in the order of their draw; no more than `num_rows // group_size`.
        num_rows (`int`):
            Rows of one process.
        group_size (`int`):
            Fewest answers of a turn.
        num_processes (`int`):
            Number of processes.

    Returns:
        `list[list[tuple[int, list[int]]]]`:
            For each process, positions among the candidates with the group sizes of their turns.

    Raises:
        `ValueError`: when there are too few candidates.

    Example:

    ```python
    >>> fill_with_conversations([3, 2, 1], num_rows=16, group_size=4, num_processes=1)
    [[(0, [4, 4, 4]), (2, [4])]]
    >>> fill_with_conversations([2, 3], num_rows=14, group_size=4, num_processes=2)
    [[(0, [7, 7])], [(1, [5, 5, 4])]]

    ```
    """
    left = list(range(len(turns)))
    chosen = []
    for _ in range(num_processes):
        room = num_rows // group_size
        own = []
        for position in list(left):
            if turns[position] <= room:
                own.append(position)
                left.remove(position)
                room -= turns[position]
        if not own:
            raise ValueError(
                f"{len(turns)} conversations do not suffice for {num_processes} processes, each of which needs one: "
                "add conversations to the dataset"
            )
        groups = sum(turns[position] for position in own)
        sizes = iter([num_rows // groups + (i < num_rows % groups) for i in range(groups)])
        chosen.append([(position, [next(sizes) for _ in range(turns[position])]) for position in own])
    return chosen


def _in_order(rolled: list[RolloutSequence], order: list[int]) -> list[RolloutSequence]:
    rows = [row for _, row in sorted(zip(order, rolled, strict=True), key=lambda pair: pair[0])]
    for row in rows:
        row.parent = None if row.parent is None else order[row.parent]
    return rows


def _beginning(row: dict[str, Any]) -> str:
    said = next((message for message in row["prompt"] if message["role"] == "user"), row["prompt"][0])
    return repr(str(said["content"])[:40])
