"""Names of a row and of a column: what a transform makes, what it leaves out, and what a format shows."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.plan.columns import column_values, fetched_rows, known_names, row_keys
from trl_grpo_ext.plan.difficulty import read_difficulty
from trl_grpo_ext.plan.posterior import posterior_of

LEVELS = ["easy", "hard"]


def raw() -> Dataset:
    return Dataset.from_dict({"question": ["a", "b", "c"], "level": [1, 2, 3]})


def named(columns):
    names = ["easy" if level < 3 else "hard" for level in columns["level"]]
    return {"prompt": columns["question"], "level": names, "extra": names}


@pytest.mark.parametrize(
    ("dataset", "keys"),
    [
        (raw(), ["question", "level"]),
        (raw().with_transform(named), ["prompt", "level", "extra"]),
        (raw().with_format("torch"), ["question", "level"]),
        (raw().with_format("torch", columns=["level"]), ["level"]),
        (raw().select([]), ["question", "level"]),
    ],
)
def test_keys_are_those_of_the_rows(dataset, keys):
    assert row_keys(dataset) == keys
    rows = list(fetched_rows(dataset, ["prompt", "level"]))
    assert len(rows) == len(dataset)
    for row in rows:
        assert {name for name in ("prompt", "level") if name in keys} <= set(row)
    assert len(list(fetched_rows(dataset, ["nothing"]))) == len(dataset)


def test_what_a_transform_makes_counts_before_the_column():
    dataset = raw().with_transform(named)
    assert column_values(dataset, "level") == ["easy", "easy", "hard"]
    assert column_values(dataset, "extra") == ["easy", "easy", "hard"]
    assert column_values(dataset, "question") == ["a", "b", "c"]  # the transform leaves it out
    assert column_values(dataset, "prompt") == ["a", "b", "c"]
    assert column_values(dataset, "other") is None
    assert known_names(dataset) == ["prompt", "level", "extra", "question"]


@pytest.mark.parametrize("make", [torch.tensor, np.array, list, lambda values: torch.tensor(values)[:, None]])
def test_difficulties_of_any_type(make):
    dataset = raw().with_transform(lambda columns: {"score": make([0.5 * level for level in columns["level"]])})
    assert read_difficulty(dataset, "score", LEVELS) == [0.5, 1.0, 1.5]


def test_difficulties_of_a_transform():
    dataset = raw().with_transform(named)
    assert read_difficulty(dataset, "extra", LEVELS) == ["easy", "easy", "hard"]
    with pytest.raises(ValueError, match=r"which has \['prompt', 'level', 'extra', 'question'\]: name one of them"):
        read_difficulty(dataset, "other", LEVELS)
    for format in ("torch", "numpy", "pandas"):
        assert read_difficulty(raw().with_format(format), "level", LEVELS) == [1, 2, 3]


def test_strata_of_a_transform(tmp_path):
    args = AdaptiveGRPOConfig(
        str(tmp_path), difficulty_column="extra", difficulty_levels=LEVELS, use_cpu=True, bf16=False
    )
    posterior = posterior_of(args, raw().with_transform(named), decay=0.9, prior=1.0)
    assert posterior.strata.tolist() == [0, 0, 1]
