"""For scripts: from a file of prompts and a reward to a trained model, its comparison and its report.

A recipe is a dataclass of arguments, a reward and one call: [`parse_arguments`], then [`train_and_compare`].

- `script`: [`DataArguments`], [`parse_arguments`], [`make_trainer`], [`train_and_compare`] and [`finish`].
- `datasets`: [`load_prompts`], which brings prompts into one form; `reading` finds and reads files, folders and sets on
  the hub, `normal` cleans texts, `layouts` knows columns of other forms. To add a layout, add an entry to `LAYOUTS`.
- `evaluation`: held-out results before and after, as a table in the terminal. `rivals`: what they are held against, the
  question repeated and stock TRL. `harmlessness`: the flags that choose who judges it.
- `cold_start`: supervised steps before a training. To add a step of this kind, return the folder of a model.
- `run_check/`: would a run learn, and what would it cost? To add a finding, see `run_check/findings.py`.
- `check`: does the package work on this machine? `accelerate launch -m trl_grpo_ext.recipe.check`.
- `tiny`: a model and a tokenizer that are made in a moment, for the check, the studies and the tests.
- `data/`: the shipped prompts, with a page about each set.
"""

from ..host.sources import resolve_model
from .datasets import load_prompts
from .evaluation import print_comparison
from .harmlessness import HarmlessnessArguments
from .script import DataArguments, finish, init_kwargs, make_trainer, parse_arguments, set_base_model, train_and_compare

__all__ = [
    "DataArguments",
    "HarmlessnessArguments",
    "finish",
    "init_kwargs",
    "load_prompts",
    "make_trainer",
    "parse_arguments",
    "print_comparison",
    "resolve_model",
    "set_base_model",
    "train_and_compare",
]
