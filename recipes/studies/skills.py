"""Three string skills, and a tiny model with a warm start that leaves one of them half learnt."""

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_grpo_ext.recipe.tiny import tiny_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORD = 4  # letters of the word in a prompt
HOPELESS = 6  # letters of a hopeless answer: one chance in 300 million
MAX_COMPLETION = HOPELESS + 2  # longest answer, end of text, and one more: a cut-off completion is never right


@dataclass(frozen=True)
class Example:
    """A prompt such as `T abcd=`, its only right answer, and the skill it asks for."""

    prompt: str
    answer: str
    skill: str


def make_example(
    skill: str, rng: random.Random, noisy: bool = False, rates: tuple[float, float] = (0.3, 0.95)
) -> Example:
    """
    One example of a skill.

    `greet`: always `hi`. `translate`: a cipher that moves every letter halfway around the alphabet. `hopeless`: a
    random word that the prompt says nothing of. In a `noisy` translation some letters come out one off, each letter at
    its own rate: `a` and `z` are right at the two `rates`, 30 % and 95 % of the time, and the others in between.

    ```python
    >>> make_example("translate", random.Random(0))
    Example(prompt='T mynb=', answer='zlao', skill='translate')

    ```
    """
    word = [rng.randrange(len(LETTERS)) for _ in range(WORD)]
    if skill == "greet":
        answer = [LETTERS.index(letter) for letter in "hi"]
    elif skill == "translate":
        slips = [noisy and rng.random() > rates[0] + (rates[1] - rates[0]) * i / (len(LETTERS) - 1) for i in word]
        answer = [(i + len(LETTERS) // 2 + slip) % len(LETTERS) for i, slip in zip(word, slips, strict=True)]
    else:
        answer = [rng.randrange(len(LETTERS)) for _ in range(HOPELESS)]
    text, answer_text = ("".join(LETTERS[i] for i in part) for part in (word, answer))
    return Example(f"{skill[0].upper()} {text}=", answer_text, skill)


def make_examples(
    counts: dict[str, int], seed: int, exclude: frozenset[str] = frozenset(), noisy: bool = False
) -> list[Example]:
    """Distinct examples, `counts[skill]` of each skill, shuffled, none of whose prompts is in `exclude`."""
    rng = random.Random(seed)
    found: dict[str, Example] = {}
    for skill, count in counts.items():
        collect(found, count, functools.partial(make_example, skill, rng, noisy), exclude)
    return rng.sample(list(found.values()), len(found))


def collect(
    found: dict[str, Example], count: int, make: Callable[[], Example], exclude: frozenset[str] = frozenset()
) -> None:
    """Add `count` examples, by their prompts, that are neither in `found` nor in `exclude`."""
    wanted = len(found) + count
    while len(found) < wanted:
        example = make()
        if example.prompt not in exclude:
            found.setdefault(example.prompt, example)


def as_dataset(examples: list[Example]) -> Dataset:
    return Dataset.from_list([{"prompt": e.prompt, "answer": e.answer, "skill": e.skill} for e in examples])


def is_right(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """1 if the completion is the answer and nothing else, 0 otherwise."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def make_tokenizer(more: str = "") -> PreTrainedTokenizerFast:
    """One token per character, those in `more` included."""
    return tiny_tokenizer(["<eos>", " ", "=", *"GTH", *LETTERS, *more])


def answer_log_probs(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> Tensor:
    """Log-probability `(P,)` that a sample at temperature 1 is the answer followed by the end of the text."""
    prompts = tokenizer([e.prompt for e in examples])["input_ids"]
    answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([e.answer for e in examples])["input_ids"]]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(examples), length), tokenizer.pad_token_id)  # (P, T)
    is_answer = torch.zeros(len(examples), length, dtype=torch.bool)  # (P, T)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(p) + len(a)] = torch.tensor(p + a)
        is_answer[row, len(p) : len(p) + len(a)] = True
    # The padding is on the right, where causal attention cannot see it, so no mask is needed.
    log_probs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)  # (P, T - 1, V)
    of_tokens: Tensor = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (of_tokens * is_answer[:, 1:]).sum(1)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example]) -> float:
    """
    Expected accuracy of one sample at temperature 1, averaged over the examples.

    This is the exact expectation of what `model.generate(do_sample=True)` would measure, without its noise, and it
    draws no random numbers, so that looking does not change the training run.
    """
    return answer_log_probs(model, tokenizer, examples).exp().mean().item()


def warm_start(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    exclude: frozenset[str] = frozenset(),
    seed: int = 0,
    steps: int = 350,
) -> LlamaForCausalLM:
    """Supervised training on demonstrations of all skills, noisy ones of `translate`, never a prompt in `exclude`."""
    model = copy.deepcopy(model).train()

    def loss(step: int) -> Tensor:
        counts = {"greet": 64, "hopeless": 8, "translate": 80}
        batch = make_examples(counts, seed * 10_000 + step, exclude, noisy=True)
        return -answer_log_probs(model, tokenizer, batch).mean()

    return fit(model, loss, steps)


def fit(model: LlamaForCausalLM, loss: Callable[[int], Tensor], steps: int) -> LlamaForCausalLM:
    """Train a model on the loss of each step, with a learning rate that rises for 20 steps and falls to 0."""
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, step / 20) * (1 - step / steps)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model
