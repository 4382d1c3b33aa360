"""For scripts: arguments, datasets, training and comparing.

- `script`: [`parse_arguments`], [`make_trainer`], [`train_and_compare`], [`finish`], which a recipe is made of.
- `datasets`, `layouts`: prompts from files, folders and hubs. To add a layout, add an entry to `LAYOUTS`.
- `evaluation`: held-out answers before and after.
- `data/`: the shipped prompts.
"""

from .script import DataArguments, finish, init_kwargs, make_trainer, parse_arguments, train_and_compare

__all__ = ["DataArguments", "finish", "init_kwargs", "make_trainer", "parse_arguments", "train_and_compare"]
