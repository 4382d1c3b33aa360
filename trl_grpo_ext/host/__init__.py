"""The TRL underneath: the seams that are wrapped, checkpoints, state, processes."""
