"""Alarms: each is raised by a run that has the illness, none by a healthy one, and none of them nags."""

import json
import math
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.utils import nanstd

from trl_grpo_ext.config import ALARMS
from trl_grpo_ext.observe.alarms import Alarm, AlarmDetector, make_alarms
from trl_grpo_ext.observe.readings import (
    RECENT,
    REST,
    History,
    Reading,
    away_from,
    collapse,
    constant_rewards,
    growth,
    level,
    off_centre,
    outburst,
    runaway,
    spike,
)

NAN = math.nan
ONSET = 40  # log at which the illness begins
GAP = "sampling/sampling_logp_difference/mean"

# A real run: 120 steps of the tiny model of recipes/studies/skills.py on `translate`, with kl_target=0.1.
RECORDED = [json.loads(line) for line in (Path(__file__).parent / "data" / "healthy.jsonl").read_text().splitlines()]


def flagship(steps: int = 80, seed: int = 0) -> list[dict]:
    """Numbers such as recipes/helpful.py logs, but with room for answers to end: continuous rewards, no KL."""
    rng, of_vllm = random.Random(seed), random.Random(seed + 100)
    return [
        {
            "loss": rng.gauss(0, 0.02),
            "grad_norm": math.exp(rng.gauss(-0.5, 0.4)),
            "entropy": 1.6 - 0.004 * step + rng.gauss(0, 0.05),
            "reward": 1.0 + 0.001 * step + rng.gauss(0, 0.02),
            "reward_std": math.exp(rng.gauss(-2.3, 0.3)),
            "rewards/total/mean": 1.0 + 0.001 * step + rng.gauss(0, 0.02),
            "rewards/total/std": 0.1,
            "rewards/helpfulness/mean": 0.56 + 0.001 * step + rng.gauss(0, 0.02),
            "rewards/harmlessness/mean": 0.95 + rng.gauss(0, 0.01),
            "completions/mean_length": 35.0 - 0.1 * step + rng.gauss(0, 1),
            "completions/clipped_ratio": rng.uniform(0.0, 0.3),
            "reward_clip/frac": rng.uniform(0.1, 0.15),
            "rollouts/flat_high": 0.0,
            "rollouts/flat_low": 0.0,
            "advantage/mean": rng.gauss(0, 1e-8),
            "advantage/abs_mean": 0.7,
            "clip_ratio/region_mean": 0.0,
            "sampling/sampling_logp_difference/mean": 0.005 * math.exp(of_vllm.gauss(0, 0.2)),
            "sampling/importance_sampling_ratio/mean": of_vllm.gauss(1, 0.02),
        }
        for step in range(steps)
    ]


def run(logs: list[dict], alarms: list[Alarm] | None = None) -> list[tuple[int, str, str]]:
    """What happens: log, alarm, state."""
    detector = AlarmDetector(make_alarms() if alarms is None else alarms)
    return [(i, e.alarm.name, e.state) for i, entry in enumerate(logs) for e in detector.update(entry)]


HEALTHY = {"recorded": RECORDED, "flagship": flagship(), "flagship_short": flagship(14, seed=1)}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_raises_nothing(name):
    assert run(HEALTHY[name]) == []


def test_the_recorded_run_has_what_the_alarms_look_at():
    seen = set(RECORDED[-1])
    assert {"kl", "entropy", "rollouts/flat_low", "advantage/abs_mean", "clip_ratio/region_mean"} <= seen
    assert len(RECORDED) == 120


# From log ONSET on, the illness overwrites these metrics; `i` counts logs since then.
ILL = {
    "all_correct": lambda i, log: {"rollouts/flat_high": 0.6 + 0.01 * (i % 5), "rollouts/flat_low": 0.1},
    "all_wrong": lambda i, log: {"rollouts/flat_low": 0.55, "rollouts/flat_high": 0.05},
    "reward_std_spike": lambda i, log: {"reward_std": 8 * log["reward_std"]},
    "reward_hacking": lambda i, log: {
        "reward": log["reward"] + 0.1 * i,
        "completions/mean_length": min(30 + 10 * i, 200.0),
    },
    "kl_spike": lambda i, log: {"kl": 4.0},
    "gradient_spike": lambda i, log: {"grad_norm": 30.0 if i == 0 else log["grad_norm"]},
    "entropy_collapse": lambda i, log: {"entropy": 0.02},
    "ratio_clipping": lambda i, log: {"clip_ratio/region_mean": 0.4},
    "reward_clipping": lambda i, log: {"reward_clip/frac": 0.5},
    "truncated": lambda i, log: {"completions/clipped_ratio": 0.9},
    "nan_loss": lambda i, log: {"grad_norm": NAN},
    "dead_reward": lambda i, log: {"rewards/helpfulness/mean": 0.0, "rewards/helpfulness/std": 0.0},
    "advantage_bias": lambda i, log: {"advantage/mean": -0.2},
    "nothing_trained": lambda i, log: {"updates/without_effect": i + 1.0},
    "sampling_mismatch": lambda i, log: {GAP: 0.4},
    "sampling_ratios": lambda i, log: {"sampling/importance_sampling_ratio/mean": 0.2},
    "stale_engine": lambda i, log: {GAP: 0.005 + 0.0024 * i},
}


def ill_run(name: str, healthy: list[dict]) -> list[dict]:
    return [log if i < ONSET else {**log, **ILL[name](i - ONSET, log)} for i, log in enumerate(healthy)]


@pytest.mark.parametrize("base", ["recorded", "flagship"])
@pytest.mark.parametrize("name", ILL)
def test_an_ill_run_raises_its_alarm_and_no_other(name, base):
    if (name, base) == ("kl_spike", "flagship"):
        pytest.skip("beta is 0 there, so there is no KL")
    if (name, base) == ("stale_engine", "recorded"):
        pytest.skip("transformers sampled there, so there is no start to grow from")
    alarm = next(alarm for alarm in make_alarms() if alarm.name == name)
    events = run(ill_run(name, HEALTHY[base]))
    assert {event[1] for event in events} == {name}
    (first, *_) = events
    assert first[2] == "raised"
    delay = {"dead_reward": 2 * REST - 1, "reward_hacking": 30, "nothing_trained": 1, "stale_engine": 38}.get(
        name, alarm.patience - 1
    )
    assert ONSET + alarm.patience - 1 <= first[0] <= ONSET + delay
    # Said once, and not at each log.
    assert len(events) <= 3


def short_run(entropy: float, grad_norm: float, reward_std: float) -> list[dict]:
    """Three healthy logs, then eight as given."""
    start = {"loss": 0.0, "reward": 0.3, "entropy": 3.0, "grad_norm": 0.5, "reward_std": 0.6}
    later = {**start, "entropy": entropy, "grad_norm": grad_norm, "reward_std": reward_std}
    return [start] * 3 + [later] * 8


@pytest.mark.parametrize(
    ("later", "is_collapse"),
    [
        ((0.02, 0.002, 0.7), True),  # one answer to everything, right or wrong
        ((0.02, 0.002, 0.1), False),  # nearly everything is right
        ((0.02, 0.4, 0.7), False),  # surer, and still learning
        ((0.02, 0.0, 0.6), True),
        ((1.0, 0.002, 0.7), False),
    ],
)
def test_a_collapse_is_told_from_learning_in_a_short_run(later, is_collapse):
    events = run(short_run(*later))
    assert events == ([(7, "entropy_collapse", "raised")] if is_collapse else [])


def test_every_alarm_of_the_configuration_is_made_and_tried():
    names = tuple(alarm.name for alarm in make_alarms())
    assert names == ALARMS
    of_tasks = {name for name in names if name.endswith("_task")}  # which `test_task_views.py` tries
    assert set(ILL) | of_tasks == set(names)


def test_lines_name_evidence_cause_and_remedy():
    detector = AlarmDetector(make_alarms())
    (event,) = [e for log in ill_run("gradient_spike", RECORDED)[: ONSET + 1] for e in detector.update(log)]
    usual = sorted(log["grad_norm"] for log in RECORDED[ONSET - RECENT : ONSET])
    usual = (usual[RECENT // 2 - 1] + usual[RECENT // 2]) / 2
    assert event.line == (
        f"gradient_spike: grad_norm is 30, {30 / usual:.1f} times its recent median of {usual:.3g}. Likely cause: "
        f"{event.alarm.cause}. Remedy: {event.alarm.remedy}"
    )
    assert "\n" not in event.line


# Raising and clearing


def alarm(**changes) -> Alarm:
    base = Alarm(
        "test", level("x"), threshold=2.0, clear=1.0, warmup=0, patience=2, calm=2, cause="c", remedy="r", source="s"
    )
    return replace(base, **changes)


def states(values, **changes):
    return [(i, state) for i, _, state in run([{"x": v} for v in values], [alarm(**changes)])]


def test_patience_and_hysteresis_by_hand():
    #                1  2  3     4  5  6    7    8  9    10 11
    assert states([0, 3, 0, 3, 3, 3, 1.5, 1.5, 1, 1.5, 1, 1, 1]) == [(4, "raised"), (11, "cleared")]
    assert states([3, 3, 3], patience=1) == [(0, "raised")]
    assert states([3, 0, 0, 3, 0, 0, 0], patience=1, calm=3) == [(0, "raised"), (6, "cleared")]


def test_warmup_by_hand():
    assert states([3, 3, 3, 3, 3, 3], warmup=3) == [(4, "raised")]
    assert states([3, 3, 3], warmup=3) == []


def test_what_is_missing_says_nothing():
    # Neither for nor against: the logs at which the metric is there count as if they were neighbours.
    assert states([3, None, NAN, 3]) == [(3, "raised")]


values = st.lists(st.one_of(st.floats(0, 4), st.just(NAN), st.none()), max_size=40)
patiences, warmups, cuts = st.integers(1, 4), st.integers(0, 10), st.integers(0, 40)


@given(values, patiences, patiences, warmups)
def test_raised_and_cleared_take_turns(values, patience, calm, warmup):
    events = states(values, patience=patience, calm=calm, warmup=warmup)
    assert [state for _, state in events] == (["raised", "cleared"] * len(events))[: len(events)]
    assert all(i >= warmup + patience - 1 for i, _ in events)
    gaps = [(later - earlier, state) for (earlier, _), (later, state) in pairwise(events)]
    assert all(gap >= (calm if state == "cleared" else patience) for gap, state in gaps)


@given(st.lists(st.floats(1.0, 2.0, exclude_min=True), max_size=30), st.booleans())
def test_between_the_thresholds_nothing_changes(values, begin_raised):
    begin = [3.0] if begin_raised else []
    assert states(begin + values, patience=1) == ([(0, "raised")] if begin_raised else [])


@given(values, cuts, patiences, warmups)
def test_a_restart_changes_nothing(values, cut, patience, warmup):
    rule = alarm(patience=patience, warmup=warmup, measure=spike("x"))
    logs = [{"x": v} for v in values]
    whole, first, second = (AlarmDetector([rule]) for _ in range(3))
    before = [event.state for log in logs[:cut] for event in first.update(log)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = [event.state for log in logs[cut:] for event in second.update(log)]
    assert before + after == [event.state for log in logs for event in whole.update(log)]
    assert second.state_dict() == whole.state_dict()


def test_a_restart_in_the_middle_of_a_streak():
    first, second = AlarmDetector([alarm()]), AlarmDetector([alarm()])
    assert first.update({"x": 3.0}) == []
    second.load_state_dict(first.state_dict())
    assert [event.state for event in second.update({"x": 3.0})] == ["raised"]


def test_state_is_a_copy():
    detector = AlarmDetector([alarm()])
    detector.update({"x": 1.0})
    state = detector.state_dict()
    detector.update({"x": 2.0})
    assert state["history"]["recent"] == {"x": [1.0]}


def test_two_alarms_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"share a name \(test, test\): rename one"):
        AlarmDetector([alarm(), alarm()])


# Readings


def history_of(**series) -> History:
    history = History()
    for i in range(max(map(len, series.values()))):
        history.append({name: values[i] for name, values in series.items() if i < len(values)})
    return history


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_history_keeps_both_ends(values):
    history = history_of(x=values)
    assert history.first["x"] == values[:10]
    assert history.recent["x"] == values[-20:]
    assert history.num_logs == history.counts["x"] == len(values)
    assert history.highest["x"] == max(values)


def test_spike_by_hand():
    history = history_of(x=[1.0, 0.0, 3.0, NAN, None, 2.0])
    assert spike("x")({"x": 20.0}, history) == Reading(10.0, "x is 20, 10.0 times its recent median of 2")
    assert spike("x", floor=20.0)({"x": 20.0}, history).value == 0.0
    assert spike("x")({"x": NAN}, history) is None
    assert spike("y")({"y": 1.0}, history) is None


def test_collapse_by_hand():
    history = history_of(x=[2.0] * 10 + [1.0] * 30)
    assert collapse("x")({"x": 0.5}, history) == Reading(4.0, "x fell to 0.5 from 2 at the start")
    assert collapse("x")({"x": 0.0}, history).value == math.inf


def test_outburst_by_hand():
    read = outburst("x", floor=1.0, alone=20.0, margin=4.0)
    steady = history_of(x=[1.0] * 10)
    assert read({"x": 30.0}, steady) == Reading(30.0, "x is 30, 30.0 times its recent median of 1")
    assert read({"x": 15.0}, steady).value == 1.0  # alone it does not count
    assert read({"x": 15.0}, history_of(x=[1.0] * 10 + [12.0, 40.0])).value == 12.0  # the smallest of three
    assert read({"x": 15.0}, history_of(x=[1.0] * 10 + [12.0, 1.0])).value == 1.0
    # Six times the usual was there before: 30 is not four times that, and 35 is as far from 6 as 6 from 1.
    assert read({"x": 23.0}, history_of(x=[1.0] * 10 + [6.0] + [1.0] * 9)).value == 1.0
    assert read({"x": 35.0}, history_of(x=[1.0] * 10 + [6.0] + [1.0] * 9)).value == 1.0
    assert read({"x": 37.0}, history_of(x=[1.0] * 10 + [6.0] + [1.0] * 9)).value == 37.0
    assert outburst("x", floor=50.0, alone=20.0, margin=4.0)({"x": 30.0}, steady).value == 0.0
    assert read({"x": NAN}, steady) is None
    assert read({"y": 1.0}, steady) is None


def dead(*values: float, std: float | None = None) -> bool:
    """Whether a reward whose mean was logged with these values is dead by the last of them."""
    (*before, last) = values
    logs = {"rewards/a/mean": last} | ({} if std is None else {"rewards/a/std": std})
    reading = constant_rewards(logs, history_of(**{"rewards/a/mean": before}))
    assert reading == (Reading(1.0, f"a is always {last:.3g}") if reading.value else Reading(0.0, "all rewards vary"))
    return reading.value == 1.0


def test_dead_rewards_by_hand():
    assert dead(*[0.5] * 5)  # it never had another value
    assert not dead(*[0.5] * 4)
    assert dead(*[0.0] * 60)
    assert not dead(*[1.0] * 60)  # always met
    assert not dead(*[0.5] * 5, std=0.2)  # the same mean from different completions
    assert not dead(0.5, 0.6, 0.5, 0.6, 0.5)
    # A service that fails: ten logs, because a coarse reward may well stand still for five.
    noisy = [0.56, 0.53, 0.58, 0.55, 0.57, 0.54, 0.56, 0.58]
    assert dead(*noisy, *[0.0] * 10)
    assert not dead(*noisy, *[0.0] * 9)
    assert dead(*noisy, *[0.0] * 60)
    # Learnt: the way leads to the value, up or down.
    assert not dead(0.3, 0.5, 0.7, 0.85, 0.95, 0.98, *[1.0] * 40)
    assert not dead(0.9, 1.2, 1.5, 1.8, 1.95, *[2.0] * 40)
    assert not dead(0.4, 0.2, 0.1, 0.05, *[0.0] * 40)
    # Rare: the value was there before.
    assert not dead(0.0, 0.125, 0.0, 0.0, 0.25, *[0.0] * 40)
    # What TRL computes of 16 times 0.1.
    rounding = nanstd(torch.full((16,), 0.1)).item()
    assert 0 < rounding < 1e-7
    assert dead(*[0.1] * 5, std=rounding)
    assert constant_rewards({"loss": 0.0}, History()) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(0, 20))
def test_what_moved_lately_is_not_dead(values, cut):
    values = [*values, values[-1] + 1.0, *[0.1 * i for i in range(cut % 4)]]
    assert not dead(*values)


def test_a_baseline_below_the_rewards_is_no_bias():
    read = off_centre("advantage/mean", "advantage/abs_mean")
    logs = {"advantage/mean": 0.5, "advantage/abs_mean": 0.8, "reward": 1.0, "reward_std": 0.4}
    assert read(logs, History()).value == 0.625
    assert read({**logs, "baseline/mean": 0.99}, History()).value == 0.625
    assert read({**logs, "baseline/mean": 0.8}, History()).value == 0.0


def test_away_from_by_hand():
    read = away_from("x", 1.0)
    assert read({"x": 0.25}, History()) == Reading(0.75, "x is 0.25 where 1 is expected")
    assert read({"x": 1.5}, History()).value == 0.5
    assert read({"x": NAN}, History()) is None
    assert read({}, History()) is None


def test_growth_by_hand():
    read = growth("x", times=3.0)
    line = [0.01 * (i + 1) for i in range(21)]
    # Medians of seven: 0.04, 0.11, 0.18. The start is the median of the first three, 0.02.
    grown = read({"x": line[-1]}, history_of(x=line[:-1]))
    assert grown.value == pytest.approx(0.18)
    assert grown.evidence == "x grew from 0.02 to 0.18, and grows on"
    assert read({"x": line[-1]}, history_of(x=line[1:-1])) is None  # too few logs
    assert read({"x": NAN}, history_of(x=line)) is None
    calm = Reading(0.0, "x is 0.21 and does not grow")
    assert read({"x": 0.21, "grad_norm": 0.0}, history_of(x=line[:-1])) == calm
    assert read({"x": 0.21, "updates/without_effect": 2.0}, history_of(x=line[:-1])) == calm
    assert read({"x": 0.21}, history_of(x=[0.1, 0.1, 0.1] + [0.0] * 17 + line[:-1])) == calm  # not three times 0.1
    assert read({"x": 0.21}, history_of(x=[0.01] * 14 + [0.21] * 6)) == calm  # a jump
    assert read({"x": 0.21}, history_of(x=[0.01] * 7 + [0.21] * 13)) == calm


@given(st.integers(0, 40), st.floats(1.0, 1e3), st.integers(0, 1000))
def test_a_jump_is_no_growth(place, factor, seed):
    rng, history, read = random.Random(seed), History(), growth("x", times=3.0)
    for step in range(60):
        log = {"x": 0.01 * (factor if step >= place + 10 else 1.0) * rng.uniform(0.97, 1.03)}
        reading = read(log, history)
        assert reading is None or reading.value == 0.0
        history.append(log)


def test_rounding_is_no_usual_spread():
    (read,) = (alarm.measure for alarm in make_alarms() if alarm.name == "reward_std_spike")
    assert read({"reward_std": 0.3}, history_of(reward_std=[7.7e-9] * 20)) is None
    assert read({"reward_std": 0.3}, history_of(reward_std=[7.7e-9] * 20 + [0.1])).value == pytest.approx(3)
    assert read({"reward_std": 0.3, "reward": 100.1}, history_of(reward_std=[1.5e-5] * 20)) is None


def test_runaway_by_hand():
    series = {"reward": [0.0] * 20, "reward_std": [1.0] * 20, "length": [10.0] * 20}
    read = runaway({"length": (5.0, 2.0)})
    longer = {"reward": 0.0, "reward_std": 1.0, "length": 60.0}
    assert read(longer, history_of(**series)).value == 0.0  # the reward did not rise
    # Means of the last five logs: reward 0.6 (up by more than half of 1.0), length 20, which is its limit.
    paid = read({**longer, "reward": 3.0}, history_of(**series))
    assert paid == Reading(1.0, "reward went from 0 to 0.6 and length from 10 to 20")
    # Running away downwards counts as well: 10 to (4 * 10 + 0) / 5 = 8, where 2 is the limit.
    shorter = read({**longer, "reward": 3.0, "length": 0.0}, history_of(**series))
    assert shorter.value == pytest.approx(math.log(10 / 8) / math.log(5))


def test_a_watched_metric_can_be_any():
    alarms = make_alarms(watch=["rewards/harmlessness/mean"])
    logs = [
        {
            **log,
            "reward": log["reward"] + max(0, i - ONSET) * 0.02,
            "rewards/harmlessness/mean": log["rewards/harmlessness/mean"] / (1 if i < ONSET else 3),
        }
        for i, log in enumerate(flagship())
    ]
    events = run(logs, alarms)
    assert [event[1:] for event in events] == [("reward_hacking", "raised")]
    assert run(logs, make_alarms(watch={"rewards/harmlessness/mean": (4.0, 2.0)})) == []
    assert run(logs) == []


# How often they are wrong


def test_false_alarms_are_rare_and_illnesses_are_found():
    import alarm_rates

    assert tuple(alarm_rates.SICK) == ALARMS
    rates = alarm_rates.false_alarms(runs=12, seed=5)
    for name in ALARMS:
        assert sum(rates[shape][name] for shape in rates) / len(rates) <= 0.05, name
        assert max(rates[shape][name] for shape in rates) <= 0.25, name
    for name, (share, delay) in alarm_rates.detections(runs=10, seed=5).items():
        assert share >= (0.7 if name == "falling_task" else 0.9), name  # 92 of a hundred
        assert delay <= 30, name


# The benchmark


@pytest.mark.training
def test_benchmark_smoke(tmp_path, capsys):
    import alarms

    alarms.main(alarms.Options(smoke=True, output_dir=str(tmp_path)))
    table = (tmp_path / "table.md").read_text().splitlines()
    assert [row.split(" | ")[1] for row in table[2:]] == ["none |"] * len(alarms.RUNS)


# The page


def test_the_docs_show_the_table_as_it_is():
    page = (Path(__file__).parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for entry in make_alarms():
        numbers, advice = re.findall(rf"^\| `{entry.name}` \|(.*)\|$", page, flags=re.MULTILINE)
        cells = [cell.strip() for cell in numbers.split("|")]
        counts = [entry.warmup, entry.patience, entry.calm]
        assert cells[1:6] == [f"{entry.threshold:g}", f"{entry.clear:g}", *map(str, counts)]
        assert cells[6] == entry.source
        assert [cell.strip() for cell in advice.split("|")] == [entry.cause, entry.remedy]
