"""Layout of packed sequences and choice of rows: properties for any group sizes and lengths."""

from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_grpo_ext.compute.packing import PADDING, PROMPT, Costs, exclusive_cumsum, fill, may_attend, pack
from trl_grpo_ext.compute.rows import Cut, first_with_context, live_rows, media_keys, regrouped, used_columns

batches = st.lists(  # groups: length of the prompt, lengths of its completions
    st.tuples(st.integers(1, 12), st.lists(st.integers(0, 9), min_size=1, max_size=9)), min_size=1, max_size=5
)
costs = st.sampled_from([Costs(1.0, 0.0, float("inf")), Costs(1e6, 1e3), Costs(10.0, 1.0, 1.0), Costs(1.0, 1e3, 2.0)])


def padded(groups):
    """Ids that name their place: prompt `g` holds 1000 (g + 1) + position, completion `i` 100 (i + 1) + position."""
    width = max(length for length, _ in groups)
    depth = max(max(lengths) for _, lengths in groups) or 1
    prompts, prompt_lengths, lengths, ids, mask = [], [], [], [], []
    for g, (length, completions) in enumerate(groups):
        for completion in completions:
            row = len(prompts)
            prompts.append(g)
            prompt_lengths.append(length)
            lengths.append(completion)
            prompt = [1000 * (g + 1) + t for t in range(length)]
            answer = [100_000 * (row + 1) + t for t in range(completion)]
            ids.append([0] * (width - length) + prompt + answer + [0] * (depth - completion))
            mask.append([0] * (width - length) + [1] * (length + completion) + [0] * (depth - completion))
    return *(torch.tensor(x) for x in (prompts, prompt_lengths, lengths, ids, mask)), depth


@settings(max_examples=150)
@given(groups=batches, costs=costs)
def test_every_token_sees_what_it_would_see_in_its_own_row(groups, costs):
    prompts, prompt_lengths, lengths, ids, mask, depth = padded(groups)
    packing = pack(prompts, prompt_lengths, lengths, costs)
    if packing is None:
        return
    batch = fill(packing, ids, mask, depth)
    allowed = may_attend(batch.chunks, batch.rows)[:, 0]
    assert batch.input_ids.shape == (packing.num_sequences, packing.length)
    scored = (batch.labels != -100).sum().item()
    assert scored == lengths.sum().item()
    for row in range(len(ids)):
        tokens = ids[row][mask[row] == 1].tolist()
        prompt_length = int(prompt_lengths[row])
        for t in range(int(lengths[row])):
            sequence, position = divmod(int(batch.index[row, t]), packing.length)
            assert batch.labels[sequence, position] == tokens[prompt_length + t]
            seen = allowed[sequence, position]
            # What it sees, in the order of positions, is its own row up to the token before the label.
            order = batch.position_ids[sequence][seen].argsort()
            assert batch.input_ids[sequence][seen][order].tolist() == tokens[: prompt_length + t]
            shift = int((mask[row] == 1).nonzero()[0])  # positions are columns of the padded batch
            assert batch.position_ids[sequence][seen].sort().values.tolist() == list(
                range(shift, shift + prompt_length + t)
            )
    assert allowed.any(-1).all()  # a query that sees nothing would be NaN
    assert ((batch.rows == PADDING) == (batch.chunks == PADDING)).all()
    assert (batch.labels[(batch.rows == PROMPT) | (batch.rows == PADDING)] == -100).all()


@settings(max_examples=100)
@given(groups=batches, costs=costs)
def test_a_layout_costs_less_and_keeps_to_the_cap(groups, costs):
    prompts, prompt_lengths, lengths, _, _, _ = padded(groups)
    packing = pack(prompts, prompt_lengths, lengths, costs)
    if packing is not None:
        longest = int(prompt_lengths.max() + lengths.max())
        assert costs.of(packing.num_sequences, packing.length) < costs.of(len(prompts), longest)
        assert packing.num_sequences * packing.length**2 <= costs.max_area * len(prompts) * longest**2


def sizes(prompt, completion, group, token, pair, max_area=4.0):
    prompts = torch.arange(2 * group) // group
    rows = 2 * group
    packing = pack(prompts, torch.full((rows,), prompt), torch.full((rows,), completion), Costs(token, pair, max_area))
    return None if packing is None else (packing.num_sequences, packing.length)


def test_long_completions_are_split():
    # SmolLM2-135M: 1.3e8 weights per token, 2 x 576 x 30 multiplications per pair.
    assert sizes(64, 48, 8, 1.3e8, 34560) == (2, 63 + 8 * 48)
    # Four completions of 512 per copy of a prompt of 1024: with eight, pairs would cost more than the prompt saves.
    assert sizes(1024, 512, 8, 1.3e8, 34560) == (4, 1023 + 4 * 512)
    assert sizes(512, 5120, 8, 1.3e8, 34560) is None
    # The cap alone: free pairs would put everything into one sequence.
    assert sizes(64, 48, 8, 1.0, 0.0, float("inf")) == (1, 2 * (63 + 8 * 48))
    assert sizes(64, 48, 8, 1.0, 0.0, 2.0) == (2, 63 + 8 * 48)


def test_nothing_to_share():
    different = pack(torch.arange(4), torch.full((4,), 9), torch.full((4,), 5), Costs(1e6, 1e3))
    assert different is None or different.num_sequences * different.length < 4 * 14


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1))
def test_exclusive_cumsum_against_a_loop(pairs):
    values, segments = torch.tensor(pairs).T
    expected = [sum(v for v, s in pairs[:i] if s == pairs[i][1]) for i in range(len(pairs))]
    assert exclusive_cumsum(values, segments).tolist() == expected


def test_rows_that_teach():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    assert live_rows(torch.tensor([0.0, 0.5, 1.0, 0.0]), mask).tolist() == [False, True, False, False]
    per_token = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0, 0], [1.0, 1, 1], [0.0, 0, -1]])
    assert live_rows(per_token, mask).tolist() == [False, False, False, True]
    assert live_rows(torch.tensor([float("nan"), 0, 0, 0]), mask).tolist() == [True, False, False, False]
    assert live_rows(torch.zeros(4), mask).tolist() == [False, True, False, False]
    assert live_rows(torch.zeros(4), torch.zeros(4, 3, dtype=torch.long)).sum() == 1


def test_columns():
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]])
    assert used_columns(mask, 3, trim_left=True) == slice(1, 5)
    assert used_columns(mask, 3, trim_left=False) == slice(0, 5)
    nothing = torch.tensor([[0, 1, 1, 0, 0]])
    assert used_columns(nothing, 2, trim_left=True) == slice(1, 4)  # one column of the completion stays


def micro_batches(groups, lengths, size):
    rows = len(groups)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    whole = {
        "prompt_ids": torch.tensor(groups)[:, None] + 5,
        "prompt_mask": torch.ones(rows, 1, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.arange(rows).float(),
        "tool_mask": None,
        "num_items_in_batch": torch.tensor(9.0),
    }
    return [
        {k: v if v is None or v.dim() == 0 else v[i : i + size] for k, v in whole.items()} for i in range(0, rows, size)
    ]


def rows_of(parts):
    return [part["advantages"].int().tolist() for part in parts]


def test_groups_come_in_the_order_of_the_shuffle():
    parts = micro_batches([2, 0, 2, 1, 0, 1, 0, 2], [3, 1, 4, 1, 5, 9, 2, 6], 4)
    found = regrouped(parts, num_accumulated=1, by_group=True, by_length=False)
    assert rows_of(found) == [[0, 2, 7, 1], [4, 6, 3, 5]]
    assert found[0]["tool_mask"] is None
    assert found[0]["num_items_in_batch"] == 9.0


@pytest.mark.parametrize("by_group", [False, True])
def test_length_orders_within_an_optimizer_step_only(by_group):
    parts = micro_batches([2, 0, 2, 1, 0, 1, 0, 2], [3, 1, 4, 1, 5, 9, 2, 6], 2)
    found = rows_of(regrouped(parts, num_accumulated=2, by_group=by_group, by_length=True))
    if by_group:  # group 2 is the longest of the first step; the row of group 0 that came with it follows
        assert found == [[0, 2], [7, 1], [3, 5], [4, 6]]
    else:
        assert found == [[2, 0], [1, 3], [5, 7], [4, 6]]


@pytest.mark.parametrize(("num_accumulated", "ordered"), [(1, True), (2, True), (3, False), (4, True), (8, True)])
def test_length_does_not_order_where_a_step_goes_on_in_the_next_batch(num_accumulated, ordered):
    parts = micro_batches([0] * 8, [3, 1, 4, 1, 5, 9, 2, 6], 2)
    found = rows_of(regrouped(parts, num_accumulated, by_group=False, by_length=True))
    assert (found != rows_of(parts)) == ordered


@given(st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans(), st.data())
def test_no_row_is_lost(size, num_accumulated, by_group, by_length, data):
    rows = size * 4
    groups = data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=rows, max_size=rows))
    parts = micro_batches(groups, lengths, size)
    found = regrouped(parts, num_accumulated, by_group, by_length)
    assert [len(part) for part in rows_of(found)] == [size] * 4
    order = list(chain(*rows_of(found)))
    assert sorted(order) == list(range(rows))
    if not by_group:  # rows stay in their optimizer step
        window = size * num_accumulated
        for i in range(0, rows, window):
            assert sorted(order[i : i + window]) == list(range(rows))[i : i + window]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(1, 2), max_size=5)), min_size=1, max_size=8))
def test_rows_that_begin_alike(rows):
    """Against a loop over prefixes; rows of a prompt that have ended are no model for those that go on."""
    depth = max(len(completion) for _, completion in rows) or 1
    ids = torch.tensor([[prompt, *completion, *[0] * (depth - len(completion))] for prompt, completion in rows])
    mask = torch.tensor([[1] + [1] * len(c) + [0] * (depth - len(c)) for _, c in rows])
    found = first_with_context(ids, mask, depth)
    for i, (prompt, completion) in enumerate(rows):
        for t in range(len(completion)):
            alike = [j for j, (p, c) in enumerate(rows) if p == prompt and len(c) > t and c[:t] == completion[:t]]
            assert found[i, t] == alike[0]


@settings(max_examples=40)
@given(batches, st.booleans(), st.data())
def test_what_is_cut_comes_back_to_its_place(groups, trim_left, data):
    _, _, _, ids, mask, depth = padded(groups)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=1, unique=True)))
    cut = Cut.of(ids, mask, depth, rows, trim_left)
    assert (cut.attention_mask.sum() == mask[rows].sum()) or not mask[rows, -depth:].any()
    restored = cut.restored(cut.input_ids[:, -cut.num_completion_columns :] * 1.0)
    assert torch.equal(restored[rows], ids[rows, -depth:].float())
    others = [row for row in range(len(ids)) if row not in rows.tolist()]
    assert (restored[others] == 0).all()
    assert cut.first_position == 0 or trim_left
    assert torch.equal(cut.input_ids[:, 0], ids[rows, cut.first_position])


def test_entries_of_other_features_go_with_their_rows():
    parts = micro_batches([0, 1, 0, 1], [1, 2, 3, 4], 2)
    for i, part in enumerate(parts):
        part |= {"weight": torch.tensor([2.0 * i, 2.0 * i + 1]), "name": [f"row {2 * i}", f"row {2 * i + 1}"]}
    found = regrouped(parts, num_accumulated=1, by_group=True, by_length=False)
    for part in found:
        assert part["weight"].tolist() == part["advantages"].tolist()
        assert part["name"] == [f"row {row:.0f}" for row in part["advantages"]]
    assert media_keys(parts[0]) == []
    assert media_keys({**parts[0], "pixel_attention_mask": 1, "num_tiles": 1}) == ["pixel_attention_mask", "num_tiles"]
