"""The model card: TRL's, and what the run knows of itself. Pure text, but for the picture."""

import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..host.sources import recipes_of
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


def completed(
    card: str,
    sections: dict[str, str],
    name: str,
    question: str | None,
    max_new_tokens: int | None,
    system: str | None = None,
) -> str:
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
        system (`str`, *optional*):
            What the system said first in training.

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
    if system is not None:
        first = json.dumps({"role": "system", "content": system}, ensure_ascii=False)
        card = card.replace('generator([{"role": "user"', f'generator([{first}, {{"role": "user"')
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
    return as_yaml(without_secrets(given))


def as_yaml(values: dict[str, Any]) -> str:
    """A block of YAML with a line for each value; nothing for none."""
    lines = [f"{name}: {json.dumps(value, default=str)}" for name, value in values.items()]
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


def system_of(rows: Any) -> str | None:
    """What the system says first in the first prompt of a dataset; `None` where it says nothing."""
    if not isinstance(rows, Dataset) or len(rows) == 0:
        return None
    prompt = rows[0].get("prompt")
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    said = first.get("content") if isinstance(first, dict) and first.get("role") == "system" else None
    return said if isinstance(said, str) else None


def adapter_section(peft_config: Any) -> str:
    """What a LoRA adapter is made of, as the flags of [`~trl.ModelConfig`]; nothing for another adapter or none."""
    if getattr(peft_config, "r", None) is None:
        return ""
    modules = peft_config.target_modules
    return as_yaml(
        {
            "lora_r": peft_config.r,
            "lora_alpha": peft_config.lora_alpha,
            "lora_dropout": peft_config.lora_dropout,
            "lora_target_modules": modules if isinstance(modules, str) else sorted(modules or []),
        }
    )


def command_section(arguments: Sequence[str]) -> str:
    """
    The command line of the run, without secrets, and without folders above the present one.

    Scripts of this package are named by the command that starts them. What its launcher was told is not known here.
    """
    if not arguments or not arguments[0] or arguments[0].startswith("-"):
        return ""  # of a notebook, or of an interpreter
    script, rest = Path(os.path.relpath(arguments[0])), list(arguments[1:])
    is_above = script.parts[:1] == ("..",)
    package = Path(__file__).resolve().parents[1]
    path = Path(arguments[0]).resolve()
    if path == package / "recipe" / "grpo.py":
        command = ["trl-grpo-ext", "grpo", *rest]
    elif path == package / "__main__.py":
        command = ["trl-grpo-ext", *rest]
    elif path.parent == package / "recipes" or (path.parent == recipes_of(package) and is_above):
        command = ["trl-grpo-ext", "recipe", path.stem, *rest]
    else:
        command = ["accelerate", "launch", script.name if is_above else str(script), *rest]
    home = os.path.expanduser("~")
    return "```bash\n" + shlex.join(str(part).replace(home, "~") for part in without_secrets(command)) + "\n```"


def without_folders(card: str) -> str:
    """
    A card whose front matter names no folder of this machine as the base model.

    Example:

    ```python
    >>> print(without_folders("---\\nbase_model: /\\ntags:\\n- base_model:adapter:/\\n- lora\\n---\\n\\nbase_model: /"))
    ---
    tags:
    - lora
    ---
    <BLANKLINE>
    base_model: /

    ```
    """
    opening, mark, rest = card.partition("---\n")
    front, end, text = rest.partition("\n---")
    if opening or not mark or not end:
        return card
    named = re.compile(r"(?:base_model: |- base_model:\w+:)(.+)")
    found = [(line, named.fullmatch(line)) for line in front.split("\n")]
    kept = [line for line, match in found if match is None or not os.path.isdir(match[1].strip("'\""))]
    return mark + "\n".join(kept) + end + text


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
