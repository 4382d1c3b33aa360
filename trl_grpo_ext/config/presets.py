"""Sets of options that go together, for `AdaptiveGRPOConfig(**EFFICIENT)`; the same as YAML in `recipes/configs`."""

from typing import Any

# What takes fewest rollouts: many prompts a batch, a guess for each, a low baseline, several looks at each batch.
EFFICIENT: dict[str, Any] = {
    "group_size": "single",
    "baseline": "predicted",
    "baseline_shift": 0.5,
    "scale_rewards": "batch",
    "curriculum": "predicted",
    "num_iterations": 4,
    "reuse_drift_limit": 0.05,
}
# The same for prompts so long that reading each of them costs more than sampling: half as many, two completions each.
EFFICIENT_LONG_PROMPTS = EFFICIENT | {"group_size": "fixed", "num_generations": 2, "baseline": "shrunk"}
EFFICIENT_LONG_PROMPTS |= {"share_prompts": True}
