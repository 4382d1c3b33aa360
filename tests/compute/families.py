"""Tiny random models of the causal language models of transformers, each built from its own configuration class."""

import inspect

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Those that can be built wherever they exist at all, so that a mistake here cannot skip all.
COMMON = {"bloom", "gemma", "gemma2", "gpt2", "gpt_neox", "llama", "mamba", "mistral", "opt", "phi3", "qwen2", "qwen3"}
# Every configuration takes those of these that it knows. Four layers, so that hybrids have one of each kind.
WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "dim_model", "lru_width")
WIDTHS += ("attention_hidden_size", "rnn_hidden_size")
DOUBLES = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "dim_ff", "ffn_hidden_size", "dense_act_ffn")
DOUBLES += ("decoder_ffn_dim", "encoder_ffn_dim")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_attention_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
HEAD_WIDTHS = ("dim_head", "d_kv", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
SIZES = {
    **dict.fromkeys(WIDTHS, 32),
    **dict.fromkeys(DOUBLES, 64),
    **dict.fromkeys(LAYERS, 4),
    **dict.fromkeys(HEADS, 4),
    **dict.fromkeys(HEAD_WIDTHS, 8),
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(LENGTHS, 128),
    "vocab_size": 120,
    "vocab_size_per_layer_input": 120,
    "hidden_size_per_layer_input": 8,
    "num_key_value_heads": 2,
    "num_attention_groups": 2,
    "rotary_dim": 4,
    "encoder_layers": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "num_experts_per_tok": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "index_n_heads": 2,
    "index_topk": 16,
    "state_size": 4,
    "mamba_d_state": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "attention_window_size": 16,
    "prompt_length": 0,
    "prompt_types": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
}
MOST_WEIGHTS = 5_000_000


def make_family(name: str):
    """
    A model of the family `name`, or the reason why there is none.

    Weights are five times as large as at a usual start: attention is not almost uniform then, and what is wrong shows.
    """
    try:
        config = _config(name)
        with torch.device("meta"):
            num_weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if num_weights > MOST_WEIGHTS:
            return f"{num_weights} weights, whatever the sizes"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return model


def _config(name):
    config_class = CONFIG_MAPPING[name]
    known = set()
    for ancestor in config_class.__mro__:
        known |= set(getattr(ancestor, "__annotations__", {})) | set(inspect.signature(ancestor.__init__).parameters)
    sizes = {key: value for key, value in SIZES.items() if key in known}
    if "kv_lora_rank" in sizes:  # latent attention has keys and values for every head
        sizes["num_key_value_heads"] = 4
    return config_class(**sizes).get_text_config()
