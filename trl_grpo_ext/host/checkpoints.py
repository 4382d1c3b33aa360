"""Checkpoints that are complete or do not count, and files that are written whole or not at all.

transformers writes a checkpoint file by file into its final folder, and takes the folder with the highest step for the
last checkpoint, whatever it holds. Here a manifest says whether a folder is complete: `"complete": false` is written
before anything else, the size of every file after everything else. Folders of stock TRL have no manifest, and count as
soon as they hold a readable `trainer_state.json`, which transformers writes last.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

MANIFEST = "grpo_checkpoint.json"
PASSING = "checkpoint-is-incomplete.txt"  # transformers puts it there before a save on a signal, and takes it away
OURS = "grpo_*"  # what this package adds to a checkpoint
TRAINER_STATE = "trainer_state.json"
# Options are pickled into every checkpoint, so this tells a checkpoint of this package from one of stock TRL.
OPTIONS, OUR_OPTIONS = "training_args.bin", b"trl_grpo_ext.config.options\nAdaptiveGRPOConfig\n"
# Names under which a model and what belongs to it are saved.
SAVED = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.txt", "*.model", "*.md")
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, is not complete, or holds what no training writes."""


def write_whole(path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]) -> None:
    """
    Write a file so that a crash at any moment, even of the machine, leaves the old file or the new one.

    A link at `path` is replaced, and the file that it leads to stays as it is.

    Args:
        path (`str` or `os.PathLike`):
            The file.
        write (`Callable`):
            Called with a binary file to write to.

    Raises:
        `OSError`: where the file cannot be written; then the old file is still there.

    Example:

    ```python
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "state"
    >>> write_whole(path, lambda file: file.write(b"whole"))
    >>> path.read_bytes(), len(list(path.parent.iterdir()))
    (b'whole', 1)

    ```
    """
    path = Path(path)
    # Nobody can put a link there in advance: the name is not known, and "x" takes no name that exists.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a crash of the machine, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # and some file systems sync none
        pass
    finally:
        os.close(descriptor)


def begin(folder: str | os.PathLike[str]) -> None:
    """
    Mark a checkpoint as incomplete, before anything of it is written, and delete what an earlier save left there.

    Raises:
        [`CheckpointError`]: for a link, since a checkpoint would be written to where the link leads.
    """
    folder = Path(folder)
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link, and a checkpoint would go to where it leads: remove the link")
    folder.mkdir(parents=True, exist_ok=True)
    _write_manifest(folder, {"format": 1, "complete": False})
    # Also links, through which transformers would write; also files that the new checkpoint does not overwrite.
    for stale in folder.iterdir():
        if stale.name in (MANIFEST, PASSING):
            continue
        if stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale)
        else:
            stale.unlink(missing_ok=True)


def drop_links(folder: str | os.PathLike[str], *patterns: str) -> None:
    """Delete links among the files of a folder, where TRL and transformers would write to what the links lead to."""
    for pattern in patterns:
        for path in Path(folder).glob(pattern):
            if path.is_symlink():
                path.unlink(missing_ok=True)


def complete(folder: str | os.PathLike[str]) -> None:
    """Mark a checkpoint as complete, once all processes have written their parts and the disk holds them."""
    folder = Path(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, PASSING))
    for path in files:
        # Some file systems tell only now that they are full.
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    _write_manifest(folder, {"format": 1, "complete": True, "files": sizes})


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    write_whole(folder / MANIFEST, lambda file: file.write((json.dumps(content, indent=2) + "\n").encode()))


def why_incomplete(folder: str | os.PathLike[str]) -> str | None:
    """Why the checkpoint in a folder is not complete, as the end of a sentence; `None` for a complete one."""
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        if _is_ours(folder):
            return f"its {MANIFEST} is missing"
        state = read_object(folder / TRAINER_STATE)
        return None if "global_step" in state else f"it has no readable {TRAINER_STATE}, which is written last"
    manifest = read_object(folder / MANIFEST)
    if manifest.get("complete") is False:
        return "writing it was interrupted"
    sizes = manifest.get("files")
    if manifest.get("complete") is not True or not isinstance(sizes, dict):
        return f"its {MANIFEST} is broken"
    for name, size in sizes.items():
        path = folder / name
        try:
            found = path.stat().st_size if path.is_file() else None
        except OSError:  # another process deletes it right now
            found = None
        if found is None:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def _is_ours(folder: Path) -> bool:
    """Whether this package began to write the checkpoint, so that it must have a manifest."""
    try:  # another process may delete it right now
        return any(folder.glob(OURS)) or OUR_OPTIONS in (folder / OPTIONS).read_bytes()
    except OSError:
        return False


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where the file is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def checkpoints_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders `checkpoint-<step>` of a run, the last step first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was written, from the name of its folder."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def last_complete(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """
    The checkpoint from which to resume a run.

    Args:
        folder (`str` or `os.PathLike`):
            `output_dir` of the run.

    Returns:
        `tuple[Path, list[str]]`:
            The complete checkpoint with the highest step, or `None` where there is none. Then, for each checkpoint of a
            higher step, why it is not complete.

    Example:

    ```python
    >>> import tempfile
    >>> run = Path(tempfile.mkdtemp())
    >>> begin(run / "checkpoint-10"), complete(run / "checkpoint-10"), begin(run / "checkpoint-20")
    (None, None, None)
    >>> path, skipped = last_complete(run)
    >>> path.name, skipped
    ('checkpoint-10', ['checkpoint-20: writing it was interrupted'])

    ```
    """
    skipped: list[str] = []
    for checkpoint in checkpoints_in(folder):
        reason = why_incomplete(checkpoint)
        if reason is None:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name}: {reason}")
    return None, skipped


def check_complete(folder: str | os.PathLike[str]) -> None:
    """Raise [`CheckpointError`] for a checkpoint that is not complete."""
    reason = why_incomplete(folder)
    if reason is not None:
        last, _ = last_complete(Path(folder).parent)
        remedy = "there is no complete one beside it" if last is None else f"resume from {last}"
        raise CheckpointError(
            f"{folder} is not complete: {reason}. Not resuming from it; {remedy}. If files were taken out of it on "
            f"purpose, take their lines out of its {MANIFEST}"
        )


def reason_of(folder: str | os.PathLike[str], error: Exception) -> str:
    """Why a checkpoint could not be written: the first line of an error, and how full the disk is."""
    free = 0
    for place in (Path(folder), *Path(folder).parents):
        with contextlib.suppress(OSError):  # it is not there, or another process deletes it right now
            free = shutil.disk_usage(place).free
            break
    disk = "the disk is full" if free < 2**20 else f"{free / 1e6:.0f} MB are free there"
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}; {disk}"


def discard(folder: str | os.PathLike[str]) -> None:
    """Delete a checkpoint that is not complete: it is of no use, and may hold what the disk lacks."""
    if os.path.exists(folder) and why_incomplete(folder) is not None:
        delete(folder)


def delete(folder: str | os.PathLike[str]) -> None:
    """Delete a checkpoint. From the first moment on, what is left of it does not count as complete."""
    # Which every complete checkpoint has: a kill in the middle may leave this one without its manifest.
    with contextlib.suppress(OSError):
        Path(folder, TRAINER_STATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def delete_old(newest: str | os.PathLike[str], limit: int | None, best: str | None) -> None:
    """
    Keep `limit` checkpoints of a run, as transformers does. Those that are not complete go first, then the lowest step.

    Args:
        newest (`str` or `os.PathLike`):
            The checkpoint that was just completed, which stays.
        limit (`int`, *optional*):
            Checkpoints to keep; all of them if `None` or not positive.
        best (`str`, *optional*):
            The best checkpoint, which stays.
    """
    if limit is None or limit <= 0:
        return
    newest = Path(newest)
    keep = {newest.absolute()} | ({Path(best).absolute()} if best else set())
    old = [path for path in checkpoints_in(newest.parent) if path.absolute() not in keep]
    old.sort(key=lambda path: (why_incomplete(path) is None, step_of(path)))
    count = len(old) + len(keep)
    for path in old[: max(0, count - max(limit, len(keep)))]:
        delete(path)


def load_tensors(path: str | os.PathLike[str], device: Any = "cpu") -> dict[str, Any]:
    """
    Tensors and plain data from a file; no code in the file runs.

    Raises:
        [`CheckpointError`]: for a file that is cut off, damaged, or holds anything else.
    """
    if torch.device(device).type == "cpu":
        device = "cpu"  # of several processes, accelerate's is "cpu:0", to which torch restores nothing
    try:
        content = torch.load(path, weights_only=True, map_location=device)
    except Exception as error:  # zip, pickle and torch each have their own
        reason = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{os.fspath(path)} cannot be read ({type(error).__name__}: {reason}): it is cut off, damaged, or holds "
            "more than tensors and plain data. Resume from another checkpoint"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{os.fspath(path)} holds a {type(content).__name__}, not a dict: not written by a save")
    return content


@contextlib.contextmanager
def blaming(place: str) -> Iterator[None]:
    """Turn an error over a state that this block reads into a `CheckpointError` that says where the state stands."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{place}: {what}") from error
