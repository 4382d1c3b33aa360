"""A model small enough to train in a second, and the data that go with it."""

import os
import string

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for a second thread to help
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, settings
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_grpo_ext import AdaptiveGRPOConfig

# How fast an example runs says something about the machine only.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", " ", "user", "assistant", "system"]
    words += ["\n", *(c for c in string.printable.strip())]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    pattern = Regex(r"<\|im_start\|>|<\|im_end\|>|user|assistant|system|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny-model")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def dataset() -> Dataset:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return Dataset.from_dict(
        {
            "prompt": [f"say {a}" for a in letters],
            "answer": list(letters),
            "difficulty": [("easy", "medium", "hard")[i % 3] for i in range(26)],
            "score": [float(i) for i in range(26)],
        }
    )


@pytest.fixture
def conversational(dataset) -> Dataset:
    return dataset.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})


def text_of(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def count_vowels(completions, **kwargs) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in text_of(c))) for c in completions]


def has_answer(completions, answer, **kwargs) -> list[float]:
    return [float(a in text_of(c)) for c, a in zip(completions, answer, strict=True)]


def config_kwargs(output_dir, **overrides) -> dict:
    return {
        "output_dir": str(output_dir),
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 7,
        **overrides,
    }


@pytest.fixture
def config(tmp_path):
    def make(**overrides) -> AdaptiveGRPOConfig:
        return AdaptiveGRPOConfig(**config_kwargs(tmp_path / "run", **overrides))

    return make
