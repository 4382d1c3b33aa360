"""The batch answers for itself: tokens, advantages, groups, and what is left when groups are taken out or put back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import NAN, batch_of
from strategies import close

GROUPS = st.lists(st.lists(st.floats(-10, 10, width=32) | st.just(NAN), min_size=1, max_size=4), min_size=1, max_size=5)


@st.composite
def batches(draw):
    """Groups of any size with lengths of completions, and advantages for each completion or each token."""
    batch = batch_of(dict(enumerate(draw(GROUPS))))
    count = len(batch.rewards)
    lengths = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    batch.completion_lengths = torch.tensor(lengths)
    shape = (count, max(lengths)) if draw(st.booleans()) else (count,)
    batch.advantages = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    return batch


@given(batches())
def test_tokens_are_where_a_completion_has_some(batch):
    lengths = batch.completion_lengths.tolist()
    assert batch.token_mask.tolist() == [[t < length for t in range(max(lengths))] for length in lengths]


@given(batches())
def test_advantages_end_with_the_completion_and_their_mean_is_that_of_its_tokens(batch):
    lengths = batch.completion_lengths.tolist()
    per_token, mean = batch.token_advantages, batch.mean_advantages
    assert mean.shape == batch.rewards.shape
    if batch.advantages.dim() == 1:
        assert torch.equal(per_token, batch.advantages[:, None])
        assert torch.equal(mean, batch.advantages)
        return
    for row, length in enumerate(lengths):
        own = batch.advantages[row, :length]
        assert torch.equal(per_token[row, :length], own)
        assert not per_token[row, length:].any()
        close(mean[row], own.mean() if length else torch.tensor(0.0))


def test_what_lies_behind_the_end_of_a_completion_does_not_count():
    batch = batch_of([[1.0, 0.0]], completion_lengths=torch.tensor([1, 2]))
    batch.advantages = torch.tensor([[1.0, NAN], [2.0, 4.0]])
    assert batch.token_advantages.tolist() == [[1.0, 0.0], [2.0, 4.0]]
    assert batch.mean_advantages.tolist() == [1.0, 3.0]


@given(GROUPS, st.data())
def test_taken_out_and_put_back_all_groups_are_there(groups, data):
    batch = batch_of(dict(enumerate(groups)))
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(groups), max_size=len(groups))))
    some, others = batch.select(chosen), batch.select(~chosen)
    assert some.num_groups + others.num_groups == batch.num_groups
    some.append(others)
    order = torch.cat([chosen.nonzero(), (~chosen).nonzero()]).flatten().tolist()
    expected = batch_of({index: groups[index] for index in order})
    for name in ("group_ids", "group_sizes", "prompt_index"):
        assert torch.equal(getattr(some, name), getattr(expected, name)), name
    for name in ("rewards", "rewards_per_func", "raw_rewards_per_func"):
        torch.testing.assert_close(getattr(some, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


def test_groups_of_trls_own_sampler_have_no_prompts():
    batch = batch_of([[1.0], [2.0, 3.0]])
    one = batch.select(torch.tensor([False, True]))
    one.append(batch.select(torch.tensor([True, False])))
    assert one.prompt_index is None
    assert one.rewards.tolist() == [2.0, 3.0, 1.0]
    assert one.group_ids.tolist() == [0, 0, 1]


def test_parts_are_all_that_was_sampled():
    batch = batch_of({3: [1.0, 0.0]})
    assert batch.parts == [batch]
    batch = batch_of({3: [1.0, 0.0]}, discarded={4: [1.0, 1.0], 5: [0.0]})
    assert [part.prompt_index.tolist() for part in batch.parts] == [[3], [4, 5]]
    assert [part.flat_groups().tolist() for part in batch.parts] == [[False], [True, True]]


def test_statistics_by_hand():
    batch = batch_of([[1.0, 3.0, NAN], [5.0]])
    mean, std, count = batch.group_stats()
    assert (mean.tolist(), count.tolist()) == ([2.0, 5.0], [2.0, 1.0])
    assert std.tolist() == pytest.approx([2**0.5, 0.0])
