"""
Would this run learn? `trl-grpo-ext check --config run.yaml`, for the YAML files and flags of `trl grpo`.

    python -m trl_grpo_ext.recipe.run_check.command --config run.yaml
    accelerate launch -m trl_grpo_ext.recipe.run_check.command --config run.yaml

TRL's own script makes the trainer, and the check takes the place of its training. Exits with 1 where the run would
learn nothing, or what nobody wants.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import trl
from trl import DatasetMixtureConfig, ModelConfig, TrlParser
from trl.scripts import grpo as stock

from ...config import AdaptiveGRPOConfig
from ...host.processes import leave
from ...trainer.adaptive import AdaptiveGRPOTrainer
from .run import NUM_PROMPTS, check_run

PROG = "trl-grpo-ext check"


class Ready(Exception):  # noqa: N818 (not an error)
    """A script has come to its training, with this trainer."""

    def __init__(self, trainer: AdaptiveGRPOTrainer):
        super().__init__("the trainer is ready")
        self.trainer = trainer


class ReadyTrainer(AdaptiveGRPOTrainer):
    """[`AdaptiveGRPOTrainer`] that is handed over where it would begin to train."""

    def train(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise Ready(self)


@contextmanager
def trainer_of_ours() -> Iterator[None]:
    """TRL's script, which imports its trainer when it is called, gets [`ReadyTrainer`]."""
    if "GRPOTrainer" not in stock.main.__code__.co_names or hasattr(stock, "GRPOTrainer"):
        raise ImportError(f"trl_grpo_ext cannot pass its trainer to the GRPO script of TRL {trl.__version__}")
    theirs = trl.GRPOTrainer
    trl.GRPOTrainer = ReadyTrainer
    try:
        yield
    finally:
        trl.GRPOTrainer = theirs


def trainer_from(flags: Sequence[str]) -> AdaptiveGRPOTrainer:
    """The trainer that TRL's script makes of its flags. This is all that the check knows of the script."""
    parser = TrlParser((stock.GRPOScriptArguments, AdaptiveGRPOConfig, ModelConfig, DatasetMixtureConfig), prog=PROG)
    try:
        parsed = parser.parse_args_and_config(list(flags))
        with trainer_of_ours():
            stock.main(*parsed)
    except Ready as ready:
        return ready.trainer
    raise RuntimeError("TRL's script did not train")


def own_parser() -> argparse.ArgumentParser:
    """The flags of the check; those of the run are TRL's."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Check a run before it starts: sample, score and update as it would, and say what came of it.",
        epilog="All other flags, such as --config run.yaml, are those of `trl grpo`.",
        allow_abbrev=False,
    )
    parser.add_argument("--check_prompts", type=int, default=NUM_PROMPTS, help="prompts to sample (%(default)s)")
    parser.add_argument("--check_answers", type=int, help="answers to each (num_generations, but 4 to 8)")
    parser.add_argument("--check_reference", help="column with the references (looked for)")
    parser.add_argument("--check_output", help="page to write (check.html in output_dir)")
    return parser


def main(flags: Sequence[str] | None = None) -> int:
    """Check the run of the flags, by default of the command line; 1 where it would not learn, 2 for bad flags."""
    own, others = own_parser().parse_known_args(None if flags is None else list(flags))
    try:
        trainer = trainer_from(others)
        output = own.check_output or trainer.args.output_dir
        result = check_run(
            trainer,
            num_prompts=own.check_prompts,
            num_answers=own.check_answers,
            reference=own.check_reference,
            output=output,
        )
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if result.page is not None:
        print(f"Page: {result.page}")
    leave()
    return 0 if result.learns else 1


if __name__ == "__main__":
    sys.exit(main())
