"""Conversations for the tests of rollouts, and a trainer that remembers what it made of them."""

import torch
from datasets import Dataset
from kit import text_of

from trl_grpo_ext import AdaptiveGRPOTrainer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def first_turns(count: int = 12) -> Dataset:
    """One turn, about a letter of its own."""
    return Dataset.from_list([{"prompt": [user(f"say {chr(ord('a') + i)}")]} for i in range(count)])


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


def patient(history):
    """A user who goes on until a vowel is read, so that conversations have different numbers of turns."""
    return None if set("aeiou") & set(history[-1]["content"]) else user("more")


class Recorder(AdaptiveGRPOTrainer):
    """Remembers the sequences and the tensors of every generation."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.seen.append((getattr(self.rollout, "sequences", None), output))
        return output


class VLLM:
    """Stands in for vLLM: samples tokens at random, one completion per prompt, with the model's log-probabilities."""

    def __init__(self, trainer):
        self.trainer, self.asked, self.logprobs = trainer, [], {}
        self.generator = torch.Generator().manual_seed(0)

    def sync_weights(self):
        pass

    @torch.no_grad()
    def generate(self, prompts, images, num_generations, profiler):
        assert num_generations == 1
        self.asked += prompts
        ids = [torch.randint(20, 60, (5,), generator=self.generator).tolist() for _ in prompts]
        for prompt, own in zip(prompts, ids, strict=True):
            logits = self.trainer.model(input_ids=torch.tensor([prompt + own])).logits[0, len(prompt) - 1 : -1]
            logps = logits.log_softmax(-1).gather(1, torch.tensor(own)[:, None])
            self.logprobs[str((prompt, own))] = logps.flatten().tolist()
        given = [[[value] for value in self.logprobs[str(pair)]] for pair in zip(prompts, ids, strict=True)]
        return prompts, ids, given, None


def use_vllm(trainer, monkeypatch, engine=None):
    """Let a trainer that is complete sample from a stand-in for vLLM."""
    engine = engine or VLLM(trainer)
    options = {"use_vllm": True, "vllm_mode": "server", "_last_loaded_step": -1, "vllm_generation": engine}
    names = ("correction", "mode", "clip_min", "clip_max")
    options |= {name: getattr(trainer.args, name, None) for name in map("vllm_importance_sampling_{}".format, names)}
    for name, value in options.items():
        monkeypatch.setattr(trainer, name, value, raising=False)
    return engine


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
