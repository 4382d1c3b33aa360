"""Replacing groups: the right rows, padded as TRL pads, the tables row by row true, and every rollout counted."""

from collections import defaultdict, deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import NAN, Record, Watched, batch_of, batches_of, logs_of

from trl_grpo_ext import DynamicSamplingCallback
from trl_grpo_ext.credit.groups import group_advantages
from trl_grpo_ext.shape.resampling import (
    global_positions,
    put_logs,
    replace_rows,
    rows_to_regenerate,
    take_logs,
)

PAD = 99


# Which rows


@st.composite
def ranks(draw):
    """Which groups are replaced, group of each row, number of ranks that share the rows."""
    num_ranks = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    sizes[-1] += -sum(sizes) % num_ranks
    replaced = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    ids = torch.repeat_interleave(torch.tensor(sizes))
    return torch.tensor(replaced), ids, num_ranks


@given(ranks())
def test_all_rows_of_replaced_groups_are_regenerated_and_no_others(case):
    replaced, ids, num_ranks = case
    positions, count = rows_to_regenerate(replaced, ids, num_ranks)
    assert count == max(len(own) for own in positions)
    assert len(positions) == num_ranks
    where, source = global_positions(positions, len(ids), count)
    assert where.tolist() == [row for row, group in enumerate(ids.tolist()) if replaced[group]]
    # What is gathered is `count` rows of rank 0, then `count` of rank 1, ...; each rank's own come first.
    owner = torch.arange(len(ids)) * num_ranks // len(ids)
    gathered_owner = torch.arange(num_ranks * count) // max(count, 1)
    assert torch.equal(gathered_owner[source], owner[where])
    assert source.unique().numel() == source.numel()
    for rank, own in enumerate(positions):
        assert source[owner[where] == rank].tolist() == list(range(rank * count, rank * count + len(own)))


def test_rows_by_hand():
    replaced, ids = torch.tensor([False, True, True]), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])
    positions, count = rows_to_regenerate(replaced, ids, 2)
    assert [own.tolist() for own in positions] == [[2, 3], [0, 1, 2]]
    assert count == 3
    where, source = global_positions(positions, 8, count)
    assert where.tolist() == [2, 3, 4, 5, 6]
    assert source.tolist() == [0, 1, 3, 4, 5]


# Tensors


def rollout_batch(rows: int, prompt: int, completion: int, base: float) -> dict[str, torch.Tensor]:
    """Every key that TRL may return for text, with all masks 1 and each row different from all others."""

    def tokens(length):
        return (base + torch.arange(rows)[:, None] + torch.zeros(rows, length)).long()

    def floats(length):
        return base + torch.arange(rows)[:, None] + torch.rand(rows, length)

    return {
        "prompt_ids": tokens(prompt),
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": tokens(completion),
        "completion_mask": torch.ones(rows, completion, dtype=torch.long),
        "advantages": base + torch.arange(rows) / 7,
        "num_items_in_batch": torch.tensor(rows * completion),
        "old_per_token_logps": floats(completion),
        "ref_per_token_logps": floats(completion),
        "sampling_per_token_logps": floats(completion),
        "importance_sampling_ratio": floats(completion),
        "tool_mask": torch.ones(rows, completion, dtype=torch.long),
    }


# Side and value with which TRL itself pads these.
TRL_PADS = dict.fromkeys(rollout_batch(1, 1, 1, 0), ("right", 0))
TRL_PADS |= {"prompt_ids": ("left", PAD), "prompt_mask": ("left", 0), "completion_ids": ("right", PAD)}
# A ratio of 1 where there is no token: losses add up its logarithm without a mask.
TRL_PADS |= {"tool_mask": ("right", 1), "importance_sampling_ratio": ("right", 1)}


@given(
    lengths=st.tuples(*[st.integers(1, 4)] * 4),
    positions=st.lists(st.integers(0, 4), max_size=5, unique=True),
    spare=st.integers(0, 2),
)
def test_rows_are_replaced_and_padded_as_trl_pads(lengths, positions, spare):
    old_prompt, old_completion, new_prompt, new_completion = lengths
    old = rollout_batch(5, old_prompt, old_completion, base=0)
    new = rollout_batch(len(positions) + spare, new_prompt, new_completion, base=50)
    merged = replace_rows(old, new, torch.tensor(positions, dtype=torch.long), PAD)
    assert merged.keys() == old.keys()
    for key, tensor in merged.items():
        if key == "num_items_in_batch":
            assert tensor == old[key]
            continue
        assert tensor.dtype == old[key].dtype
        side, value = TRL_PADS[key]
        for row in range(5):
            expected = new[key][positions.index(row)] if row in positions else old[key][row]
            if expected.ndim:
                length = max(old[key].size(1), new[key].size(1))
                padding = torch.full((length - len(expected),), value, dtype=expected.dtype)
                expected = torch.cat([padding, expected] if side == "left" else [expected, padding])
            assert torch.equal(tensor[row], expected), (key, row)


def test_padding_by_hand():
    old = {
        "prompt_ids": torch.tensor([[1, 2], [3, 4]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[5, 6], [7, PAD]]),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "importance_sampling_ratio": torch.tensor([[0.5], [2.0]]),
        "advantages": torch.tensor([0.1, 0.2]),
        "num_items_in_batch": torch.tensor(3),
    }
    new = {
        "prompt_ids": torch.tensor([[8, 8, 8]]),
        "prompt_mask": torch.tensor([[1, 1, 1]]),
        "completion_ids": torch.tensor([[9]]),
        "completion_mask": torch.tensor([[1]]),
        "importance_sampling_ratio": torch.tensor([[3.0]]),
        "advantages": torch.tensor([0.3]),
        "num_items_in_batch": torch.tensor(1),
    }
    merged = {key: value.tolist() for key, value in replace_rows(old, new, torch.tensor([1]), PAD).items()}
    assert merged == {
        "prompt_ids": [[PAD, 1, 2], [8, 8, 8]],
        "prompt_mask": [[0, 0, 1], [1, 1, 1]],
        "completion_ids": [[5, 6], [9, PAD]],
        "completion_mask": [[1, 1], [1, 0]],
        "importance_sampling_ratio": [[0.5], [3.0]],
        "advantages": pytest.approx([0.1, 0.3]),
        "num_items_in_batch": 3,
    }


def test_old_batch_is_left_alone():
    old = rollout_batch(3, 2, 2, base=0)
    before = {key: value.clone() for key, value in old.items()}
    replace_rows(old, rollout_batch(1, 2, 2, base=50), torch.tensor([0]), PAD)
    assert all(torch.equal(old[key], before[key]) for key in old)


# Tables


def make_logs(rows: list[str], functions=("reward",), extras=(), maxlen=4) -> dict:
    """TRL's completions table: one name per row, columns made from it."""
    logs = {name: deque(maxlen=maxlen) for name in ("images", "prompt", "completion", "advantages")}
    logs |= {name: defaultdict(lambda: deque(maxlen=maxlen)) for name in ("rewards", "extra")}
    append(logs, rows, functions, extras)
    return logs


def append(logs, rows, functions=("reward",), extras=()):
    for name in ("prompt", "completion", "advantages"):
        logs[name].extend(f"{name}-{row}" for row in rows)
    for group, names in (("rewards", functions), ("extra", extras)):
        for name in names:
            logs[group][name].extend(f"{name}-{row}" for row in rows)


def test_logged_rows_are_replaced_in_place():
    logs = make_logs(["a", "b", "c", "d"])
    taken = take_logs(logs)
    assert all(len(column) == 0 for column in (logs["prompt"], logs["completion"], logs["rewards"]["reward"]))
    append(logs, ["x", "y", "z"])
    put_logs(logs, taken, torch.tensor([3, 1]), torch.tensor([0, 2]))
    for name, column in {**logs, **logs["rewards"]}.items():
        if name in ("prompt", "completion", "advantages", "reward"):
            assert list(column) == [f"{name}-{row}" for row in ("a", "z", "c", "x")]
            assert isinstance(column, deque)
            assert column.maxlen == 4


def test_column_that_only_one_round_logged_is_filled_with_none():
    logs = make_logs(["a", "b", "c", "d"], extras=["early"])
    taken = take_logs(logs)
    append(logs, ["x", "y"], extras=["late"])
    put_logs(logs, taken, torch.tensor([1, 2]), torch.tensor([1, 0]))
    assert list(logs["extra"]["early"]) == ["early-a", None, None, "early-d"]
    assert list(logs["extra"]["late"]) == [None, "late-y", "late-x", None]
    assert list(logs["prompt"]) == ["prompt-a", "prompt-y", "prompt-x", "prompt-d"]


# The callback


def test_flat_groups_are_replaced_for_a_bounded_number_of_rounds():
    callback = DynamicSamplingCallback(max_rounds=2)
    batch = batch_of([[1.0, 1.0], [0.0, 1.0], [NAN, 0.0]])
    for round in (0, 1):
        assert callback.on_resample(batch=batch, round=round).tolist() == [True, False, True]
    assert callback.on_resample(batch=batch, round=2) is None


def test_rows_are_replaced_with_their_images():
    """Two images of 2 and 4 patches in the old row, one of 6 in the new; columns of the prompt are padded left."""
    grids = torch.tensor([[1, 1, 2], [1, 2, 2], [1, 1, 3]])
    batch = {
        "prompt_ids": torch.tensor([[0, 5], [5, 6]]),
        "completion_ids": torch.tensor([[7], [8]]),
        "pixel_values": torch.arange(9.0)[:, None],
        "image_grid_thw": grids,
        "num_images": [2, 1],
        "mm_token_type_ids": torch.tensor([[0, 1, 0], [1, 1, 0]]),
        "num_items_in_batch": torch.tensor(2.0),
    }
    fresh = {
        "prompt_ids": torch.tensor([[9, 9, 9]]),
        "completion_ids": torch.tensor([[4, 4]]),
        "pixel_values": 100 + torch.arange(6.0)[:, None],
        "image_grid_thw": torch.tensor([[1, 2, 3]]),
        "num_images": [1],
        "mm_token_type_ids": torch.tensor([[1, 1, 1, 0, 0]]),
        "num_items_in_batch": torch.tensor(2.0),
    }
    merged = replace_rows(batch, fresh, torch.tensor([0]), pad_token_id=0)
    assert merged["num_images"] == [1, 1]
    assert merged["image_grid_thw"].tolist() == [[1, 2, 3], [1, 1, 3]]
    assert merged["pixel_values"].flatten().tolist() == [100, 101, 102, 103, 104, 105, 6, 7, 8]
    assert merged["prompt_ids"].tolist() == [[9, 9, 9], [0, 5, 6]]
    assert merged["mm_token_type_ids"].tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 0, 0]]
    assert batch["num_images"] == [2, 1]


def test_images_that_are_padded_to_one_tensor_for_each_row():
    """As of Idefics: rows have as many images as the one with most, of the largest height and width."""
    batch = {"pixel_values": torch.ones(2, 1, 3, 4, 4), "pixel_attention_mask": torch.ones(2, 1, 4, 4)}
    fresh = {"pixel_values": torch.full((1, 2, 3, 2, 6), 2.0), "pixel_attention_mask": torch.ones(1, 2, 2, 6)}
    merged = replace_rows(batch | {"num_images": [1, 1]}, fresh | {"num_images": [2]}, torch.tensor([1]), 0)
    assert merged["pixel_values"].shape == (2, 2, 3, 4, 6)
    assert merged["pixel_values"].sum() == 3 * 4 * 4 + 2 * 2 * 3 * 2 * 6
    assert merged["pixel_attention_mask"].sum(dim=(1, 2, 3)).tolist() == [16, 24]
    assert merged["num_images"] == [1, 2]


# Real runs


class Rewards:
    """Always flat for prompts of the first half of the alphabet; counts what it scores."""

    __name__ = "length"

    def __init__(self):
        self.scored = 0
        self.calls = []

    @staticmethod
    def of(prompt, completion):
        return float(len(completion) % 3) if prompt[-1] > "m" else 1.0

    def __call__(self, prompts, completions, log_extra, **kwargs):
        self.scored += len(prompts)
        self.calls.append(len(prompts))
        log_extra("size", [len(completion) for completion in completions])
        return [self.of(p, c) for p, c in zip(prompts, completions, strict=True)]


@pytest.fixture
def resampled(trained):
    def train(reward=None, **options):
        options = {"dynamic_sampling_rounds": 2, "per_device_train_batch_size": 16, **options}
        return trained(reward_funcs=reward or Rewards(), callbacks=[Record], cls=Watched, **options)

    return train


def test_counts_in_the_logs_add_up(resampled):
    reward = Rewards()
    trainer = resampled(reward)
    logs, batches = logs_of(trainer), batches_of(trainer)
    assert logs[-1]["rollouts/total"] == reward.scored > 3 * 16
    discarded = sum(entry["dynamic_sampling/discarded"] for entry in logs)
    assert reward.scored == 3 * 16 + discarded
    assert sum(entry["dynamic_sampling/rounds"] for entry in logs) == len(reward.calls) - 3
    assert any(entry["dynamic_sampling/rounds"] == 2 for entry in logs)
    for entry, batch in zip(logs, batches, strict=True):
        thrown_away = batch.discarded.group_ids.numel() if batch.discarded else 0
        assert entry["dynamic_sampling/discarded"] == thrown_away
        if batch.discarded:
            assert batch.discarded.flat_groups().all()
            assert (dataset_rows(batch.discarded) <= 13).any()
        assert entry["reward"] == pytest.approx(batch.rewards.mean().item())
        assert entry["rewards/length/mean"] == pytest.approx(batch.rewards.mean().item())
        assert entry["reward_std"] == pytest.approx(batch.rewards.std().item())
        assert entry["frac_reward_zero_std"] == batch.flat_groups()[batch.group_ids].float().mean().item()


def dataset_rows(batch) -> torch.Tensor:
    return batch.prompt_index[batch.group_ids]


@pytest.mark.parametrize("group_size", ["fixed", "threshold"])
def test_trained_rows_and_tables_are_true_row_by_row(group_size, resampled, dataset):
    trainer = resampled(group_size=group_size)
    batches, outputs = batches_of(trainer), trainer.outputs
    assert any(batch.discarded for batch in batches)
    tokenizer, logs = trainer.processing_class, trainer._logs
    batch, output = batches[-1], outputs[-1]
    prompts = [dataset[i]["prompt"] for i in dataset_rows(batch).tolist()]
    assert list(logs["prompt"]) == prompts
    rewards = [Rewards.of(p, c) for p, c in zip(prompts, logs["completion"], strict=True)]
    assert list(logs["rewards"]["length"]) == batch.rewards.tolist() == rewards
    assert list(logs["extra"]["size"]) == [len(completion) for completion in logs["completion"]]
    expected = group_advantages(torch.tensor(rewards), batch.group_ids, batch.num_groups)
    assert list(logs["advantages"]) == pytest.approx(expected.tolist(), abs=1e-6)
    # What the loss gets: tokens and advantages of the same rows.
    assert torch.equal(output["advantages"], torch.tensor(list(logs["advantages"])))
    masks = output["prompt_mask"].bool(), output["completion_mask"].bool()
    for row in range(16):
        prompt, completion = output["prompt_ids"][row][masks[0][row]], output["completion_ids"][row][masks[1][row]]
        assert tokenizer.decode(prompt, skip_special_tokens=True) == prompts[row]
        assert tokenizer.decode(completion, skip_special_tokens=True) == logs["completion"][row]
    assert output["num_items_in_batch"] == output["completion_mask"].sum()
    assert torch.equal(batch.completion_lengths, output["completion_mask"].sum(1))


def test_logged_lengths_are_those_of_the_trained_rows(resampled):
    trainer = resampled(max_completion_length=24)
    batches = batches_of(trainer)
    assert any(batch.discarded for batch in batches)
    for entry, batch in zip(trainer.state.log_history, batches, strict=False):
        lengths = batch.completion_lengths.float()
        assert entry["completions/min_length"] == lengths.min()
        assert entry["completions/max_length"] == lengths.max()
        assert entry["completions/mean_length"] == pytest.approx(lengths.mean().item())


def test_online_curriculum_does_not_redraw_what_was_discarded(resampled, dataset):
    for batch in batches_of(resampled(dataset=dataset.select(range(13)), curriculum="online")):
        sampled = torch.cat([batch.prompt_index, batch.discarded.prompt_index])
        assert sampled.unique().numel() == sampled.numel() == 12  # all flat: 4 prompts, replaced twice


@pytest.mark.parametrize("curriculum", ["none", "online"])
def test_prompts_stay_distinct_when_fresh_ones_run_out(curriculum, resampled, dataset):
    rows = dataset.select([0, 1, 2, 24, 25])  # 5 prompts for batches of 4
    batches = batches_of(resampled(dataset=rows, curriculum=curriculum, max_steps=6))
    assert any(batch.discarded and batch.discarded.num_groups > 3 for batch in batches)
    for batch in batches:
        assert batch.prompt_index.unique().numel() == batch.num_groups == 4


def test_nothing_is_resampled_without_flat_groups(resampled):
    calls = []

    def alternating(prompts, **kwargs):
        calls.append(len(prompts))
        return [float(i % 2) for i in range(len(prompts))]

    trainer = resampled(alternating, max_steps=2)
    assert calls == [16, 16]
    assert batches_of(trainer)[-1].discarded is None
    last = trainer.state.log_history[1]
    assert last["dynamic_sampling/rounds"] == last["dynamic_sampling/discarded"] == 0
    assert last["rollouts/total"] == 32
