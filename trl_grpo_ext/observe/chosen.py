"""Which options of a configuration somebody chose, and which of them follow from defaults and from other options."""

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

# Options that do something to the machine or the process when a configuration is made, which is made on paper here.
NOT_ON_PAPER = re.compile(
    r".*_dir|accelerator_config|bf16|ddp_.*|deepspeed|fp16|fsdp.*|hub_.*|local_rank|parallelism_config|push_.*|report_to"
    r"|tf32|torch_compile.*|use_cpu"
)
MOST = 1_000_000  # of a number on paper, so that whatever a file says is soon counted


def chosen_options(given: Mapping[str, Any], kind: type | None = None) -> dict[str, Any]:
    """
    The options that are not what the configuration makes of the others.

    So `gradient_accumulation_steps=4` is there, and `generation_batch_size`, which TRL makes of it, is not. Where the
    rows of a batch are a choice, `steps_per_generation` says so for any number of processes.

    Args:
        given (`Mapping[str, Any]`):
            What `to_dict` of a configuration gives, or a part of it.
        kind (`type`, *optional*, defaults to [`AdaptiveGRPOConfig`]):
            The class of the configuration.

    Returns:
        `dict[str, Any]`: the chosen ones, in the order of the class; what is no option of it is left out.

    Example:

    ```python
    >>> from trl_grpo_ext import AdaptiveGRPOConfig
    >>> args = AdaptiveGRPOConfig(output_dir="x", bf16=False, use_cpu=True, gradient_accumulation_steps=4)
    >>> {name for name in chosen_options(args.to_dict()) if name not in ("output_dir", "bf16", "use_cpu")}
    {'gradient_accumulation_steps'}

    ```
    """
    kind = kind or _our_kind()
    usual = {**(_made(kind, {}, 1) or {}), "bf16": True, "use_cpu": False}  # which paper has otherwise
    chosen: dict[str, Any] = {}
    for option in dataclasses.fields(kind):
        if option.init and option.name in given:
            factory = option.default_factory
            default = option.default if factory is dataclasses.MISSING else factory()
            value = given[option.name]
            if as_plain(value) not in [as_plain(default), as_plain(usual.get(option.name, default))]:
                chosen[option.name] = value
    if "steps_per_generation" in given:
        chosen.pop("generation_batch_size", None)
    paper = {name: value for name, value in chosen.items() if _is_for_paper(name, value)}
    processes = _processes(given)
    for name in reversed(list(paper)):  # of two names for one thing, the later is the old one
        others = {other: value for other, value in paper.items() if other != name}
        made = _made(kind, others, processes)
        if made is not None and as_plain(made.get(name)) == as_plain(paper[name]):
            del paper[name], chosen[name]
    # What nobody sets may be a choice beside the others, such as one step of a generation in place of several.
    made = _made(kind, paper, processes) or {}
    for name in made.keys() & given.keys() - chosen.keys() - {"generation_batch_size"}:
        if _is_for_paper(name, given[name]) and as_plain(made[name]) != as_plain(given[name]):
            chosen[name] = given[name]
    return {option.name: chosen[option.name] for option in dataclasses.fields(kind) if option.name in chosen}


def as_plain(value: Any) -> Any:
    """A value as JSON has it: no enumerations and tuples, and whole numbers without a point."""
    value = getattr(value, "value", value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return int(value)
    if isinstance(value, Mapping):
        return {str(name): as_plain(inner) for name, inner in value.items()}
    return [as_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _our_kind() -> type:
    from ..config import AdaptiveGRPOConfig  # which takes TRL along, and the rest of a report does not

    return AdaptiveGRPOConfig


def _is_for_paper(name: str, value: Any) -> bool:
    is_text = isinstance(value, str) and not value.startswith("{")  # which would be read as JSON
    is_number = isinstance(value, bool | int | float) and abs(value) <= MOST
    return not NOT_ON_PAPER.fullmatch(name) and (is_text or is_number)


def _processes(given: Mapping[str, Any]) -> int:
    """On how many processes the configuration was made, as far as its batches say so."""
    names = ("generation_batch_size", "per_device_train_batch_size", "steps_per_generation")
    rows, per_device, steps = (value if isinstance(value := given.get(name), int) else 0 for name in names)
    return min(max(1, rows // (per_device * steps)), MOST) if per_device > 0 and steps > 0 else 1


def _made(kind: type, options: Mapping[str, Any], processes: int) -> dict[str, Any] | None:
    """
    What a configuration makes of these options, as a dictionary; `None` where it refuses them.

    It asks for no device: that would start a process group where the variables of a launcher are set, and take the one
    of a training that is going on in this process from it.
    """
    import torch

    on_paper: dict[str, Any] = {"distributed_state": None, "_n_gpu": 0, "_setup_devices": torch.device("cpu")}
    made = type("OnPaper", (kind,), {**on_paper, "world_size": processes})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about defaults that TRL itself sets
            found: dict[str, Any] = made(output_dir="", bf16=False, use_cpu=True, **options).to_dict()
    except Exception:  # whatever was written into the file of a run
        return None
    if isinstance(found.get("accelerator_config"), dict):
        found["accelerator_config"].pop("use_configured_state", None)  # which is gone once a device was asked for
    return found
