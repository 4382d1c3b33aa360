"""Which prompts, and how many completions each."""
