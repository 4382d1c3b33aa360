"""TRL's trainer beside ours, rollouts by hand, and the gradients that both make of them."""

import torch
from kit import count_vowels, has_answer, trainer_of
from transformers import AutoTokenizer
from trl import GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOTrainer

SAVINGS = {"share_prompts", "skip_zero_advantage"}


def both_of(model_path, dataset, out, model=None, **given):
    """
    TRL's trainer, then ours with the same weights and random numbers. Savings are given to ours alone.

    `model` builds another model than the tiny one, for each of them.
    """
    for cls in (GRPOTrainer, AdaptiveGRPOTrainer):
        own = {name: value for name, value in given.items() if cls is AdaptiveGRPOTrainer or name not in SAVINGS}
        torch.manual_seed(3)
        own |= {"processing_class": AutoTokenizer.from_pretrained(model_path), "cls": cls}
        trainer = trainer_of(model() if model else model_path, dataset, out, [count_vowels, has_answer], **own)
        trainer.current_gradient_accumulation_steps = given.get("gradient_accumulation_steps", 1)
        yield trainer


def rollouts(seed, sizes, longest_prompt=9, longest_completion=7, dead=0.5, old=False, ref=False):
    """Padded rows in random order, groups of `sizes`, of which a share `dead` has no advantage."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low, high, shape):
        return torch.randint(low, high + 1, shape, generator=generator)

    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    rows = len(group)
    prompts = integers(8, 100, (len(sizes), longest_prompt))
    prompt_mask = (torch.arange(longest_prompt) >= longest_prompt - integers(1, longest_prompt, (len(sizes), 1))).long()
    lengths = integers(0, longest_completion, (rows, 1))
    lengths[0] = longest_completion
    mask = (torch.arange(longest_completion) < lengths).long()
    alive = torch.rand(len(sizes), generator=generator) >= dead
    advantages = torch.randn(rows, generator=generator) * alive[group]
    shuffle = torch.randperm(rows, generator=generator)
    inputs = {
        "prompt_ids": prompts[group] * prompt_mask[group],
        "prompt_mask": prompt_mask[group],
        "completion_ids": integers(8, 100, (rows, longest_completion)) * mask,
        "completion_mask": mask,
        "advantages": advantages,
    }
    for name, wanted in {"old_per_token_logps": old, "ref_per_token_logps": ref}.items():
        if wanted:
            inputs[name] = (-4.6 + 0.2 * torch.randn(rows, longest_completion, generator=generator)) * mask
    inputs = {key: value[shuffle] for key, value in inputs.items()}
    return inputs | {"num_items_in_batch": mask.sum().float()}


def whole_rows(inputs):
    """Prompts and completions in one: ids and mask."""
    return (torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], dim=1) for name in ("ids", "mask"))


def gradient(trainer, inputs):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def relative(ours, stock):
    return ((ours - stock).norm() / stock.norm().clamp(min=1e-12)).item()


def distance(ours, stock, inputs):
    """How far the gradients of the two trainers are from each other."""
    return relative(gradient(ours, inputs)[1], gradient(stock, inputs)[1])


def sizes_of_calls(module):
    """The ids of each call of a module from now on, as a list of their numbers of tokens."""
    sizes = []
    module.register_forward_pre_hook(lambda m, a, k: sizes.append(k["input_ids"].numel()), with_kwargs=True)
    return sizes
