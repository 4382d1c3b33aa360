"""Every family of transformers: the same numbers with the savings as without, or a reason."""

import pytest
import torch
from accelerate import Accelerator
from families import COMMON, NAMES, make_family
from transformers import GenerationConfig
from trl.trainer import utils

from trl_grpo_ext.compute.forward import Trials, positions_from, shared_logps, why_not_shared
from trl_grpo_ext.compute.generation import prefilled_generate, why_not_as_plain, why_not_prefilled
from trl_grpo_ext.compute.packing import Costs
from trl_grpo_ext.compute.rows import Cut
from trl_grpo_ext.host.seams import HAS_FUSED_HEAD

pytestmark = pytest.mark.training  # a small model of each family runs
WIDTH, DEPTH = 9, 6


PARTS = 8


def families(part):
    """Those of a part that can be built from sizes alone, and in which stock can run `works`."""
    for name in NAMES[part::PARTS]:
        family = make_family(name)
        if isinstance(family, str):
            assert name not in COMMON, family
        else:
            yield name, family


def result_of(call, *args, **kwargs):
    """What stock computes, or `None` where it fails, as with encoders that pass for decoders."""
    try:
        return call(*args, **kwargs)
    except Exception:
        return None


def prompts(sizes=(3, 2)):
    """Three columns of padding before all of them, as in a batch whose longest prompt is elsewhere."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, 100, (len(sizes), WIDTH - 3), generator=generator)
    lengths = torch.tensor([WIDTH - 3, 3])[:, None]
    mask = (torch.arange(WIDTH - 3) >= WIDTH - 3 - lengths).long()
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return (torch.nn.functional.pad(values[group], (3, 0)) for values in (ids * mask, mask))


@torch.no_grad()
@pytest.mark.parametrize("part", range(PARTS))
def test_generation(part):
    """Rows leave on the way: some tokens end a completion."""
    ids, mask = prompts()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": list(range(8, 24))}
    shared = []
    for name, family in families(part):
        config = GenerationConfig(**settings)
        expected = result_of(family.generate, input_ids=ids, attention_mask=mask, generation_config=config)
        if expected is None:
            continue
        arguments = (family, family.generate, ids, mask, GenerationConfig(**settings))
        reason = why_not_prefilled(family, GenerationConfig(**settings)) or why_not_as_plain(*arguments)
        if reason is None:
            assert torch.equal(prefilled_generate(*arguments), expected), name
            shared.append(name)
    assert len(shared) > 8  # of 25: no reason is given to all


def completed():
    generator = torch.Generator().manual_seed(1)
    ids, mask = prompts()
    lengths = torch.randint(1, DEPTH + 1, (len(ids), 1), generator=generator)
    completion_mask = (torch.arange(DEPTH) < lengths).long()
    completions = torch.randint(8, 100, (len(ids), DEPTH), generator=generator) * completion_mask
    return torch.cat([ids, completions], 1), torch.cat([mask, completion_mask], 1)


def logps(family, ids, mask, num_columns):
    """As TRL computes them."""
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-num_columns] = -100
    return family(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -num_columns:]


@torch.no_grad()
@pytest.mark.skipif(not HAS_FUSED_HEAD, reason="TRL has no fused head")
@pytest.mark.parametrize("part", range(PARTS))
def test_log_probabilities(part):
    ids, mask = completed()
    scored = mask[:, -DEPTH:].bool()
    accelerator = Accelerator(cpu=True)
    shared, trimmed = [], []
    for name, family in families(part):
        utils.add_fused_lm_head(family)
        expected = result_of(logps, family, ids, mask, DEPTH)
        if expected is None:
            continue
        trials = Trials(family, family, accelerator)
        if (why_not_shared(family) or trials.why_not_shared()) is None:
            found = shared_logps(family, family, accelerator, ids, mask, DEPTH, Costs(1.0, 0.0, float("inf")))[0]
            assert (found - expected)[scored].abs().max() < 1e-4, name
            shared.append(name)
        if trials.why_not_trimmed() is None:
            cut = Cut.of(ids, mask, DEPTH, torch.arange(len(ids)), trim_left=True)
            assert cut.first_position == 3
            with positions_from(family, cut.first_position):
                found = cut.restored(logps(family, cut.input_ids, cut.attention_mask, cut.num_completion_columns))
            assert (found - expected)[scored].abs().max() < 1e-4, name
            trimmed.append(name)
    assert len(shared) > 4
    assert len(trimmed) > 8


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_neox", "phi3"])
def test_what_is_shared_for_sure(name):
    family = make_family(name)
    if HAS_FUSED_HEAD:
        utils.add_fused_lm_head(family)
    trials = Trials(family, family, Accelerator(cpu=True))
    assert why_not_shared(family) is None
    assert trials.why_not_shared() is None
    assert trials.why_not_trimmed() is None
    ids, mask = prompts()
    arguments = (ids, mask, GenerationConfig(max_new_tokens=8, pad_token_id=0))
    assert why_not_as_plain(family, family.generate, *arguments) is None
