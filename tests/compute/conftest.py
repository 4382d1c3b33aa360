"""Trainers whose gradients are compared."""

from functools import partial

import pytest
from gradients import both_of


@pytest.fixture
def both(model_path, dataset, tmp_path):
    """TRL's trainer and ours, by `both_of`."""
    return partial(both_of, model_path, dataset, tmp_path)
