"""
Check a run before it starts: would it learn, and what would it cost?

- `run`: [`check_run`], the one call. `command`: the same for a YAML file of `trl grpo`.
- `probes`: answers that nobody wants, and what the reward pays for them. `maths`: pure functions of numbers.
- `measured`: the numbers. `findings`: what they mean. To add a finding, add a line to a function there and a test.
- `page`: the numbers in a terminal and as HTML.
"""

from .findings import Finding
from .measured import Measured
from .run import RunCheck, check_run

__all__ = ["Finding", "Measured", "RunCheck", "check_run"]
