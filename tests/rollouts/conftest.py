"""Trainers of conversations."""

import pytest
from kit import Record
from rollout_helpers import Recorder, length_of_text, make_conversations


@pytest.fixture
def make_trainer(make_trainer):
    """The kit's, of conversations, which remembers its sequences and its finished batches. `trained` has it too."""

    def make(out="run", **given):
        defaults = {"cls": Recorder, "reward_funcs": length_of_text, "dataset": make_conversations()}
        defaults |= {"per_device_train_batch_size": 16, "callbacks": ()}
        given = {**defaults, **given}
        return make_trainer(out, **{**given, "callbacks": [*given["callbacks"], Record()]})

    return make
