"""The model card: TRL's, and what the run knows of itself. Pure text, but for the picture."""

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..observe.chosen import chosen_options
from ..observe.held_out import HeldOut
from ..observe.paired import NOISE, paired
from ..observe.secrets import hide, without_secrets
from ..rewards import Reward

PICTURE = "reward.png"
# Options that say nothing of the model: places, names, logs, and what the machine needs.
ELSEWHERE = re.compile(
    r".*_dir|hub_.*|push_to_hub|run_name|project|trackio_.*|report_to|logging_.*|log_.*|num_completions_to_print"
    r"|disable_tqdm|save_.*|eval_.*|do_.*|dataloader_.*|ddp_.*|use_cpu|bf16|fp16|tf32|resume_from_checkpoint|model_init_kwargs"
    r"|generation_batch_size|monitor|include_.*|push_.*|local_rank|accelerator_config"
)


def completed(card: str, sections: dict[str, str], name: str, question: str | None, max_new_tokens: int | None) -> str:
    """
    A card of TRL with sections of its own before the versions, and a quick start that asks what the model was asked.

    Args:
        card (`str`):
            What TRL wrote.
        sections (`dict[str, str]`):
            Markdown by title; empty ones are left out.
        name (`str`):
            What to load where TRL knows no repository.
        question (`str`, *optional*):
            A prompt that the model was evaluated on.
        max_new_tokens (`int`, *optional*):
            Length of its answers in training.

    Example:

    ```python
    >>> card = 'generator = pipeline("text-generation", model="None")\\n\\n### Framework versions\\n'
    >>> print(completed(card, {"Reward": "`Length()`", "Empty": ""}, "helpful", None, None))
    generator = pipeline("text-generation", model="helpful")
    <BLANKLINE>
    ### Reward
    <BLANKLINE>
    `Length()`
    <BLANKLINE>
    ### Framework versions
    <BLANKLINE>

    ```
    """
    own = "".join(f"### {title}\n\n{text}\n\n" for title, text in sections.items() if text)
    before, mark, after = card.partition("### Framework versions")
    card = before + own + mark + after if mark else f"{card}\n\n{own}"
    card = card.replace("[None](https://huggingface.co/None)", "a model in a local folder")
    card = card.replace('model="None"', f"model={json.dumps(name)}")
    if question is not None:
        asked = f"question = {json.dumps(question, ensure_ascii=False)}"
        card = re.sub(r"^question = .*$", lambda match: asked, card, flags=re.MULTILINE)
    if max_new_tokens is not None:
        card = re.sub(r"max_new_tokens=\d+", f"max_new_tokens={max_new_tokens}", card)
    return card


def reward_section(rewards: Sequence[Any], names: Sequence[str], weights: Sequence[float]) -> str:
    """The expression of each reward with its weight; the name of a function or a model."""
    lines = []
    for reward, name, weight in zip(rewards, names, weights, strict=True):
        text = repr(reward) if isinstance(reward, Reward) else name
        lines.append(f"{weight:g} * {text}" if len(names) > 1 or weight != 1 else text)
    return "```python\n" + "\n".join(hide(line) for line in lines) + "\n```"


def options_section(args: Any) -> str:
    """The options of a configuration that somebody chose, as YAML; see [`~trl_grpo_ext.observe.chosen`]."""
    chosen = chosen_options(args.to_dict(), type(args))
    given = {n: value for n, value in chosen.items() if value is not None and not ELSEWHERE.fullmatch(n)}
    lines = [f"{name}: {json.dumps(value, default=str)}" for name, value in without_secrets(given).items()]
    return "```yaml\n" + "\n".join(lines) + "\n```" if lines else ""


def held_out_section(before: HeldOut | None, after: HeldOut | None) -> str:
    """A table of the means before and after, with the noise of the paired difference."""
    if before is None or after is None:
        return ""
    lines = ["| | before | after | change |", "| --- | --- | --- | --- |"]
    for name in before.scores:
        if name not in after.scores:
            continue
        gain = paired(before.per_prompt(name), after.per_prompt(name))
        if gain.count == 0:
            continue
        noise = f" ± {NOISE * gain.error:.3g}" if gain.is_known else " (too few prompts to tell)"
        lines.append(f"| {name} | {before.mean(name):.3g} | {after.mean(name):.3g} | {gain.mean:+.3g}{noise} |")
    asked = f"Answers to {after.num_prompts} held-out prompts; the noise is twice the standard error of the change.\n\n"
    return asked + "\n".join(lines)


def command_section(arguments: Sequence[str]) -> str:
    """The command line of the run, without secrets, and without folders above the present one."""
    if not arguments or not arguments[0] or arguments[0].startswith("-"):
        return ""  # of a notebook, or of an interpreter
    script = os.path.relpath(arguments[0])
    shown = without_secrets([Path(script).name if script.startswith("..") else script, *arguments[1:]])
    home = os.path.expanduser("~")
    return "```bash\naccelerate launch " + shlex.join(str(part).replace(home, "~") for part in shown) + "\n```"


def draw(history: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw the reward over the rollouts, of the training and of the evaluation. Whether there was anything to draw."""
    try:
        import matplotlib
    except ImportError:
        return False
    lines: dict[str, tuple[list[float], list[float]]] = {"reward": ([], []), "eval_reward": ([], [])}
    rollouts = 0.0
    for entry in history:
        rollouts = entry.get("rollouts/total", rollouts)
        for name, (x, y) in lines.items():
            if isinstance(entry.get(name), int | float):
                x.append(rollouts)
                y.append(entry[name])
    if len(lines["reward"][0]) < 2:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.2), constrained_layout=True)
    for (x, y), (label, style) in zip(lines.values(), (("training", "-"), ("held-out", "o-")), strict=True):
        if x:
            axis.plot(x, y, style, label=label)
    axis.set(xlabel="completions", ylabel="reward")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
