"""A judge that compares the answers of a group: one request for each, on any number of processes."""

import asyncio
import json
import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import count_vowels, launch, logs_of, trainer_of
from reward_helpers import Logs, ask
from test_judge import Handler, Server

from trl_grpo_ext.host.calls import SIBLINGS, siblings_of
from trl_grpo_ext.rewards import GroupJudge, Length, Rubric, as_reward
from trl_grpo_ext.rewards.group_judge import _ranked

# --- replies and groups -----------------------------------------------------------------------------------------------


@given(st.permutations(range(1, 7)).flatmap(lambda order: st.tuples(st.just(order), st.text("{}[]12, ", max_size=9))))
def test_a_ranking_gives_evenly_spaced_values(drawn):
    order, before = drawn
    values = _ranked(f'{before} {{"ranking": {order}}} so it is', 6)
    assert values is not None
    assert sorted(values) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert sorted(range(1, 7), key=lambda number: -values[number - 1]) == list(order)


@pytest.mark.parametrize("held", [[1, 2], [1, 2, 2], [0, 1, 2], [1, 2, 3, 4], "123", None, [1, 2, None], [1, 2, True]])
def test_what_ranks_not_all_answers_once_is_no_ranking(held):
    assert _ranked(json.dumps({"ranking": held}), 3) is None


@given(st.lists(st.tuples(st.sampled_from("pq"), st.sampled_from("abc")), max_size=12))
def test_siblings_are_the_different_answers_to_the_prompt(rows):
    prompts, texts = [prompt for prompt, _ in rows], [text for _, text in rows]
    for (prompt, text), siblings in zip(rows, siblings_of(prompts, texts), strict=True):
        assert set(siblings) == {other for own, other in rows if own == prompt}
        assert len(siblings) == len(set(siblings))
        assert text in siblings


def test_messages_with_parts_that_json_lacks_are_prompts_too():
    prompt = [{"role": "user", "content": [{"type": "image", "image": object()}]}]
    assert siblings_of([prompt, prompt], ["a", "b"]) == [["a", "b"], ["a", "b"]]


# --- the server -------------------------------------------------------------------------------------------------------


class Comparer(Handler):
    """The longest answer is the best; the score is the length. Answers may ask for trouble, as in `Handler`."""

    def do_POST(self):  # noqa: N802
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        answers = json.loads(request["messages"][-1]["content"])["answers"]
        self.server.seen.append(request)
        self.server.asked[json.dumps(sorted(answers))] += 1
        if troubles := [answer for answer in answers if answer.partition(" x")[2]]:
            kind, _, times = troubles[0].partition(" x")
            if self.server.asked[json.dumps(sorted(answers))] <= int(times):
                if kind == "stall":
                    self.server.released.wait(60)
                    self.close_connection = True
                    return
                self.answer(500, {"error": {"message": "trouble"}}) if kind == "500" else self.reply("Hm.")
                return
        if '"ranking"' in request["messages"][0]["content"]:
            order = sorted(range(1, len(answers) + 1), key=lambda number: -len(answers[number - 1]))
            self.reply(json.dumps({"ranking": order}))
        else:
            self.reply(json.dumps({"scores": [min(10, len(answer)) for answer in answers]}))


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    server.RequestHandlerClass = Comparer
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_one_request_holds_the_different_answers_of_a_group(server):
    judge = GroupJudge("m", server.url, Rubric(["It is long.", ("It is right.", 2.0)]), reference="solution")
    rows = {"prompts": ["p", "p", "q", "p"], "completions": ["aaa", "bbbbb", "c", "aaa"], "solution": ["s"] * 4}
    assert asyncio.run(judge(**rows)) == [0.3, 0.5, 0.1, 0.3]
    assert server.asked == {'["aaa", "bbbbb"]': 1, '["c"]': 1}
    asked = [json.loads(request["messages"][1]["content"]) for request in server.seen]
    assert sorted((material["prompt"], material["reference answer"]) for material in asked) == [("p", "s"), ("q", "s")]
    assert "- It is long.\n- It is right. (weight 2)\n" in server.seen[0]["messages"][0]["content"]


def test_a_ranking_is_relative(server):
    judge = GroupJudge("m", server.url, ranking=True)
    assert ask(judge, "aaa", "b", "cc") == [1.0, 0.0, 0.5]
    assert ask(judge, "alone") == [1.0]


def test_the_order_of_answers_is_drawn_and_repeatable(server):
    answers = [letter * (place + 1) for place, letter in enumerate("abcdefgh")]
    for _ in range(2):
        ask(GroupJudge("m", server.url), *answers)
    first, second = (json.loads(request["messages"][1]["content"])["answers"] for request in server.seen)
    assert first == second != answers
    assert sorted(first) == answers


@pytest.mark.parametrize(("kind", "counted"), [("500", "failures"), ("hm", "garbage"), ("stall", "timeouts")])
def test_trouble_costs_its_group_and_is_asked_again_once_for_all_rows(server, kind, counted):
    judge, logs = GroupJudge("m", server.url).timeout(0.5 if kind == "stall" else 30).retry(1, wait=0.0), Logs()
    call = {"prompts": [*"ppqqrr"], "completions": ["a", "b", f"{kind} x1", "c", f"{kind} x9", "d"]}
    values = asyncio.run(judge(**call, **logs.kwargs()))
    assert values[:2] == [0.1, 0.1]
    assert values[3] == 0.1
    assert values[4:] == [None, None]
    by_trouble = Counter(next((part for part in ("x1", "x9") if part in key), "") for key in server.asked.elements())
    assert by_trouble == {"": 1, "x1": 2, "x9": 2}
    counts = {name.rpartition("/")[2]: value for name, value in logs.metrics if value}
    assert counts == {counted: 6, "retries": 4, "errors": 2}


def test_what_is_remembered_belongs_to_the_group(server):
    judge = GroupJudge("m", server.url)
    assert ask(judge, "aa", "b") == ask(judge, "aa", "b")
    assert sum(server.asked.values()) == 1
    ask(judge, "aa", "ccc")
    assert sum(server.asked.values()) == 2


def test_it_composes_and_reads_as_its_source(server):
    tree = 0.5 * GroupJudge("m", server.url, ranking=True).retry(1) + 0.01 * Length()
    assert eval(repr(tree), {"GroupJudge": GroupJudge, "Rubric": Rubric, "Length": Length}) == tree
    assert tree.__name__ == "group_judge+length"


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.training
def test_only_a_reward_that_compares_gets_the_group(model_path, dataset, tmp_path):
    seen = []

    def spy(completions, **kwargs):
        seen.append(kwargs.get(SIBLINGS))
        return [0.0] * len(completions)

    trainer_of(model_path, dataset, tmp_path, [as_reward(count_vowels), spy], max_steps=1).train()
    assert seen == [None]


def train_with_a_judge(model_path, out, url, **options):
    """Run on each process: what the judge's rows saw of their groups, and the rewards."""
    from datasets import Dataset

    dataset = Dataset.from_dict({"prompt": [f"say {letter}" for letter in "abcd"]})
    seen = []

    class Spy(GroupJudge):
        async def score(self, prompts, completions, completion_ids=None, **kwargs):
            seen.extend(zip(prompts, completions, map(tuple, kwargs[SIBLINGS]), strict=True))
            return await super().score(prompts, completions, completion_ids, **kwargs)

    trainer = trainer_of(model_path, dataset, out, Spy("m", url).cached(1), **options)
    trainer.train()
    return seen, [entry["rewards/group_judge/mean"] for entry in logs_of(trainer)]


@pytest.mark.training
def test_a_group_on_two_processes_is_seen_as_a_whole(server, model_path, tmp_path):
    # Four rows a process and one group of eight: each process holds half of it.
    options = {"url": server.url, "per_device_train_batch_size": 4, "num_generations": 8, "max_steps": 2}
    (first, rewards), (second, same) = launch(model_path, tmp_path, train_with_a_judge, **options)
    assert rewards == same
    for seen in (first, second):
        for prompt, completion, siblings in seen:
            answers = {text for own, text, _ in first + second if own == prompt}
            assert completion in siblings
            assert set(siblings) <= answers
            assert len(siblings) > 1
    by_prompt = {prompt: siblings for prompt, _, siblings in first}
    assert {prompt: siblings for prompt, _, siblings in second} == by_prompt
