"""What a chat template writes between two answers, read off several renderings of dummy conversations."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

Message = dict[str, Any]

USER = {"role": "user", "content": "dummy"}
CONTENTS = ("dummy", "another")  # of the same answer: what the template writes behind both is no part of the answer


class TurnTemplate:
    """
    A chat template as far as conversations need it: the tokens between an answer and the next one.

    Nothing is assumed about what ends a turn. It may be a token of its own, the token that opens the next turn, several
    tokens, text, or nothing; and a template may write more behind a conversation that is finished.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]):
            Has the template, unless `chat_template` is given.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the text.
        eos_token_ids (`list[int]`):
            Tokens of which each ends an answer.
        chat_template (`str`, *optional*):
            Template to use in place of that of `processing_class`.
        variables (`dict[str, Any]`, *optional*):
            Further variables of the template.

    Raises:
        `ValueError`: for a template that cannot be carried on by tokens.
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: list[int],
        chat_template: str | None = None,
        variables: dict[str, Any] | None = None,
    ) -> None:
        self.processing_class = processing_class
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.chat_template = chat_template
        self.variables = variables or {}
        self.special_ids = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self.takes_parts = self._reads_parts()
        # Once, so that a template that cannot be carried on is refused before anything is trained.
        self.closing = self._check([USER])
        self._check([USER, {"role": "assistant", "content": "dummy"}, USER])

    def between(self, messages: list[Message], said: list[Message]) -> list[int]:
        """
        What the template writes between an answer to `messages` and the answer to what is `said` next.

        It begins with what ends the answer's turn, as if the answer had not ended it.
        """
        return self._behind_answer(_skeleton(messages), said)[1]

    def rest(self, ids: list[int], between: list[int]) -> list[int]:
        """
        What is left to write of `between` after an answer, which may have ended its turn by itself.

        Args:
            ids (`list[int]`):
                The answer as it was generated.
            between (`list[int]`):
                What [`between`][TurnTemplate.between] returned.
        """
        # The closing, white space and one token more, which may be the one that opens the next turn.
        opening = next(
            (i for i, token in enumerate(between) if i >= len(self.closing) and not self._is_blank([token])), 0
        )
        is_ended = ids[-1:] != [] and ids[-1] in self.eos_token_ids
        if is_ended and ids[-1] in between[: opening + 1]:
            return between[between.index(ids[-1]) + 1 :]
        # Cut off, or ended with a token that the template does not write there. Special tokens before it may be the
        # template's closing all the same.
        written = ids[:-1] if is_ended else ids
        for length in range(len(self.closing), 0, -1):
            if written[-length:] == between[:length] and self._closes(length):
                return between[length:]
        return between

    def _closes(self, length: int) -> bool:
        """Whether an answer that ends in the first tokens of the closing has written them as a closing."""
        first, others = self.closing[:length], self.closing[length:]
        is_whole = self._is_blank(others) and not self._is_blank(first)
        return is_whole or first[-1] in self.special_ids

    def _is_blank(self, ids: list[int]) -> bool:
        text: str = self.tokenizer.decode(ids)
        return not text.strip()

    # Renderings

    def _check(self, messages: list[Message]) -> list[int]:
        """What ends the turn of an answer to `messages`, after several renderings have been compared."""
        start, between = self._behind_answer(messages, [USER])
        answer = {"role": "assistant", "content": CONTENTS[0]}
        finished, going_on = self._render([*messages, answer]), self._render([*messages, answer, USER], True)
        asked = self._render([*messages, answer, USER])
        num_asked = _num_shared(asked, going_on)  # without what opens the next answer
        later = self._render([*messages, answer, USER, answer, USER], True)
        if finished[:start] != going_on[:start] or later[:num_asked] != going_on[:num_asked]:
            raise ValueError(
                "The chat template writes earlier turns differently once others follow, so a conversation cannot be "
                "carried on by tokens: pass a processing_class whose chat_template only appends"
            )
        behind = finished[start:]
        _, behind_user = self._behind_answer(messages[:-1], [], role="user")
        is_replaced = behind[:1] != between[:1] == behind_user[:1]
        if is_replaced and behind[:1] and behind[0] in self.eos_token_ids and between[0] in self.special_ids:
            first, then = (self.tokenizer.decode([ids[0]]) for ids in (behind, between))
            raise ValueError(
                f"The chat template ends the last answer with {first!r} and earlier ones with {then!r}, so a "
                "conversation cannot be carried on by tokens: pass a processing_class whose chat_template ends all "
                "answers alike"
            )
        return between[: _num_shared(behind, between)]

    def _behind_answer(
        self, messages: list[Message], said: list[Message], role: str = "assistant"
    ) -> tuple[int, list[int]]:
        """Where the first of the dummy answers to `messages` ends, and what follows both."""
        one, other = (
            self._render([*messages, {"role": role, "content": content}, *said], True) for content in CONTENTS
        )
        num_shared = _num_shared(one[::-1], other[::-1])
        return len(one) - num_shared, one[len(one) - num_shared :]

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        try:
            ids: list[int] = self.processing_class.apply_chat_template(
                [self._in_form(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                chat_template=self.chat_template,
                return_dict=False,
                **self.variables,
            )
        except Exception as error:  # a template may raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"The chat template raises {type(error).__name__} for a conversation of {roles}: {error}. Pass a "
                "processing_class whose chat_template takes it, or change the roles of the messages"
            ) from error
        return ids

    def _in_form(self, message: Message) -> Message:
        if self.takes_parts and isinstance(message.get("content"), str):
            return {**message, "content": [{"type": "text", "text": message["content"]}]}
        return message

    def _reads_parts(self) -> bool:
        """Whether the template writes contents that are lists of parts, and leaves out texts or raises."""
        failure: ValueError | None = None
        for takes_parts in (False, True):
            self.takes_parts = takes_parts
            try:
                one, other = (self._render([{"role": "user", "content": content}]) for content in CONTENTS)
            except ValueError as error:
                failure = failure or error
            else:
                if one != other:
                    return takes_parts
        raise failure or ValueError(
            "The chat template leaves out what the user says: pass a processing_class whose chat_template writes "
            'messages such as {"role": "user", "content": "..."}'
        )


def _skeleton(messages: list[Message]) -> list[Message]:
    """The same turns with short contents, since a template writes the same around them."""
    return [{**message, "content": "dummy"} for message in messages]


def _num_shared(one: list[int], other: list[int]) -> int:
    """With how many equal tokens both begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
