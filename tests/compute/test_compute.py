"""The savings change no gradient: every loss type, peft, beta; random groups and lengths; two processes; generation."""

import copy
from functools import partial

import pytest
import torch
from gradients import both_of, distance, gradient, relative, rollouts, sizes_of_calls, whole_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import Watched, make_letters
from peft import LoraConfig
from rollout_helpers import first_turns, length_of_text, make_conversations
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from trl_grpo_ext import AdaptiveGRPOTrainer
from trl_grpo_ext.compute import forward
from trl_grpo_ext.compute.forward import logps_and_entropies, why_not_shared
from trl_grpo_ext.host.seams import HAS_FUSED_HEAD

LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
BOTH = {"share_prompts": True, "skip_zero_advantage": True}


@pytest.fixture(scope="module")
def pair(model_path, tmp_path_factory):
    """A stock trainer and ours with the same weights; tests set loss type and options on both."""
    return list(both_of(model_path, make_letters(), tmp_path_factory.mktemp("pair"), **BOTH))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "peft"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_same_gradient_for_every_loss(loss_type, beta, lora, both):
    options = {"loss_type": loss_type, "beta": beta, "share_prompts": True, "skip_zero_advantage": beta == 0.0}
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    if lora:
        options["peft_config"] = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    stock, ours = both(**options)
    for seed in range(3):
        inputs = rollouts(seed, [3, 4, 2, 3], old=seed > 0, ref=beta > 0)
        stock_loss, expected = gradient(stock, inputs)
        metrics = copy.deepcopy(dict(stock._metrics["train"]))
        loss, found = gradient(ours, inputs)
        assert expected.norm() > 0
        assert relative(found, expected) < 1e-5
        assert loss == pytest.approx(stock_loss, abs=1e-5)
        for name, value in metrics.items():
            if beta > 0.0 or name not in ("entropy", "vespo/phi_seq_mean"):  # these are of the rows that are computed
                assert ours._metrics["train"][name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("requires_grad", [False, True])
def test_log_probabilities_and_entropies_are_those_of_the_softmax(requires_grad):
    logits, labels = torch.randn(2, 130, 7, requires_grad=True), torch.randint(7, (2, 130))
    logps, entropies = logps_and_entropies(logits, labels, 0.7, requires_grad)
    expected = (logits / 0.7).log_softmax(-1)
    assert torch.allclose(logps, expected.gather(2, labels[..., None])[..., 0], atol=1e-5)
    assert torch.allclose(entropies, -(expected.exp() * expected).sum(-1), atol=1e-5)
    assert logps.requires_grad
    assert entropies.requires_grad == requires_grad


@pytest.mark.parametrize("kept", [0, 2**28], ids=["fused head", "own head"])
def test_same_gradient_and_entropy_with_either_head(kept, both, monkeypatch):
    monkeypatch.setattr(forward, "KEPT_LOGITS", kept)
    stock, ours = both(share_prompts=True, temperature=0.7)
    inputs = rollouts(5, [4, 4, 4], old=True)
    calls = []
    monkeypatch.setattr(forward, "logps_and_entropies", lambda *a, **k: calls.append(1) or logps_and_entropies(*a, **k))
    assert distance(ours, stock, inputs) < 1e-5
    assert bool(calls) == bool(kept) or not HAS_FUSED_HEAD
    assert ours._metrics["train"]["entropy"] == pytest.approx(stock._metrics["train"]["entropy"], abs=1e-5)


@pytest.mark.parametrize("options", [{"entropy_coef": 0.01}, {"use_adaptive_entropy": True}], ids=str)
def test_an_entropy_bonus_has_its_gradient(options, both):
    stock, ours = both(share_prompts=True, **options)
    assert distance(ours, stock, rollouts(6, [4, 4, 4])) < 1e-5


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    longest_prompt=st.integers(1, 40),
    longest_completion=st.integers(1, 20),
    dead=st.sampled_from([0.0, 0.5, 1.0]),
    loss_type=st.sampled_from(LOSS_TYPES),
    share=st.booleans(),
)
def test_same_gradient_for_any_rollouts(pair, seed, sizes, longest_prompt, longest_completion, dead, loss_type, share):
    stock, ours = pair
    stock.loss_type = ours.loss_type = loss_type
    ours.args.share_prompts = share
    inputs = rollouts(seed, sizes, longest_prompt, longest_completion, dead, old=seed % 2 == 0)
    _, expected = gradient(stock, inputs)
    _, found = gradient(ours, inputs)
    ours.args.share_prompts = True
    assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-8


def test_a_skipped_row_whose_ratio_would_explode(pair):
    """Far off the old policy, its ratio is infinite, and 0 times that would be NaN."""
    _, ours = pair
    ours.loss_type = "dapo"
    inputs = rollouts(0, [3, 3, 3])
    inputs["old_per_token_logps"] = (
        torch.where(inputs["advantages"][:, None] == 0, -500.0, -4.6) * inputs["completion_mask"]
    )
    assert (inputs["advantages"] == 0).any()
    loss, found = gradient(ours, inputs)
    assert torch.isfinite(found).all()
    assert found.norm() > 0
    assert loss == loss


# What can be shared, and what is said where it cannot


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", ["plain", "checkpointing", "autocast", "old_and_reference"])
def test_shared_log_probabilities(attention, variant, model_path, both):
    options = {"gradient_checkpointing": True} if variant == "checkpointing" else {}
    options |= {"bf16": True} if variant == "autocast" else {}
    load = partial(LlamaForCausalLM.from_pretrained, model_path, attn_implementation=attention)
    stock, ours = both(load, share_prompts=True, **options)
    inputs = rollouts(0, [5, 1, 6], dead=0.0)
    ids, mask = whole_rows(inputs)
    ours._get_per_token_logps_and_entropies(ours.model, ids, mask, 7)  # with the trials
    sizes = sizes_of_calls(ours.model.model)
    chunk = 5 if variant == "old_and_reference" else None
    expected, found = (
        one._get_per_token_logps_and_entropies(one.model.train(), ids, mask, 7, batch_size=chunk, compute_entropy=True)
        for one in (stock, ours)
    )
    tolerance = 0.1 if variant == "autocast" else 1e-5
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert one.shape == other.shape
        assert ((one - other) * inputs["completion_mask"]).abs().max() < tolerance  # TRL 1.13 computes padding too
    assert len(sizes) == (3 if chunk else 1)
    assert sum(sizes) < 0.8 * ids.numel()
    if variant != "autocast":
        weight = torch.randn(expected[0].shape)
        (found[0] * weight * inputs["completion_mask"]).sum().backward()
        (expected[0] * weight * inputs["completion_mask"]).sum().backward()
        for one, other in zip(ours.model.parameters(), stock.model.parameters(), strict=True):
            assert relative(one.grad, other.grad) < 1e-4


def test_flex_attention_masks_agree(model_path):
    """Forward only: FlexAttention has no backward on a CPU."""
    from accelerate import Accelerator
    from trl.trainer import utils

    from trl_grpo_ext.compute.forward import costs_of, shared_logps

    model = LlamaForCausalLM.from_pretrained(model_path, attn_implementation="flex_attention").requires_grad_(False)
    plain = LlamaForCausalLM.from_pretrained(model_path)
    if HAS_FUSED_HEAD:
        utils.add_fused_lm_head(model)
    ids, mask = whole_rows(rollouts(0, [5, 1, 6]))
    logits = plain(input_ids=ids, attention_mask=mask).logits[:, 8:-1]
    expected = logits.log_softmax(-1).gather(2, ids[:, 9:, None])[..., 0] * mask[:, 9:]
    with torch.no_grad():
        found = shared_logps(model, model, Accelerator(cpu=True), ids, mask, 7, costs_of(model))
    assert found is not None
    assert (found[0] - expected).abs().max() < 1e-4


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=120)), "takes no position_ids"),
        (MistralForCausalLM(MistralConfig(sliding_window=8, num_key_value_heads=2, **TINY)), "sliding window"),
    ],
    ids=["no positions", "sliding window"],
)
def test_falls_back_with_the_reason(model, reason, both, caplog):
    model.config.eos_token_id, model.config.pad_token_id = 3, 0
    stock, ours = both(lambda: copy.deepcopy(model), **BOTH)
    for _ in range(2):
        assert distance(ours, stock, rollouts(1, [4, 4, 2])) < 1e-5
    said = [record.message for record in caplog.records if "share_prompts" in record.message]
    assert len(said) == 1
    assert reason in said[0]


def test_a_model_that_ignores_the_mask_is_found_out(model_path, make_trainer, caplog):
    """Its configuration promises what its attention does not keep."""
    model = LlamaForCausalLM.from_pretrained(model_path)
    forward = model.model.forward

    def without_mask(*args, **kwargs):
        if kwargs["attention_mask"].dim() == 4:
            kwargs["attention_mask"] = None
        return forward(*args, **kwargs)

    model.model.forward = without_mask
    assert why_not_shared(model) is None
    ours = make_trainer(model=model, share_prompts=True)
    ours.current_gradient_accumulation_steps = 1
    gradient(ours, rollouts(1, [4, 4, 2]))
    assert "in a trial, log-probabilities were off by" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, r"beta=0\.1 the KL term .* set skip_zero_advantage=False or beta=0\.0"),
        ({"entropy_coef": 0.01}, r"entropy_coef=0\.01 the entropy bonus"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True the entropy bonus"),
        ({"top_entropy_quantile": 0.2}, r"top_entropy_quantile=0\.2 rows without advantage count"),
    ],
)
def test_what_would_change_the_gradient_is_refused(options, message, config):
    with pytest.raises(ValueError, match=message):
        config(skip_zero_advantage=True, **options)
    config(share_prompts=True, **options)


def test_experts_with_a_load_balancing_loss_are_refused(both):
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"num_local_experts": 2, "router_aux_loss_coef": 0.01}
    config = MixtralConfig(num_key_value_heads=2, pad_token_id=0, **experts, **TINY)
    with pytest.raises(ValueError, match="load-balancing loss"):
        list(both(lambda: MixtralForCausalLM(config), skip_zero_advantage=True))
    stock, ours = both(lambda: MixtralForCausalLM(config), share_prompts=True)
    assert distance(ours, stock, rollouts(1, [4, 4])) < 1e-6


# A whole run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "loss_type": "grpo"},
        {"num_iterations": 2, "max_steps": 4, "loss_type": "dapo"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "mask_truncated_completions": True},
    ],
    ids=["plain", "accumulation", "old_log_probabilities", "truncated"],
)
def test_a_run_ends_where_stock_ends(options, both):
    """The same rollouts (greedy prefill differs by rounding only) and gradients give the same weights."""
    runs = []
    for trainer in both(learning_rate=1e-3, scale_rewards="none", **BOTH, **options):
        start = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        trainer.train()
        end = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        runs.append((end - start, [e["reward"] for e in trainer.state.log_history if "reward" in e]))
    (stock, stock_rewards), (ours, our_rewards) = runs
    assert our_rewards == pytest.approx(stock_rewards, abs=1e-6)
    assert relative(ours, stock) < 1e-2  # Adam divides by the size of gradients, which enlarges rounding


def test_whole_groups_stay_together(trained):
    """TRL shuffles rows; here groups are shuffled, and equal prompts meet in a micro-batch."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    seen = []

    class Spy(AdaptiveGRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append(len(torch.unique(inputs["prompt_ids"], dim=0)))
            return super()._compute_loss(model, inputs)

    trained(cls=Spy, share_prompts=True, **options)
    assert seen == [1, 1, 1, 1]
    seen.clear()
    trained(cls=Spy, **options)
    assert sum(seen) > 4


ROLLOUTS = {
    "shared": {"rollout": "multi_turn", "history": "shared", "turn_columns": ["letter"]},
    "independent": {"rollout": "multi_turn", "history": "independent", "turn_columns": ["letter"]},
    "hierarchical": {"rollout": "hierarchical", "num_plans": 3, "num_implementations": 3, "num_generations": 3},
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_rollouts_of_several_turns(name, trained):
    """Advantages and masks per token; a history or a plan is computed once for the answers to it."""
    is_tree = name == "hierarchical"
    data = {"dataset": first_turns() if is_tree else make_conversations(), "reward_funcs": length_of_text}
    batch = {"per_device_train_batch_size": 24 if is_tree else 16, "max_steps": 1, "mask_truncated_completions": False}
    trainer = trained(cls=Watched, **data, **batch, **ROLLOUTS[name])
    (inputs,) = trainer.outputs
    inputs = {key: value for key, value in inputs.items() if value is not None}
    trainer.current_gradient_accumulation_steps = 1
    inputs["advantages"] = inputs["advantages"].clone()
    inputs["advantages"][:3] = 0.0
    _, expected = gradient(trainer, inputs)
    trainer.args.share_prompts = trainer.args.skip_zero_advantage = True
    gradient(trainer, inputs)  # with the trial
    sizes = sizes_of_calls(trainer.model.model)
    _, found = gradient(trainer, inputs)
    assert relative(found, expected) < 1e-4
    tokens = int(inputs["prompt_mask"][3:].sum() + inputs["completion_mask"][3:].sum())
    assert len(sizes) == 1
    assert sizes[0] < 0.95 * tokens
