"""Whatever stands in a file, a dataset, a reward or an option: it works, or one clear error says what is wrong."""

import dataclasses
import json
import math
import os
import shutil
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit import NAN, args_of, has_answer, make_letters, trainer_of
from trl import GRPOConfig

from trl_grpo_ext import AdaptiveGRPOConfig, GRPOCallback
from trl_grpo_ext.credit.groups import group_advantages, normalize_then_sum
from trl_grpo_ext.hooks.records import Answer, RolloutSequence
from trl_grpo_ext.hooks.segments import flat_groups, group_mean_std, total_rewards
from trl_grpo_ext.host.checkpoints import MANIFEST, CheckpointError, load_tensors
from trl_grpo_ext.observe.record import RunRecord, entries_of
from trl_grpo_ext.observe.report import NotARunError, read_run, write_report
from trl_grpo_ext.observe.report.figures import axes_of, panels_of
from trl_grpo_ext.observe.report.page import page_data, render
from trl_grpo_ext.plan.posterior import PromptPosterior
from trl_grpo_ext.recipe.datasets import load_prompts
from trl_grpo_ext.rewards import Length, RewardError, as_reward
from trl_grpo_ext.rollouts.dialogue import read_turns
from trl_grpo_ext.trainer.features import callbacks_of

INF = math.inf
ODD_TEXT = [
    "",
    " ",
    "\x00",
    "\x1b[2J",
    "\u202e",
    "\ufeff",
    "🙂" * 50,
    "é" * 3,
    "a" * 5000,
    "\n" * 9,
    "{}",
    "<|im_end|>",
]
odd_floats = st.one_of(st.floats(), st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1e308, 5e-324]))

# --- options ----------------------------------------------------------------------------------------------------------

OURS = [f for f in dataclasses.fields(AdaptiveGRPOConfig) if f.name not in GRPOConfig.__dataclass_fields__]


def values_for(option):
    kind = str(option.type)
    choices = option.metadata.get("choices") or []
    maybe = st.none() if "None" in kind else st.nothing()
    numbers = odd_floats if "float" in kind else st.integers(-3, 40)
    if "list[float]" in kind:
        return st.none() | st.lists(odd_floats, max_size=3)
    if "list[str]" in kind:
        return st.lists(st.sampled_from([*ODD_TEXT, "easy", "hard"]), max_size=3)
    if "dict" in kind:
        names = st.sampled_from(["kl_spike", "flat", "adapt_beta", "cool_lr", *ODD_TEXT])
        return st.none() | st.dictionaries(names, names, max_size=2)
    if kind == "bool" or option.type is bool:
        return st.booleans()
    if "str" in kind or option.type is str:
        return st.sampled_from([*choices, *ODD_TEXT[:4]]) | maybe
    return numbers | maybe


@st.composite
def options(draw):
    chosen = draw(st.lists(st.sampled_from(OURS), max_size=4, unique_by=lambda option: option.name))
    return {option.name: draw(values_for(option)) for option in chosen}


def refusal(build):
    """What the error says that `build` raises; `None` where it raises none."""
    try:
        build()
    except ValueError as error:
        return str(error)


@given(options(), st.sampled_from([0.0, 0.04]))
@settings(max_examples=150)
def test_options_work_or_are_refused_by_name(chosen, beta):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = refusal(lambda: callbacks_of(args_of(beta=beta, **chosen)))
    assert said is None or any(name in said for name in (*chosen, "num_generations", "exploration")), said


# --- rewards ----------------------------------------------------------------------------------------------------------

reward_rows = st.lists(st.lists(odd_floats, min_size=2, max_size=2), min_size=1, max_size=10).map(
    lambda rows: torch.tensor(rows, dtype=torch.float32)
)


@given(reward_rows, st.sampled_from(["group", "batch", "none"]), st.data())
def test_advantages_are_finite_whatever_the_rewards(rewards, scale, data):
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=len(rewards), max_size=len(rewards))))
    weights = torch.tensor([1.0, 0.5])
    total = total_rewards(rewards, weights)
    advantages = group_advantages(total, groups, 4, scale)
    scaled = normalize_then_sum(rewards, weights, groups, 4)[1]
    # Differences of the largest floats do not fit in a float; all others do.
    if total[total.isfinite()].abs().max().item() < 1e38 if total.isfinite().any() else True:
        assert advantages.isfinite().all()
    assert (advantages[~total.isfinite()] == 0).all()
    assert (advantages[flat_groups(total, groups, 4)[groups]] == 0).all()
    assert scaled.isfinite().all()


@given(reward_rows)
def test_what_is_known_of_prompts_stays_finite(rewards):
    posterior = PromptPosterior(num_prompts=3, decay=0.5, prior=2.0)
    rewards = torch.where(rewards.isinf(), rewards, rewards.clamp(-1e18, 1e18))[:, 0]  # whose squares fit
    groups = torch.arange(len(rewards)) % 3
    posterior.update(torch.arange(3), *group_mean_std(rewards, groups, 3))
    assert posterior.variance().isfinite().all()
    assert (posterior.variance() >= 0).all()
    assert posterior.mean().isfinite().all()


ROWS = {
    "nothing": lambda prompts, **kwargs: [None] * len(prompts),
    "nan": lambda prompts, **kwargs: [NAN] * len(prompts),
    "some": lambda prompts, **kwargs: [1.0 if i % 3 else None for i in range(len(prompts))],
    "huge": lambda prompts, **kwargs: [1e30 * (-1) ** i for i in range(len(prompts))],
    "flat": lambda prompts, **kwargs: [7] * len(prompts),
}
FEATURES = {
    "group_size": "variance",
    "curriculum": "online",
    "dynamic_sampling_rounds": 1,
    "monitor": True,
    "share_prompts": True,
    "skip_zero_advantage": True,
}


def assert_trained(trainer):
    assert trainer.state.global_step == 2
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("kind", ROWS)
def test_odd_rewards_train(kind, trained):
    assert_trained(trained(reward_funcs=ROWS[kind], max_steps=2, **FEATURES))


@pytest.mark.parametrize("value", [INF, -INF])
def test_an_infinite_reward_stops_the_run_with_its_name_or_is_clipped(value, trained):
    def explode(prompts, **kwargs):
        return [value, *[float(i % 2) for i in range(len(prompts) - 1)]]

    options = {"monitor": True, "max_steps": 2}
    with pytest.raises(ValueError, match=r"Rewards of step 0 are infinite \('explode' in 1 rows\).*reward_clip_range"):
        trained(reward_funcs=explode, **options)
    assert_trained(trained(reward_funcs=explode, reward_clip_range=[-5, 5], **options))
    with pytest.raises(RewardError, match=r"explode.*row 0"):
        trained(reward_funcs=as_reward(explode), **options)
    trainer = trained(reward_funcs=as_reward(explode).on_error("skip"), **options)
    assert trainer.state.log_history[0]["rewards/explode/errors"] == 1.0


# --- datasets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "overrides"),
    [
        (["say a"], {"per_device_train_batch_size": 4}),
        (["say a"] * 8, {}),
        (["say a", "\x00\x1b[2J\u202e\ufeff", "🙂é\u0301", " ", "<|im_start|>user <|im_end|>", "x" * 600, "\n"], {}),
    ],
    ids=["one prompt", "duplicated", "odd text"],
)
def test_odd_prompts_train(prompts, overrides, trained):
    data = Dataset.from_dict({"prompt": prompts, "answer": ["a"] * len(prompts)})
    features = {**FEATURES, "group_size": "fixed"} if len(prompts) == 1 else FEATURES
    assert_trained(trained(dataset=data, max_steps=2, **features, **overrides))


def test_one_prompt_for_many_groups_is_refused(make_trainer):
    data = Dataset.from_dict({"prompt": ["say a"], "answer": ["a"]})
    with pytest.raises(ValueError, match="train_dataset has 1 rows and one generation batch holds 2 prompts"):
        make_trainer(dataset=data, **FEATURES)


def test_every_row_cut_off_and_masked_trains_on_nothing(trained):
    options = {**FEATURES, "skip_zero_advantage": False, "mask_truncated_completions": True}
    trainer = trained(max_completion_length=1, max_steps=2, **options)
    assert_trained(trainer)
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == 1.0


@pytest.mark.parametrize("completion", [["<|im_end|>"], ["<pad>"] * 4], ids=["only the end", "all pad"])
def test_completions_of_nothing_train(completion, make_trainer, monkeypatch):
    trainer = make_trainer(reward_funcs=as_reward(has_answer) - 0.1 * Length(), max_steps=2, **FEATURES)
    ids = trainer.processing_class.convert_tokens_to_ids(completion)
    monkeypatch.setattr(
        trainer, "_generate_single_turn", lambda prompt_ids, *args, **kwargs: ([list(ids) for _ in prompt_ids], None)
    )
    trainer.train()
    assert_trained(trainer)


class Silent(GRPOCallback):
    def on_generate(self, rows, **kwargs):
        return [RolloutSequence([5], [Answer(row["prompt"], ids=[], text="")]) for row in rows]


def test_answers_without_a_token_are_refused(conversational, trained):
    with pytest.raises(ValueError, match=r"Silent\.on_generate returned sequence 0 with an answer of no tokens"):
        trained(dataset=conversational, callbacks=[Silent()])


messages = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", ""]), "content": st.none() | st.sampled_from(ODD_TEXT)}
    ),
    st.dictionaries(st.sampled_from(["role", "content", "x"]), st.none() | st.text(max_size=3) | st.integers()),
    st.none(),
    st.text(max_size=3),
    st.integers(),
)
anything = st.one_of(st.none(), st.text(max_size=4), st.integers(), st.lists(messages, max_size=4), messages)


@given(st.dictionaries(st.sampled_from(["prompt", "turns", "answer"]), anything))
@settings(max_examples=300)
def test_a_row_is_a_conversation_or_refused(row):
    said = refusal(lambda: read_turns(row))
    if said is not None:
        assert "prompt=" in said or "turns=" in said
        return
    opening, later = read_turns(row)
    for part in (opening, *later):
        assert part
        assert all(isinstance(message["role"], str) and message["content"] is not None for message in part)
        assert part[-1]["role"] != "assistant"


@given(st.binary(max_size=60) | st.lists(st.dictionaries(st.text(max_size=6), anything, max_size=3)).map(
    lambda rows: "\n".join(json.dumps(row) for row in rows).encode()
), st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))  # fmt: skip
@settings(max_examples=25)
def test_a_file_of_prompts_is_read_or_refused_by_name(tmp_path_factory, content, ending):
    path = tmp_path_factory.mktemp("data") / f"prompts{ending}"
    path.write_bytes(content)
    said = refusal(lambda: load_prompts(str(path)))
    assert said is None or str(path) in said


# --- the report -------------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), odd_floats, st.sampled_from([*ODD_TEXT, "\ud800", 10**300])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["step", "time", "a"]), inner),
    max_leaves=6,
)
KEYS = ["step", "time", "loss", "reward", "rewards/a/mean", "rewards/a/std", "kl", "eval_reward", "rollouts/total"]
KEYS += ["name", "state", "evidence", "train_runtime", "step_time", "\u202e", "__proto__", "completions/min_length"]
lines = st.one_of(
    st.dictionaries(st.sampled_from(KEYS), json_values).map(lambda line: json.dumps(line).encode()),
    st.fixed_dictionaries({"step": st.integers(0, 9), "reward": odd_floats, "time": odd_floats}).map(
        lambda line: json.dumps(line).encode()
    ),
    st.binary(max_size=30),
    st.sampled_from([b"[" * 5000, b'{"step": 1' * 999, b"9" * 5000, b'{"step": ' + b"9" * 4000 + b"}", b"\xff\xfe{}"]),
)
INFO_KEYS = ["status", "max_steps", "started", "config", "versions", "reward_names", "reward_weights", "model"]
infos = st.dictionaries(st.sampled_from([*INFO_KEYS, "resumed_at_steps", "num_processes"]), json_values)


@given(st.lists(lines, max_size=8), st.lists(lines, max_size=4), infos | st.binary(max_size=20), st.booleans())
@settings(max_examples=120)
def test_a_report_of_any_folder_is_a_page(tmp_path_factory, metrics, alarms, info, monitored):
    folder = tmp_path_factory.mktemp("run")
    if monitored:
        (folder / "monitor").mkdir()
        (folder / "monitor" / "metrics.jsonl").write_bytes(b"\n".join(metrics))
        (folder / "monitor" / "alarms.jsonl").write_bytes(b"\n".join(alarms))
        text = info if isinstance(info, bytes) else json.dumps(info).encode()
        (folder / "monitor" / "run.json").write_bytes(text)
    else:
        state = {"log_history": [line.decode("latin-1") for line in metrics] if alarms else 5, "global_step": 3}
        state |= {} if isinstance(info, bytes) else info
        (folder / "trainer_state.json").write_text(json.dumps(state))
    runs = [read_run(folder)]
    page = render(page_data(runs, axes_of(runs), panels_of(runs), 10)).encode()
    assert b"<html" in page


def run_folder(folder, num_lines=3):
    (folder / "monitor").mkdir(parents=True)
    rows = [{"step": step, "reward": step / 10, "time": 1e9 + step} for step in range(1, num_lines + 1)]
    (folder / "monitor" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "monitor" / "run.json").write_text('{"status": "running", "max_steps": 9}')
    return folder


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", "alarms.jsonl"])
@pytest.mark.parametrize("kind", ["secret", "device", "pipe", "folder", "loop"])
def test_what_leads_out_of_the_folder_or_is_no_file_is_left_out(tmp_path, name, kind):
    folder = run_folder(tmp_path / "run")
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"step": 1, "reward": 0.123456, "model": "TOP SECRET", "name": "TOP SECRET"}) + "\n")
    path = folder / "monitor" / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"secret": secret, "device": Path("/dev/zero"), "loop": path}[kind])
    try:
        page = write_report(folder, tmp_path / "report.html").read_text()
    except NotARunError:
        assert (name, kind) == ("metrics.jsonl", "loop")
        return
    assert "TOP SECRET" not in page
    assert "0.123456" not in page
    assert "left out" in page or kind == "loop"


def test_tables_that_are_hostile_are_left_out(tmp_path):
    folder = run_folder(tmp_path / "run")
    tables = folder / "completions"
    tables.mkdir()
    good = {"step": [1, 1], "prompt": ["p", "p"], "completion": ["good one", "\ud83d\x00"[1:]], "advantage": [NAN, INF]}
    pq.write_table(pa.table(good), tables / "completions_1.parquet")
    pq.write_table(pa.table({"other": [1]}), tables / "completions_2.parquet")
    pq.write_table(pa.table({**good, "step": ["x", "y"]}), tables / "completions_3.parquet")
    (tables / "completions_00001.parquet").write_bytes(b"PAR1" + bytes(range(256)) + b"PAR1")
    (tables / f"completions_{'9' * 200}.parquet").write_bytes(b"")
    (tables / "completions_4.parquet").mkdir()
    (tables / "completions_5.parquet").symlink_to(tables / "completions_1.parquet")
    shutil.copy(tables / "completions_1.parquet", tmp_path / "private.parquet")
    (tables / "completions_6.parquet").symlink_to(tmp_path / "private.parquet")
    page = write_report(folder, tmp_path / "report.html").read_text()
    assert "good one" in page
    assert "could not be read" in page


def test_a_report_is_not_written_through_links(tmp_path):
    folder = run_folder(tmp_path / "run")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (folder / "report.html").symlink_to(precious)
    (folder / "report_figures").mkdir()
    (folder / "report_figures" / "reward.png").symlink_to(precious)
    write_report(folder)
    assert precious.read_text() == "precious"
    assert not (folder / "report.html").is_symlink()
    shutil.rmtree(folder / "report_figures")
    (folder / "report_figures").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is a link, and plots would go where it leads"):
        write_report(folder)


def test_numbers_at_the_ends_of_floats_are_drawn_or_left_out(tmp_path):
    folder = run_folder(tmp_path / "run", 0)
    rows = [
        {"step": i, "reward": (-1) ** i * 1e308, "kl": 5e-324, "loss": INF, "time": 1e308 * i, "learning_rate": 10.0**i}
        for i in range(12)
    ]
    (folder / "monitor" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_report(folder).exists()


def test_a_line_of_any_length_takes_little_memory(tmp_path):
    folder = run_folder(tmp_path / "run")
    with (folder / "monitor" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "x": "' + "x" * 5_000_000 + '"}\n{"step": 5, "reward": 1.0}\n')
    run = read_run(folder)
    assert [entry["step"] for entry in run.metrics] == [1, 2, 3, 5]
    assert "1 lines of monitor/metrics.jsonl could not be read" in " ".join(run.notes)


@given(st.lists(lines, max_size=6), st.binary(max_size=20), st.integers(0, 5))
@settings(max_examples=60)
def test_the_record_goes_on_after_any_crash(tmp_path_factory, before, info, step):
    folder = tmp_path_factory.mktemp("run")
    record = RunRecord(folder / "monitor")
    record.run.parent.mkdir()
    for path in (record.metrics, record.alarms):
        path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + b"\n".join(before))
    record.run.write_bytes(info)
    record.start({"model": "m"}, step)
    record.log(step + 1, {"loss": 1.0}, [])
    record.update(status="finished")
    kept = list(entries_of(record.metrics, record.run.parent))
    assert [entry["step"] for entry in kept][-1] == step + 1
    assert all(entry["step"] <= step for entry in kept[:-1])
    assert len(record.metrics.read_text().splitlines()) == len(kept)
    assert json.loads(record.run.read_text())["status"] == "finished"
    assert read_run(folder).last_step == step + 1


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Keeper(GRPOCallback):
    """A callback of a user, whose state is whatever it likes."""

    def __init__(self):
        self.state = {"sum": torch.zeros(3)}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state_dict):
        self.state["sum"] = self.state["sum"] + state_dict["sum"]


SAVED = {**FEATURES, "skip_zero_advantage": False, "kl_target": 0.1, "beta": 0.04, "num_iterations": 2}
SAVED |= {"on_alarm": {"truncated": "cool_lr"}, "curriculum": "target", "difficulty_column": "score"}


@pytest.fixture(scope="module")
def saved(model_path, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved")
    options = {**SAVED, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer = trainer_of(model_path, make_letters(), out, callbacks=[Keeper()], **options)
    trainer.train()
    return trainer, out / "checkpoint-1"


@pytest.fixture
def checkpoint(saved, tmp_path):
    folder = shutil.copytree(saved[1], tmp_path / "checkpoint-1")
    (folder / MANIFEST).unlink()  # so that the file is read, and not refused for its size
    return saved[0], folder


def leaves(value, path=()):
    """Where the numbers, texts and tensors of a state are."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], tuple):
        for i, (_, item) in enumerate(value):
            yield from leaves(item, (*path, i, 1))
    else:
        yield path, value


def replaced(state, path, value):
    """A copy of `state` with another value at `path`; without it where the value is `KeyError`."""
    if not path:
        return value
    key, *rest = path
    if isinstance(state, dict):
        if not rest and value is KeyError:
            return {k: v for k, v in state.items() if k != key}
        return {k: replaced(v, rest, value) if k == key else v for k, v in state.items()}
    kept = [replaced(v, rest, value) if i == key else v for i, v in enumerate(state)]
    return tuple(kept) if isinstance(state, tuple) else kept


def bad_values(value):
    """What could stand there instead, and must not be taken."""
    if isinstance(value, torch.Tensor):
        yield torch.zeros(*value.shape, 2, dtype=value.dtype)
        yield torch.zeros(1, dtype=value.dtype).expand(10**9) if value.dim() == 1 else torch.zeros(())
        yield value.to(torch.complex64)
        if value.is_floating_point() and value.numel():
            yield torch.full_like(value, NAN)
            yield torch.full_like(value, INF)
    elif isinstance(value, bool):
        yield from (2, None, NAN)
    elif isinstance(value, int | float):
        yield from (NAN, INF, -1 if isinstance(value, int) else "1.0", None, 10**400, [value])
    yield from (KeyError, "text", {})


def broken(state, depth):
    """Each place of a state with what must not be taken there, and what an error has to name; callbacks are so deep."""
    for place, value in leaves(state):
        is_optional = "detector" in place and (len(place) > depth or "streaks" in place)  # any metric may be known
        key = next(part for part in reversed(place) if isinstance(part, str))
        for bad in bad_values(value):
            if not (isinstance(value, list) or (bad is KeyError and is_optional) or (value == {} == bad)):
                yield place, value, bad, (f"'{key}'", "The checkpoint knows")


def test_a_hostile_state_is_refused_with_the_file_and_the_key(checkpoint):
    trainer, folder = checkpoint
    path = folder / "grpo_callbacks.pt"
    state = torch.load(path, weights_only=True)
    names = [name for name, _ in state["callbacks"]]
    assert {"TargetCurriculumCallback", "VarianceGroupSizeCallback", "AdaptiveKLCallback", "MonitorCallback"} < {*names}
    tried = 0
    for place, value, bad, parts in broken(state, depth=5):
        is_users = place[:1] == ("callbacks",) and names[place[1]] == "Keeper"
        if value is None or (is_users and isinstance(bad, torch.Tensor)):  # which is for the callback to judge
            continue
        torch.save(replaced(state, place, bad), path)
        with pytest.raises(CheckpointError, match=r"grpo_callbacks\.pt") as error:
            trainer._load_state(str(folder))
        parts = ("Keeper",) if is_users else parts
        assert any(part in str(error.value) for part in parts), (place, bad, str(error.value))
        tried += 1
    assert tried > 100


def test_a_writer_refuses_what_its_reader_refuses(saved, monkeypatch):
    """With the name of the callback and the key, and without a change of anything."""
    trainer, _ = saved
    writers = [callback for callback in trainer.grpo_callbacks if not isinstance(callback, Keeper)]
    writers = {type(writer).__name__: writer for writer in [*writers, trainer._planner]}
    before = {name: str(writer.state_dict()) for name, writer in writers.items()}
    beta = trainer.beta
    tried = 0
    for name, writer in writers.items():
        state = writer.state_dict()
        assert trainer._state_of(writer) is not None
        for place, _, bad, parts in broken(state, depth=3):
            monkeypatch.setattr(writer, "state_dict", lambda p=place, b=bad, s=state: replaced(s, p, b))
            with pytest.raises(ValueError, match=rf"state_dict\(\) of {name}") as error:
                trainer._state_of(writer)
            monkeypatch.undo()
            assert any(part in str(error.value) for part in parts), (place, bad)
            tried += 1
    assert tried > 80
    assert trainer.beta == beta
    assert before == {name: str(writer.state_dict()) for name, writer in writers.items()}


def test_another_version_is_refused(checkpoint):
    trainer, folder = checkpoint
    state = torch.load(folder / "grpo_callbacks.pt", weights_only=True)
    for version in (1, 3):
        torch.save({"version": version, "callbacks": state["callbacks"]}, folder / "grpo_callbacks.pt")
        message = rf"grpo_callbacks\.pt: 'version' is {version}, and this release reads 2: resume with the release"
        with pytest.raises(CheckpointError, match=message):
            trainer._load_state(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": {"kl": [None]}}, r"'metrics' has \[None\] under 'kl': not numbers"),
        ({"metrics": {3: [1.0]}}, "'metrics' has .* under 3"),
        ({"metrics": {"kl": 1.0}}, "'metrics' has 1.0 under 'kl'"),
        ({"losses": []}, "'losses' is .*: not numbers"),
        ({"losses": ["1"]}, "'losses' is .*: not numbers"),
        ({"last_log": -1}, "'last_log' is -1: not a count"),
        ({"table": {"prompt": ["a"], "completion": [], "rewards": {}, "extra": {}}}, ".*'completion' that"),
        ({"table": {"prompt": ["a"], "rewards": {"r": [1.0, 2.0]}, "extra": {}}}, ".*'rewards/r' that does not fit"),
        ({"table": {"prompt": 3, "rewards": {}, "extra": {}}}, "'prompt' is 3: not a list"),
        ({"table": {"completion": [], "rewards": {}, "extra": {}}}, "'prompt' is missing"),
    ],
)
def test_what_was_logged_is_checked(change, message, checkpoint):
    trainer, folder = checkpoint
    path = folder / "grpo_callbacks.pt"
    state = torch.load(path, weights_only=True)
    torch.save({**state, "logged": {**state["logged"], **change}}, path)
    with pytest.raises(CheckpointError, match=rf"grpo_callbacks\.pt: {message}"):
        trainer._load_state(str(folder))


@pytest.mark.parametrize("name", ["grpo_callbacks.pt", "grpo_rollouts_0.pt"])
@given(data=st.data())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_is_cut_off_or_changed_is_refused_or_read(checkpoint, name, data):
    trainer, folder = checkpoint
    path = folder / name
    original = path.read_bytes()
    changed = bytearray(original[: data.draw(st.integers(0, len(original)))])
    for _ in range(data.draw(st.integers(0, 3)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    said = refusal(lambda: trainer._load_state(str(folder)))
    path.write_bytes(original)
    assert said is None or name in said


class Boom:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_checkpoint_runs_no_code(checkpoint, tmp_path, monkeypatch):
    trainer, folder = checkpoint
    monkeypatch.chdir(tmp_path)
    for name in ("grpo_callbacks.pt", "grpo_rollouts_0.pt"):
        original = (folder / name).read_bytes()
        torch.save({"version": 2, "callbacks": [("Keeper", Boom())]}, folder / name)
        with pytest.raises(CheckpointError, match=f"{name} cannot be read .*more than tensors and plain data"):
            trainer._load_state(str(folder))
        (folder / name).write_bytes(original)
    assert not (tmp_path / "pwned").exists()


def test_rollouts_of_other_shapes_are_refused(checkpoint):
    trainer, folder = checkpoint
    path = folder / "grpo_rollouts_0.pt"
    state = load_tensors(path)
    (batch,) = state["inputs"]
    wrong = {
        "'step' is -1": {"step": -1},
        "'inputs' has 0 micro-batches": {"inputs": []},
        "'advantages' is missing": {"inputs": [{k: v for k, v in batch.items() if k != "advantages"}]},
        "'advantages' holds NaN": {"inputs": [{**batch, "advantages": batch["advantages"] * NAN}]},
        "'advantages' has shape": {"inputs": [{**batch, "advantages": batch["advantages"][1:]}]},
        "'completion_mask' has shape": {"inputs": [{**batch, "completion_mask": batch["completion_mask"][:, 1:]}]},
    }
    for message, change in wrong.items():
        torch.save({**state, **change}, path)
        with pytest.raises(CheckpointError, match=rf"grpo_rollouts_0\.pt: {message}"):
            trainer._load_state(str(folder))


def test_nothing_of_ours_is_loaded_with_pickle():
    root = Path(__file__).parents[2] / "trl_grpo_ext"
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert "allow_pickle" not in text, path
        assert "weights_only=False" not in text, path
        assert text.count("torch.load(") == text.count("weights_only=True"), path
        if "pickle.load" in text:
            assert path.name == "processes.py", path  # between processes of one training
