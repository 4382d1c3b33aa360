"""A picture of a run: rewards, group sizes and informative share, curriculum."""

from pathlib import Path

# Colours that colour-blind readers tell apart (Okabe and Ito, 2008).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def plot_run(log_history: list[dict[str, float]], path: str | Path) -> None:
    """
    Draw the metrics that the trainer logged against the number of rollouts.

    Args:
        log_history (`list[dict[str, float]]`):
            `trainer.state.log_history`.
        path (`str` or `Path`):
            PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [entry for entry in log_history if "reward" in entry]
    x = [entry.get("rollouts/total", entry["step"]) for entry in steps]

    def series(name: str) -> list[float]:
        return [float("nan") if entry.get(name) is None else entry[name] for entry in steps]

    means = [key for key in (steps[0] if steps else {}) if key.startswith("rewards/") and key.endswith("/mean")]
    parts = [key for key in means if key.split("/")[1].isidentifier()]
    small = [key for key in parts if max((abs(v) for v in series(key) if v == v), default=0) <= 10]
    large = [key for key in parts if key not in small]

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    (rewards, tokens), (groups, shares) = axes
    rewards.plot(x, series("reward"), color="black", linewidth=2, label="total")
    for color, key in zip(COLORS, small, strict=False):
        rewards.plot(x, series(key), color=color, label=key.split("/")[1])
    harder = ", which get harder" if any(value == value for value in series("curriculum/position")) else ""
    rewards.set(title=f"Rewards of the training prompts{harder}", ylabel="mean reward (raw)")
    for color, key in zip(COLORS, large, strict=False):
        tokens.plot(x, series(key), color=color, label=key.split("/")[1])
    if not large:
        tokens.plot(x, series("completions/mean_length"), color=COLORS[0], label="completion length")
    tokens.set(title="Length of the completions", ylabel="mean length (tokens)")
    tokens.set_ylim(bottom=0)
    groups.fill_between(
        x, series("group_size/min"), series("group_size/max"), color=COLORS[4], alpha=0.4, label="range"
    )
    groups.plot(x, series("group_size/mean"), color=COLORS[0], label="mean")
    groups.set(title="Group size", ylabel="completions per prompt")
    for color, (name, label) in zip(
        COLORS,
        {
            "rollouts/informative": "informative rollouts",
            "reward_clip/frac": "clipped rewards",
            "curriculum/position": "curriculum position (0 easy, 1 hard)",
        }.items(),
        strict=False,
    ):
        if any(value == value for value in series(name)):
            shares.plot(x, series(name), color=color, label=label)
    shares.set(title="Shares", ylabel="share", ylim=(-0.05, 1.05))
    for axis in axes.flat:
        axis.set_xlabel("rollouts sampled")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, ncols=3, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.savefig(path, dpi=120)
    plt.close(figure)
