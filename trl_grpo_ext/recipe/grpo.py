"""`trl grpo` with one word changed: TRL's own script, with the trainer, the options and the rewards of this package.

    trl-grpo-ext grpo --config grpo.yaml --num_processes 2
    accelerate launch -m trl_grpo_ext grpo --config grpo.yaml

Every flag and YAML file of `trl grpo` is taken. With no option of this package, the trained weights are those of TRL.
A reward is one of TRL's names, a dotted name, one of ours, or an expression of all of them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import trl
import trl.rewards
from trl import DatasetMixtureConfig, ModelConfig
from trl.scripts import grpo as stock

from ..config import AdaptiveGRPOConfig
from ..host.processes import leave
from ..rewards import Reward, as_reward, parse_reward
from ..rewards.parsing import import_reward, ready
from ..trainer.adaptive import AdaptiveGRPOTrainer
from .flags import FlagParser, meant
from .launch import EPILOG, is_launched, launch, launcher_flags
from .script import checkpoint_of

# Where TRL's script finds the rewards that were read from text, under dotted names: the only ones it imports.
MADE = "trl_grpo_ext_rewards_from_text"
# The names that TRL's script knows. It keeps them to itself, so they stand here; a test pins them.
NAMES = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


@dataclass
class GRPOScriptArguments(stock.GRPOScriptArguments):
    """
    Arguments of TRL's GRPO script, whose `reward_funcs` may also be rewards of this package.

    Parameters:
        reward_funcs (`list[str]`, *optional*):
            Names that TRL takes, rewards of this package, or expressions of both.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Reward functions to use: names of TRL such as `accuracy_reward`, dotted import paths such as "
                "`my_lib.rewards.custom_reward`, rewards of trl_grpo_ext such as `Length()`, or expressions of all of "
                "them, such as \"1.0 * Relevance('reference') - 0.001 * Length()\"."
            )
        },
    )


class ScriptTrainer(AdaptiveGRPOTrainer):
    """[`AdaptiveGRPOTrainer`] as the script calls it, whatever the release of TRL."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """TRL's script passes on where to resume since 1.15."""
        return super().train(resume_from_checkpoint or self.args.resume_from_checkpoint, **kwargs)

    def end(self) -> None:
        """TRL's script calls this since 1.15, and it would end the group of processes without waiting for them."""
        leave()
        super().end()


def make_parser(prog: str | None = None, *further: type) -> FlagParser:
    """The parser of TRL's script, with the options of this package, and of `further` dataclasses."""
    kinds = (GRPOScriptArguments, AdaptiveGRPOConfig, ModelConfig, DatasetMixtureConfig, *further)
    return FlagParser(kinds, prog=prog, epilog=EPILOG)


def main(flags: Sequence[str] | None = None) -> int:
    """Launch the script, or run it where a launcher has started this process. By default with `sys.argv`."""
    flags = sys.argv[1:] if flags is None else flags
    if is_launched():
        return run(flags)
    parser = make_parser("trl-grpo-ext grpo")
    return launch(["-m", __spec__.name], parser, flags, lambda parsed: check(*parsed))


def run(flags: Sequence[str] | None = None) -> int:
    """Train in this process, by TRL's script."""
    parser = make_parser("trl-grpo-ext grpo")
    train(parser, parsed_by(parser, flags))
    return 0


def parsed_by(parser: FlagParser, flags: Sequence[str] | None) -> list[Any]:
    """What a parser makes of the flags of a script that the launcher has started."""
    # A YAML file may hold options of the launcher, which has read them.
    parsed, _, of_line = parser.parse_with_others(flags, launcher_flags())
    if of_line:
        parser.error(f"{of_line[0]} is for the launcher: write it before -m, or start with {parser.prog}")
    return parsed


def train(parser: FlagParser, parsed: Sequence[Any], trainer: type[AdaptiveGRPOTrainer] | None = None) -> None:
    """Run TRL's script with its four dataclasses, and a trainer of this class, by default [`ScriptTrainer`]."""
    script_args, training_args, *others = parsed
    with parser.in_one_line():
        check(script_args, training_args, *others)
        rewards = rewards_of(script_args, import_reward)
    made = ModuleType(MADE)
    for index, reward in enumerate(rewards):
        if isinstance(reward, Reward):
            setattr(made, f"reward_{index}", reward)
    sys.modules[MADE] = made
    script_args.reward_funcs = [
        f"{MADE}.reward_{index}" if isinstance(reward, Reward) else reward for index, reward in enumerate(rewards)
    ]
    with trainer_of_ours(trainer):
        stock.main(script_args, training_args, *others)
    if torch.distributed.is_initialized():  # where the script did not end what it began
        leave()


@contextmanager
def trainer_of_ours(trainer: type[AdaptiveGRPOTrainer] | None = None) -> Iterator[None]:
    """TRL's script, which imports its trainer when it is called, gets ours."""
    if "GRPOTrainer" not in stock.main.__code__.co_names or hasattr(stock, "GRPOTrainer"):
        raise ImportError(f"trl_grpo_ext cannot pass its trainer to the GRPO script of TRL {trl.__version__}")
    theirs = trl.GRPOTrainer
    trl.GRPOTrainer = trainer or ScriptTrainer
    try:
        yield
    finally:
        trl.GRPOTrainer = theirs


def check(script_args: Any, training_args: AdaptiveGRPOConfig, model_args: ModelConfig, dataset_args: Any) -> None:
    """Raise `ValueError` for what would stop the run later; imports no reward."""
    if model_args.model_name_or_path is None:
        raise ValueError("model_name_or_path is not set: name a model in the YAML file or with --model_name_or_path")
    if not dataset_args.datasets and not script_args.dataset_name:
        raise ValueError("no dataset is set: name one with --dataset_name, or list some as `datasets` in the YAML file")
    if not script_args.reward_funcs and not script_args.reward_model_name_or_path:
        raise ValueError("no reward is set: name one with --reward_funcs or --reward_model_name_or_path")
    rewards_of(script_args, lambda name: as_reward(len, name=name))  # in place of the function, which is not called
    training_args.resume_from_checkpoint = checkpoint_of(training_args)


def rewards_of(script_args: Any, importing: Callable[[str], Any]) -> list[str | Reward]:
    """
    What `reward_funcs` holds: a [`Reward`] for each text of ours, and the names that TRL's script imports itself.

    Args:
        script_args (`Any`):
            A YAML file may set one text in place of a list.
        importing (`Callable`):
            Gives the function of a dotted name.
    """

    def lookup(name: str) -> Any:
        if name in dir(trl.rewards):
            return getattr(trl.rewards, name)
        if "." in name:
            return importing(name)
        raise ValueError(f"there is no reward {name!r}{meant(name, [*ready(), *NAMES])}")

    texts = script_args.reward_funcs or []
    rewards: list[str | Reward] = []
    for text in [texts] if isinstance(texts, str) else texts:
        name = str(text).strip()
        if name in NAMES:
            rewards.append(name)
        elif "." in name and all(part.isidentifier() for part in name.split(".")):
            importing(name)
            rewards.append(name)
        else:
            rewards.append(parse_reward(name, lookup))
    return rewards


if __name__ == "__main__":
    sys.exit(run())
