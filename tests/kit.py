"""What the tests share: a tiny model and its tokenizer, rewards, options, and the path of the scripts they start."""

import os
import string
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_grpo_ext.recipe.tiny import tiny_model, tiny_tokenizer

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
    words = ["<|im_start|>", "<|im_end|>", " ", "user", "assistant", "system", "\n", *string.printable.strip()]
    return tiny_tokenizer(words, "<|im_end|>", chat_template=CHAT_TEMPLATE)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    return tiny_model(tokenizer, seed, hidden_size=32, num_key_value_heads=2, max_position_embeddings=4096)


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
