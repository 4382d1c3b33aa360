"""No secret reaches the record, whatever carries it; what is none stays as it is."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.observe.secrets import is_secret, without_secrets

WORD = "Zq7xk9VwPz3m"  # the secret

CARRIERS = {
    "query": f"https://host/v1?token={WORD}&page=2",
    "query, other case": f"https://host/v1?page=2&Access_Token={WORD}",
    "query of a vendor": f"https://host/v1?key={WORD}",
    "signed address": f"https://bucket/x?X-Amz-Signature={WORD}&X-Amz-Credential={WORD}",
    "fragment": f"https://host/#access_token={WORD}",
    "user of an address": f"postgres://me:{WORD}@host/db",
    "headers": {"default_headers": {"AUTHORIZATION": f"Bearer {WORD}", "X-Api-Key": WORD, "Proxy-Authorization": WORD}},
    "headers in lower case": {"headers": {"authorization": f"Basic {WORD}==", "cookie": f"a=b; session={WORD}"}},
    "headers as pairs": [("Authorization", f"Bearer {WORD}"), ("x-api-key", WORD)],
    "headers by name": [{"name": "Authorization", "value": f"Bearer {WORD}"}],
    "headers as text": f"Authorization: Bearer {WORD}",
    "cookies as text": f"Cookie: a=b; session={WORD}",
    "bearer": f"bearer {WORD}",
    "JSON in a text": json.dumps({"Authorization": f"Token {WORD}"}),
    "an object": f"Client(api_key='{WORD}', timeout=3)",
    "flags": ["--hub_token", WORD, f"--api-key={WORD}"],
    "an environment": f"HF_TOKEN={WORD} python train.py",
    "a connection": f"Server=a;Password={WORD};Database=b",
    "camel case": {"hubToken": WORD, "clientSecret": WORD},
    "deep": {"a": [{"b": {"HUB-TOKEN": WORD}}]},
    "bytes": f"token={WORD}".encode(),
    "a token of a known form": f"hf_{WORD}{WORD}",
    "a JSON web token": f"eyJ{WORD}.eyJ{WORD}.{WORD}",
}


@pytest.mark.parametrize("name", CARRIERS)
def test_no_carrier_keeps_its_secret(name):
    shown = json.dumps(without_secrets({"option": CARRIERS[name]}))
    assert WORD not in shown
    assert without_secrets(json.loads(shown)) == json.loads(shown)


KINDS = ["token", "api_key", "Authorization", "X-Auth-Token", "PASSWORD", "client_secret", "access-token", "HF_TOKEN"]


@given(
    st.sampled_from(KINDS),
    st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.~+/", min_size=12, max_size=40),
    st.sampled_from(["?{n}={v}&a=b", "x&{n}={v}", "{n}: Bearer {v}", "{n}={v}", "{{'{n}': '{v}'}}", "--{n}={v} -x"]),
    st.sampled_from([str, str.upper, str.lower, str.title]),
)
def test_a_value_under_the_name_of_a_secret_is_hidden(name, value, form, case):
    assert value not in without_secrets(f"https://host/{form.format(n=case(name), v=value)}")
    assert value not in json.dumps(without_secrets({"config": {case(name): value}}))


PLAIN = [
    "https://host:8000/v1?page=2&tokens=5",
    "Answer in one sentence. The key: be brief, and count each token once.",
    "Basic training of the bearer",
    "<|im_start|>system: you are a token counter<|im_end|>",
    "eos_token=<eos>",
    "a=b; c: d",
    "runs/secretary",
]


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


def test_no_option_of_the_configuration_is_taken_for_a_secret():
    options = AdaptiveGRPOConfig(output_dir="x", bf16=False, use_cpu=True).to_dict()
    assert [name for name in options if is_secret(name)] == ["hub_token"]
    assert without_secrets(options).keys() == options.keys() - {"hub_token"}


def test_values_that_json_lacks():
    assert without_secrets({"a": math.nan, "b": (1, Path("x")), 3: {"c": None}, "d": True}) == {
        "a": None,
        "b": [1, "x"],
        "3": {"c": None},
        "d": True,
    }
