"""Savings are tried on the model at hand, in its precision and with its positions, and left where numbers differ."""

import math

import pytest
import torch
from accelerate import Accelerator, PartialState
from families import make_family
from gradients import distance, rollouts, whole_rows
from hypothesis import given
from hypothesis import strategies as st
from kit import count_vowels, have_same_weights, launch, make_letters, trainer_of
from peft import IA3Config, LoraConfig
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)
from trl.trainer import utils

from trl_grpo_ext import AdaptiveGRPOTrainer
from trl_grpo_ext.compute import forward, generation, trials
from trl_grpo_ext.compute.generation import two_prompts, why_not_as_plain
from trl_grpo_ext.compute.trials import in_evaluation, relative_error, why_not
from trl_grpo_ext.host.seams import CACHE, HAS_FUSED_HEAD

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 120}
TINY_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 120}
TINY_GPT |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


# The measure


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=8), st.floats(0.1, 10), st.floats(-3, 3))
def test_an_error_has_no_unit(values, scale, shift):
    expected = torch.tensor(values)
    if expected.std() < 1e-3:
        return
    found = expected + torch.linspace(-0.1, 0.1, len(values))
    error = relative_error(found, expected)
    assert relative_error(scale * found + shift, scale * expected + shift) == pytest.approx(error, rel=0.02)
    assert relative_error(expected, expected) == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_in_one_alone_is_an_error(value):
    good, bad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, value])
    assert "off by" in why_not(lambda: (bad, good, 0.1), "logits")
    assert "off by" in why_not(lambda: (good, bad, 0.1), "logits")
    both = torch.tensor([1.0, 2.0, -math.inf])
    assert why_not(lambda: (both, both.clone(), 0.1), "logits") is None


def test_one_process_speaks_for_all(monkeypatch):
    monkeypatch.setattr(trials, "gather_values", lambda reason: [reason, "what rank 1 found", "rank 2"])
    assert why_not(lambda: (torch.ones(2), torch.ones(2), 0.1), "logits") == "what rank 1 found"


def test_each_module_keeps_its_mode():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout())
    model[1].eval()

    def fail():
        with in_evaluation(model):
            assert not model[0].training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (model.training, model[0].training, model[1].training) == (True, True, False)


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(0, 3),
)
def test_prompts_of_the_trial_have_padding_and_two_tokens(lengths, more):
    width = max(lengths) + more
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    ids = torch.arange(1, width + 1).expand(len(lengths), -1) * mask
    ids, mask = two_prompts(ids, mask)
    assert ids.shape == mask.shape
    assert (mask.sum(1) > 1).all()
    assert mask[1, 0] == 0
    assert (mask[:, -1] == 1).all()
    assert (ids[mask == 1] > 0).all()


# Positions


def scaled_by_position():
    """Attention grows with the position, every four tokens."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 3.0}
    rope |= {"original_max_position_embeddings": 4}
    config = Ministral3Config(head_dim=8, num_key_value_heads=2, rope_parameters=rope, sliding_window=None, **TINY)
    return large(Ministral3ForCausalLM(config))


def with_learned_positions():
    return large(GPT2LMHeadModel(GPT2Config(**TINY_GPT)))


def with_dynamic_rope():
    """Its frequencies depend on the longest position of a batch."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    return large(LlamaForCausalLM(LlamaConfig(max_position_embeddings=8, rope_parameters=rope, **TINY)))


POSITIONS = [scaled_by_position, with_learned_positions]


def large(model):
    """Weights at which attention is far from uniform, so that a wrong position shows."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    model.config.eos_token_id, model.config.pad_token_id = 3, 0
    return model


def with_longer_prompts(inputs):
    """As where a longer prompt is in another micro-batch."""
    return inputs | {key: torch.nn.functional.pad(inputs[key], (5, 0)) for key in ("prompt_ids", "prompt_mask")}


@pytest.mark.parametrize("build", POSITIONS)
@pytest.mark.parametrize("share", [False, True])
def test_absolute_positions_stay(build, share, both, caplog):
    stock, ours = both(build, skip_zero_advantage=True, share_prompts=share)
    inputs = with_longer_prompts(rollouts(1, [4, 4, 2]))
    widths = []
    ours.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["attention_mask"].size(1)), with_kwargs=True
    )
    assert distance(ours, stock, inputs) < 1e-4
    assert "share_prompts" not in caplog.text
    if not share:
        assert widths[-1] < inputs["prompt_ids"].size(1) + inputs["completion_ids"].size(1) - 4


@pytest.mark.parametrize("share", [False, True])
def test_frequencies_that_depend_on_the_length(share, both, caplog):
    """Every column counts, also those of rows that are left out, and the last token of the longest row."""
    stock, ours = both(with_dynamic_rope, skip_zero_advantage=True, share_prompts=share)
    for seed in range(3):
        inputs = rollouts(seed, [4, 4, 2], longest_completion=12)
        inputs["advantages"][inputs["completion_mask"].sum(1) > 8] = 0.0
        assert distance(ours, stock, inputs) < 1e-5
    assert ("depend on the length of the sequence" in caplog.text) == share


@pytest.mark.parametrize("build", POSITIONS)
def test_other_positions_would_be_found_out(build, both, monkeypatch):
    """Without the positions of the padded batch, the trial says so and padding stays."""
    monkeypatch.setattr(forward, "takes_positions", lambda module: False)
    stock, ours = both(build, skip_zero_advantage=True)
    assert distance(ours, stock, with_longer_prompts(rollouts(1, [4, 4, 2]))) < 1e-5
    assert not next(iter(ours._savings.values())).trims_left


# Ties of entropies


@pytest.mark.parametrize("quantile", [0.3, 0.8])
def test_the_tokens_of_most_entropy_are_those_of_stock(quantile, model_path, make_trainer):
    """The first tokens of a group have one entropy: where the quantile falls on it, all are in or all are out."""
    model = large(LlamaForCausalLM.from_pretrained(model_path))
    ours = make_trainer(model=model, share_prompts=True, top_entropy_quantile=quantile)
    on_a_tie = 0
    for seed in range(12):
        inputs = rollouts(seed, [4, 4], longest_prompt=7, longest_completion=5)
        inputs["completion_ids"] = inputs["completion_ids"] % 3 + 8 * (inputs["completion_mask"] > 0)  # more ties
        ids, mask = whole_rows(inputs)
        masks = []
        for share in (False, True):
            ours.args.share_prompts = share
            with torch.no_grad():
                found = ours._get_per_token_logps_and_entropies(ours.model, ids, mask, 5, compute_entropy=True)[1]
            masks.append(ours.get_high_entropy_mask(found, inputs["completion_mask"], quantile))
        assert torch.equal(*masks)
        scored = found[inputs["completion_mask"].bool()]
        on_a_tie += int(((scored - torch.quantile(scored, quantile)).abs() < 1e-6).sum() > 1)
    assert on_a_tie > 0


# Entries of other features


class WithAnotherEntry(AdaptiveGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return output | {"weight": output["advantages"] * 2.0, "name": [str(a.item()) for a in output["advantages"]]}

    def _compute_loss(self, model, inputs):
        assert torch.equal(inputs["weight"], inputs["advantages"] * 2.0)
        assert inputs["name"] == [str(a.item()) for a in inputs["advantages"]]
        return super()._compute_loss(model, inputs)


def test_entries_of_a_subclass_cost_no_saving(trained, caplog):
    options = {"share_prompts": True, "skip_zero_advantage": True, "gradient_accumulation_steps": 2}
    one, other = (
        trained(reward_funcs=count_vowels, cls=cls, **options) for cls in (AdaptiveGRPOTrainer, WithAnotherEntry)
    )
    assert have_same_weights(one, other)
    assert "TRL's own forward pass" not in caplog.text


# Generation in the precision of the run


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "peft_config",
    [
        None,
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        LoraConfig(r=4, target_modules=["k_proj"], use_dora=True),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=["full", "lora", "dora", "ia3"],
)
def test_adapters_and_precisions(peft_config, dtype, bf16, model_path, trained, caplog):
    """The shared prefill is used, and draws the tokens of plain generation where it rounds alike."""
    rewards = []
    for share in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM.from_pretrained(model_path, dtype=dtype)
        options = {"peft_config": peft_config, "bf16": bf16, "share_prompts": share, "max_steps": 1}
        trainer = trained(model=model, reward_funcs=count_vowels, **options)
        rewards.append(trainer.state.log_history[0]["reward"])
    assert trainer._shared_prefill.is_tried
    assert "share_prompts" not in caplog.text
    if dtype == torch.float32 and (peft_config is not None or not bf16):
        assert rewards[0] == rewards[1]


@pytest.mark.parametrize("fault", ["no cache that is known", "positions of the cache are forgotten"])
def test_a_model_that_cannot_be_prefilled(fault, model_path, both, caplog):
    """It trains all the same, from the samples that it would have drawn, and says once why it is not faster."""

    def build():
        if fault == "no cache that is known":
            return large(OpenAIGPTLMHeadModel(OpenAIGPTConfig(**TINY_GPT)))
        model = LlamaForCausalLM.from_pretrained(model_path)
        plain = model.model.forward

        def forgetful(*args, position_ids=None, **kwargs):
            """A prompt that is read by itself, and then its last token, end up at other positions."""
            length = kwargs["input_ids"].size(1)
            if length > 1:
                model.length = length
            shift = 40 * (length == 1 and kwargs[CACHE].get_seq_length() == model.length)
            return plain(*args, position_ids=position_ids + shift if position_ids is not None else None, **kwargs)

        model.model.forward = forgetful
        return large(model)

    rewards = []
    for trainer in both(build, share_prompts=True):
        torch.manual_seed(0)
        trainer.train()
        rewards.append([row["reward"] for row in trainer.state.log_history if "reward" in row])
    assert rewards[0] == pytest.approx(rewards[1])
    said = [record.message for record in caplog.records if "generation reads every copy" in record.message]
    assert len(said) == 1
    assert "in a trial" in said[0]


def reason_of_each_process(model_path, out):
    """On one process, the trial of the shared prefill goes wrong."""
    if PartialState(cpu=True).process_index == 1:
        generation.dtype_of = None  # what is called in the trial alone
    trainer = trainer_of(model_path, make_letters(), out, share_prompts=True, max_steps=1)
    trainer.train()
    return trainer._shared_prefill.reason


def test_processes_fall_back_together(model_path, tmp_path):
    one, other = launch(model_path, tmp_path / "out", reason_of_each_process)
    assert one == other
    assert "failed with TypeError" in one


def test_rounding_of_a_deep_model_is_no_reason():
    """In half precision, thirty layers make more of a rounding error than a wrong mask of two layers does."""
    config = LlamaConfig(**{**TINY, "num_hidden_layers": 30, "hidden_size": 64}, num_key_value_heads=2)
    torch.manual_seed(0)
    model = large(LlamaForCausalLM(config)).to(torch.bfloat16)
    if HAS_FUSED_HEAD:
        utils.add_fused_lm_head(model)
    assert forward.Trials(model, model, Accelerator(cpu=True)).why_not_shared() is None
    wrong = make_family("cpmant")  # whose prompts see both ways
    ids = torch.arange(8, 24).view(2, 8)
    config = GenerationConfig(max_new_tokens=8, pad_token_id=0)
    assert "off by" in why_not_as_plain(wrong, wrong.generate, ids, torch.ones_like(ids), config)
