"""Conversations that go on by tokens: what the model wrote is never tokenised again."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from trl.chat_template_utils import get_training_chat_template

from ..hooks.ground import HookedTrainer
from ..hooks.records import Answer, RolloutSequence
from ..host.processes import gather_values
from .limits import longest_conversation
from .template import Message, TurnTemplate


class RolloutError(RuntimeError):
    """A simulated user failed, or the choice of an answer; the message names the row and the turn."""


@dataclass(frozen=True)
class Dialogue:
    """
    A conversation that waits for the model's answer.

    Args:
        row (`dict[str, Any]`):
            Dataset row.
        where (`str`):
            The row in words, for errors.
        messages (`list[dict]`):
            Everything before the answer.
        ids (`list[int]`):
            Tokens of the messages, up to where the answer begins.
        script (`list[list[dict]]`):
            What is said between the answers to come, one entry for each.
        turn (`int`, *optional*, defaults to `0`):
            Turn of the answer, from 0.
        glue_ids (`list[int]`, *optional*):
            The end of `ids` that follows the last answer.
    """

    row: dict[str, Any]
    where: str
    messages: list[Message]
    ids: list[int]
    script: list[list[Message]]
    turn: int = 0
    glue_ids: list[int] = field(default_factory=list)


def read_turns(row: dict[str, Any]) -> tuple[list[Message], list[list[Message]]]:
    """
    The user's side of a conversation in a dataset row.

    Either `prompt` holds the messages up to the first answer and `turns` what the user says after each answer (texts or
    messages), or `prompt` holds the whole conversation with assistant messages whose content is missing.

    Args:
        row (`dict[str, Any]`):
            Dataset row with `prompt` and, optionally, `turns`.

    Returns:
        `tuple[list[dict], list[list[dict]]]`:
            Messages before the first answer, and for each later answer the messages between the one before and it.

    Raises:
        `ValueError`: for a row that is no conversation.

    Example:

    ```python
    >>> hello, bye = {"role": "user", "content": "Hello"}, {"role": "user", "content": "Bye"}
    >>> read_turns({"prompt": [hello], "turns": ["Bye"]})
    ([{'role': 'user', 'content': 'Hello'}], [[{'role': 'user', 'content': 'Bye'}]])
    >>> read_turns({"prompt": [hello, {"role": "assistant", "content": None}, bye]})
    ([{'role': 'user', 'content': 'Hello'}], [[{'role': 'user', 'content': 'Bye'}]])

    ```
    """
    prompt, turns = row.get("prompt"), row.get("turns")
    turns = [] if turns is None else turns.tolist() if hasattr(turns, "tolist") else turns
    turns = list(turns) if isinstance(turns, tuple) else turns
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        raise ValueError(
            f"prompt={prompt!r:.500} is no list of messages: write "
            '[{"role": "user", "content": "..."}] and put what the user says later into `turns`'
        )
    if not isinstance(turns, list) or not all(isinstance(turn, str) or _is_message(turn, True) for turn in turns):
        raise ValueError(f"turns={turns!r:.500} is no list of what the user says: write texts or messages into it")
    parts: list[list[Message]] = [[]]
    for message in prompt:
        if message["role"] == "assistant" and not message.get("content"):
            parts.append([])
        else:
            parts[-1].append(message)
    for turn in turns:
        parts.append([{"role": "user", "content": turn}] if isinstance(turn, str) else [turn])
    if len(parts) > 1 and not parts[-1]:
        parts.pop()  # a last assistant message is where the last answer goes anyway
    if not all(part and part[-1]["role"] != "assistant" for part in parts):
        raise ValueError(f"prompt={prompt!r:.500} has a turn in which the user says nothing: fill it in or remove it")
    return parts[0], parts[1:]


def _is_message(value: Any, is_whole: bool = False) -> bool:
    """Whether `value` is a message. A message has a content, except where the assistant has not answered yet."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    is_open = value["role"] == "assistant" and not is_whole
    return isinstance(value.get("content"), str | list) or (is_open and not value.get("content"))


class Talk:
    """
    Generates answers and carries conversations on, with the trainer's generation backend.

    Args:
        trainer ([`HookedTrainer`]):
            Trainer.
        max_conversation_length (`int`, *optional*):
            Most tokens of a conversation, prompt and answers included. Defaults to what the model or vLLM can hold.
    """

    def __init__(self, trainer: HookedTrainer, max_conversation_length: int | None = None) -> None:
        self.trainer = trainer
        self.max_length = longest_conversation(trainer, max_conversation_length)
        if self.max_length is not None and self.max_length <= trainer.max_completion_length:
            raise ValueError(
                f"max_completion_length={trainer.max_completion_length} leaves no room for a prompt in a conversation "
                f"of {self.max_length} tokens (max_conversation_length, or what the model or vLLM can hold): lower it, "
                "or raise max_conversation_length"
            )
        self.template = self._read_template()

    def open(self, rows: list[dict[str, Any]], where: list[str]) -> list[Dialogue]:
        """The conversations of dataset rows, before the first answer."""
        turns = [read_turns(row) for row in rows]
        prompt_ids = self.trainer.tokenize([opening for opening, _ in turns]) if rows else []
        return [
            Dialogue(row, place, opening, ids, script)
            for row, place, (opening, script), ids in zip(rows, where, turns, prompt_ids, strict=True)
        ]

    def answer(self, dialogues: list[Dialogue]) -> list[Answer]:
        """
        One answer to each conversation. Every process must call this, with any number of conversations.

        Where a prompt leaves no room for an answer, an end of text that is not scored stands in its place.
        """
        answers = iter(self._generate([dialogue for dialogue in dialogues if self.has_room(dialogue)]))
        return [next(answers) if self.has_room(dialogue) else self.nothing(dialogue) for dialogue in dialogues]

    def nothing(self, dialogue: Dialogue) -> Answer:
        """An end of text in place of an answer for which there is no room, since each sequence needs a token."""
        return Answer(
            prompt=dialogue.messages,
            ids=[self.trainer.tokenizer.eos_token_id],
            text="",
            logprobs=[math.nan] if self.trainer.use_vllm else None,  # TRL's metrics leave NaN out
            glue_ids=dialogue.glue_ids,
            turn=dialogue.turn,
            is_scored=False,
        )

    def _generate(self, dialogues: list[Dialogue]) -> list[Answer]:
        # All processes must ask for as many answers: vLLM's server divides what it returns by their number, and a
        # sharded model hangs unless all generate. Processes with fewer conversations throw the others away.
        most = max(gather_values(len(dialogues)))
        if most == 0:
            return []
        filler = dialogues[0].ids if dialogues else [self.trainer.tokenizer.eos_token_id]
        contexts = [dialogue.ids for dialogue in dialogues] + [filler] * (most - len(dialogues))
        ids, logprobs = self.trainer.generate(contexts)
        texts = self.trainer.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            Answer(
                prompt=dialogue.messages,
                ids=ids[i],
                text=texts[i],
                logprobs=None if logprobs is None else logprobs[i],
                glue_ids=dialogue.glue_ids,
                turn=dialogue.turn,
            )
            for i, dialogue in enumerate(dialogues)
        ]

    def carry_on(
        self, dialogue: Dialogue, answer: Answer, said: list[Message], script: list[list[Message]]
    ) -> Dialogue:
        """The conversation after an answer and what the user said to it."""
        glue_ids = self.template.rest(answer.ids, self.template.between(dialogue.messages, said))
        return replace(
            dialogue,
            messages=dialogue.messages + answer.completion + said,
            ids=dialogue.ids + answer.ids + glue_ids,
            script=script,
            turn=dialogue.turn + 1,
            glue_ids=glue_ids,
        )

    def has_room(self, dialogue: Dialogue) -> bool:
        """Whether the longest answer would still fit."""
        return self.max_length is None or len(dialogue.ids) + self.trainer.max_completion_length <= self.max_length

    def _read_template(self) -> TurnTemplate:
        """The template of the run, or TRL's training version of it where only that one can be carried on."""
        trainer = self.trainer
        arguments = (trainer.processing_class, trainer.tokenizer, trainer.eos_token_ids)
        try:
            return TurnTemplate(*arguments, trainer.chat_template, trainer.chat_template_kwargs)
        except ValueError:
            training: str | None = None
            if trainer.chat_template is None:
                with suppress(ValueError):
                    training = get_training_chat_template(trainer.processing_class)
            if training is None:
                raise
        return TurnTemplate(*arguments, training, trainer.chat_template_kwargs)


def roll_out(
    talk: Talk,
    dialogues: list[Dialogue],
    next_turn: Callable[[Dialogue, Answer], Dialogue | None],
) -> list[RolloutSequence]:
    """
    One sequence for each conversation, with an answer for each turn until `next_turn` ends it.

    Args:
        talk ([`Talk`]):
            Generates.
        dialogues (`list[Dialogue]`):
            This process's conversations. Every process makes as many generation calls as the longest conversation of
            all processes has turns.
        next_turn (`Callable[[Dialogue, Answer], Dialogue | None]`):
            Carries a conversation on; `None` ends it.
    """
    sequences = [RolloutSequence(dialogue.ids, []) for dialogue in dialogues]
    waiting = dict(enumerate(dialogues))
    while max(gather_values(len(waiting))) > 0:
        answers = talk.answer(list(waiting.values()))
        still: dict[int, Dialogue] = {}
        for (number, dialogue), answer in zip(waiting.items(), answers, strict=True):
            sequences[number].answers.append(answer)
            following = next_turn(dialogue, answer)
            answer.is_last = following is None
            if following is not None:
                still[number] = following
        waiting = still
    return sequences
