"""What does not fit: the limit of vLLM's server, metrics of rows without room, and seeds that make answers equal."""

import contextlib
import http.server
import json
from types import SimpleNamespace

import pytest
import requests
from datasets import Dataset
from kit import args_of, logs_of, serving
from rollout_helpers import TrueVLLM, use_vllm, user

from trl_grpo_ext.rollouts.limits import length_of_server, longest_conversation


@pytest.fixture
def serve():
    """Starts a stand-in for `vllm serve` that answers with a status and a body; gives a client of it."""
    with contextlib.ExitStack() as stack:

        def start(body, status: int = 200):
            class Handler(http.server.BaseHTTPRequestHandler):
                def do_GET(self):
                    self.send_response(status if self.path == "/v1/models" else 404)
                    self.end_headers()
                    self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

            server = stack.enter_context(serving(Handler))
            return SimpleNamespace(base_url=server.url, session=requests.Session())

        yield start


def test_a_server_that_does_not_say_its_limit(serve, caplog):
    assert length_of_server(serve({"data": [{"id": "tiny"}]})) is None
    assert "names no max_model_len" in caplog.text
    assert "set max_conversation_length" in caplog.text


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [("busy", 500, "500"), ("<html>", 200, "JSONDecodeError"), ({"data": []}, 200, "IndexError"), ("", 404, "404")],
)
def test_a_server_that_cannot_be_asked_is_named(body, status, why, serve):
    client = serve(body, status)
    with pytest.raises(ValueError, match=rf"does not say at {client.base_url}/v1/models how long .*{why}.*Check that"):
        length_of_server(client)


def test_a_server_that_is_not_there_is_named():
    client = SimpleNamespace(base_url="http://127.0.0.1:9", session=requests.Session())
    with pytest.raises(ValueError, match=r"does not say at http://127.0.0.1:9/v1/models .*ConnectionError"):
        length_of_server(client)


@pytest.mark.parametrize(
    ("of_user", "of_server", "expected"), [(None, 256, 256), (100, 256, 100), (300, 256, 256), (None, 9999, 4096)]
)
def test_the_lowest_limit_counts(of_user, of_server, expected, serve, monkeypatch, make_trainer):
    trainer = make_trainer()
    client = serve({"data": [{"id": "tiny", "max_model_len": of_server}]})
    use_vllm(trainer, monkeypatch, SimpleNamespace(vllm_client=client))
    assert longest_conversation(trainer, of_user) == expected


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
@pytest.mark.parametrize(
    "options",
    [
        {"rollout": "hierarchical", "num_plans": 3, "num_implementations": 2, "per_device_train_batch_size": 18},
        {"rollout": "multi_turn", "history": "shared"},
        {"rollout": "multi_turn", "history": "independent"},
    ],
    ids=lambda options: options.get("history", "hierarchical"),
)
def test_rows_without_room_are_in_no_metric_of_sampling(options, mode, monkeypatch, make_trainer):
    """Their end of text was never sampled, so no log-probability of it can differ from the model's."""
    is_tree = options["rollout"] == "hierarchical"
    row = {} if is_tree else {"turns": ["go on"]}
    dataset = Dataset.from_list([{"prompt": [user(text)], **row} for text in ("hm", "m" * 90) * 12])
    if is_tree:
        options = {**options, "plan_template": "plan {prompt}", "implementation_template": "do it"}
    options = {**options, "num_generations": 2, "max_conversation_length": 112 if is_tree else 80, "max_steps": 3}
    trainer = make_trainer(dataset=dataset, vllm_importance_sampling_mode=mode, **options)
    use_vllm(trainer, monkeypatch, TrueVLLM(trainer))
    trainer.train()
    scored = [answer.is_scored for rows, _ in trainer.seen for row in rows for answer in row.answers if not is_tree]
    assert is_tree or set(scored) == {False, True}
    name = "hierarchical/overflowed" if is_tree else "multi_turn/overflowed"
    assert any(entry[name] > 0 for entry in logs_of(trainer))
    assert any(entry["grad_norm"] > 0 for entry in logs_of(trainer))
    for entry in logs_of(trainer):
        assert entry["sampling/sampling_logp_difference/max"] < 1e-4
        for name in ("min", "mean", "max"):
            assert entry[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(1.0, abs=1e-3)
    assert all(value.isfinite().all() for value in trainer.model.parameters())


@pytest.mark.parametrize("options", [{}, {"use_vllm": True}, {"rollout": "multi_turn"}])
def test_a_seed_that_makes_all_completions_equal_is_refused(options):
    for given in ({"seed": 5}, '{"seed": 5}', {"seed": 0, "top_k": 3}):
        with pytest.raises(
            ValueError, match=r"has a seed, which makes all completions of a prompt equal .* set `seed`"
        ):
            args_of(generation_kwargs=given, **options)
    for given in ({"seed": None}, {"top_k": 3}, None):
        args_of(generation_kwargs=given, **options)
