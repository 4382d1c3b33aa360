"""PPO's baseline: a value model of its own says what a token's return should have been, in place of a group."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from ..config import AdaptiveGRPOConfig
from ..hooks.callback import GRPOCallback
from ..hooks.conflicts import Conflict
from ..hooks.ground import HookedTrainer
from ..hooks.records import RolloutBatch, RolloutPlan
from ..host.state import check_state
from .gae import gae
from .groups import EPS

MAX_GRAD_NORM = 1.0  # of the value model


class ValueModel(nn.Module):
    """
    A copy of a policy's body with a scalar head, which starts at 0.

    Args:
        policy ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to copy. What is frozen in it stays frozen, so a value model of a LoRA policy trains LoRA weights too.
    """

    def __init__(self, policy: Any):
        super().__init__()
        model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self.body = copy.deepcopy(model.base_model)
        first = next(self.body.parameters())
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1).to(first.device, torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self, prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, completion_mask: Tensor
    ) -> Tensor:
        """Values `(B, C)`: of what follows before each token of the completion is written."""
        hidden = self.body(
            input_ids=torch.cat([prompt_ids, completion_ids], 1),
            attention_mask=torch.cat([prompt_mask, completion_mask], 1),
            use_cache=False,
        ).last_hidden_state
        before = hidden[:, prompt_ids.size(1) - 1 : -1]
        values: Tensor = self.head(before.float()).squeeze(-1)
        return values


class CriticBaseline(GRPOCallback):
    """
    Proximal policy optimisation (arXiv 1707.06347): one completion per prompt, and a value model in place of the group.

    Each token's advantage is its generalised advantage estimate ([`~trl_grpo_ext.credit.gae.gae`]) under a value model.
    The value model starts as a copy of the policy and learns beside it. Clipping and KL are those of TRL's loss. The
    advantages of a batch are shifted to mean 0 and divided by their standard deviation, as PPO implementations do; with
    `scale_rewards="none"` they are not divided.

    Every process holds the whole value model and averages its gradients with the others.

    Args:
        learning_rate (`float`, *optional*):
            Constant learning rate (AdamW) of the value model. Defaults to the policy's `learning_rate`.
        gamma (`float`, *optional*, defaults to `1.0`):
            Discount of a token.
        lam (`float`, *optional*, defaults to `0.95`):
            λ of the advantage estimate.
        epochs (`int`, *optional*, defaults to `4`):
            Passes of the value model over each generation batch, with one step for `per_device_train_batch_size` rows
            of each process.

    Raises:
        `ValueError`: for options out of range, and for callbacks and trainers that it cannot be combined with.

    Example:

    ```python
    >>> from trl_grpo_ext import CriticBaseline
    >>> CriticBaseline(lam=1.5)
    Traceback (most recent call last):
        ...
    ValueError: lam=1.5 is outside 0 to 1: try 0.95

    ```
    """

    plans_single_rows = True
    is_unique = True

    @property
    def conflicts(self) -> tuple[Conflict, ...]:
        groups = "CriticBaseline samples one completion per prompt, and {other} lays out groups: pass one of them"
        reads = "CriticBaseline reads what the model wrote: use a text model without tools and rollout_func"
        copies = "CriticBaseline copies the policy, of which DeepSpeed's stage 3 holds parts: use stage 2"
        return (
            *(Conflict(hook, groups) for hook in ("on_generate", "on_group_sizes", "on_resample", "on_plan")),
            *(Conflict(fact, reads) for fact in ("vision-language models", "tools", "rollout_func")),
            Conflict("DeepSpeed ZeRO-3", copies),
        )

    def __init__(self, learning_rate: float | None = None, gamma: float = 1.0, lam: float = 0.95, epochs: int = 4):
        if learning_rate is not None and not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate={learning_rate} must be positive and finite: try 1e-4")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma={gamma} is outside 0 to 1: try 1.0")
        if not 0 <= lam <= 1:
            raise ValueError(f"lam={lam} is outside 0 to 1: try 0.95")
        if epochs < 1:
            raise ValueError(f"epochs={epochs} never trains the value model: use at least 1")
        self.learning_rate, self.gamma, self.lam, self.epochs = learning_rate, gamma, lam, epochs

    def on_setup(self, args: AdaptiveGRPOConfig, trainer: HookedTrainer, **kwargs: Any) -> None:
        self.accelerator = trainer.accelerator
        self.rows_per_step = args.per_device_train_batch_size
        # Under DeepSpeed, and with bf16_full_eval, the policy is not on its device yet.
        value_model = ValueModel(self.accelerator.unwrap_model(trainer.model)).eval()
        self.value_model = value_model.to(self.accelerator.device)
        self.optimizer = torch.optim.AdamW(
            [p for p in self.value_model.parameters() if p.requires_grad],
            lr=args.learning_rate if self.learning_rate is None else self.learning_rate,
            weight_decay=0.0,
        )

    def on_plan(self, prompt_index: Tensor, num_rows: int, **kwargs: Any) -> RolloutPlan:
        index = prompt_index[torch.arange(num_rows) % prompt_index.numel()]
        return RolloutPlan(torch.ones(num_rows, dtype=torch.long), index)

    def on_advantages(self, args: AdaptiveGRPOConfig, batch: RolloutBatch, **kwargs: Any) -> Tensor:
        lengths, count = batch.completion_lengths, int(batch.completion_lengths.max())
        # A row without a reward says nothing of its tokens.
        lengths = lengths.where(batch.rewards.isfinite(), torch.zeros_like(lengths))
        is_token = torch.arange(count) < lengths[:, None]
        values = self._values(batch.tokens, count)
        is_last = torch.arange(count) == lengths[:, None] - 1
        rewards = torch.where(is_last, batch.rewards.nan_to_num()[:, None], 0.0)
        advantages, returns = gae(rewards, values, lengths, self.gamma, self.lam)
        loss = self._fit(batch.tokens, returns, is_token)
        if not is_token.any():
            return torch.zeros_like(values)
        errors, spread = (returns - values)[is_token], returns[is_token].var(correction=0)
        batch.metrics["critic/loss"] = loss
        batch.metrics["critic/value"] = values[is_token].mean().item()
        # 1: the values say it all; 0: no better than one number for all tokens.
        batch.metrics["critic/explained_variance"] = (1 - errors.var(correction=0) / spread.clamp(min=1e-12)).item()
        return whiten(advantages, is_token, scale=args.scale_rewards != "none")

    @torch.no_grad()
    def _values(self, tokens: dict[str, Tensor], count: int) -> Tensor:
        """Values `(N, count)` of the rows of all processes, on the CPU."""
        parts = [self.value_model(**part) for part in _split(tokens, self.rows_per_step)]
        own = torch.cat(parts)[:, :count]
        own = nn.functional.pad(own, (0, count - own.size(1)))
        gathered: Tensor = self.accelerator.gather(own)
        return gathered.cpu()

    def _fit(self, tokens: dict[str, Tensor], returns: Tensor, is_token: Tensor) -> float:
        """Move the values towards the returns `(N, T)`. Gives the loss of the first pass, before it had an effect."""
        per_rank = (self.accelerator.num_processes, -1)
        # All ranks know all rows, so none has to ask how many tokens a step has.
        masks = is_token.unflatten(0, per_rank).split(self.rows_per_step, 1)
        targets = returns.unflatten(0, per_rank).split(self.rows_per_step, 1)
        rank, losses = self.accelerator.process_index, []
        for _ in range(self.epochs):
            for part, mask, target in zip(_split(tokens, self.rows_per_step), masks, targets, strict=True):
                values = self.value_model(**part)
                own, wanted = (x[rank, :, : values.size(1)].to(values.device) for x in (mask, target))
                errors = (values[:, : own.size(1)] - wanted).where(own, torch.zeros_like(wanted))
                loss = 0.5 * errors.square().sum() / mask.sum().clamp(min=1)
                self.optimizer.zero_grad()
                loss.backward()
                self._sum_gradients()
                self.optimizer.step()
                losses.append(loss.detach())
        self.optimizer.zero_grad()
        total: Tensor = self.accelerator.reduce(torch.stack(losses[: len(masks)]).mean(), "sum")
        return total.item()

    def _sum_gradients(self) -> None:
        parameters = self.optimizer.param_groups[0]["params"]
        if self.accelerator.num_processes > 1:
            for p in parameters:
                # The same parameters on every rank, also where none of its rows has a token.
                p.grad = self.accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, "sum")
        clip_grad_norm_(parameters, MAX_GRAD_NORM)

    def state_dict(self) -> dict[str, Any]:
        trained = {n: p.detach().cpu() for n, p in self.value_model.named_parameters() if p.requires_grad}
        return {"value_model": trained, "optimizer": self.optimizer.state_dict()["state"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        check_state(state_dict, value_model=dict, optimizer=dict)
        trained = {n: p for n, p in self.value_model.named_parameters() if p.requires_grad}
        check_state(state_dict["value_model"], **{name: p.detach() for name, p in trained.items()})
        self.value_model.load_state_dict(state_dict["value_model"], strict=False)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state_dict["optimizer"], "param_groups": groups})


def whiten(advantages: Tensor, is_token: Tensor, scale: bool = True) -> Tensor:
    """
    Advantages `(N, T)` less their mean over all tokens of the batch and, with `scale`, over their standard deviation.

    Example:

    ```python
    >>> import torch
    >>> is_token = torch.tensor([[True, True], [True, False]])
    >>> whiten(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), is_token, scale=False).tolist()
    [[-2.0, 0.0], [2.0, 0.0]]

    ```
    """
    values = advantages[is_token].double()
    centred = advantages - values.mean()
    if scale:
        centred = centred / (values.std(correction=0) + EPS)
    return centred.where(is_token, torch.zeros_like(centred)).to(advantages.dtype)


def _split(tokens: dict[str, Tensor], rows: int) -> list[dict[str, Tensor]]:
    return [
        dict(zip(tokens, part, strict=True)) for part in zip(*(t.split(rows) for t in tokens.values()), strict=True)
    ]
