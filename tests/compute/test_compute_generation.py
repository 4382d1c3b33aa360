"""Generation from a shared prefill: the tokens of `generate` on repeated prompts, and finished rows that leave."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import count_vowels
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from trl_grpo_ext.compute import generation
from trl_grpo_ext.compute.generation import (
    adapter_merged,
    prefilled_generate,
    select_rows,
    why_not_merged,
    why_not_prefilled,
)
from trl_grpo_ext.trainer import lean

WIDTH = 8


@pytest.fixture(scope="module")
def model(model_path):
    return LlamaForCausalLM.from_pretrained(model_path).eval()


def prompts(seed, sizes, shortest=2):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 100, (len(sizes), WIDTH), generator=generator)
    lengths = torch.randint(shortest, WIDTH + 1, (len(sizes), 1), generator=generator)
    mask = (torch.arange(WIDTH) >= WIDTH - lengths).long()
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    return (ids * mask)[group], mask[group]


def settings_for(sample=False, eos=None, new=10, **more):
    more |= {"top_k": 0} if sample else {}
    return GenerationConfig(max_new_tokens=new, do_sample=sample, eos_token_id=eos, pad_token_id=0, **more)


def stock(model, ids, mask, config):
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)


def ours(model, ids, mask, config):
    return prefilled_generate(model, model.generate, ids, mask, config)


@settings(max_examples=25)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), ends=st.integers(0, 40))
def test_greedy_output_is_identical(model, seed, sizes, ends):
    """With `ends` of 112 tokens ending a completion, rows finish at different times, or never."""
    ids, mask = prompts(seed, sizes)
    config = settings_for(eos=list(range(8, 8 + ends)) or None)
    assert torch.equal(ours(model, ids, mask, config), stock(model, ids, mask, config))


@pytest.mark.parametrize("in_model", [False, True])
def test_a_cache_that_is_switched_off_is_used_all_the_same(in_model, model, model_path):
    ids, mask = prompts(0, [3, 2])
    config = settings_for(eos=list(range(8, 28)), **({} if in_model else {"use_cache": False}))
    if in_model:  # as in a checkpoint without a generation configuration
        model = LlamaForCausalLM.from_pretrained(model_path).eval()
        model.generation_config.use_cache = False
    assert torch.equal(ours(model, ids, mask, config), stock(model, ids, mask, config))


def test_models_without_keys_and_values_of_each_token():
    recurrent = MambaForCausalLM(MambaConfig(state_size=4, hidden_size=32, num_hidden_layers=2, vocab_size=120))
    for model in (recurrent, hybrid()):
        assert "linear attention or recurrence" in why_not_prefilled(model, settings_for())


def test_tokens_of_peft_before_the_prompt(model):
    peft_config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    assert "tokens that peft puts" in why_not_prefilled(model, settings_for(), peft_config)


def test_a_prompt_of_one_token(model):
    ids, mask = prompts(0, [3, 2], shortest=1)
    mask[:, :-1] = 0
    assert torch.equal(ours(model, ids, mask, settings_for()), stock(model, ids, mask, settings_for()))


def test_samples_come_from_the_same_random_numbers(model):
    ids, mask = prompts(0, [4, 3])
    config = settings_for(sample=True, temperature=0.7)
    torch.manual_seed(0)
    expected = stock(model, ids, mask, config)
    torch.manual_seed(0)
    assert torch.equal(ours(model, ids, mask, config), expected)
    assert len(torch.unique(expected, dim=0)) == 7


def test_logits_of_the_first_step(model):
    ids, mask = prompts(0, [4, 3])
    config = settings_for(sample=True, output_logits=True)
    seen = []

    def record(**kwargs):
        output = model.generate(**kwargs)
        seen.append(output.logits[0])
        return output

    expected = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, return_dict_in_generate=True
    ).logits[0]
    prefilled_generate(model, record, ids, mask, config)
    assert [len(logits) for logits in seen] == [2, 7]  # each prompt once, then every row
    assert (seen[1] - expected).abs().max() < 1e-5


def test_each_prompt_is_read_once_and_finished_rows_leave(model):
    ids, mask = prompts(0, [6, 6])
    shapes = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    torch.manual_seed(0)
    out = ours(model, ids, mask, settings_for(sample=True, eos=list(range(8, 28)), new=40))
    handle.remove()
    assert shapes[0] == (2, WIDTH - 1)
    assert shapes[1] == (12, 1)
    rows = [shape[0] for shape in shapes[1:]]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) > 2
    assert all(width == 1 for _, width in shapes[1:])
    assert torch.equal(out[:, :WIDTH], ids)


def test_same_distribution_when_rows_leave(model):
    """Frequencies of lengths and of last tokens over many samples, against `generate`."""
    ids, mask = prompts(3, [1500])
    config = settings_for(sample=True, eos=list(range(8, 38)), new=8)
    torch.manual_seed(0)
    one, other = stock(model, ids, mask, config), ours(model, ids, mask, config)

    def lengths(sequences):
        return torch.bincount((sequences[:, WIDTH:] != 0).sum(1), minlength=9) / 1500

    assert (lengths(one) - lengths(other)).abs().max() < 0.05  # standard deviation of a difference: below 0.018


def test_settings_that_need_the_whole_run(model):
    assert why_not_prefilled(model, settings_for(temperature=0.5, top_p=0.9)) is None
    reason = why_not_prefilled(model, settings_for(min_new_tokens=3, num_beams=2))
    assert reason == "the generation settings min_new_tokens, num_beams"


@pytest.mark.parametrize("lora", [False, True])
def test_the_trainer_uses_it(lora, trained, monkeypatch):
    calls = []
    original = generation.prefilled_generate

    def spy(model, generate, input_ids, **arguments):
        calls.append(input_ids.size(0))
        return original(model, generate, input_ids, **arguments)

    monkeypatch.setattr(generation, "prefilled_generate", spy)
    trainer = trained(share_prompts=True, peft_config=LoraConfig(r=4, target_modules=["q_proj"]) if lora else None)
    assert calls == [8, 8, 8]
    assert trainer._shared_prefill.reason is None
    assert "generate" not in vars(trainer.model)


def hybrid():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 120, "bos_token_id": 1, "eos_token_id": 2}
    layers = {"layer_types": ["conv", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2}
    return Lfm2ForCausalLM(Lfm2Config(intermediate_size=64, **layers, **sizes))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": hybrid()}, "linear attention or recurrence"),
        ({"generation_kwargs": {"no_repeat_ngram_size": 3}}, "the generation settings no_repeat_ngram_size"),
    ],
    ids=["model", "settings"],
)
def test_the_trainer_says_once_why_not(options, reason, model_path, trained, caplog):
    trained(processing_class=AutoTokenizer.from_pretrained(model_path), share_prompts=True, **options)
    said = [record.message for record in caplog.records if "generation reads" in record.message]
    assert len(said) == 1
    assert f"generation reads every copy of a prompt, because of {reason}" in said[0]


@given(
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=5),
    steps=st.lists(st.integers(1, 3), max_size=4),
    room=st.integers(0, 8),
)
def test_cache_with_room_holds_what_one_that_grows_does(rows, steps, room):
    """Also where the room is used up, and one that had room is selected from again."""
    generator = torch.Generator().manual_seed(0)
    growing, roomy = DynamicCache(), DynamicCache()
    start = torch.randn(2, 3, 2, 4, 5, generator=generator)
    for cache in (growing, roomy):
        cache.update(*start, layer_idx=0)
    for selected in (torch.tensor(rows), torch.arange(len(rows)).flip(0)):
        growing.batch_select_indices(selected)
        select_rows(roomy, selected, room)
        for step in steps:
            new = torch.randn(2, len(rows), 2, step, 5, generator=generator)
            for one, other in zip(growing.update(*new, layer_idx=0), roomy.update(*new, layer_idx=0), strict=True):
                assert torch.equal(one, other)
        assert growing.get_seq_length() == roomy.get_seq_length()


def test_tokens_are_written_into_the_room_without_a_copy():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 4, 5), torch.zeros(1, 2, 4, 5), layer_idx=0)
    select_rows(cache, torch.tensor([0, 0]), num_new=3)
    place = cache.layers[0].keys.data_ptr()
    for _ in range(3):
        cache.update(torch.ones(2, 2, 1, 5), torch.ones(2, 2, 1, 5), layer_idx=0)
        assert cache.layers[0].keys.data_ptr() == place
    cache.update(torch.ones(2, 2, 1, 5), torch.ones(2, 2, 1, 5), layer_idx=0)
    assert cache.layers[0].keys.data_ptr() != place


# A merged adapter


def adapted(model_path, **options):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", **options)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_path), lora)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_merged_adapter_gives_the_same_logits_and_leaves_no_trace(use_dora, fails, model_path):
    model = adapted(model_path, use_dora=use_dora)
    ids, _ = prompts(0, [2, 1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(ids).logits
        with model.disable_adapter():
            assert (model(ids).logits - expected).abs().max() > 0.1
        try:
            with adapter_merged(model):
                products = []
                lora = model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"]
                handle = lora.register_forward_hook(lambda *_: products.append(1))
                assert torch.allclose(model(ids).logits, expected, atol=1e-4)
                handle.remove()
                assert products == []
                if fails:
                    raise KeyError("in generation")
        except KeyError:
            assert fails
        assert torch.equal(model(ids).logits, expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_cannot_be_merged_is_refused(model_path):
    assert why_not_merged(adapted(model_path)) is None
    assert "no adapter" in why_not_merged(LlamaForCausalLM.from_pretrained(model_path))
    assert "lora_dropout" in why_not_merged(adapted(model_path, lora_dropout=0.1))
    assert "bias" in why_not_merged(adapted(model_path, lora_bias=True))
    tied = adapted(model_path)
    layers = tied.base_model.model.model.layers
    layers[1].mlp.up_proj.base_layer.weight = layers[0].mlp.up_proj.base_layer.weight
    assert "tied" in why_not_merged(tied)
    layers[1].mlp.up_proj.base_layer = torch.nn.Identity()  # packed weights go by other names
    assert "no LoRA on weights in floating point" in why_not_merged(tied)


def test_training_with_a_merged_adapter(make_trainer, monkeypatch):
    opened = []
    monkeypatch.setattr(lean, "adapter_merged", lambda model: opened.append(model) or adapter_merged(model))
    weights = []
    for merge in (False, True):
        torch.manual_seed(0)  # of the adapter
        lora = LoraConfig(r=4, target_modules="all-linear")
        options = {"reward_funcs": count_vowels, "share_prompts": True, "merge_adapter": merge}
        trainer = make_trainer(peft_config=lora, **options)
        frozen = {name: p.clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
        trainer.train()
        assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
        weights.append(torch.cat([p.flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert len(opened) == 3  # once for each generation of the second run
    assert torch.allclose(*weights, atol=1e-4)  # the same samples, so the same training
    assert weights[0].norm() > 0


@pytest.mark.parametrize(("options", "peft", "message"), [({}, False, "no adapter"), ({"r": 4}, True, "lora_dropout")])
def test_merging_is_refused_at_construction(options, peft, message, make_trainer):
    lora = LoraConfig(lora_dropout=0.1, target_modules="all-linear", **options) if peft else None
    with pytest.raises(ValueError, match=f"merge_adapter=True cannot be used here, because .*{message}"):
        make_trainer(merge_adapter=True, peft_config=lora)
