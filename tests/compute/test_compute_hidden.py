"""Features of prompts: the state that the head reads, whatever the padding, the adapter, the mode and the precision."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from trl_grpo_ext.compute.hidden import narrowed, prompt_features


@pytest.fixture(scope="module")
def model(model_path):
    return LlamaForCausalLM.from_pretrained(model_path)


def padded(prompts, left, right=0):
    """Prompts of any lengths as a rectangle, with so many columns of padding on each side at least."""
    longest = max(map(len, prompts))
    ids = [[0] * (left + longest - len(p)) + p + [0] * right for p in prompts]
    mask = [[0] * (left + longest - len(p)) + [1] * len(p) + [0] * right for p in prompts]
    return torch.tensor(ids), torch.tensor(mask)


SIZES = {"n_layer": 2, "n_head": 2, "vocab_size": 120}
OTHERS = [
    GPT2LMHeadModel(GPT2Config(n_embd=32, **SIZES)),  # absolute positions, and dropout
    BloomForCausalLM(BloomConfig(hidden_size=32, **SIZES)),  # takes no positions
]


def test_the_head_makes_the_logits_of_them(model):
    prompts = [[8, 9, 10], [11], [30, 31, 32, 33, 34]]
    logits = model.lm_head(prompt_features(model, *padded(prompts, 2)))
    for prompt, row in zip(prompts, logits, strict=True):
        expected = model(torch.tensor([prompt])).logits[0, -1]
        assert torch.allclose(row, expected, atol=1e-5)


@given(
    prompts=st.lists(st.lists(st.integers(8, 100), min_size=1, max_size=6), min_size=1, max_size=5),
    left=st.integers(0, 4),
    right=st.integers(0, 4),
)
def test_padding_and_neighbours_change_nothing(model, prompts, left, right):
    found = prompt_features(model, *padded(prompts, left, right))
    assert found.shape == (len(prompts), 32)
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float32, "cpu", False)
    for prompt, row in zip(prompts, found, strict=True):
        alone = prompt_features(model, torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.long))
        assert torch.allclose(row, alone[0], atol=1e-5)


@pytest.mark.parametrize("model", OTHERS, ids=lambda model: type(model).__name__)
def test_positions_and_dropout_of_other_models(model):
    prompts = [[8, 9, 10], [30, 31, 32, 33, 34]]
    model.train()
    model.get_input_embeddings().eval()  # as a part that somebody froze
    modes = [module.training for module in model.modules()]
    found = prompt_features(model, *padded(prompts, 3))
    assert [module.training for module in model.modules()] == modes
    model.eval()
    for prompt, row in zip(prompts, found, strict=True):
        expected = model.base_model(torch.tensor([prompt]))[0][0, -1]
        assert torch.allclose(row, expected, atol=1e-5)


def test_an_adapter_takes_part(model):
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, init_lora_weights=False, lora_dropout=0.5))
    adapted.train()
    inputs = padded([[8, 9, 10], [30, 31]], 1)
    found = prompt_features(adapted, *inputs)
    assert torch.equal(found, prompt_features(adapted, *inputs))  # without dropout
    assert (found - prompt_features(model, *inputs)).abs().max() > 1e-2
    with adapted.disable_adapter():
        assert torch.allclose(prompt_features(adapted, *inputs), prompt_features(model, *inputs), atol=1e-6)


def test_tokens_of_peft_before_the_prompt(model):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    adapted = get_peft_model(copy.deepcopy(model), config).eval()
    ids = torch.tensor([[8, 9, 10]])
    found = model.lm_head(prompt_features(adapted, ids, torch.ones_like(ids)))
    assert torch.allclose(found, adapted(ids).logits[:, -1], atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_mixed_precision_gives_float32(lora, model):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    inner = copy.deepcopy(model)
    prepared = accelerator.prepare(get_peft_model(inner, LoraConfig(r=4)) if lora else inner)
    inputs = padded([[8, 9, 10], [30, 31]], 1)
    with accelerator.autocast():
        found = prompt_features(prepared, *inputs)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert found.dtype == torch.float32
    expected = prompt_features(model, *inputs)
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_projection_is_fixed_and_keeps_lengths(model):
    inputs = padded([[8, 9, 10], [30, 31]], 1)
    whole, narrow = prompt_features(model, *inputs), prompt_features(model, *inputs, width=8)
    assert narrow.shape == (2, 8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(narrow, narrowed(whole, 8))
    assert torch.equal(torch.get_rng_state(), state)  # the run draws the numbers that it would have drawn
    points = torch.randn(40, 2000)
    kept = narrowed(points, 256).norm(dim=1) / points.norm(dim=1)
    assert (kept - 1).abs().max() < 0.25  # standard deviation 1 / sqrt(512)
