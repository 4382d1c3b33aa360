"""What the tests share: a tiny model and its tokenizer, rewards, options, and the path of the scripts they start."""

import os
import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
# For scripts in processes of their own: what pytest puts on the path itself.
PYTHONPATH = os.pathsep.join(
    str(ROOT / folder) for folder in (".", "tests", "tests/rollouts", "tests/observe", "recipes/studies")
)

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
