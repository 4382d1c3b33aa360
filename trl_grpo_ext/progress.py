"""A progress bar with one readable line per logged step, in place of a printed dictionary."""

from transformers import ProgressCallback

# Metric -> (label, format). Components of a composed reward are added by name.
FIELDS = {
    "reward": ("reward", "{:.3f}"),
    "kl": ("kl", "{:.3g}"),
    "grad_norm": ("grad", "{:.2f}"),
    "rollouts/informative": ("informative", "{:.0%}"),
    "reward_clip/frac": ("clipped", "{:.0%}"),
    "curriculum/difficulty": ("difficulty", "{:.2f}"),
}


def readable(logs: dict[str, float], step: int, max_steps: int) -> str:
    """
    One line for the metrics of a training step.

    Args:
        logs (`dict[str, float]`):
            What the trainer logs.
        step (`int`):
            Optimizer steps done.
        max_steps (`int`):
            Optimizer steps in all.

    Returns:
        `str`:
            The line.

    Example:

    ```python
    >>> readable({"reward": 0.5, "rewards/length/mean": 31.0, "group_size/min": 2, "group_size/max": 8}, 3, 16)
    'step  3/16 · reward 0.500 · length 31 · groups 2-8'

    ```
    """
    parts = [f"step {step:>{len(str(max_steps))}}/{max_steps}"]
    if logs.get("reward") is not None:
        parts.append(f"reward {logs['reward']:.3f}")
    for key, value in logs.items():
        name = key.removeprefix("rewards/").removesuffix("/mean")
        # A composed reward is logged by TRL under a name made of its parts; they say it better.
        if key.startswith("rewards/") and key.endswith("/mean") and value is not None and name.isidentifier():
            parts.append(f"{name} {value:.3f}" if abs(value) < 10 else f"{name} {value:.0f}")
    for key, (label, form) in FIELDS.items():
        if key != "reward" and logs.get(key) is not None:
            parts.append(f"{label} {form.format(float(logs[key]))}")
    if logs.get("group_size/min") is not None:
        parts.append(f"groups {logs['group_size/min']:.0f}-{logs['group_size/max']:.0f}")
    if logs.get("dynamic_sampling/discarded"):
        parts.append(f"replaced {logs['dynamic_sampling/discarded']:.0f} rows")
    return " · ".join(parts)


class ReadableProgressCallback(ProgressCallback):
    """
    transformers' progress bar, with a readable line for each log.

    Example:

    ```python
    >>> from transformers import ProgressCallback
    >>> trainer.remove_callback(ProgressCallback)  # doctest: +SKIP
    >>> trainer.add_callback(ReadableProgressCallback)  # doctest: +SKIP

    ```
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.write(readable(logs, state.global_step, state.max_steps))
