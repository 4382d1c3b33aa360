"""Conversations: a group from one history per turn, or whole trajectories with credit per turn."""

import random
from collections.abc import Callable, Collection, Sequence
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
from ..host.calls import own_copy
from ..host.state import check_state
from ..plan.columns import fetched_rows, row_keys
from .adapter import eval_datasets
from .dialogue import Dialogue, RolloutError, Talk, read_turns, roll_out
from .shared import Thread, fill_with_conversations
from .template import Message

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

    reads_dataset = True

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
            for number, row in enumerate(rows):  # of a stream, none has been checked before
                self._check_keys(row.keys(), f"row {number} of the batch")
                self._turns_of(row, f"Row {number} of the batch")
            where = [f"row {i} of the batch, which begins {_beginning(row)}" for i, row in enumerate(rows)]
            rolled = roll_out(self.talk, self.talk.open(rows, where), self._next)
            self._lengths = [len(sequence.answers) for sequence in rolled]
            for sequence, row in zip(rolled, rows, strict=True):
                for answer in sequence.answers:
                    answer.columns = self._columns_of(row, answer.turn)
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
        """A group of answers to one history for each turn, in the order of the plan."""
        threads = self._threads(rows)
        sequences: dict[int, RolloutSequence] = {}
        spare: list[tuple[dict[str, Any], Answer]] = []  # each process has an answer in the first step at least
        # As many generation calls on every process as the longest conversation of all processes has turns.
        for step in range(max(len(sizes) for layout in self._layout for _, sizes in layout)):
            asked = [thread for thread in threads if step < len(thread.sizes)]
            groups = self._sample(asked, step)
            answers = [
                (thread.waiting.row, answer) for thread, group in zip(asked, groups, strict=True) for answer in group
            ]
            spare = spare or answers[:1]
            rewards = self._rewards_of(answers, spare).split([len(group) for group in groups])
            for thread, group, values in zip(asked, groups, rewards, strict=True):
                row = thread.row_of(step)
                for number, answer in enumerate(group):
                    sequences[row + number] = RolloutSequence(thread.waiting.ids, [answer], thread.parent)
                draw = random.Random(f"{seed} {self.num_batches} {self._process} {thread.number} {step}")
                choice = self._choose(thread.waiting, group, values, draw)
                self._carry_on(thread, group, choice, row, is_end=step + 1 == len(thread.sizes))
        return [sequences[row] for row in sorted(sequences)]

    @property
    def _process(self) -> int:
        return int(self.trainer.accelerator.process_index)

    def _threads(self, rows: list[dict[str, Any]]) -> list[Thread]:
        """This process's conversations, each with the rows that the plan gives it."""
        own = self._layout[self._process]
        firsts = [sum(sum(sizes) for _, sizes in own[:number]) for number in range(len(own))]
        fresh = self.talk.open([rows[first] for first in firsts], [f"row {index} of the dataset" for index, _ in own])
        return [
            Thread(number, first, sizes, dialogue, dialogue)
            for number, (first, (_, sizes), dialogue) in enumerate(zip(firsts, own, fresh, strict=True))
        ]

    def _sample(self, threads: list[Thread], step: int) -> list[list[Answer]]:
        """The group of each conversation at this step, all of them from one generation call."""
        asked = [thread.waiting for thread in threads for _ in range(thread.sizes[step])]
        answers = self.talk.answer(asked)
        for dialogue, answer in zip(asked, answers, strict=True):
            answer.columns = self._columns_of(dialogue.row, answer.turn)
            answer.is_last = not dialogue.script and self.user is None
            answer.glue_ids = []  # the prompt of the sequence holds them
        left = iter(answers)
        return [[next(left) for _ in range(thread.sizes[step])] for thread in threads]

    def _carry_on(self, thread: Thread, group: list[Answer], choice: int, row: int, is_end: bool) -> None:
        """Carry the chosen answer of a group on, whose first one lies in `row`."""
        following = self._next(thread.waiting, group[choice])
        for answer in group:
            answer.is_last = following is None
        if following is None or is_end:
            self._lengths.append(thread.waiting.turn + 1)
        thread.go_on(following, row + choice)

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
            said = own_copy(user(own_copy(dialogue.messages + answer.completion)))
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
        choice = self.carry(own_copy(dialogue.messages), [answer.text for answer in group])
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
        """The value of this turn in each of the `turn_columns`, `None` behind the end of the row's values."""
        return {name: row[name][turn] if turn < len(row[name]) else None for name in self.turn_columns}

    def _read(self, dataset: Dataset, place: str = "the training dataset") -> Tensor:
        """Number of turns of each row, all of which are checked."""
        names = ("prompt", "turns", *self.turn_columns)
        self._check_keys(row_keys(dataset), place)
        turns = [self._turns_of(row, f"Row {i} of {place}") for i, row in enumerate(fetched_rows(dataset, names))]
        return torch.tensor(turns, dtype=torch.long)

    def _check_keys(self, keys: Collection[str], place: str) -> None:
        missing = [name for name in self.turn_columns if name not in keys]
        if missing:
            raise ValueError(
                f"turn_columns names {missing[0]!r}, which is not a column of {place}, only {list(keys)}: name those "
                "with one value per turn"
            )
        taken = sorted({"turn", "last_turn"} & set(keys))
        if taken:
            raise ValueError(f"Column {taken[0]!r} of {place} is what reward functions are told: rename it")

    def _turns_of(self, row: dict[str, Any], where: str) -> int:
        """Most turns of a row, which is checked."""
        try:
            _, script = read_turns(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        turns = len(script) + 1
        for name in self.turn_columns:
            values: Any = row.get(name)  # a list, or an array or tensor where the dataset has such a format
            is_list = isinstance(values, list | tuple) or getattr(values, "ndim", 0) > 0
            if not is_list or len(values) != turns:
                raise ValueError(
                    f"{where} has {turns} turns and {name}={values!r}: give a list with one value for each turn"
                )
        if self.max_turns is None:
            return turns
        return self.max_turns if self.user is not None else min(turns, self.max_turns)


def _beginning(row: dict[str, Any]) -> str:
    said = next((message for message in row["prompt"] if message["role"] == "user"), row["prompt"][0])
    return repr(str(said["content"])[:40])
