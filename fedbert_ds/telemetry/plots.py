"""The one place that draws: figures without pyplot, in one style, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fedbert_ds.atomic_write import atomic_write

COLORS = (
    "#1f4e8c", "#b5482a", "#4c7a34", "#c98a1b", "#7a4c8c", "#2a9d8f", "#d08fb0", "#5b5b5b", "#a8c686", "#6f9bd1",
)  # fmt: skip
"""Of lines and bars, in this order."""
PALE, REFERENCE, GRID = "#c9c9c9", "#6b6b6b", "#e4e4e4"
"""Of what others are held against, of lines across a panel, of the grid."""

Figure = Any
Axes = Any


@contextmanager
def picture(
    path: Path,
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    grid: Literal["both", "x", "y"] = "both",
    **subplots: Any,
) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure of `width` x `height` inches and its panels, row by row; then write the PNG.

    `subplots` go to matplotlib's `Figure.subplots`.
    """
    # Without pyplot there is no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, **subplots).flat)
    for axes in panels:
        axes.grid(axis=grid, color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    yield figure, panels
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")


def short_ticks(axis: Any) -> None:
    """Label an axis 1k, 2M, 3G."""
    from matplotlib.ticker import EngFormatter

    axis.set_major_formatter(EngFormatter(sep=""))
