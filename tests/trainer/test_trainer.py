"""The trainer with everything that the host accepts, and what it logs."""

import asyncio
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from kit import (
    Record,
    Watched,
    args_of,
    batches_of,
    count_vowels,
    has_answer,
    logs_of,
    make_tokenizer,
    text_of,
    weights_of,
)
from peft import LoraConfig
from transformers import AutoTokenizer
from trl.chat_template_utils import qwen3_chat_template
from trl.trainer.grpo_trainer import GRPOTrainer

from trl_grpo_ext import AdaptiveGRPOTrainer, GRPOCallback, RewardClipCallback
from trl_grpo_ext.credit.groups import group_advantages
from trl_grpo_ext.trainer.trial import lengths_of, rounds
from trl_grpo_ext.trainer.untouched import untouched

EVERYTHING = {
    "group_size": "variance",
    "curriculum": "online",
    "reward_clip_quantiles": [0.0, 0.95],
    "dynamic_sampling_rounds": 1,
    "per_device_train_batch_size": 16,
    "share_prompts": True,
}


@pytest.fixture
def make(make_trainer):
    def build(**given):
        given = {**EVERYTHING, **given}
        if not given.get("beta") and not given.get("entropy_coef"):
            given["skip_zero_advantage"] = True
        return make_trainer(**given)

    return build


@pytest.fixture
def train(make):
    """Trains with everything on, and gives the trainer, its batches and its logs."""

    def run(callbacks=(), **given):
        trainer = make(callbacks=[*callbacks, Record], **given)
        before = weights_of(trainer)
        trainer.train()
        assert not all(torch.equal(before[name], value) for name, value in weights_of(trainer).items())
        logs = logs_of(trainer)
        assert all(math.isfinite(entry["loss"]) for entry in logs)
        return trainer, batches_of(trainer), logs

    return run


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_every_loss_type(loss_type, train):
    level = "sequence" if loss_type == "luspo" else "token"
    train(loss_type=loss_type, importance_sampling_level=level)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 2, "per_device_train_batch_size": 8, "max_steps": 4},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none", "gradient_checkpointing": True},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"mask_truncated_completions": True},
        {"entropy_coef": 0.01},
        {"remove_unused_columns": False, "dataloader_num_workers": 1},
        {"log_completions": True, "num_completions_to_print": 1},
        {"pad_to_multiple_of": 8},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_host(options, train):
    trainer, batches, _ = train(reward_funcs=[has_answer, count_vowels], **options)
    rows = trainer.args.generation_batch_size
    assert all(int(batch.group_sizes.sum()) == rows for batch in batches)


def test_conversational_prompts_with_peft_and_beta(conversational, train):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    train(dataset=conversational, beta=0.05, peft_config=lora)


def test_evaluation_runs_as_in_trl(dataset, make):
    trainer = make(
        reward_funcs=lambda completions, **kwargs: [100.0 if i == 0 else 0.0 for i in range(len(completions))],
        reward_clip_range=[0, 1],
        reward_clip_quantiles=None,
        per_device_eval_batch_size=8,
        eval_dataset=dataset.select(range(4)),
    )
    # Two evaluation batches of eight rows, each with one reward of 100: clipping would show here.
    assert trainer.evaluate()["eval_reward"] == pytest.approx(12.5)


def test_async_and_none_rewards(train):
    async def slow(completions, **kwargs):
        await asyncio.sleep(0)
        return [float(len(text_of(c))) for c in completions]

    def sometimes(completions, answer, **kwargs):
        return [
            None if a in "abcdefghijklm" else float("e" in text_of(c)) for a, c in zip(answer, completions, strict=True)
        ]

    _, batches, logs = train(reward_funcs=[slow, sometimes])
    assert any(batch.raw_rewards_per_func[:, 1].isnan().any() for batch in batches)
    assert not any(batch.rewards.isnan().any() or batch.advantages.isnan().any() for batch in batches)
    assert "rewards/slow/mean" in logs[0]


def test_positional_arguments_are_those_of_the_host(model_path, dataset, tmp_path):
    args = args_of(tmp_path, max_steps=1)
    tokenizer, record = make_tokenizer(), Record()
    trainer = AdaptiveGRPOTrainer(model_path, count_vowels, args, dataset, None, tokenizer, None, [record])
    assert trainer.processing_class is tokenizer
    trainer.train()
    assert len(record.batches) == 1


def test_rows_without_any_reward_get_no_advantage(train):
    def rarely(completions, answer, **kwargs):
        return [float("e" in text_of(c)) if a > "m" else None for a, c in zip(answer, completions, strict=True)]

    _, batches, _ = train(reward_funcs=rarely, dynamic_sampling_rounds=0)
    missing = torch.cat([batch.rewards.isnan() for batch in batches])
    advantages = torch.cat([batch.advantages for batch in batches])
    assert missing.any()
    assert (advantages[missing] == 0).all()


def test_rollout_func(train):
    asked = []

    def rollout(prompts, trainer):
        asked.append((len(prompts), trainer.num_generations))
        ids = trainer.processing_class(text=prompts)["input_ids"]
        letters = trainer.processing_class(text="aeioubcdfg")["input_ids"]
        chosen = [[letters[i] for i in torch.randint(10, (4,)).tolist()] for _ in prompts]
        return {
            "prompt_ids": ids,
            "completion_ids": chosen,
            "logprobs": [[0.0] * 4 for _ in prompts],
            "source": ["scripted"] * len(prompts),
        }

    def sourced(completions, source, **kwargs):
        assert set(source) == {"scripted"}
        return count_vowels(completions)

    _, batches, _ = train(reward_funcs=sourced, rollout_func=rollout)
    assert len(batches) == 3
    # A ragged plan asks for one completion per row.
    assert all(generations == 1 for rows, generations in asked if rows != 16)


def qwen_tokenizer(model_path):
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokenizer.chat_template = qwen3_chat_template
    return tokenizer


def test_tools(model_path, monkeypatch, train):
    """The model is scripted: it calls the tool in every other row, then answers with the result."""
    tokenizer = qwen_tokenizer(model_path)
    calls = []

    def add(a: int, b: int) -> int:
        """
        Add two numbers.

        Args:
            a: First number.
            b: Second number.
        """
        calls.append((a, b))
        return a + b

    def scripted(self, prompt_ids, *args, **kwargs):
        call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'
        second_turn = [tokenizer.decode(ids).count("tool_response") > 1 for ids in prompt_ids]
        texts = ["3<|im_end|>" if second else (call, "4<|im_end|>")[i % 2] for i, second in enumerate(second_turn)]
        return [tokenizer(text)["input_ids"] for text in texts], None

    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", scripted)
    data = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"add {i}"}] for i in range(12)]})

    def is_three(completions, **kwargs):
        return [float(c[-1]["content"].strip() == "3") for c in completions]

    class Counting(GRPOCallback):
        def on_advantages(self, batch, **kwargs):
            return torch.arange(1.0, batch.completion_lengths.max() + 1).expand(len(batch.rewards), -1)

    trainer, batches, logs = train(
        dataset=data,
        cls=Watched,
        callbacks=[Counting()],
        reward_funcs=is_three,
        max_completion_length=400,
        tools=[add],
        processing_class=tokenizer,
    )
    assert set(calls) == {(1, 2)}
    assert 0 < batches[0].raw_rewards_per_func.mean() < 1
    # Advantages per token are those of the tokens that the model wrote, with what tools said in between.
    for output, batch in zip(trainer.outputs, batches, strict=True):
        assert not output["tool_mask"].all()
        written = output["completion_mask"] * output["tool_mask"] > 0
        for row, mask, length in zip(output["advantages"], written, batch.completion_lengths.tolist(), strict=True):
            assert row[mask].tolist() == list(range(1, length + 1))
            assert not row[~mask].any()
    assert logs[0]["tools/call_frequency"] > 0


def test_environment_factory(model_path, conversational, train):
    class Letters:
        def reset(self, answer=None, **kwargs):
            self.answer = answer
            return None

        def spell(self, letter: str) -> str:
            """
            Spell a letter.

            Args:
                letter: The letter.
            """
            return letter

        def get_reward(self) -> float:
            return float(self.answer in "aeiou") if self.answer is not None else 0.0

    _, batches, _ = train(
        dataset=conversational,
        reward_funcs=count_completion_letters,
        environment_factory=Letters,
        processing_class=qwen_tokenizer(model_path),
    )
    # The environment's reward follows the prompt that our plan chose.
    letters = "abcdefghijklmnopqrstuvwxyz"
    for batch in batches:
        expected = torch.tensor([float(letters[p] in "aeiou") for p in batch.prompt_index[batch.group_ids].tolist()])
        assert torch.equal(batch.raw_rewards_per_func[:, 1], expected)


def count_completion_letters(completions, **kwargs):
    return [float(len(c[-1]["content"])) for c in completions]


def test_ragged_advantages_reach_loss_and_logs(make):
    trainer = make(reward_funcs=count_vowels, dynamic_sampling_rounds=0, callbacks=[Record], cls=Watched)
    trainer.train()
    ragged = False
    for batch, output, table in zip(batches_of(trainer), trainer.outputs, trainer.tables, strict=True):
        expected = group_advantages(batch.rewards, batch.group_ids, batch.num_groups, "group")
        assert torch.equal(output["advantages"], expected)
        assert table["advantages"] == expected.tolist()
        by_group = [batch.rewards[batch.group_ids == g] for g in range(batch.num_groups)]
        flat_rows = sum(len(group) for group in by_group if group.min() == group.max())
        assert table["frac_reward_zero_std"] == [pytest.approx(flat_rows / 16)]
        ragged |= len(set(batch.group_sizes.tolist())) > 1
    assert ragged


def test_a_user_callback_in_ten_lines(train):
    class OnlyFirstGroup(GRPOCallback):
        def on_advantages(self, batch, **kwargs):
            batch.metrics["first_group"] = batch.group_sizes[0].item()
            return torch.where(batch.group_ids == 0, batch.advantages, 0.0)

    _, batches, logs = train(reward_funcs=count_vowels, callbacks=[OnlyFirstGroup()])
    for batch, entry in zip(batches, logs, strict=True):
        assert (batch.advantages[batch.group_ids > 0] == 0).all()
        assert entry["first_group"] == batch.group_sizes[0].item()


def test_callbacks_can_come_late_or_as_a_class(make):
    class Calls(GRPOCallback):
        setups = 0

        def on_setup(self, **kwargs):
            type(self).setups += 1

    trainer = make(callbacks=[Calls])
    trainer.add_callback(Calls())
    trainer.add_callback(RewardClipCallback(clip_range=[0, 1]))
    assert Calls.setups == 2
    assert sum(isinstance(callback, RewardClipCallback) for callback in trainer.grpo_callbacks) == 2


def test_a_late_callback_that_plans_needs_a_dataset_too(dataset, make):
    options = {"group_size": "fixed", "curriculum": "none", "dynamic_sampling_rounds": 0, "max_steps": 2}
    stream = dataset.to_iterable_dataset()
    trainer = make(dataset=stream, **options)
    trainer.train()  # clipping alone works on a stream

    class Chooses(GRPOCallback):
        def on_prompt_weights(self, weights, **kwargs):
            return weights

    with pytest.raises(ValueError, match=r"datasets\.Dataset"):
        trainer.add_callback(Chooses())


class Client:
    """Stands in for the vLLM server: answers `n` completions per prompt it is sent."""

    def __init__(self):
        self.requests, self.budgets = [], []

    def get_server_info(self):
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def generate(self, prompts, n, **kwargs):
        self.requests.append((prompts, n))
        self.budgets.append(kwargs.get("max_tokens"))
        letters = make_tokenizer()("aeioubcdfg<|im_end|>")["input_ids"]
        completions = [[letters[i] for i in torch.randint(11, (4,)).tolist()] for _ in prompts for _ in range(n)]
        logprobs = [[[-2.0] for _ in completion] for completion in completions]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": logprobs}


@pytest.fixture
def vllm(monkeypatch):
    """TRL's own `VLLMGeneration.generate`; its client (server mode) and engine (colocate mode) are stand-ins."""
    from trl.generation import vllm_generation
    from trl.trainer import grpo_trainer

    client = Client()

    class Engine:
        def generate(self, prompts, sampling_params, **kwargs):
            answer = client.generate([p["prompt_token_ids"] for p in prompts], n=sampling_params["n"])

            class Output:
                def __init__(self, prompt, ids, logprobs):
                    steps = [{i: Logprob(lp[0])} for i, lp in zip(ids, logprobs, strict=True)]
                    self.prompt_token_ids = prompt
                    self.outputs = [type("O", (), {"token_ids": ids, "logprobs": steps})()]

            class Logprob:
                def __init__(self, value):
                    self.logprob, self.rank = value, 1

            columns = (answer["prompt_ids"], answer["completion_ids"], answer["logprobs"])
            return [Output(*row) for row in zip(*columns, strict=True)]

    class StandIn(vllm_generation.VLLMGeneration):
        def __init__(self, *, model, accelerator, processing_class, mode, **kwargs):
            self.model, self.accelerator, self.processing_class, self.mode = model, accelerator, processing_class, mode
            for name, value in kwargs.items():
                setattr(self, name, value)
            self.vllm_client, self.llm = client, Engine()
            self.generation_kwargs = self.generation_kwargs or {}
            self._llm_weights_sleeping = False

        def sync_weights(self):
            pass

    monkeypatch.setattr(grpo_trainer, "VLLMGeneration", StandIn)
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    return client


@pytest.mark.parametrize("mode", ["server", "colocate"])
def test_vllm_gets_one_prompt_per_row_when_groups_are_ragged(mode, vllm, model_path, train):
    _, batches, _ = train(reward_funcs=count_vowels, use_vllm=True, vllm_mode=mode, max_steps=4)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    letters = "abcdefghijklmnopqrstuvwxyz"
    whole = [(prompts, n) for prompts, n in vllm.requests if len(prompts) * n == 16]
    sizes = [batch.group_sizes.tolist() for batch in batches]
    assert any(len(set(s)) > 1 for s in sizes)
    for (prompts, n), batch in zip(whole, batches, strict=True):
        assert n == 1 or batch.group_sizes.eq(4).all()
        if batch.discarded is None:
            expected = [f"say {letters[p]}" for p in batch.prompt_index[batch.group_ids].tolist()]
            assert [tokenizer.decode(ids) for ids in prompts for _ in range(n)] == expected


def test_a_trial_asks_vllm_for_each_row_and_for_longer_answers(vllm, make_trainer):
    trainer = make_trainer(reward_funcs=count_vowels, use_vllm=True, vllm_mode="server")
    with untouched(trainer):
        (first,) = rounds(trainer, num_prompts=2, num_answers=4)
        lengths = lengths_of(trainer, ["say a", "say b"], budget=24)
    assert [(len(prompts), n) for prompts, n in vllm.requests] == [(8, 1), (2, 1)]
    assert vllm.budgets == [6, 24]
    assert len(first.answers) == 8
    assert len(lengths) == 2
    assert trainer.vllm_generation.max_completion_length == 6
    assert trainer._last_loaded_step == -1


def test_a_fixed_group_keeps_vllms_shared_prompts(vllm, train):
    options = {"group_size": "fixed", "curriculum": "online", "dynamic_sampling_rounds": 0}
    train(reward_funcs=count_vowels, use_vllm=True, vllm_mode="server", **options)
    assert all(n == 4 and len(prompts) == 4 for prompts, n in vllm.requests)


HOOKS_OF_TENSORS = ["on_rewards", "on_total_rewards", "on_advantages", "on_prompt_weights", "on_resample"]


@pytest.mark.parametrize("hook", HOOKS_OF_TENSORS)
def test_a_hook_that_returns_another_shape_is_named(hook, make):
    wrong = type("Wrong", (GRPOCallback,), {hook: lambda self, *args, **kwargs: torch.zeros(3, 3, 3)})
    trainer = make(callbacks=[wrong()])
    with pytest.raises(ValueError, match=rf"Wrong.{hook} returned shape \(3, 3, 3\): return a tensor of shape"):
        trainer.train()


@pytest.mark.parametrize("convert", [torch.Tensor.double, torch.Tensor.half, lambda values: values > 0.5])
@pytest.mark.parametrize("hook", ["on_rewards", "on_total_rewards", "on_advantages"])
def test_a_hook_may_return_another_type(hook, convert, train):
    fields = {"on_rewards": "rewards_per_func", "on_total_rewards": "rewards", "on_advantages": "advantages"}

    def changed(self, args, state, control, batch, **kwargs):
        return convert(getattr(batch, fields[hook]))

    other = type("Other", (GRPOCallback,), {hook: changed})
    _, batches, _ = train(reward_funcs=has_answer, callbacks=[other()], max_steps=1)
    assert batches[0].rewards.dtype == batches[0].advantages.dtype == torch.float32


def test_a_hook_that_makes_advantages_nan_is_named(make):
    class Centre(GRPOCallback):
        def on_advantages(self, batch, **kwargs):
            return batch.rewards - 1

    def some(completions, **kwargs):
        return [None if i % 4 == 0 else 1.0 for i in range(len(completions))]

    trainer = make(reward_funcs=some, callbacks=[Centre()])
    with pytest.raises(ValueError, match=r"Centre.on_advantages made the advantages of .* NaN or infinite: return 0"):
        trainer.train()


def test_sizes_that_are_no_tensor_are_named(make):
    wrong = type("Wrong", (GRPOCallback,), {"on_group_sizes": lambda self, *args, **kwargs: [4, 4]})
    trainer = make(callbacks=[wrong()])
    with pytest.raises(
        ValueError, match=r"Wrong.on_group_sizes returned a list: return a tensor with one size for each"
    ):
        trainer.train()


def test_metrics_of_a_callback_are_numbers(tmp_path, train, make):
    class Counts(GRPOCallback):
        def on_rollouts(self, batch, **kwargs):
            batch.metrics |= {"tensor": batch.rewards.mean(), "numpy": np.float32(0.5), "flag": True}

    trainer, _, logs = train(callbacks=[Counts()], max_steps=1)
    assert [type(logs[0][name]) for name in ("tensor", "numpy", "flag")] == [float] * 3
    trainer.state.save_to_json(str(tmp_path / "state.json"))

    class Wrong(GRPOCallback):
        def on_rollouts(self, batch, **kwargs):
            batch.metrics["several"] = batch.rewards

    with pytest.raises(ValueError, match=r"batch.metrics\['several'\] is tensor.*: put one number into it"):
        make(callbacks=[Wrong()]).train()


def test_changing_rewards_in_place_counts_as_shaping(train):
    class InPlace(GRPOCallback):
        def on_rewards(self, batch, **kwargs):
            batch.rewards_per_func[:] = torch.arange(16.0)[:, None]

    options = {"group_size": "fixed", "curriculum": "none", "dynamic_sampling_rounds": 0, "reward_clip_quantiles": None}
    _, batches, _ = train(callbacks=[InPlace()], **options)
    assert all(batch.is_shaped and batch.advantages.abs().min() > 0 for batch in batches)
    assert all(batch.raw_rewards_per_func.max() <= 1 for batch in batches)


def test_stock_trl_warns_that_hooks_are_not_called(trained, caplog):
    trained(cls=GRPOTrainer, callbacks=[Record], max_steps=1)
    assert "Record is a GRPOCallback, and this trainer does not call its hooks" in caplog.text
