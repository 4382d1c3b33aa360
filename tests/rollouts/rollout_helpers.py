"""Conversations for the tests of rollouts, and a trainer that remembers what it made of them."""

import torch
from datasets import Dataset
from kit import config_kwargs, text_of

from trl_grpo_ext import AdaptiveGRPOConfig, AdaptiveGRPOTrainer, GRPOCallback


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def make_conversations(count: int = 12) -> Dataset:
    """One to three turns, each about a letter of its own."""
    letters = [[chr(ord("a") + (3 * i + t) % 26) for t in range(1 + i % 3)] for i in range(count)]
    rows = [
        {"prompt": [user(f"say {own[0]}")], "turns": [f"and {a}?" for a in own[1:]], "letter": own} for own in letters
    ]
    return Dataset.from_list(rows)


def has_letter(completions, letter, **kwargs) -> list[float]:
    return [float(a in text_of(c)) for c, a in zip(completions, letter, strict=True)]


def length_of_text(completions, **kwargs) -> list[float]:
    """Differs between almost all answers."""
    return [sum(ord(character) for character in text_of(c)) / 100 for c in completions]


class Record(GRPOCallback):
    """Every finished batch."""

    def __init__(self):
        self.batches = []

    def on_rollouts(self, batch, **kwargs):
        self.batches.append(batch)


class Recorder(AdaptiveGRPOTrainer):
    """Remembers the sequences and the tensors of every generation."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.seen.append((getattr(self.rollout, "sequences", None), output))
        return output


def make_trainer(
    model, out, reward_funcs=length_of_text, dataset=None, callbacks=(), processing_class=None, **options
) -> Recorder:
    dataset = make_conversations() if dataset is None else dataset
    return Recorder(
        model=model,
        processing_class=processing_class,
        reward_funcs=reward_funcs,
        args=AdaptiveGRPOConfig(**config_kwargs(out, **{"per_device_train_batch_size": 16, **options})),
        train_dataset=dataset,
        eval_dataset=dataset.select(range(4)) if options.get("eval_strategy", "no") != "no" else None,
        callbacks=list(callbacks),
    )


def use_vllm(trainer, monkeypatch, engine) -> None:
    """Let a trainer that is complete sample from a stand-in for vLLM."""
    options = {"use_vllm": True, "vllm_mode": "server", "_last_loaded_step": -1, "vllm_generation": engine}
    names = ("correction", "mode", "clip_min", "clip_max")
    options |= {name: getattr(trainer.args, name, None) for name in map("vllm_importance_sampling_{}".format, names)}
    for name, value in options.items():
        monkeypatch.setattr(trainer, name, value, raising=False)


class TrueVLLM:
    """Samples tokens at random, and tells the log-probabilities that a model gives them: the policy, or another one."""

    def __init__(self, trainer, model=None, shift=0.0):
        self.trainer, self.model, self.shift = trainer, model, shift
        self.generator = torch.Generator().manual_seed(0)

    def sync_weights(self):
        pass

    def generate(self, prompts, images, num_generations, profiler):
        ids = [torch.randint(20, 60, (5,), generator=self.generator).tolist() for _ in prompts]
        return prompts, ids, [self.logprobs(*pair) for pair in zip(prompts, ids, strict=True)], None

    @torch.no_grad()
    def logprobs(self, prompt, ids):
        model = self.model or self.trainer.model
        logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        return (logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]) + self.shift).tolist()
