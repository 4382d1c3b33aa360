"""Sampling outside of a trainer: for the pairs of DPO, and for scores on held-out prompts."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trl_grpo_ext.rewards import Reward


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Any],
    max_new_tokens: int,
    do_sample: bool = True,
    batch_size: int = 64,
) -> list[list[int]]:
    """
    Token ids of one completion for each prompt, up to and with the end of the turn.

    Sampling is at temperature 1 from the whole vocabulary, as TRL's trainers do; without `do_sample` it is greedy.
    """
    was_training = model.training
    model.eval()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if do_sample:
        how = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    completions: list[list[int]] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        if isinstance(part[0], str):
            asked = tokenizer(part)["input_ids"]
        else:
            asked = tokenizer.apply_chat_template(part, add_generation_prompt=True, return_dict=True)["input_ids"]
        width = max(map(len, asked))
        # Padded on the left, whatever side the tokenizer prefers: generation goes on from the last position.
        padded = [[tokenizer.pad_token_id] * (width - len(ids)) + ids for ids in asked]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in asked]
        inputs = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        pad = {"pad_token_id": tokenizer.pad_token_id}
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, **pad, **how)
        for ids in output[:, width:].tolist():
            length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
            completions.append(ids[:length])
    model.train(was_training)
    return completions


@torch.no_grad()
def entropy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Any], ids: list[list[int]]
) -> float:
    """Mean entropy, in nats, of the distributions that the tokens of some completions were drawn from."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(prompts), 32):
        asked = tokenizer.apply_chat_template(prompts[start : start + 32], add_generation_prompt=True, return_dict=True)
        pairs = list(zip(asked["input_ids"], ids[start : start + 32], strict=True))
        width = max(len(prompt) + len(completion) for prompt, completion in pairs)
        rows = torch.tensor([[tokenizer.pad_token_id] * (width - len(p) - len(c)) + p + c for p, c in pairs])
        mask = torch.tensor([[0] * (width - len(p) - len(c)) + [1] * len(p + c) for p, c in pairs])
        longest = max(len(completion) for _, completion in pairs)
        logits = model(input_ids=rows, attention_mask=mask, logits_to_keep=longest + 1).logits[:, :-1].float()
        probabilities = logits.log_softmax(-1)
        each = -(probabilities.exp() * probabilities).sum(-1)
        kept = torch.tensor([[0.0] * (longest - len(c)) + [1.0] * len(c) for _, c in pairs])
        total, count = total + float((each * kept).sum()), count + int(kept.sum())
    model.train(was_training)
    return total / count


def ask(
    reward: Callable[..., list[float]], rows: Dataset, ids: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """Rewards of one completion for each row, called as TRL would."""
    prompts = list(rows["prompt"])
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    if not isinstance(prompts[0], str):
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {name: list(rows[name]) for name in rows.column_names if name != "prompt"}
    return reward(prompts=prompts, completions=texts, completion_ids=ids, **columns)


def mean_scores(
    reward: Reward, rows: Dataset, ids: list[list[int]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, float]:
    """Mean of each part of a reward, and of the total as `reward`."""
    scores = {part.__name__: ask(part, rows, ids, tokenizer) for part in reward.leaves()}
    scores["reward"] = ask(reward, rows, ids, tokenizer)
    return {name: sum(values) / len(values) for name, values in scores.items()}
