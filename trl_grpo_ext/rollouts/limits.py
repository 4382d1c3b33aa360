"""How long a conversation may become: what the model and vLLM can hold."""

import logging
from typing import Any

from ..hooks.ground import HookedTrainer
from ..host.processes import gather_values, together

logger = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds in which vLLM's server, which has just been reached, must answer


def longest_conversation(trainer: HookedTrainer, max_conversation_length: int | None = None) -> int | None:
    """
    Most tokens of a conversation, or `None` where nothing limits it. Every process must call this.

    Args:
        trainer ([`HookedTrainer`]):
            Trainer, whose model or vLLM may be the limit.
        max_conversation_length (`int`, *optional*):
            Limit of the user.

    Raises:
        `ValueError`: where vLLM's server cannot be asked for its limit.
    """
    config: Any = trainer.model.config
    limits = [max_conversation_length, getattr(config.get_text_config(), "max_position_embeddings", None)]
    if trainer.use_vllm and trainer.vllm_mode == "colocate":
        limits.append(trainer.vllm_generation.llm.llm_engine.model_config.max_model_len)
    elif trainer.use_vllm:
        length: int | None = None
        with together():
            if trainer.accelerator.is_main_process:  # the only one with a client
                length = length_of_server(trainer.vllm_generation.vllm_client)
        limits.append(gather_values(length)[0])
    return min((limit for limit in limits if limit is not None), default=None)


def length_of_server(client: Any) -> int | None:
    """
    The `--max-model-len` of a vLLM server, from `GET /v1/models`.

    Args:
        client ([`~trl.generation.vllm_client.VLLMClient`]):
            Client of the server.

    Returns:
        `int`, *optional*:
            Tokens, or `None` for a server that does not say.

    Raises:
        `ValueError`: for a server that does not answer.
    """
    url = f"{client.base_url}/v1/models"
    try:
        response = client.session.get(url, timeout=TIMEOUT)
        response.raise_for_status()
        models = response.json()["data"]
        length = models[0].get("max_model_len")
    except Exception as error:  # of requests, of JSON, or of an answer in another form
        raise ValueError(
            f"vLLM's server does not say at {url} how long a conversation may become, {type(error).__name__}: "
            f"{error}. Check that it runs, can be reached, and is a `vllm serve` of a version that TRL supports"
        ) from error
    if length is None:
        logger.warning(
            f"{url} names no max_model_len: if conversations may outgrow what the server holds, set "
            "max_conversation_length"
        )
        return None
    return int(length)
