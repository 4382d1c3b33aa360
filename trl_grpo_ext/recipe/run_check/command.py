"""
Would this run learn? For the YAML files and flags of `trl-grpo-ext grpo`, which TRL calls `trl grpo`.

    trl-grpo-ext check --config run.yaml
    accelerate launch -m trl_grpo_ext.recipe.run_check.command --config run.yaml

TRL's own script makes the trainer, and the check takes the place of its training. Exits with 1 where the run would
learn nothing, or what nobody wants.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ...host.processes import leave
from ...trainer.adaptive import AdaptiveGRPOTrainer
from .. import grpo
from ..launch import is_launched, launch
from .run import NUM_PROMPTS, check_run

PROG = "trl-grpo-ext check"


@dataclass
class CheckOptions:
    """
    Options of the check, beside those of the run.

    Parameters:
        check_prompts (`int`, *optional*, defaults to `24`), check_answers (`int`, *optional*):
            Prompts to sample, and answers to each. The latter defaults to `num_generations`, but 4 to 8.
        check_reference (`str`, *optional*):
            Column with the references.
        check_output (`str`, *optional*):
            Page to write.
    """

    check_prompts: int = field(default=NUM_PROMPTS, metadata={"help": "Prompts to sample."})
    check_answers: int | None = field(
        default=None, metadata={"help": "Answers to each prompt. Defaults to num_generations, but 4 to 8."}
    )
    check_reference: str | None = field(
        default=None, metadata={"help": "Column with the references. Defaults to the first of the usual names."}
    )
    check_output: str | None = field(
        default=None, metadata={"help": "Page to write. Defaults to check.html in output_dir."}
    )


class Ready(Exception):  # noqa: N818 (not an error)
    """A script has come to its training, with this trainer."""

    def __init__(self, trainer: AdaptiveGRPOTrainer):
        super().__init__("the trainer is ready")
        self.trainer = trainer


class ReadyTrainer(AdaptiveGRPOTrainer):
    """[`AdaptiveGRPOTrainer`] that is handed over where it would begin to train."""

    def train(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise Ready(self)


def main(flags: Sequence[str] | None = None) -> int:
    """Launch the check, or run it where a launcher has started this process. By default with `sys.argv`."""
    flags = sys.argv[1:] if flags is None else flags
    if is_launched():
        return run(flags)
    parser = grpo.make_parser(PROG, CheckOptions)
    return launch(["-m", __spec__.name], parser, flags, lambda parsed: grpo.check(*parsed[:-1]))


def run(flags: Sequence[str] | None = None) -> int:
    """Check in this process: 0 where nothing speaks against the run, 1 where it would not learn."""
    parser = grpo.make_parser(PROG, CheckOptions)
    *of_run, own = grpo.parsed_by(parser, flags)
    with parser.in_one_line():
        try:
            grpo.train(parser, of_run, ReadyTrainer)
        except Ready as ready:
            result = check_run(
                ready.trainer,
                num_prompts=own.check_prompts,
                num_answers=own.check_answers,
                reference=own.check_reference,
                output=own.check_output or ready.trainer.args.output_dir,
            )
    if result.page is not None:
        print(f"Page: {result.page}")
    leave()
    return 0 if result.learns else 1


if __name__ == "__main__":
    sys.exit(run())
