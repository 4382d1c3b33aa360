"""What can go wrong with a reward: which errors cost a row, which stop the run, and what their messages say.

A reward may fail on one row, and then `on_error` decides. A mistake in the script fails on every row: a signature that
TRL's call does not fit, or a package that is not installed. Such a mistake always stops the run.
"""

import contextlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

# What TRL passes besides the rows. A cached value must not depend on these, and they cannot go to another process.
NOT_OF_THE_ROW = ("trainer_state", "environments", "log_metric", "log_extra")
_OF_TRL = ("prompts", "completions", "completion_ids", *NOT_OF_THE_ROW)
SKIP = 'leave such rows out with .on_error("skip")'

_WRONG_ARGUMENTS = re.compile(r"unexpected keyword argument|missing \d+ required|positional-only")
_NO_ATTRIBUTE = re.compile(r"'(list|dict)' object has no attribute '(\w+)'")
_LIST_AS_TEXT = re.compile(r"\b(list|dict)\b")  # in a `TypeError`
_TEXT_AS_LIST = re.compile(r"string indices must be integers|'str' object has no attribute '(get|items|keys|values)'")


class RewardError(ValueError):
    """A reward raised, or returned something else than one finite number or `None` for each completion."""


class CallError(RewardError):
    """A reward that cannot be called on this dataset: a mistake in the script, which `on_error` does not skip."""


class RowError(RuntimeError):
    """
    What went wrong with one row, where the message says everything.

    Args:
        message (`str`):
            What happened.
        kind (`str`, *optional*, defaults to `"failures"`):
            Under which name the row is counted; see [`TALLIES`].
        remedy (`str`, *optional*):
            What to do about it, where that is known.
    """

    def __init__(self, message: str, kind: str = "failures", remedy: str | None = None):
        super().__init__(message)
        self.kind, self.remedy = kind, remedy


def stops_the_run(error: BaseException) -> bool:
    """Whether an error is for the user to mend, whatever `on_error` says."""
    return isinstance(error, CallError) or is_missing_package(error)


def is_missing_package(error: BaseException | None) -> bool:
    """
    Whether the reward itself lacks a package.

    A reward may also run a completion that imports something; such an error costs only its row. The two differ in where
    the import stands. A completion is code made of a string, as by `exec`. A cell of a notebook is made of a string
    too, but belongs to a module.

    ```python
    >>> def error_of(run):
    ...     try:
    ...         run()
    ...     except ImportError as error:
    ...         return error
    >>> is_missing_package(ImportError("of a file")), is_missing_package(error_of(lambda: exec("import not_there")))
    (True, False)

    ```
    """
    if not isinstance(error, ImportError):
        return False
    return not any(_is_of_a_string(frame) for frame, _ in traceback.walk_tb(error.__traceback__))


def _is_of_a_string(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if not file.startswith("<") or file.startswith("<frozen "):
        return False
    if file == "<string>" and frame.f_code.co_name != "__init__":  # a dataclass makes its `__init__` of a string too
        return True
    name = frame.f_globals.get("__name__")
    module = sys.modules.get(name) if isinstance(name, str) else None
    return frame.f_code.co_name == "<module>" or getattr(module, "__dict__", None) is not frame.f_globals


@contextlib.contextmanager
def wrong_signature_told(name: str, function: Callable[..., Any], call: dict[str, Any]) -> Iterator[None]:
    """Raise [`CallError`] in place of the `TypeError` of a `function` that does not take the arguments `call`."""
    try:
        yield
    except TypeError as error:
        problem = signature_problem(function, call) if _WRONG_ARGUMENTS.search(said(error)) else None
        if problem is None:  # the error comes from inside the function
            raise
        raise CallError(f"reward {name!r} {problem}") from error


def signature_problem(function: Callable[..., Any], call: dict[str, Any]) -> str | None:
    """
    Why `function` cannot be called with the keyword arguments `call`, and the remedy; `None` where it can.

    ```python
    >>> call = {"prompts": ["Hi"], "completions": ["Ho"], "level": [1]}
    >>> print(signature_problem(lambda completions, level: ..., call))
    does not take 'prompts', which TRL passes: end its parameters with **kwargs, as in (completions, level, **kwargs)
    >>> print(signature_problem(lambda texts, **kwargs: ..., call))
    needs the argument 'texts', but TRL passes 'prompts', 'completions' and the columns 'level': rename 'texts' to one
    of these, or add the column to the dataset

    ```
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C
        return None
    try:
        signature.bind(**call)
    except TypeError:
        pass
    else:
        return None
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters):
        return f"has positional-only parameters, but TRL passes arguments by name: remove the / from {signature}"
    named = [item.name for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)]
    missing = [
        name for name in named if name not in call and signature.parameters[name].default is inspect.Parameter.empty
    ]
    refused = [name for name in call if name not in named]
    problems = []
    if missing:
        columns = _quoted([name for name in call if name not in _OF_TRL])
        passed = _quoted([name for name in call if name in _OF_TRL])
        passed += f" and the columns {columns}" if columns else ""
        remedy = f"rename {_quoted(missing)} to one of these, or add the column to the dataset"
        problems.append(f"needs the argument {_quoted(missing)}, but TRL passes {passed}: {remedy}")
    if refused and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        example = ", ".join([*([name for name in named if name in call] or ["completions"]), "**kwargs"])
        problems.append(
            f"does not take {_quoted(refused)}, which TRL passes: end its parameters with **kwargs, as in ({example})"
        )
    return "; it ".join(problems)


def _quoted(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def remedy_for(error: BaseException, completions: Any) -> str:
    """What to do about an error that a reward raised for `completions`: one hint where the cause is known."""
    if isinstance(error, RowError) and error.remedy is not None:
        return error.remedy
    first = completions[0] if isinstance(completions, list | tuple) and completions else None
    if isinstance(first, list) and _takes_messages_for_text(error):
        return (
            'the prompts are messages, so each completion is a list of messages such as [{"role": "assistant", '
            '"content": "..."}]: read the text with completion[0]["content"]'
        )
    if isinstance(first, str) and isinstance(error, AttributeError | TypeError) and _TEXT_AS_LIST.search(said(error)):
        return (
            "the prompts are texts, so each completion is a text: use the completion itself, or make each prompt a "
            "list of messages"
        )
    return f"mend the cause, or {SKIP}"


def _takes_messages_for_text(error: BaseException) -> bool:
    if isinstance(error, AttributeError):
        found = _NO_ATTRIBUTE.search(said(error))
        return found is not None and hasattr(str, found[2])
    return isinstance(error, TypeError) and _LIST_AS_TEXT.search(said(error)) is not None


def said(error: BaseException) -> str:
    """What an exception of a reward says, in text that any log takes."""
    if isinstance(error, RowError):
        return str(error)
    try:
        text = str(error)
    except Exception:
        text = "(it cannot say why)"
    return f"raised {type(error).__name__}: {text.strip().partition(chr(10))[0][:2000]}".encode(
        "utf-8", "backslashreplace"
    ).decode()


def shown(value: Any) -> str:
    """The beginning of the `repr` of what a reward returned, which may be anything."""
    try:
        return f"{value!r:.80}"
    except Exception:  # Python prints no integer of 5000 digits
        return f"a {type(value).__name__}"
