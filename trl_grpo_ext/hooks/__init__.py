"""What travels through the life of a batch, and where you step in."""

from .callback import GRPOCallback, RolloutBatch

__all__ = ["GRPOCallback", "RolloutBatch"]
