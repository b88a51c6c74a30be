"""Line charts of a report."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES, DPI = (7.4, 3.4), 100
REFERENCES = ("oracle", "calibrated")  # in black, dashed


def line_figure(lines: dict[str, tuple[list[float], list[float]]], x_label: str, y_label: str) -> "Figure":
    """{name: (x, y)} => a figure with axes from 0 and its legend beside them."""
    from matplotlib.figure import Figure  # slow to import, and a report without uncertainty has no chart

    figure = Figure(INCHES, DPI, layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    for name, (x, y) in lines.items():
        axes.plot(x, y, label=name, **({"color": "black", "linestyle": "--"} if name in REFERENCES else {}))
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


def line_chart(lines: dict[str, tuple[list[float], list[float]]], x_label: str, y_label: str) -> np.ndarray:
    """The figure of `line_figure` as uint8 [H, W, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(line_figure(lines, x_label, y_label))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
