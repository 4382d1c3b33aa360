"""The report of a run: `python -m trl_grpo_ext.observe.report RUN_DIR`."""

from .page import write_report
from .reader import NotARunError, Run, read_run

__all__ = ["NotARunError", "Run", "read_run", "write_report"]
