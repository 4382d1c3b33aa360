"""The same gradient for less work: shared prompts, dead rows, padding, generation from a shared prefill."""
