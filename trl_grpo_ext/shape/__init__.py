"""Rewards before credit: clipping, and groups that are replaced."""
