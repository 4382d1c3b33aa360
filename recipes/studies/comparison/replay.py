"""A replay of recent batches, to see whether older completions teach anything that a further pass does not."""

from collections import deque
from typing import Any

from trl_grpo_ext import AdaptiveGRPOTrainer


class ReplayTrainer(AdaptiveGRPOTrainer):
    """
    The last passes over a batch look at the batches before it instead, the newest first.

    Old completions keep their advantages and the log-probabilities under the policy that sampled them, so the ratio is
    clipped as in any further pass. `reuse_drift_limit` leaves out a batch from which the policy has moved too far. Only
    for one step per generation.
    """

    num_replayed = 2

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recent: deque[dict[str, Any]] = deque(maxlen=self.num_replayed + 1)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        position = self._step % self.num_iterations
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if not self.model.training:
            return inputs
        if position == 0:
            self.recent.append(inputs)
        age = position - (self.num_iterations - self.num_replayed) + 1
        return self.recent[-1 - age] if 0 < age < len(self.recent) else inputs
