"""What holds for every callback of the package. A new one joins by one line in `CASES`."""

import importlib
import pkgutil
import re
from functools import cache, partial
from typing import Any

import pytest
import torch
from kit import ROOT, Record, batches_of, count_vowels, has_answer, launch, logs_of, make_letters, trainer_of
from transformers import TrainerCallback, TrainerControl
from trl import GRPOTrainer

import trl_grpo_ext
from trl_grpo_ext import (
    AdaptiveKLCallback,
    BaselineCallback,
    CriticBaseline,
    DynamicSamplingCallback,
    GRPOCallback,
    HeldOutCallback,
    HierarchicalCallback,
    MonitorCallback,
    MultiTurnCallback,
    OnlineCurriculumCallback,
    PredictedCurriculumCallback,
    RewardClipCallback,
    StagedCurriculumCallback,
    TargetCurriculumCallback,
    TaskAdvantagesCallback,
    TaskCallback,
    TaskMixingCallback,
    ThresholdGroupSizeCallback,
    VarianceGroupSizeCallback,
)
from trl_grpo_ext.hooks.callback import call_hook
from trl_grpo_ext.host import checkpoints
from trl_grpo_ext.observe.actions import Action, AdaptBeta, CapGroupSize, CoolLearningRate, SaveAndStop
from trl_grpo_ext.observe.live import LiveCallback
from trl_grpo_ext.plan.group_size import SingleGroupSizeCallback
from trl_grpo_ext.trainer.reuse import ReuseGuardCallback

ALONE = {"scale_rewards": "batch", "baseline": "batch", "min_group_size": 1}
# How to make one, the callbacks that it needs beside it, and the options that it needs.
CASES: list[tuple[Any, list[Any], dict[str, Any]]] = [
    (partial(StagedCurriculumCallback, "difficulty"), [], {}),
    (partial(TargetCurriculumCallback, "score"), [], {}),
    (OnlineCurriculumCallback, [], {}),
    (PredictedCurriculumCallback, [], {}),
    (SingleGroupSizeCallback, [], ALONE),
    (ThresholdGroupSizeCallback, [], {}),
    (VarianceGroupSizeCallback, [], {}),
    (partial(RewardClipCallback, [0, 1]), [], {}),
    (DynamicSamplingCallback, [], {}),
    (partial(BaselineCallback, "shrunk"), [], {"scale_rewards": "batch"}),
    (CriticBaseline, [], {}),
    (partial(MultiTurnCallback, max_turns=2), [], {}),
    (partial(HierarchicalCallback, 2, 2), [], {"rows": 12}),
    (partial(AdaptiveKLCallback, 0.1), [], {"beta": 0.1}),
    (MonitorCallback, [], {}),
    (partial(HeldOutCallback, ["Length"]), [], {"eval_dataset": make_letters()}),
    (LiveCallback, [], {}),
    (AdaptBeta, [], {"beta": 0.1}),
    (CoolLearningRate, [], {}),
    (CapGroupSize, [VarianceGroupSizeCallback], {}),
    (SaveAndStop, [], {}),
    (partial(ReuseGuardCallback, 0.1), [], {"num_iterations": 2}),
    (partial(TaskMixingCallback, "difficulty"), [], {}),
    (partial(TaskAdvantagesCallback, "difficulty", "shrunk"), [], {"scale_rewards": "batch"}),
    (partial(TaskCallback, "difficulty"), [], {}),
]
NAMES = [getattr(make, "func", make).__name__ for make, _, _ in CASES]
OPTIONAL = {"predictor"}  # parts of a state that there need not be
REPEATED = "on_rewards", "on_total_rewards", "on_resample"  # may run several times on one batch


class Replace(GRPOCallback):
    """Two rounds of resampling for each batch."""

    def on_resample(self, batch, round, **kwargs):
        return torch.arange(batch.num_groups) == 0 if round < 2 else None


class Fire(TrainerCallback):
    """An alarm at the first step, as far as actions are concerned."""

    def on_step_end(self, args, state, control, callbacks=None, **kwargs):
        for callback in self.trainer.grpo_callbacks:
            if isinstance(callback, Action) and state.global_step == 1:
                callback.fire("kl_spike", TrainerControl())


def twice(callback, hook, of, **arguments):
    """Call a hook as the trainer does, and once more where that must make no difference."""
    value = call_hook(callback, hook, of, **arguments)
    if hook in REPEATED:
        again = call_hook(callback, hook, of, **arguments)
        assert plain(again) == plain(value), f"{type(callback).__name__}.{hook} counts how often it is called"
    return value


@cache
def data(has_turns=False):
    """The letters as conversations."""
    prompts = make_letters().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    return prompts.add_column("turns", [["and?"]] * len(prompts)) if has_turns else prompts


def made(model_path, out, position, subject=None, more=(), processes=1, **given):
    """A trainer with a callback of `CASES`, and the callback."""
    make, also, options = CASES[position]
    subject = make() if subject is None else subject
    options = {**options, **given}
    rows = options.pop("rows", 16) // processes
    callbacks = [other() for other in also] + [subject, *more]
    trainer = trainer_of(
        model_path,
        data(has_turns=isinstance(subject, MultiTurnCallback)),
        out,
        [has_answer, count_vowels],
        callbacks,
        per_device_train_batch_size=rows,
        **options,
    )
    return trainer, subject


def can_resample(position) -> bool:
    make, _, _ = CASES[position]
    return not any(conflict.other == "on_resample" for conflict in make().conflicts)


def train(model_path, out, position, **given):
    fire = Fire()
    more = [Record(), fire, *([Replace()] if can_resample(position) else [])]
    trainer, subject = made(model_path, out, position, more=more, **given)
    fire.trainer = trainer
    trainer.train()
    return trainer, subject


def plain(value: Any, ours: bool = False) -> Any:
    """What a value holds, as data that can be compared: NaN equals NaN. With `ours`, objects of the package too."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), repr(value.tolist()))
    if isinstance(value, dict):
        return {key: plain(part, ours) for key, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(part, ours) for part in value]
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    if hasattr(value, "state_dict"):
        return plain(value.state_dict(), ours)
    is_ours = type(value).__module__.startswith("trl_grpo_ext.") and not isinstance(
        value, trl_grpo_ext.AdaptiveGRPOTrainer
    )
    return plain(vars(value), ours) if ours and is_ours and hasattr(value, "__dict__") else type(value).__name__


def insides(callback: GRPOCallback, names: set[str]) -> Any:
    """What a callback holds under these names, apart from its trainer."""
    return {name: plain(getattr(callback, name, "nothing"), ours=True) for name in names}


# One run of each


@pytest.fixture(scope="module", params=range(len(CASES)), ids=NAMES)
def run(request, model_path, tmp_path_factory):
    out = tmp_path_factory.mktemp(NAMES[request.param])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl_grpo_ext.trainer.adaptive.call_hook", twice)
        trainer, subject = train(model_path, out, request.param, save_strategy="steps", save_steps=3)
    saved = checkpoints.load_tensors(str(out / "checkpoint-3" / "grpo_callbacks.pt"))["callbacks"]
    state = next(state for name, state in saved if name == NAMES[request.param])
    return request.param, trainer, subject, state


@pytest.fixture
def fresh(run, model_path, tmp_path):
    return made(model_path, tmp_path / "fresh", run[0])[1]


def test_every_callback_is_here():
    for module in pkgutil.walk_packages(trl_grpo_ext.__path__, "trl_grpo_ext."):
        if not module.name.startswith(("trl_grpo_ext.recipe", "trl_grpo_ext.observe.report")):
            importlib.import_module(module.name)
    waiting, found = [GRPOCallback], set()
    while waiting:
        waiting += (below := waiting.pop().__subclasses__())
        found |= {kind for kind in below if kind.__module__.startswith("trl_grpo_ext.") and not kind.__subclasses__()}
    found = {kind.__name__ for kind in found if not kind.__module__.startswith("trl_grpo_ext.recipe")}
    assert found == set(NAMES)


def test_its_state_comes_back_from_a_file(run, fresh):
    _, _, subject, state = run
    assert plain(state) == plain(subject.state_dict())
    fresh.load_state_dict(state)
    assert plain(fresh.state_dict()) == plain(state)


def test_a_wrong_state_is_refused_by_its_key(run, fresh):
    for key in run[3]:
        state = dict(run[3])
        is_float = isinstance(state[key], torch.Tensor) and state[key].is_floating_point()
        for wrong in ("nonsense", None, *([torch.full_like(state[key], torch.nan)] if is_float else [])):
            with pytest.raises(ValueError, match=key):
                fresh.load_state_dict({**state, key: wrong})
        del state[key]
        if key not in OPTIONAL:
            with pytest.raises(ValueError, match=key):
                fresh.load_state_dict(state)


@cache
def documented() -> re.Pattern[str]:
    """The names between backticks in the docs; `{name}` in one stands for any."""
    text = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    names = set(re.findall(r"`([\w/{}]+)`", text.replace("`alarms/<name>`", "`alarms/{name}`")))
    return re.compile("|".join(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(name)) for name in names))


@pytest.fixture(scope="module")
def of_trl(model_path, tmp_path_factory):
    """Metrics that TRL logs with the same rewards."""
    out = tmp_path_factory.mktemp("trl")
    trainer = trainer_of(model_path, data(), out, [has_answer, count_vowels], cls=GRPOTrainer, beta=0.1, max_steps=1)
    trainer.train()
    return set(logs_of(trainer)[0])


def test_it_logs_only_what_the_docs_name(run, of_trl):
    logs = logs_of(run[1])
    assert len(logs) == 3
    added = {name for entry in logs for name in entry} - of_trl
    assert [name for name in sorted(added) if not documented().fullmatch(name)] == []


def test_it_survives_rounds_of_resampling(run):
    position, trainer, _, _ = run
    logs, batches = logs_of(trainer), batches_of(trainer)
    rounds = [entry["dynamic_sampling/rounds"] for entry in logs if "dynamic_sampling/rounds" in entry]
    assert len(rounds) == (len(batches) if can_resample(position) else 0)
    assert all(count >= 2 for count in rounds)
    assert all(torch.tensor([entry["loss"], entry["grad_norm"]]).isfinite().all() for entry in logs)
    assert all(batch.advantages.isfinite().all() for batch in batches)


def test_set_up_by_a_second_trainer_it_starts_afresh(run, fresh, model_path, tmp_path):
    position, _, subject, _ = run
    again = type(subject).__new__(type(subject))
    vars(again).update(vars(subject))  # the run stays as it is for the other tests
    _, again = made(model_path, tmp_path / "second", position, subject=again)
    names = {*vars(again), *vars(fresh)}
    assert insides(again, names) == insides(fresh, names)


@pytest.mark.parametrize("position", range(len(CASES)), ids=NAMES)
def test_twins_are_refused_where_one_is_all_there_can_be(position, model_path, tmp_path):
    make, _, _ = CASES[position]
    trainer, subject = made(model_path, tmp_path, position)
    message = f"There are two callbacks of the class {NAMES[position]}"
    for other in [subject, *([make()] if subject.is_unique else [])]:
        with pytest.raises(ValueError, match=message):
            trainer.add_callback(other)
        with pytest.raises(ValueError, match=message):
            made(model_path, tmp_path, position, subject, more=[other])


# Two processes


def train_all(model_path, out) -> list[dict[str, Any]]:
    """Each of them in turn, in one pair of processes."""
    found = []
    for position, name in enumerate(NAMES):
        trainer, subject = train(model_path, f"{out}/{name}", position, processes=2, max_steps=2)
        batches = batches_of(trainer)
        found.append(
            {
                "state": plain(subject.state_dict()),
                "rewards": [plain(batch.rewards) for batch in batches],
                "advantages": [plain(batch.advantages) for batch in batches],
                "prompts": [plain(batch.prompt_index) for batch in batches],
                "metrics": logs_of(trainer),
                "weights": [p.sum().item() for p in trainer.model.parameters()],
            }
        )
    return found


def untimed(value: Any) -> Any:
    """Without the times, which are those of a process."""
    if isinstance(value, dict):
        return {key: untimed(part) for key, part in value.items() if not str(key).startswith(("time/", "step_time"))}
    return [untimed(part) for part in value] if isinstance(value, list) else value


@pytest.mark.training
def test_two_processes_agree(model_path, tmp_path):
    first, second = launch(model_path, tmp_path / "out", train_all)
    for name, one, other in zip(NAMES, first, second, strict=True):
        assert untimed(one) == untimed(other), name
