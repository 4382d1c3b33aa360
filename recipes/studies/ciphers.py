"""A task in which the plan decides: which of four ciphers, then the cipher itself; and a tiny model that half can."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from skills import LETTERS, fit
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_grpo_ext.recipe.tiny import tiny_tokenizer

WORD = 3  # letters of a word
SHIFTS = {"1": 3, "2": 8, "3": 13, "4": 18}  # plan -> how far its cipher moves every letter
MARKS = "PQRS"
MAX_COMPLETION = WORD + 2  # longest answer, end of text, and one more: a cut-off answer is never right
ASK_PLAN, ASK_ANSWER = "{prompt}?", "!"
TEMPLATE = (
    "{% for m in messages %}{{ '<u>' if m['role'] == 'user' else '<a>' }}{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@dataclass(frozen=True)
class Task:
    """A prompt such as `Pabc`, the right plan (hidden: the mark decides it, one way per seed) and the right answer."""

    prompt: str
    plan: str
    answer: str


def shift(word: str, plan: str, rng: random.Random | None = None) -> str:
    """
    The word in the cipher of a plan. With a generator some letters come out one off: `a` is right 30 % of the time, `z`
    95 %.

    ```python
    >>> shift("abz", "1")
    'dec'

    ```
    """
    places = [LETTERS.index(letter) for letter in word]
    slips = [rng is not None and rng.random() > 0.3 + 0.65 * i / (len(LETTERS) - 1) for i in places]
    return "".join(LETTERS[(i + SHIFTS[plan] + slip) % len(LETTERS)] for i, slip in zip(places, slips, strict=True))


def make_tasks(count: int, seed: int, salt: int = 0, exclude: frozenset[str] = frozenset()) -> list[Task]:
    """Distinct tasks whose prompts are not in `exclude`; the seed alone says which plan is right for which mark."""
    rng = random.Random(1_000_000 * seed + salt)
    found: dict[str, Task] = {}
    plan_of = dict(zip(MARKS, random.Random(seed).sample(list(SHIFTS), len(SHIFTS)), strict=True))
    while len(found) < count:
        word = "".join(rng.choices(LETTERS, k=WORD))
        mark = rng.choice(MARKS)
        if mark + word not in exclude:
            found[mark + word] = Task(mark + word, plan_of[mark], shift(word, plan_of[mark]))
    return list(found.values())


def as_dataset(tasks: list[Task], turns: bool) -> Dataset:
    """With `turns`, the plan and the answer are two turns of a conversation; without, the tree asks for them."""
    rows = []
    for task in tasks:
        asked = ASK_PLAN.replace("{prompt}", task.prompt) if turns else task.prompt
        row = {"prompt": [{"role": "user", "content": asked}], "answer": task.answer}
        rows.append({**row, "turns": [ASK_ANSWER]} if turns else row)
    return Dataset.from_list(rows)


def is_right(
    completions: list[list[dict[str, str]]], answer: list[str], last_turn: list[bool], **kwargs: Any
) -> list[float]:
    """1 if the implementation is the answer and nothing else, 0 otherwise; a plan alone earns nothing."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(last and t == a) for t, a, last in zip(texts, answer, last_turn, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    tokens = ["<eos>", "<u>", "<a>", *"?!", *SHIFTS, *MARKS, *LETTERS]
    return tiny_tokenizer(tokens, chat_template=TEMPLATE, extra_special_tokens=["<u>", "<a>"])


def log_probs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, talks: list[tuple[str, str, str]]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities `(P,)` of the plan and of the answer after it, of triples of prompt, plan and answer."""
    parts = [
        [
            f"<u>{ASK_PLAN.replace('{prompt}', prompt)}<eos><a>",
            f"{plan}<eos>",
            f"<u>{ASK_ANSWER}<eos><a>",
            f"{answer}<eos>",
        ]
        for prompt, plan, answer in talks
    ]
    ids = [[tokenizer(part, add_special_tokens=False)["input_ids"] for part in talk] for talk in parts]
    ends = torch.tensor([[len(part) for part in talk] for talk in ids]).cumsum(1)  # (P, 4)
    tokens = torch.full((len(ids), int(ends.max())), tokenizer.pad_token_id)
    for row, talk in enumerate(ids):
        tokens[row, : int(ends[row, -1])] = torch.tensor(sum(talk, []))  # noqa: RUF017 (four short lists)
    # The padding is on the right, where causal attention cannot see it, so no mask is needed.
    each = model(input_ids=tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    place = torch.arange(1, tokens.size(1))
    spans = [(place >= ends[:, [i]]) & (place < ends[:, [i + 1]]) for i in (0, 2)]
    return (each * spans[0]).sum(1), (each * spans[1]).sum(1)


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: list[Task]
) -> tuple[float, float, float]:
    """
    Exact probability of a right answer, of the right plan, and of a right answer given the right plan, on average.

    The expectation over one sample at temperature 1 of plan and answer, without the noise of sampling.
    """
    right = torch.zeros(len(tasks))
    for plan in SHIFTS:
        planned, answered = log_probs(model, tokenizer, [(task.prompt, plan, task.answer) for task in tasks])
        right += (planned + answered).exp()
    planned, answered = log_probs(model, tokenizer, [(task.prompt, task.plan, task.answer) for task in tasks])
    return right.mean().item(), planned.exp().mean().item(), answered.exp().mean().item()


def warm_start(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, exclude: frozenset[str], seed: int, steps: int
) -> LlamaForCausalLM:
    """Supervised training on talks whose plan is right 40 % of the time and whose answers have slips."""
    rng = random.Random(seed)

    def loss(step: int) -> Tensor:
        talks = []
        for task in make_tasks(256, seed, step + 2, exclude):
            plan = task.plan if rng.random() < 0.2 else rng.choice(list(SHIFTS))
            talks.append((task.prompt, plan, shift(task.prompt[1:], plan, rng)))
        planned, answered = log_probs(model, tokenizer, talks)
        return -(planned + answered).mean()

    return fit(model, loss, steps)
