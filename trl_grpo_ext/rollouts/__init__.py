"""Rollouts of several turns: conversations, and plans with their implementations."""

from .hierarchical import HierarchicalCallback
from .multi_turn import MultiTurnCallback

__all__ = ["HierarchicalCallback", "MultiTurnCallback"]
