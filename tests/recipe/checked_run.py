"""A tiny run to check, with answers that end, and what two processes say about it."""

from typing import Any

import torch
from datasets import Dataset
from kit import make_letters, make_model, make_tokenizer, text_of, trainer_of

from trl_grpo_ext.recipe.run_check import RunCheck, check_run

VOWELS = "aeiou"


def ending_model(tokenizer: Any, strength: float = 0.5) -> Any:
    """The tiny model of the kit, whose answers end after a few tokens: one dimension says so."""
    model = make_model(tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = strength
    return model


def save_ending_model(path: Any, **options: Any) -> str:
    tokenizer = make_tokenizer()
    ending_model(tokenizer, **options).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def likes_vowels(completions: list[Any], **kwargs: Any) -> list[float]:
    """Share of vowels: graded, and nothing that nobody wants is paid more than the references of `vowels`."""
    texts = [text_of(completion) for completion in completions]
    return [sum(letter in VOWELS for letter in text) / max(1, len(text)) for text in texts]


def vowels() -> Dataset:
    """The letters, each with a reference of vowels that is its own."""
    letters = make_letters().remove_columns("answer")
    return letters.add_column("reference", [VOWELS[i % 5] * (1 + i // 5) for i in range(len(letters))])


def check_of(model: Any, out: Any, dataset: Any = None, reward: Any = likes_vowels, **given: Any) -> RunCheck:
    """The check of a tiny run; `num_prompts` and what else the check takes may be among the options."""
    of_check = {
        name: given.pop(name) for name in ("num_prompts", "num_answers", "output", "reference") if name in given
    }
    options = {"max_completion_length": 24, "report_to": "none", **given}
    trainer = trainer_of(model, vowels() if dataset is None else dataset, out, reward_funcs=reward, **options)
    return check_run(trainer, show=False, **{"num_prompts": 8, **of_check})


def two_ranks(model_path: str, out: str, **options: Any) -> Any:
    """What this process says."""
    result = check_of(model_path, out, per_device_train_batch_size=4, **options)
    measured = result.measured
    return {
        "findings": [(finding.level, finding.name, finding.what) for finding in result.findings],
        "answers": [(answer.group, answer.text, answer.total) for answer in measured.answers],
        "shares": measured.shares,
        "paid": [(paid.kind, paid.totals, paid.values) for paid in measured.paid],
        "reach": None if measured.update is None else measured.update.parameters,
        "plan": measured.plan,
        "page": result.page,
    }
