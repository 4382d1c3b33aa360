"""The command line of scripts: TRL's parser, which answers what is wrong in one line, with what was meant."""

import dataclasses
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from ..host.nearest import nearest


class FlagParser(TrlParser):
    """
    [`~trl.TrlParser`] for a script: a wrong flag, option of a YAML file or value ends in one line, with status 2.

    Args:
        dataclass_types (`Sequence[type]`):
            What the flags are options of.
        config (`str`, *optional*):
            YAML file that is read where the flags name none with `--config`.
        kwargs (`Any`):
            As in [`~argparse.ArgumentParser`], such as `prog`.
    """

    dataclass_types: Any  # what TRL builds from the values that it has read

    def __init__(self, dataclass_types: Sequence[Any], config: str | None = None, **kwargs: Any):
        super().__init__(dataclass_types, **kwargs)
        self.config = config

    def error(self, message: str) -> NoReturn:
        """End the process with one line. Where several processes parse the same flags, the first one speaks."""
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2)

    @contextmanager
    def in_one_line(self) -> Iterator[None]:
        """What is wrong with a value or a file ends the process in one line."""
        try:
            yield
        except (ValueError, OSError, yaml.YAMLError) as error:
            self.error(str(error))

    def parse(self, flags: Sequence[str] | None = None) -> tuple[Any, ...]:
        """The dataclasses, from the flags; by default, those of the command line."""
        return tuple(self.parse_with_others(flags)[0])

    def parse_with_others(
        self, flags: Sequence[str] | None = None, others: Collection[str] = ()
    ) -> tuple[list[Any], list[str], list[str]]:
        """
        The dataclasses, and what is there for someone else.

        Args:
            flags (`Sequence[str]`, *optional*, defaults to those of the command line):
                Without the name of the script.
            others (`Collection[str]`, *optional*):
                Flags of someone else, such as `--num_processes` of the launcher.

        Returns:
            `tuple`:
                The dataclasses, those of `others` that the YAML file sets, and those of the command line.
        """
        with self.in_one_line():
            words = flags_with_config(sys.argv[1:] if flags is None else flags, self.config)
            # A configuration may refuse this machine or its values. A wrong flag is told before it is built.
            *_, of_file, of_line = self._read(words, [])
            self._refuse_wrong(words, of_file, of_line, others)
            *parsed, of_file, of_line = self._read(words, self.dataclass_types)
        return parsed, of_file, of_line

    def _read(self, words: Sequence[str], building: Sequence[Any]) -> tuple[Any, ...]:
        """Those dataclasses that are to be built, bare values for others, and what is left over of file and line."""
        kinds, self.dataclass_types = self.dataclass_types, building
        try:
            return tuple(
                self.parse_args_and_config(words, return_remaining_strings=True, separate_remaining_strings=True)
            )
        finally:
            self.dataclass_types = kinds

    def _refuse_wrong(
        self, words: Sequence[str], of_file: Sequence[str], of_line: Sequence[str], others: Collection[str]
    ) -> None:
        """End the process if anything that is left over is not for someone else."""
        options = [option.name for kind in self.dataclass_types for option in dataclasses.fields(kind)]
        names = [*options, *(name.lstrip("-").replace("-", "_") for name in others)]
        known, wrong = ["--config", *(f"--{name}" for name in names)], []
        for flag in of_file[::2]:
            if flag not in others:
                file = words[words.index("--config") + 1]
                wrong.append(f"{file} sets {flag[2:]!r}, which is no option{meant(flag[2:], names)}")
        given = [flag.partition("=")[0] for flag in of_line if flag.startswith("-") and not _is_number(flag)]
        wrong += [f"{flag} is no option{meant(flag, known)}" for flag in given if flag not in others]
        if of_line and not given:
            wrong.append(f"{of_line[0]!r} belongs to no option: a flag comes before its values")
        if wrong:
            self.error("; ".join(wrong))


def meant(flag: str, known: Iterable[str]) -> str:
    """
    The end of an error about a flag: which of the known ones was meant.

    Example:
    ```python
    >>> meant("--lerning-rate", ["--learning_rate", "--max_steps"])
    ': did you mean --learning_rate?'
    >>> meant("--colour", ["--learning_rate", "--max_steps"])
    ' (--help lists them)'

    ```
    """
    near = nearest(flag, known)
    return f": did you mean {near}?" if near else " (--help lists them)"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def config_of(script: str | os.PathLike[str]) -> str:
    """The configuration of a script: `configs/<script>.yaml` beside it."""
    return str(Path(script).parent / "configs" / f"{Path(script).stem}.yaml")


def flags_with_config(flags: Sequence[str], config: str | None = None) -> list[str]:
    """
    The flags with at most one `--config`, as the two words that TRL's parser reads.

    Args:
        flags (`Sequence[str]`):
            Of the command line, with `--config other.yaml` or `--config=other.yaml`.
        config (`str`, *optional*):
            The file where the flags name none. A file that is not there is looked for beside this one, too, such as
            `--config presets/small.yaml`.

    Raises:
        `ValueError`: where the flag names no file.
    """
    words: list[str] = []
    for flag in flags:
        name, sign, value = flag.partition("=")
        words += [name, value] if name == "--config" and sign else [flag]
    if "--config" not in words:
        if config is None or {"-h", "--help"} & set(words):
            return words
        words += ["--config", config]
    if words.count("--config") > 1:
        raise ValueError("--config is there twice: name one file")
    at = words.index("--config") + 1
    path = "".join(words[at : at + 1])
    if not path or path.startswith("--"):
        raise ValueError("--config names no file: write --config other.yaml")
    places = [os.path.abspath(path)]
    if config is not None:
        places += [place for place in [os.path.join(os.path.dirname(config), path)] if place not in (config, path)]
    found = next(filter(os.path.isfile, [path, *places]), None)
    if found is None:
        raise ValueError(f"--config {path}: there is no such file (looked for {' and '.join(places)})")
    return [*words[:at], found, *words[at + 1 :]]
