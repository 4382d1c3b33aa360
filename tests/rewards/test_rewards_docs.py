"""Every Python block of docs/rewards.md runs, in order, and prints what its comments say."""

import re
from pathlib import Path

import pytest

from trl_grpo_ext.rewards import RewardError, as_reward

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"


def test_blocks_run_and_say_the_truth(monkeypatch):
    built = {}
    # The trainer of the page needs a hub and an accelerator; test_rewards.py trains a tiny one.
    monkeypatch.setattr("trl.GRPOTrainer", lambda **kwargs: built.update(kwargs))
    monkeypatch.setattr("trl.GRPOConfig", dict)
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    checked = 0
    for block in blocks:
        exec(block, namespace)
        for line in block.splitlines():
            if match := re.fullmatch(r"(print\((.+)\)|reward\(.+\))  # (.+)", line):
                call, printed, comment = match.groups()
                result = repr(eval(printed, namespace)) if printed else repr(eval(call, namespace))
                assert result == comment
                checked += 1
    assert checked == 2
    assert built["reward_funcs"].__name__ == "relevance+harmlessness-length"


def test_the_error_message_is_the_one_shown():
    (shown,) = re.findall(r"```text\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    reward = as_reward(lambda completions, **kwargs: [1.0, float("nan")], name="exact")
    with pytest.raises(RewardError, match=re.escape(shown) + "$"):
        reward(prompts=["", ""], completions=["", ""])
