"""The critic: generalised advantages against their definition, and PPO as a callback on real tiny runs."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import Record, batches_of, have_same_weights, interrupt, logs_of, weights_of
from peft import LoraConfig
from transformers import LlamaForCausalLM

from trl_grpo_ext import CriticBaseline
from trl_grpo_ext.credit.critic import ValueModel, whiten
from trl_grpo_ext.credit.gae import gae
from trl_grpo_ext.hooks.checks import check_conflicts

NUMBERS = st.floats(-10, 10, width=32)


@st.composite
def episodes(draw):
    """Rewards and values `(N, T)` with anything, also NaN, beyond the lengths `(N,)`."""
    count, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    lengths = torch.tensor(draw(st.lists(st.integers(0, width), min_size=count, max_size=count)))
    cells = st.lists(NUMBERS, min_size=count * width, max_size=count * width)
    rewards, values = (torch.tensor(draw(cells), dtype=torch.float64).view(count, width) for _ in range(2))
    beyond = torch.arange(width) >= lengths[:, None]
    return rewards.masked_fill(beyond, torch.nan), values.masked_fill(beyond, torch.nan), lengths


PORTIONS = st.sampled_from([0.0, 0.3, 0.95, 1.0])


@given(episodes(), PORTIONS, PORTIONS)
def test_gae_is_the_sum_that_defines_it(episode, gamma, lam):
    rewards, values, lengths = episode
    advantages, returns = gae(rewards, values, lengths, gamma, lam)
    for n, length in enumerate(lengths.tolist()):
        r, v = rewards[n, :length].tolist(), [*values[n, :length].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert advantages[n, t].item() == pytest.approx(expected, abs=1e-9)
            assert returns[n, t].item() == pytest.approx(expected + v[t], abs=1e-9)
        assert not advantages[n, length:].any()
        assert not returns[n, length:].any()


@given(episodes(), PORTIONS)
def test_with_lambda_1_returns_do_not_depend_on_the_values(episode, gamma):
    rewards, values, lengths = episode
    one, other = (gae(rewards, v, lengths, gamma, 1.0)[1] for v in (values, 3 - 2 * values))
    torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


@given(episodes(), PORTIONS)
def test_values_that_are_right_leave_no_advantage(episode, lam):
    rewards, _, lengths = episode
    right = gae(rewards, torch.zeros_like(rewards), lengths, 1.0, 1.0)[1]
    advantages = gae(rewards, right, lengths, 1.0, lam)[0]
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), atol=1e-9, rtol=0)


def test_gae_by_hand():
    # δ = (0 + 0.5·4 - 2, 1 + 0 - 4) = (0, -3), and A_0 = 0 + 0.5·0.8·(-3).
    advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 4.0]]), torch.tensor([2]), 0.5, 0.8)
    torch.testing.assert_close(advantages, torch.tensor([[-1.2, -3.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.8, 1.0]]))


def test_whitening_reads_tokens_alone():
    is_token = torch.tensor([[True, True], [True, False]])
    white = whiten(torch.tensor([[1.0, 3.0], [5.0, 1e6]]), is_token)
    assert white[1, 1] == 0
    assert white[is_token].mean().abs() < 1e-6
    assert white[is_token].std(correction=0).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"gamma": 0.0}, "gamma=0.0"),
        ({"lam": 1.5}, "lam=1.5"),
        ({"epochs": 0}, "epochs=0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        CriticBaseline(**options)


@pytest.fixture
def with_critic(make_trainer):
    def make(out="run", critic=None, **given):
        return make_trainer(out, callbacks=[critic or CriticBaseline(), Record], **given)

    return make


def critic_of(trainer) -> CriticBaseline:
    return next(callback for callback in trainer.grpo_callbacks if isinstance(callback, CriticBaseline))


def test_one_completion_per_prompt_and_an_advantage_per_token(with_critic, dataset):
    trainer = with_critic()
    before = weights_of(trainer)
    trainer.train()
    for batch in batches_of(trainer):
        assert batch.group_sizes.tolist() == [1] * 8
        assert len(set(batch.prompt_index.tolist())) == 8
        assert batch.advantages.shape == batch.token_mask.shape == (8, int(batch.completion_lengths.max()))
        assert not batch.advantages[~batch.token_mask].any()
        assert [batch.rows[i]["prompt"] for i in range(8)] == [
            dataset[i]["prompt"] for i in batch.prompt_index.tolist()
        ]
        assert batch.tokens["completion_mask"].sum(1).tolist() == batch.completion_lengths.tolist()
    assert all(not torch.equal(before[name], p) for name, p in weights_of(trainer).items())
    logged = logs_of(trainer)
    assert len(logged) == 3
    # A value model that says 0 explains nothing of rewards that differ.
    assert logged[0]["critic/value"] == 0


def test_the_value_model_learns_what_the_prompt_is_worth(with_critic):
    def early(prompts, **kwargs):  # the last letter alone decides
        return [2.0 * (prompt[-1] < "n") for prompt in prompts]

    critic = CriticBaseline(learning_rate=1e-2)
    options = {"max_steps": 15, "learning_rate": 1e-6, "per_device_train_batch_size": 16}
    trainer = with_critic(critic=critic, reward_funcs=early, **options)
    trainer.train()
    explained = [entry["critic/explained_variance"] for entry in logs_of(trainer)]
    assert explained[0] == 0
    assert sum(explained[-3:]) / 3 > 0.6
    assert len(explained) == 15


def test_a_row_without_a_reward_teaches_nothing(with_critic):
    def some(prompts, **kwargs):
        return [None if i % 2 else float(i) for i in range(len(prompts))]

    trainer = with_critic(reward_funcs=some, max_steps=1)
    trainer.train()
    advantages = batches_of(trainer)[0].advantages
    assert not advantages[1::2].any()
    assert advantages[::2].any(1).all()


def test_lora_trains_a_lora_value_model(with_critic):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = with_critic(peft_config=config)
    trainer.train()
    critic = critic_of(trainer)
    trained = [name for name, p in critic.value_model.named_parameters() if p.requires_grad]
    assert all("lora" in name or name.startswith("head") for name in trained)
    assert critic.value_model.head.weight.any()


def test_the_value_model_is_a_copy_and_starts_at_zero(with_critic):
    trainer = with_critic()
    critic = critic_of(trainer)
    ids = torch.tensor([[5, 6, 7]])
    ones = torch.ones_like(ids)
    assert isinstance(critic.value_model, ValueModel)
    assert critic.value_model(ids, ones, ids, ones).tolist() == [[0.0, 0.0, 0.0]]
    mine = {p.data_ptr() for p in critic.value_model.parameters()}
    assert not mine & {p.data_ptr() for p in trainer.model.parameters()}


def test_a_value_sees_only_what_was_written_before(with_critic):
    critic = critic_of(with_critic())
    torch.nn.init.normal_(critic.value_model.head.weight)
    prompt, completion = torch.tensor([[0, 5, 6]]), torch.tensor([[7, 8, 9]])
    mask = torch.tensor([[0, 1, 1]])
    values = critic.value_model(prompt, mask, completion, torch.ones_like(completion))
    other = critic.value_model(prompt, mask, torch.tensor([[7, 8, 30]]), torch.ones_like(completion))
    torch.testing.assert_close(values, other)
    changed = critic.value_model(prompt, mask, torch.tensor([[7, 30, 9]]), torch.ones_like(completion))
    torch.testing.assert_close(values[0, :2], changed[0, :2])
    assert (values[0, 2] - changed[0, 2]).abs() > 1e-4


@pytest.mark.parametrize("options", [{"group_size": "variance"}, {"dynamic_sampling_rounds": 1}])
def test_features_that_lay_out_groups_are_refused(options, with_critic):
    with pytest.raises(ValueError, match="lays out groups"):
        with_critic(**options)


def test_the_value_model_goes_where_the_training_is(model_path):
    """Under DeepSpeed, and with `bf16_full_eval`, the policy gets there later."""
    nowhere = torch.device("meta")
    trainer = SimpleNamespace(
        model=LlamaForCausalLM.from_pretrained(model_path),
        accelerator=SimpleNamespace(device=nowhere, unwrap_model=lambda model: model),
        grpo_callbacks=[],
        rollout_func=None,
        tools=None,
        is_deepspeed_enabled=False,
        is_vlm=False,
        rollout=None,
    )
    critic = CriticBaseline()
    critic.on_setup(args=SimpleNamespace(per_device_train_batch_size=2, learning_rate=1e-3), trainer=trainer)
    held = critic.optimizer.param_groups[0]["params"]
    assert {p.device for p in (*critic.value_model.parameters(), *held)} == {nowhere}
    assert {p.device.type for p in trainer.model.parameters()} == {"cpu"}
    trainer.rollout_func = print
    with pytest.raises(ValueError, match="without tools and rollout_func"):
        check_conflicts([critic], trainer)


def test_a_dataset_smaller_than_the_batch_comes_again(with_critic, dataset):
    trainer = with_critic(dataset=dataset.select(range(3)), max_steps=1)
    trainer.train()
    assert sorted(batches_of(trainer)[0].prompt_index.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2]


def test_resume_equals_no_interruption(with_critic):
    whole, _, resumed = interrupt(partial(with_critic, max_steps=4), step=2)
    assert have_same_weights(whole, resumed)
    for one, other in zip(*(critic_of(run).value_model.parameters() for run in (whole, resumed)), strict=True):
        assert torch.equal(one, other)


def test_a_state_of_another_model_is_refused(with_critic):
    critic = critic_of(with_critic())
    state = critic.state_dict()
    state["value_model"]["head.weight"] = torch.zeros(1, 3)
    with pytest.raises(ValueError, match=r"head\.weight"):
        critic.load_state_dict(state)
