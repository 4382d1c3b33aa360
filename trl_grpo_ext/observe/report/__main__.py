"""`python -m trl_grpo_ext.observe.report RUN_DIR` and the console script `trl-grpo-report`."""

import argparse
import sys
from pathlib import Path

from ...host.nearest import nearest
from .escaping import one_line
from .page import MAX_COMPLETIONS, write_report
from .reader import NotARunError, read_run, runs_in
from .summary import line_of


def command(arguments: list[str]) -> int:
    """[`main`] as a command of the console."""
    return main(arguments, "trl-grpo-ext report")


def main(arguments: list[str] | None = None, prog: str = "trl-grpo-report") -> int:
    """Write a report and print where it is, or list the runs of a folder; 2 when neither is possible."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write the report of a run as one HTML page, compare two runs, or list the runs of a folder.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="output_dir of a run, which may go on, or a folder of runs")
    parser.add_argument("other", metavar="OTHER_RUN", nargs="?", help="another run to show beside it")
    parser.add_argument("--compare", metavar="OTHER_RUN", help="the same")
    parser.add_argument("--output", metavar="PATH", help="page or folder to write (default: RUN_DIR/report.html)")
    parser.add_argument(
        "--max-completions",
        type=int,
        default=MAX_COMPLETIONS,
        metavar="N",
        help="how many completions the page holds at most (default: %(default)s)",
    )
    options, wrong = parser.parse_known_args(arguments)
    if wrong:
        near = nearest(wrong[0].partition("=")[0], ["--compare", "--output", "--max-completions"])
        remedy = f"did you mean {near}?" if near else f"{prog} --help lists what is"
        print(f"{prog}: {wrong[0]} is not expected: {remedy}", file=sys.stderr)
        return 2
    if options.other is not None and options.compare is not None:
        print(f"{prog}: OTHER_RUN and --compare are the same: pass one of them", file=sys.stderr)
        return 2
    try:
        page = write_report(options.run_dir, options.output, options.other or options.compare, options.max_completions)
    except NotARunError as error:
        return _list(Path(options.run_dir), error, prog)
    except (ValueError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    print(f"Report: {page}")
    figures = page.with_name(f"{page.stem}_figures")
    print(f"Plots:  {figures}" if figures.exists() else "Plots as PNG files need matplotlib: pip install matplotlib")
    return 0


def _list(folder: Path, error: NotARunError, prog: str) -> int:
    """Print the runs of a folder; where there are none, what is wrong with it."""
    found = runs_in(folder)
    if not found:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    width = max(len(one_line(path.relative_to(folder), 60)) for path in found)
    for path in found:
        print(f"{one_line(path.relative_to(folder), 60):<{width}}  {line_of(read_run(path))}")
    print(f"{folder} holds {len(found)} runs: pass one of them for its report, or two to compare them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
