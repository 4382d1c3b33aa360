"""A killed training resumes from what was complete, and a save that fails leaves what was there."""

import contextlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import ROOT, args_of, config_kwargs, make_letters, trainer_of
from transformers import Trainer, TrainerCallback
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext.host import checkpoints
from trl_grpo_ext.host.checkpoints import (
    MANIFEST,
    CheckpointError,
    begin,
    checkpoints_in,
    complete,
    delete,
    delete_old,
    discard,
    last_complete,
    reason_of,
    why_incomplete,
    write_whole,
)

# --- kills ------------------------------------------------------------------------------------------------------------


@pytest.mark.training
def test_killed_trainings_end_where_the_one_that_was_not_killed_ends(tmp_path):
    """Short; `python recipes/studies/crashes.py` is the long one."""
    command = [sys.executable, str(ROOT / "recipes" / "studies" / "crashes.py"), "--kills", "4", "--steps", "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--output_dir", str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-4000:]
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert table["kills"] == sum(table["killed in"].values()) == 4
    assert table["checkpoints compared bit by bit"] > 0
    assert table["differing runs"] == 0


# --- files ------------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=50), st.binary(max_size=50), st.integers(0, 50))
@settings(max_examples=50)
def test_a_file_is_whole_or_what_it_was(tmp_path_factory, before, after, crash_at):
    path = tmp_path_factory.mktemp("file") / "state"
    path.write_bytes(before)

    def write(file):
        file.write(after[:crash_at])
        if crash_at < len(after):
            raise OSError(28, "No space left on device")
        file.write(after[crash_at:])

    with contextlib.suppress(OSError):
        write_whole(path, write)
    assert path.read_bytes() == (before if crash_at < len(after) else after)
    assert [entry.name for entry in path.parent.iterdir()] == ["state"]


def test_a_file_is_not_written_through_a_link(tmp_path, monkeypatch):
    """Whoever made the folder may have put links wherever a name could be known."""
    precious, folder = tmp_path / "precious", tmp_path / "run"
    precious.write_text("precious")
    folder.mkdir()
    for name in ("state", "state.tmp", ".state.tmp", ".tmp"):
        (folder / name).symlink_to(precious)
    write_whole(folder / "state", lambda file: file.write(b"new"))
    assert precious.read_text() == "precious"
    assert (folder / "state").read_bytes() == b"new"
    assert not (folder / "state").is_symlink()
    # Even where the name was guessed.
    monkeypatch.setattr("secrets.token_hex", lambda count: "guessed")
    (folder / ".guessed.tmp").symlink_to(precious)
    with pytest.raises(FileExistsError):
        write_whole(folder / "state", lambda file: file.write(b"newer"))
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_file_has_the_permissions_that_any_other_file_has(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "state", lambda file: file.write(b"x"))
    finally:
        os.umask(before)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o666 & ~mask


files = st.dictionaries(st.from_regex(r"(sub/)?[a-z]{1,6}\.pt", fullmatch=True), st.binary(max_size=9), min_size=1)


def write_files(folder, contents):
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@given(files, st.data())
@settings(max_examples=40)
def test_a_checkpoint_is_complete_from_the_last_moment_of_a_save_until_a_file_changes(tmp_path_factory, contents, data):
    folder = tmp_path_factory.mktemp("run") / "checkpoint-3"
    begin(folder)
    assert why_incomplete(folder) == "writing it was interrupted"
    write_files(folder, contents)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    assert why_incomplete(folder) == "writing it was interrupted"
    complete(folder)
    assert why_incomplete(folder) is None
    assert last_complete(folder.parent) == (folder, [])
    name = data.draw(st.sampled_from(sorted(contents)))
    if data.draw(st.booleans()):
        (folder / name).unlink()
        assert why_incomplete(folder) == f"{name} is missing"
    else:
        (folder / name).write_bytes(contents[name] + b"x")
        size = len(contents[name])
        assert why_incomplete(folder) == f"{name} has {size + 1} bytes instead of {size}"
    assert last_complete(folder.parent) == (None, [f"checkpoint-3: {why_incomplete(folder)}"])


def test_a_checkpoint_on_a_signal_is_complete_without_the_mark_that_transformers_takes_away(tmp_path):
    folder = tmp_path / "checkpoint-3"
    begin(folder)
    write_files(folder, {"checkpoint-is-incomplete.txt": b"", "model.safetensors": b"weights"})
    complete(folder)
    (folder / "checkpoint-is-incomplete.txt").unlink()
    assert why_incomplete(folder) is None


def test_saving_into_a_complete_checkpoint_takes_that_back_first(tmp_path):
    folder, precious = tmp_path / "checkpoint-3", tmp_path / "precious"
    precious.write_text("precious")
    begin(folder)
    old = {"grpo_rollouts_7.pt": b"of a run on more processes", "pytorch_model_fsdp_0/a.distcp": b"shard"}
    write_files(folder, {"model.safetensors": b"weights", **old})
    complete(folder)
    (folder / "optimizer.pt").symlink_to(precious)
    begin(folder)
    assert why_incomplete(folder) == "writing it was interrupted"
    assert [path.name for path in folder.iterdir()] == [MANIFEST]
    assert precious.read_text() == "precious"


def test_a_checkpoint_that_is_a_link_is_not_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("precious")
    (tmp_path / "checkpoint-3").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="checkpoint-3 is a link, and a checkpoint would go to where it leads"):
        begin(tmp_path / "checkpoint-3")
    discard(tmp_path / "checkpoint-3")
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["precious"]


@pytest.mark.parametrize("ours", ["grpo_callbacks.pt", "grpo_rollouts_1.pt", "training_args.bin"])
def test_a_checkpoint_of_ours_without_its_manifest_is_not_complete(tmp_path, ours):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    torch.save(GRPOConfig(**config_kwargs(folder)), folder / "training_args.bin")
    assert why_incomplete(folder) is None  # of stock TRL
    torch.save(args_of(), folder / ours)
    assert why_incomplete(folder) == f"its {MANIFEST} is missing"
    assert last_complete(tmp_path) == (None, [f"checkpoint-3: its {MANIFEST} is missing"])


@given(files, st.data())
@settings(max_examples=40)
def test_a_checkpoint_whose_deletion_is_killed_does_not_count(tmp_path_factory, contents, data):
    """Whatever is deleted first, and whether or not it is a checkpoint of stock TRL."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-3"
    begin(folder)
    write_files(folder, {**contents, "trainer_state.json": b'{"global_step": 3}'})
    complete(folder)
    if data.draw(st.booleans()):
        (folder / MANIFEST).unlink()
    assert why_incomplete(folder) is None

    def killed(path, **kwargs):
        left = sorted(entry for entry in Path(path).rglob("*") if entry.is_file())
        for entry in data.draw(st.lists(st.sampled_from(left), unique=True)) if left else []:
            entry.unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            delete(folder)
    assert why_incomplete(folder) is not None
    assert last_complete(folder.parent)[0] is None
    delete(folder)
    assert not folder.exists()


@pytest.mark.parametrize("state", [None, "", '{"global_step": 3', "[]", "null", "[" * 100_000])
def test_without_a_manifest_the_last_file_of_transformers_decides(tmp_path, state):
    folder = tmp_path / "checkpoint-3"
    write_files(folder, {"model.safetensors": b"weights"})
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    assert why_incomplete(folder) == "it has no readable trainer_state.json, which is written last"
    (folder / "trainer_state.json").write_text('{"global_step": 3}')
    assert why_incomplete(folder) is None


@pytest.mark.parametrize("contents", [("trainer_state.json", MANIFEST), ("trainer_state.json",), ("grpo_x.pt",), ()])
@pytest.mark.parametrize("look", [last_complete, lambda run: reason_of(run / "checkpoint-3", OSError("no"))])
def test_another_process_may_delete_a_checkpoint_while_this_one_looks(tmp_path, monkeypatch, contents, look):
    """Between any two calls of the system. An error here would keep one process from the collective of all."""
    calls = []

    def deletes_first(call, when):
        def called(*args, **kwargs):
            calls.append(call)
            if len(calls) == when:
                with monkeypatch.context() as undone:
                    undone.undo()
                    shutil.rmtree(tmp_path / "checkpoint-3")
            return call(*args, **kwargs)

        return called

    for when in itertools.count(1):
        write_files(tmp_path / "checkpoint-3", dict.fromkeys(contents, b'{"complete": true, "files": {"a": 1}}'))
        (tmp_path / "checkpoint-3").mkdir(exist_ok=True)
        with monkeypatch.context() as patch:
            calls.clear()
            for module, name in ((os, "stat"), (os, "scandir"), (io, "open"), (shutil, "disk_usage")):
                patch.setattr(module, name, deletes_first(getattr(module, name), when))
            look(tmp_path)
        if len(calls) < when:
            break
    assert when > 1


def test_only_folders_with_a_step_count_as_checkpoints(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x", "checkpoint-10-old", "my-checkpoint-11"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-10", "checkpoint-9"]
    assert checkpoints_in(tmp_path / "none") == []


@given(st.lists(st.booleans(), min_size=1, max_size=6), st.none() | st.integers(-1, 4), st.data())
@settings(max_examples=40)
def test_old_checkpoints_go_first_those_that_are_not_complete_then_by_step(tmp_path_factory, are_complete, limit, data):
    """When the files were written says nothing: a copy of a run has other times."""
    run = tmp_path_factory.mktemp("run")
    folders = [run / f"checkpoint-{step}" for step in range(8, 8 + len(are_complete))]  # 9 is before 10
    ages = data.draw(st.permutations(range(len(folders))))
    for age, folder, is_complete in zip(ages, folders, are_complete, strict=True):
        begin(folder)
        if is_complete or folder is folders[-1]:
            complete(folder)
        os.utime(folder, (age, age))
    best = data.draw(st.none() | st.sampled_from(folders))
    delete_old(folders[-1], limit, None if best is None else str(best))
    left = set(checkpoints_in(run))
    kept = {folders[-1], best} - {None}
    assert kept <= left
    if limit is None or limit <= 0:
        assert len(left) == len(folders)
        return
    assert len(left) == min(len(folders), max(limit, len(kept)))
    others = [folder for folder in folders if folder not in kept]
    others.sort(key=lambda folder: are_complete[folders.index(folder)])  # stable: by step within each kind
    assert set(others[: len(folders) - len(left)]) == set(folders) - left


@pytest.mark.parametrize("ages", [(3, 2, 1, 0), (0, 0, 0, 0), (1, 3, 0, 2)])
def test_a_copied_run_loses_its_lowest_steps(tmp_path, ages):
    folders = [tmp_path / f"checkpoint-{step}" for step in (9, 10, 11, 100)]
    for age, folder in zip(ages, folders, strict=True):
        begin(folder)
        complete(folder)
        os.utime(folder, (age, age))
    delete_old(folders[-1], 2, None)
    assert checkpoints_in(tmp_path) == [folders[3], folders[2]]


# --- a real trainer ---------------------------------------------------------------------------------------------------


SAVING = {"group_size": "variance", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture
def make_trainer(make_trainer):
    """Saves each of three steps into `run`."""
    return lambda **given: make_trainer(**{**SAVING, **given})


@pytest.fixture(scope="module")
def finished(model_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    trainer_of(model_path, make_letters(), out, **SAVING).train()
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, where a trainer would go on."""
    return shutil.copytree(finished, tmp_path / "run")


def test_a_checkpoint_lists_all_that_is_in_it(finished):
    sizes = json.loads((finished / "checkpoint-3" / MANIFEST).read_text())["files"]
    assert {"model.safetensors", "optimizer.pt", "grpo_callbacks.pt", "trainer_state.json"} < sizes.keys()
    assert why_incomplete(finished / "checkpoint-3") is None


def test_resume_passes_over_what_is_not_complete_and_says_so(run, make_trainer, caplog):
    begin(run / "checkpoint-3")
    (run / "checkpoint-9").mkdir()
    seen = []

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    make_trainer(max_steps=4, callbacks=[Look]).train(resume_from_checkpoint=True)
    assert seen == [2]
    (line,) = [record.message for record in caplog.records if "Resuming from" in record.message]
    assert "Resuming from checkpoint-2: checkpoint-9: it has no readable trainer_state.json" in line
    assert "checkpoint-3: writing it was interrupted" in line
    assert why_incomplete(run / "checkpoint-3") is None  # written anew


def test_an_incomplete_checkpoint_is_refused_when_asked_for(run, make_trainer):
    with (run / "checkpoint-3" / "optimizer.pt").open("r+b") as file:
        file.truncate(1000)
    message = r"checkpoint-3 is not complete: optimizer.pt has 1000 bytes instead of \d+.*resume from .*checkpoint-2"
    with pytest.raises(CheckpointError, match=message):
        make_trainer().train(resume_from_checkpoint=str(run / "checkpoint-3"))


def test_where_no_checkpoint_is_complete(run, make_trainer):
    for checkpoint in checkpoints_in(run):
        begin(checkpoint)
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is complete .*checkpoint-1: writing it was inter"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make_trainer(out="empty").train(resume_from_checkpoint=True)


def test_checkpoints_of_stock_trl_are_taken_where_they_are_whole(model_path, dataset, tmp_path, make_trainer, caplog):
    run = tmp_path / "run"
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "cls": GRPOTrainer}
    trainer_of(model_path, dataset, run, **options).train()
    (run / "checkpoint-3").mkdir()  # killed while it saved
    trainer = make_trainer()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.log_history[-1]["step"] == 3
    assert "Resuming from checkpoint-2: checkpoint-3" in caplog.text
    assert "start from scratch" in caplog.text


def test_the_limit_of_checkpoints_is_kept_and_the_previous_one_goes_last(trained, tmp_path, monkeypatch):
    deleted, rmtree, run = [], shutil.rmtree, tmp_path / "run"

    def spy(path, *args, **kwargs):
        if "checkpoint-" in str(path):
            later = run / f"checkpoint-{int(str(path).rpartition('-')[2]) + 1}"
            deleted.append((Path(path).name, why_incomplete(later)))
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", spy)
    trainer = trained(save_total_limit=1)
    assert deleted == [("checkpoint-1", None), ("checkpoint-2", None)]
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-3"]
    saved = torch.load(run / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == trainer.args.save_total_limit == 1


def test_what_goes_to_the_hub_is_complete(make_trainer, monkeypatch):
    pushed = []

    def push(trainer, folder):
        pushed.append((Path(folder).name, why_incomplete(folder)))

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer = make_trainer(max_steps=2)
    trainer.args.push_to_hub = True  # not before: a repository would be made
    monkeypatch.setattr(trainer, "push_to_hub", lambda *args, **kwargs: None)
    monkeypatch.setattr(trainer, "_finish_current_push", lambda: None)
    trainer.train()
    assert pushed == [("checkpoint-1", None), ("checkpoint-2", None)]


def test_a_run_folder_of_somebody_else_overwrites_nothing_of_whoever_resumes_in_it(run, make_trainer, tmp_path):
    """Links wait under every name that a training writes."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    names = [path.name for path in (run / "checkpoint-3").iterdir()]
    shutil.rmtree(run / "checkpoint-3")
    (run / "checkpoint-3").mkdir()
    for name in [*names, f"{MANIFEST}.tmp", "grpo_callbacks.pt.tmp"]:
        (run / "checkpoint-3" / name).symlink_to(precious)
    for name in ("README.md", "model.safetensors", "training_args.bin", "config.json", "tokenizer.json"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(precious)
    (run / "completions").mkdir()
    (run / "completions" / "completions_00003.parquet").symlink_to(precious)
    trainer = make_trainer(log_completions=True)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    trainer.save_model()
    assert precious.read_text() == "precious"
    assert why_incomplete(run / "checkpoint-3") is None
    assert not [path for path in run.rglob("*") if path.is_symlink()]


# --- a full disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def no_file_above(num_bytes):
    """No file can grow beyond some bytes: the system refuses to write, whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [10, 2_000, 60_000, 120_000])
def test_a_full_disk_is_a_clear_error_and_the_previous_checkpoint_stays(make_trainer, monkeypatch, num_bytes):
    logging.disable_progress_bar()  # whose line would be the first to fail
    trainer = make_trainer(save_total_limit=1)
    save = trainer._save_checkpoint

    def save_on_a_full_disk(*args):
        with no_file_above(num_bytes) if trainer.state.global_step == 3 else contextlib.nullcontext():
            save(*args)

    monkeypatch.setattr(trainer, "_save_checkpoint", save_on_a_full_disk)
    with pytest.raises(CheckpointError) as error:
        trainer.train()
    message = str(error.value)
    assert re.search(r"checkpoint-3 could not be written \(\w+: .+; \d+ MB are free there\)", message)
    assert "the last complete checkpoint is" in message
    assert "checkpoint-2" in message
    assert [path.name for path in checkpoints_in(trainer.args.output_dir)] == ["checkpoint-2"]
    assert trainer.args.save_total_limit == 1
    resumed = make_trainer()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3


def test_a_failed_save_does_not_delete_what_was_complete(tmp_path):
    folder = tmp_path / "checkpoint-3"
    begin(folder)
    complete(folder)
    discard(folder)
    assert why_incomplete(folder) is None
    begin(folder)
    discard(folder)
    assert not folder.exists()
    reason = reason_of(folder, OSError(28, "No space left on device"))
    assert re.fullmatch(r"OSError: \[Errno 28\] No space left on device; \d+ MB are free there", reason)


@pytest.mark.parametrize("fails_in", [0, "model", 1, 2])
def test_saving_a_step_again_leaves_the_old_checkpoint_or_none(trained, tmp_path, monkeypatch, fails_in):
    """Where the mark of an incomplete one, the model, the state of the callbacks or the manifest cannot be written."""
    trainer = trained(max_steps=2)
    folder = tmp_path / "run" / "checkpoint-2"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = []

    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def fails_in_one(path, write):
        written.append(Path(path).name)
        (fails if len(written) - 1 == fails_in else write_whole)(path, write)

    monkeypatch.setattr(checkpoints, "write_whole", fails_in_one)
    if fails_in == "model":
        monkeypatch.setattr(trainer.model, "save_pretrained", fails)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written \(OSError: .*No space left") as error:
        trainer._save_checkpoint(trainer.model, None)
    assert written == [MANIFEST, "grpo_callbacks.pt", MANIFEST][: 1 if fails_in == "model" else fails_in + 1]
    if fails_in == 0:
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert why_incomplete(folder) is None
    else:
        assert not folder.exists()
        assert str(error.value).endswith(f"the last complete checkpoint is {folder.with_name('checkpoint-1')}")
