"""Plans and implementations: the rows of a tree, credit for each level, and each plan's tokens once in the loss."""

import pytest
import torch
from datasets import Dataset
from kit import batches_of, text_of
from rollout_helpers import first_turns, length_of_text, user

from trl_grpo_ext import HierarchicalCallback
from trl_grpo_ext.credit.groups import EPS
from trl_grpo_ext.rewards import Length, as_reward, of_plan

OPTIONS = {"rollout": "hierarchical", "num_plans": 3, "num_implementations": 2, "per_device_train_batch_size": 18}
OPTIONS |= {"num_generations": 2, "plan_template": "plan {prompt}", "implementation_template": "do {prompt}"}


@pytest.fixture
def trained(trained):
    """Two trees a batch; gives the trainer and its finished batches."""

    def train(**given):
        trainer = trained(**{"dataset": first_turns(), **OPTIONS, **given})
        return trainer, batches_of(trainer)

    return train


def test_the_rows_of_a_tree(trained):
    trainer, batches = trained()
    tokenizer = trainer.processing_class
    for (rows, output), batch in zip(trainer.seen, batches, strict=True):
        assert batch.group_sizes.tolist() == [3, 2, 2, 2] * 2
        assert batch.turns.tolist() == ([0] * 3 + [1] * 6) * 2
        assert batch.parents.tolist() == [-1] * 3 + [0, 0, 1, 1, 2, 2] + [-1] * 3 + [9, 9, 10, 10, 11, 11]
        assert "tool_mask" not in output
        assert output["advantages"].shape == (18,)
        for tree in (rows[:9], rows[9:]):
            asked = tree[0].prompt[-1]["content"]
            assert asked.startswith("plan say ")
            assert all(row.prompt_ids == tree[0].prompt_ids for row in tree[:3])
            for number, row in enumerate(tree[3:]):
                plan = tree[number // 2]
                # By tokens: the plan's prompt, the plan as it was sampled, and what asks for the implementation.
                end = [] if plan.answers[0].ids[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
                said = f"<|im_start|>user do {asked[5:]}<|im_end|><|im_start|>assistant "
                glue = end + tokenizer(said, add_special_tokens=False)["input_ids"]
                assert row.prompt_ids == plan.prompt_ids + plan.answers[0].ids + glue
                assert row.prompt == [*plan.prompt, *plan.completion, user(f"do {asked[5:]}")]


@pytest.mark.parametrize("scale", ["group", "none"])
def test_credit_of_both_levels(scale, trained):
    _, batches = trained(scale_rewards=scale)
    for batch in batches:
        for start in (0, 9):
            own = batch.raw_rewards_per_func[start : start + 9, 0]
            assert own[:3].isnan().all()
            values = own[3:].view(3, 2).mean(1)
            implementations = own[3:].view(3, 2) - values[:, None]
            plans = values - values.mean()
            if scale == "group":
                implementations = implementations / (own[3:].view(3, 2).std(1, keepdim=True) + EPS)
                plans = plans / (values.std() + EPS)
            expected = torch.cat([plans, implementations.flatten()])
            torch.testing.assert_close(batch.advantages[start : start + 9], expected, rtol=1e-4, atol=1e-4)
            assert batch.advantages[start : start + 3].sum().abs() < 1e-4
            assert batch.advantages[start + 3 : start + 9].view(3, 2).sum(1).abs().max() < 1e-4


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "dr_grpo", "grpo"])
def test_the_loss_of_a_tree_counts_every_token_once(loss_type, trained):
    """The gradient is that of a sum over the distinct tokens of the tree, each seen once, one sequence at a time."""
    trainer, batches = trained(loss_type=loss_type, max_steps=1, learning_rate=0.0)
    (rows, output), batch = trainer.seen[0], batches[0]
    model = trainer.model
    model.train()
    model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(model, output).backward()
    gradients = [value.grad.clone() for value in model.parameters()]

    model.zero_grad()
    nodes = set()  # every token of the tree by the row that wrote it and its position
    total = torch.zeros(())
    num_tokens = sum(len(row.answers[0].ids) for row in rows)
    for number, row in enumerate(rows):
        answer = row.answers[0]
        ids = torch.tensor([row.prompt_ids + answer.ids])
        start = len(row.prompt_ids)
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)[start - 1 :]
        for position in range(len(answer.ids)):
            assert (number, position) not in nodes
            nodes.add((number, position))
        weight = {
            "dapo": 1 / num_tokens,
            "bnpo": 1 / num_tokens,
            "dr_grpo": 1 / (len(rows) * trainer.max_completion_length),
            "grpo": 1 / (len(rows) * len(answer.ids)),
        }[loss_type]
        total = total - batch.advantages[number] * weight * logps.sum()
    assert len(nodes) == num_tokens == output["num_items_in_batch"]
    # A plan's tokens are in the context of its implementations as well: there they are not trained on.
    assert sum(row.prompt_ids.count(t) > 0 for row in rows for t in row.answers[0].ids) > 0
    total.backward()
    for value, expected in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(value.grad, expected, rtol=1e-3, atol=1e-6)


def test_rewards_see_the_implementation_and_may_see_the_plan(trained):
    seen = []

    def spy(prompts, completions, plan, **kwargs):
        seen.extend(zip(prompts, completions, plan, strict=True))
        return [float(len(text)) for text in plan]

    reward = as_reward(length_of_text) + 0.5 * as_reward(spy) + of_plan(Length("characters"))
    reward += 10 * of_plan(Length()).named("tokens")
    trainer, batches = trained(reward_funcs=reward, max_steps=1)
    rows = trainer.seen[0][0]
    assert len(seen) == 12  # implementations alone
    for prompt, completion, plan in seen:
        assert prompt[1] == {"role": "assistant", "content": plan}
        assert [completion] in [[row.completion] for row in rows if row.parent is not None]
    raw = batches[0].raw_rewards_per_func[:, 0]
    for number, row in enumerate(rows):
        if row.parent is None:
            assert raw[number].isnan()
        else:
            plan = text_of(rows[row.parent].completion)
            expected = length_of_text([row.completion])[0] + 1.5 * len(plan)
            assert raw[number] == pytest.approx(expected + 10 * len(rows[row.parent].answers[0].ids), rel=1e-5)


def test_what_is_logged(trained):
    options = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 6, "log_completions": True}
    trainer, _ = trained(eval_dataset=first_turns(3), **options)
    logs = trainer.state.log_history[0]
    raw = logs["rewards/length_of_text/mean"]
    assert logs["reward"] == pytest.approx(raw)
    assert logs["hierarchical/across_plans_std"] > 0
    assert logs["hierarchical/within_plan_std"] > 0
    assert 0 <= logs["hierarchical/plan_share"] <= 1
    assert logs["hierarchical/overflowed"] == 0
    assert logs["rollouts/total"] == 18
    evaluated = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    # A plan and its implementation in one row, of which the reward sees the implementation.
    assert len(trainer.seen[-1][0]) == 6
    assert all([a.turn for a in row.answers] == [0, 1] for row in trainer.seen[-1][0])
    assert evaluated["eval_reward"] > 0
    assert "turn_2" not in " ".join(evaluated)


def test_a_plan_that_leaves_no_room_is_not_implemented(trained):
    """Then the row of the implementation holds an end of text, with no reward, no advantage and in no baseline."""
    trainer, batches = trained(max_conversation_length=36, max_steps=2)
    assert trainer.state.log_history[0]["hierarchical/overflowed"] == 1
    for (rows, output), batch in zip(trainer.seen, batches, strict=True):
        assert len(rows) == 18
        assert batch.rewards.isnan().all()
        assert (output["advantages"] == 0).all()
        assert all(
            row.answers[0].ids == [trainer.processing_class.eos_token_id] for row in rows if row.parent is not None
        )


def test_a_prompt_that_leaves_no_room_is_not_planned_for(trained):
    dataset = Dataset.from_list([{"prompt": [user(text)]} for text in ("hm", "m" * 90) * 6])
    trainer, batches = trained(dataset=dataset, max_conversation_length=80, max_steps=3)
    seen = set()
    for (rows, output), batch in zip(trainer.seen, batches, strict=True):
        for start in (0, 9):
            is_long = len(rows[start].prompt_ids) + trainer.max_completion_length > 80
            own = slice(start, start + 9)
            assert batch.rewards[own].isnan().all() == is_long
            assert (output["advantages"][own] == 0).all() == is_long
            if is_long:
                assert {tuple(row.answers[0].ids) for row in rows[own]} == {(trainer.processing_class.eos_token_id,)}
            seen.add(is_long)
    assert seen == {False, True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_plans": 1}, "num_plans=1 leaves nothing to compare with: use at least 2"),
        ({"plan_template": "plan"}, "plan_template='plan' does not say what to plan"),
        ({"per_device_train_batch_size": 16}, "has 9 rows, and 16 rows of a process are no multiple of that"),
        (
            {"per_device_train_batch_size": 18, "num_generations": 18},
            "too large to draw 2 prompts: set num_generations=2",
        ),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "use 'sum_then_normalize'"),
        ({"group_size": "variance", "min_group_size": 2, "num_generations": 3}, "set group_size='fixed'"),
        ({"dynamic_sampling_rounds": 1}, "set dynamic_sampling_rounds=0"),
        (
            {"dataset": first_turns(8)},
            "has 8 rows and one generation batch holds 9 prompts .* raise num_generations",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, message, trained):
    with pytest.raises(ValueError, match=message):
        trained(**options)


def test_a_prompt_that_does_not_end_in_a_text_is_refused(trained):
    parts = Dataset.from_list([{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}] * 12)
    with pytest.raises(ValueError, match="Row 0 of the training dataset does not end in a text of the user"):
        trained(dataset=parts)
    with pytest.raises(ValueError, match="implementation_template is empty"):
        HierarchicalCallback(implementation_template="")
