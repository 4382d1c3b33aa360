"""Models with random weights that are made in a moment: for the check of a machine, for studies and for tests."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_tokenizer(tokens: Sequence[str], eos_token: str = "<eos>", **options: Any) -> PreTrainedTokenizerFast:
    """
    A tokenizer of single characters, and of the longer words that are named.

    Args:
        tokens (`Sequence[str]`):
            The vocabulary after `<pad>` and `<unk>`, `eos_token` included.
        eos_token (`str`, *optional*, defaults to `"<eos>"`):
            What ends a text or a turn.
        options:
            What else the tokenizer takes, such as `chat_template`.

    Example:

    ```python
    >>> tokenizer = tiny_tokenizer(["<eos>", "a", "b", "yes"])
    >>> tokenizer("abyes?")["input_ids"]
    [3, 4, 5, 1]

    ```
    """
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *tokens])}
    words = [re.escape(token) for token in vocabulary if len(token) > 1]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*words, r"[\s\S]"])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": eos_token}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special, **options)


def tiny_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, hidden_size: int = 64, **shape: Any
) -> LlamaForCausalLM:
    """
    A Llama of two layers with random weights, for a tokenizer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]):
            Tokenizer whose vocabulary it has.
        seed (`int`, *optional*, defaults to `0`):
            Of the weights. It sets torch's generator.
        hidden_size (`int`, *optional*, defaults to `64`):
            Width; that of the inner layers is twice as large.
        shape:
            Other options of [`~transformers.LlamaConfig`].
    """
    torch.manual_seed(seed)
    default = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": None}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**default, **shape},
    )
    return LlamaForCausalLM(config)
