"""The plots of a report as PNG files, for papers and mails. Needs matplotlib, which the page does not."""

import warnings
from pathlib import Path
from typing import Any

from .escaping import one_line
from .figures import COLORS, DASHES, Axis, Panel

MAX = 1e100  # of a coordinate in a plot


def write_pngs(panels: list[Panel], axes: list[Axis], folder: str | Path) -> list[Path]:
    """
    Draw every plot into a PNG file, but for metrics without a place of their own and for what never moves.

    Args:
        panels (`list[Panel]`):
            From [`panels_of`].
        axes (`list[Axis]`):
            From [`axes_of`].
        folder (`str` or `Path`):
            Where to; it is made.

    Returns:
        `list[Path]`:
            The files.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link, and plots would go where it leads: delete it, or choose another output")
    folder.mkdir(parents=True, exist_ok=True)
    # Runs are compared at the same number of rollouts where both count them.
    kind = "rollouts" if len(axes) > 1 and all("rollouts" in axis.x for axis in axes) else "step"
    files = []
    # Names are text: no formulas in dollar signs, and characters without a glyph are no concern.
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 10}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        for panel in panels:
            if (
                panel.is_extra
                or panel.constant
                or not any(_drawn(axes[line.run].x[kind], line.y) for line in panel.lines)
            ):
                continue
            figure = Figure(figsize=(7.5, 4.2), layout="constrained")
            FigureCanvasAgg(figure)
            _draw(figure.subplots(), panel, axes, kind)
            files.append(folder / panel.file)
            files[-1].unlink(missing_ok=True)  # it may be a link
            figure.savefig(files[-1], dpi=120)
    return files


def _draw(plot: Any, panel: Panel, axes: list[Axis], kind: str) -> None:
    several = len(axes) > 1
    handles, labels = [], []
    for line in panel.lines:
        x = axes[line.run].x[kind]
        color = "black" if line.color < 0 else COLORS[line.color % len(COLORS)]
        points = _drawn(x, line.y)
        if not points:
            continue
        if line.low is not None and line.high is not None and (band := _drawn(x, line.low, line.high)):
            plot.fill_between(*map(list, zip(*band, strict=True)), color=color, alpha=0.2, linewidth=0)
        (handle,) = plot.plot(
            *map(list, zip(*points, strict=True)),
            color=color,
            linestyle=DASHES[max(line.color, 0) // len(COLORS) % len(DASHES)],
            linewidth=2 if line.color < 0 else 1.5,
            marker="o" if len(points) < 20 else None,
            markersize=3.5,
        )
        handles.append(handle)
        labels.append(one_line(axes[line.run].name if several else line.label, 50))
    if panel.limits:
        # Unseen points that the axis makes room for.
        plot.update_datalim([(plot.dataLim.x0, value) for value in panel.limits])
        plot.autoscale_view()
    if panel.log:
        plot.set_yscale("log")
        plot.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        plot.yaxis.set_minor_formatter(lambda value, position: "")
    for index, axis in enumerate(axes):
        steps = axis.x["step"]
        where = [_position(alarm["step"], steps, axis.x[kind]) for alarm in axis.alarms]
        marks = [x for x in where if x is not None]
        if marks:
            (handle,) = plot.plot(
                marks,
                [0.02 + 0.05 * index] * len(marks),  # those of a second run above those of the first
                "^",
                color=COLORS[index] if several else COLORS[5],
                markersize=7,
                transform=plot.get_xaxis_transform(),
            )
            handles.append(handle)
            labels.append(one_line(f"alarms of {axis.name}", 50) if several else "alarm raised")
    unit = panel.unit + (", logarithmic" if panel.log else "")
    plot.set(title=panel.title, xlabel="rollouts sampled" if kind == "rollouts" else "optimizer step", ylabel=unit)
    plot.grid(alpha=0.3)
    plot.spines[["top", "right"]].set_visible(False)
    # A label that starts with an underscore would be left out.
    labels = [f" {label}" if label.startswith("_") else label for label in labels]
    columns = 1 if max(map(len, labels)) > 32 else 2 if max(map(len, labels)) > 18 else 4
    plot.figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def _drawn(*columns: list[float | None]) -> list[tuple[float, ...]]:
    """The points that matplotlib can draw: with all coordinates, none of them beyond what its axes can hold."""
    rows = zip(*columns, strict=True)
    return [tuple(p for p in row if p is not None) for row in rows if all(p is not None and abs(p) < MAX for p in row)]


def _position(step: float, steps: list[float | None], x: list[float | None]) -> float | None:
    """Where a step is on another axis: at the first point that is not before it."""
    for at, value in zip(steps, x, strict=True):
        if at is not None and at >= step:
            return value
    return None
