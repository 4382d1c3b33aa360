"""`python -m trl_grpo_ext.observe.report RUN_DIR` and the console script `trl-grpo-report`."""

import argparse
import sys

from .page import MAX_COMPLETIONS, write_report


def main(arguments: list[str] | None = None) -> int:
    """Write a report and print where it is; 2 when it cannot be written."""
    parser = argparse.ArgumentParser(prog="trl-grpo-report", description="Write the report of a run as one HTML page.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of the run; it may still be going")
    parser.add_argument("--compare", metavar="OTHER_RUN", help="another run to show beside it")
    parser.add_argument("--output", metavar="PATH", help="page or folder to write (default: RUN_DIR/report.html)")
    parser.add_argument(
        "--max-completions",
        type=int,
        default=MAX_COMPLETIONS,
        metavar="N",
        help="how many completions the page holds at most (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        page = write_report(options.run_dir, options.output, options.compare, options.max_completions)
    except (ValueError, OSError) as error:
        print(f"trl-grpo-report: {error}", file=sys.stderr)
        return 2
    print(f"Report: {page}")
    figures = page.with_name(f"{page.stem}_figures")
    print(f"Plots:  {figures}" if figures.exists() else "Plots as PNG files need matplotlib: pip install matplotlib")
    return 0


if __name__ == "__main__":
    sys.exit(main())
