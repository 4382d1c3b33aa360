"""A judge behind a server that also fails, stalls and answers nonsense; and the scores that a reply holds."""

import asyncio
import copy
import json
import pickle
import re
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import config_kwargs
from reward_helpers import Logs, ask, settle
from trl import GRPOConfig, GRPOTrainer

from trl_grpo_ext.rewards import Judge, Length, RewardError, Rubric, parse_reward
from trl_grpo_ext.rewards.errors import CallError
from trl_grpo_ext.rewards.guards import Guard

# --- replies ----------------------------------------------------------------------------------------------------------

SCORES = st.lists(st.integers(0, 10) | st.floats(0, 10).map(lambda score: round(score, 2)), min_size=1, max_size=4)
PROSE = st.text(alphabet=st.characters(exclude_characters="{}", codec="utf-8"), max_size=30)


@given(SCORES, PROSE, PROSE, st.data())
def test_the_value_is_the_weighted_mean_of_the_scores(scores, before, after, data):
    weights = [data.draw(st.floats(0.1, 5)) for _ in scores]
    rubric = Rubric([(f"criterion {number}", weight) for number, weight in enumerate(weights)])
    by_hand = sum(score * weight for score, weight in zip(scores, weights, strict=True)) / sum(weights) / 10
    named = {str(number): score for number, score in enumerate(scores)}
    for held in (scores, [str(score) for score in scores], named):
        reply = f'{before}{{"scores": [1, 2, 3, 4, 5]}} no: {json.dumps({"scores": held}, indent=1)}{after}'
        assert rubric.value(reply) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    "reply",
    [
        '{"score": 7}',
        '{"scores": 7}',
        '```json\n{"score": 7.0}\n```',
        "Good. **Score:** 7/10",
        "score = 7",
        " 7\n",
        '"score": "7"',
    ],
)
def test_one_score_may_be_said_in_other_ways(reply):
    assert Rubric("Is it right?").value(reply) == pytest.approx(0.7)
    with pytest.raises(ValueError, match=r"does not hold 2 score\(s\) from 0 to 10"):
        Rubric(["Is it right?", "Is it short?"]).value(reply)


NONSENSE = [
    "", "great!", '{"scores": []}', '{"scores": [11]}', '{"scores": [-1]}', '{"scores": [NaN]}', '{"scores": [true]}',
    '{"scores": [null]}', '{"scores": [1, 2]}', '{"score": "high"}', '{"scores": [3', "Score: -3", "Score: 1000",
    "{" * 5000, '{"points": 3}', "nan", "inf",
]  # fmt: skip


@pytest.mark.parametrize("reply", NONSENSE, ids=lambda reply: repr(reply[:20]))
def test_a_reply_without_a_score_is_garbage(reply):
    with pytest.raises(ValueError, match=r"the judge's reply .* does not hold 1 score"):
        Rubric("Is it right?").value(reply)


@given(st.text(max_size=40))
def test_no_text_makes_a_value_outside_the_range(reply):
    try:
        value = Rubric("Is it right?").value(reply)
    except ValueError:
        value = 0.0
    assert 0.0 <= value <= 1.0


# --- the server -------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server: the score is the length of the answer, unless the answer asks for trouble."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen, self.headers, self.asked = [], [], Counter()
        self.released = threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server = self.server
        server.seen.append(request)
        server.headers.append({name.lower(): value for name, value in self.headers.items()})
        material = json.loads(request["messages"][-1]["content"])
        answer = material["answer"]
        server.asked[answer] += 1
        kind, _, times = answer.partition(" x")
        troubled = server.asked[answer] <= int(times or 10**6)
        count = len(re.findall(r"^\d+\. ", request["messages"][0]["content"], flags=re.MULTILINE))
        scores = {"scores": [min(len(answer), 10)] * count}
        if self.path != "/v1/chat/completions":
            self.answer(404, {"error": {"message": "no such path"}})
        elif kind.isdigit() and troubled:
            self.answer(int(kind), {"error": {"message": f"trouble {kind}"}})
        elif kind == "stall" and troubled:
            server.released.wait(60)
            self.close_connection = True
        elif kind == "hang up" and troubled:
            self.close_connection = True
        elif kind == "html" and troubled:
            self.answer(200, b"<html>Bad gateway</html>", "text/html")
        elif kind == "cut" and troubled:
            self.answer(200, b'{"choices": [{"mess')
        elif kind == "empty" and troubled:
            self.answer(200, {"id": "x", "object": "chat.completion", "choices": []})
        elif kind == "silent" and troubled:
            self.reply(None)
        elif kind == "nonsense" and troubled:
            self.reply("I would rather talk about the weather.")
        else:
            self.reply("I thought about it. " + json.dumps(scores))

    def reply(self, content):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        self.answer(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]})

    def answer(self, status, body, kind="application/json"):
        payload = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_each_row_is_one_request_that_holds_what_the_judge_needs(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = Judge(
        model="m", base_url=server.url, rubric=["It is polite.", "It is right."], reference="solution",
        api_key_env="JUDGE_KEY", max_tokens=99,
    )  # fmt: skip
    assert ask(judge, "four", 'two" }', solution=["4", None]) == [pytest.approx(0.4), pytest.approx(0.6)]
    by_answer = {json.loads(request["messages"][1]["content"])["answer"]: request for request in server.seen}
    first, second = by_answer["four"], by_answer['two" }']
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("m", 0.0, 99)
    assert "1. It is polite.\n2. It is right.\n" in first["messages"][0]["content"]
    assert json.loads(first["messages"][1]["content"]) == {"prompt": "p", "answer": "four", "reference answer": "4"}
    assert "reference answer" not in json.loads(second["messages"][1]["content"])
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    ask(Judge("m", server.url, temperature=None), "five")
    assert "temperature" not in server.seen[-1]


def test_half_a_character_is_judged_too(server):
    assert ask(Judge("m", server.url), "ab\udcff") == [0.3]


def test_conversations_are_read_as_text(server):
    say = lambda role, content: {"role": role, "content": content}  # noqa: E731
    prompt = [say("system", "Be brief."), say("user", [{"type": "image"}, {"type": "text", "text": "Hi"}])]
    judge = Judge("m", server.url)
    rows = {"prompts": [prompt], "completions": [[say("assistant", "Hello")]]}
    assert settle(judge(**rows)) == [0.5]
    assert json.loads(server.seen[0]["messages"][1]["content"]) == {
        "prompt": [say("system", "Be brief."), say("user", "Hi")],
        "answer": "Hello",
    }


KINDS = {
    "500": "failures", "503": "failures", "429": "failures", "400": "failures", "hang up": "failures",
    "html": "garbage", "cut": "garbage", "empty": "garbage", "silent": "garbage", "nonsense": "garbage",
    "stall": "timeouts",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_trouble_costs_its_row_and_is_counted(server, kind):
    judge, logs = Judge("m", server.url).timeout(0.5 if kind == "stall" else 30).retry(2, wait=0.0), Logs()
    values = ask(judge, "good", f"{kind} x1", f"{kind} x9", **logs.kwargs())
    assert values == [0.4, pytest.approx(min(10, len(kind) + 3) / 10), None]
    counts = {name.rpartition("/")[2]: value for name, value in logs.metrics if value}
    assert counts == {KINDS[kind]: 4, "retries": 3, "errors": 1}
    assert server.asked == {"good": 1, f"{kind} x1": 2, f"{kind} x9": 3}


def test_scores_are_remembered_and_failures_are_not(server):
    judge = Judge("m", server.url).retry(0)
    assert ask(judge, "same", "same", "500 x1") == [0.4, 0.4, None]
    assert ask(judge, "same", "500 x1") == [0.4, 0.6]
    assert server.asked == {"same": 1, "500 x1": 2}


def test_no_more_requests_at_once_than_the_limit(server):
    judge = Judge("m", server.url).concurrency(2).timeout(1.0).retry(0)
    loop = asyncio.new_event_loop()
    values = loop.create_task(judge(prompts=["p"] * 5, completions=[f"stall x{9 + row}" for row in range(5)]))
    loop.run_until_complete(asyncio.sleep(0.5))
    assert len(server.seen) == 2
    assert loop.run_until_complete(values) == [None] * 5
    loop.close()


def test_it_composes_pickles_and_reads_as_its_source(server):
    judge = Judge("m", server.url, Rubric(["It is polite.", ("It is right.", 2.0)]), name="polite").retry(1, wait=0.0)
    tree = 0.5 * judge + Length("words")
    for same in (tree, pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree)):
        assert same == tree
        assert ask(same, "four") == [pytest.approx(1.2)]
        assert same.__name__ == "polite+length"
    assert eval(repr(tree), {"Judge": Judge, "Rubric": Rubric, "Length": Length}) == tree
    assert "key" not in repr(tree)
    assert judge.guard == Guard(timeout=60.0, retries=1, wait=0.0)
    assert ask(tree, "in another event loop") == [pytest.approx(4.5)]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "OPENAI_API_KEY to the server's key"), (403, "a key that may use"), (404, "base_url ends .* serves 'm'")],
)
def test_what_no_request_can_mend_stops_the_run_at_the_first_one(server, status, remedy):
    judge = Judge("m", server.url).retry(1, wait=0.0)
    message = rf"reward 'judge': .* answered with HTTP {status}: .*trouble {status}.*{remedy}"
    with pytest.raises(CallError, match=message):
        ask(judge.on_error("skip"), f"{status} x9")
    assert server.asked == {f"{status} x9": 1}
    # A hiccup in the middle of a run costs no more than its row.
    assert ask(judge, "good") == [0.4]
    assert ask(judge, "good", f"{status} x1", f"{status} x99") == [0.4, 0.6, None]


def test_a_wrong_path_is_told(server):
    with pytest.raises(CallError, match=r"HTTP 404: .*: check that base_url ends where the server's API begins"):
        ask(Judge("m", server.url.removesuffix("/v1")), "good")


def test_a_server_that_is_not_there_is_told(server):
    url = server.url
    server.server_close()
    with pytest.raises(
        RewardError, match=rf"row 0: cannot reach the judge at {url}/: .*: start the server, or correct"
    ):
        ask(Judge("m", url).retry(0).on_error("raise"), "good")


def test_openai_needs_a_key(monkeypatch):
    pytest.importorskip("openai")
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CallError, match="set the environment variable OPENAI_API_KEY, or pass base_url"):
        ask(Judge("m"), "good")


def test_the_package_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "trl-grpo-ext\[judge\]"'):
        ask(Judge("m", "http://localhost:1/v1"), "good")


def test_a_missing_reference_column_is_told():
    with pytest.raises(CallError, match=r"no column 'solution', only \['answer'\]: pass Judge\(\.\.\., reference="):
        ask(Judge("m", "http://localhost:1/v1", reference="solution"), "good", answer=["x"])


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Judge(""), ValueError, "model='' is no name"),
        (lambda: Judge("m", "localhost:8000/v1"), ValueError, "base_url='localhost:8000/v1' is no address"),
        (lambda: Judge("m", "http:///v1"), ValueError, "is no address"),
        (
            lambda: Judge("m", "http://me:secret@host/v1"),
            ValueError,
            "put the key into the environment variable OPENAI",
        ),
        (lambda: Judge("m", rubric=[]), ValueError, "leaves nothing to judge"),
        (lambda: Rubric(["  "]), ValueError, "leaves nothing to judge"),
        (
            lambda: Rubric([("It is right.", 0)]),
            ValueError,
            "weight 0.0 of 'It is right.' must be a finite number above 0",
        ),
        (lambda: Rubric([("It is right.",)]), TypeError, "is no criterion: pass a sentence, or a pair"),
        (lambda: Rubric("It is right.", highest=0), ValueError, "highest=0 tells no answers apart"),
        (lambda: Judge("m").in_processes(2), TypeError, "'judge' is async"),
    ],
)
def test_mistakes_are_found_at_construction(build, error, message):
    with pytest.raises(error, match=message) as raised:
        build()
    assert "secret" not in str(raised.value)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_model_is_trained_on_its_scores(server, model_path, dataset, tmp_path):
    kwargs = config_kwargs(tmp_path, max_steps=2)
    names = {name for name in kwargs if name in GRPOConfig.__dataclass_fields__}
    trainer = GRPOTrainer(
        model=model_path,
        reward_funcs=Judge("m", server.url, reference="answer").retry(1, wait=0.0) + 0.01 * Length(),
        args=GRPOConfig(**{name: kwargs[name] for name in names}),
        train_dataset=dataset,
    )
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert entries
    assert all(0.0 < entry["rewards/judge/mean"] <= 1.0 for entry in entries)
    assert all(entry["rewards/judge/errors"] == 0.0 for entry in entries)
    assert len(server.seen) >= len(entries)


def test_without_its_package_there_is_no_judge(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"Judge needs the package openai: pip install"):
        Judge("m", base_url="http://localhost:1")
    with pytest.raises(ValueError, match=r"Judge needs the package openai"):
        parse_reward("Judge('m', base_url='http://localhost:1')")
