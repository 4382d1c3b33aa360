"""
The one kernel with which TRL 1.15 trains on a CPU, in plain torch, so that the test suite runs where Triton does not.

`make versions` copies this file into the environment of TRL 1.15: Python imports a module of this name by itself.
"""

import sys
import types


class ChunkedLogProbFunction:
    """What `apply` of TRL's kernel returns, with the logits of all tokens in memory at once."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, softcap=None, scale=1.0, outputs=None):
        import torch

        logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype), bias).float() * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = logits / temperature
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        found = {
            "entropy": lambda: -(log_probs.exp() * log_probs).sum(-1),
            "log_sum_sq_probs": lambda: (2 * log_probs.detach()).logsumexp(-1),
            "mean_logits": lambda: logits.detach().mean(-1),
            "is_top1": lambda: logits.argmax(-1) == targets,
        }
        return chosen, *(make() if outputs is None or name in outputs else None for name, make in found.items())


def selective_log_softmax_and_entropy(*args, **kwargs):
    raise NotImplementedError("TRL calls this kernel on a GPU only")


kernels = types.ModuleType("trl.kernels")
kernels.ChunkedLogProbFunction = ChunkedLogProbFunction
kernels.selective_log_softmax_and_entropy = selective_log_softmax_and_entropy
sys.modules["trl.kernels"] = kernels
