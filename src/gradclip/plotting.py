"""One look for every figure of the book: opaque, colour-blind safe, shown once.

Three decisions are made here so that no notebook has to make them again:

* the background is opaque white, because the book's dark mode puts its own colour behind a transparent image;
* a series is told apart by colour *and* by marker or line style (:func:`style`), so it survives a grey print;
* a figure does not stay in pyplot's registry (:func:`figure`), so a cell shows it once, as its last value.

>>> from gradclip import plotting
>>> fig, ax = plotting.figure()
>>> [line] = ax.plot([1, 2, 3], [1, 4, 9], **plotting.style(0))
>>> line.get_color(), line.get_marker()
('#0072B2', 'o')
"""

import matplotlib as mpl
import matplotlib.patheffects as path_effects
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's colours, without the yellow that is too light for a line on white.
PALETTE: tuple[dict, ...] = (
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#D55E00", "marker": "s", "linestyle": "--"},
    {"color": "#009E73", "marker": "^", "linestyle": "-."},
    {"color": "#CC79A7", "marker": "D", "linestyle": ":"},
    {"color": "#56B4E9", "marker": "v", "linestyle": (0, (6, 1.5, 1, 1.5, 1, 1.5))},
    {"color": "#E69F00", "marker": "P", "linestyle": (0, (8, 3))},
    {"color": "#000000", "marker": "X", "linestyle": (0, (3, 1, 1, 1))},
)

# The neutral grey of reference lines and annotations: 4.5 : 1 against white, so it is still text.
GREY = "#6B6B6B"

# 7 inches at 160 dots per inch are 1120 pixels: in a column 700 pixels wide, 10.5 points read as 15 pixels.
_WIDTHS = {"text": 7.0, "wide": 8.5}
_DPI = 160


def style(i: int, *, line: bool = True, marker: bool = True) -> dict:
    """Return the i-th entry of ``PALETTE`` as keyword arguments of ``ax.plot``.

    Args:
        i: Index of the series, from 0 to 6.
        line: Keep the line style. Without it the series is markers only.
        marker: Keep the marker. Without it the series is a plain line, for dense curves.

    Returns:
        A new dict with ``color``, ``marker`` and ``linestyle``.

    Raises:
        ValueError: If there is no such entry; an eighth colour could no longer be told apart.

    >>> style(1, marker=False)
    {'color': '#D55E00', 'marker': '', 'linestyle': '--'}
    """
    if not 0 <= i < len(PALETTE):
        raise ValueError(f"style index must be between 0 and {len(PALETTE) - 1}, got {i}")
    entry = dict(PALETTE[i])
    if not line:
        entry["linestyle"] = ""
    if not marker:
        entry["marker"] = ""
    return entry


def use_style() -> None:
    """Set matplotlib's defaults to the look of the book; call it once at the top of a notebook."""
    sns.set_theme(
        context="notebook",
        style="ticks",
        palette=[entry["color"] for entry in PALETTE],
        rc={
            "figure.facecolor": "white",
            "axes.facecolor": "white",
            "savefig.facecolor": "white",
            "savefig.transparent": False,
            "figure.dpi": _DPI,
            "savefig.dpi": _DPI,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.w_pad": 0.06,
            "figure.constrained_layout.h_pad": 0.06,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same figure on every machine
            "mathtext.fontset": "cm",
            "font.size": 10.5,
            "axes.labelsize": 10.5,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.titlepad": 8,
            "xtick.labelsize": 9.5,
            "ytick.labelsize": 9.5,
            "legend.fontsize": 9.5,
            "legend.title_fontsize": 9.5,
            "legend.frameon": False,
            "legend.handlelength": 2.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.linewidth": 0.8,
            "axes.edgecolor": "#333333",
            "xtick.major.width": 0.8,
            "ytick.major.width": 0.8,
            "xtick.minor.width": 0.5,
            "ytick.minor.width": 0.5,
            "xtick.major.size": 4,
            "ytick.major.size": 4,
            "xtick.minor.size": 2,
            "ytick.minor.size": 2,
            "axes.grid": False,
            "lines.linewidth": 2.0,
            "lines.markersize": 5.0,
            "image.cmap": "viridis",
        },
    )


def figure(
    nrows: int = 1,
    ncols: int = 1,
    *,
    width: str = "text",
    height: float | None = None,
    **kw,
) -> tuple[Figure, Axes | np.ndarray]:
    """Make a figure that is opaque, laid out by constraints and unknown to pyplot.

    A notebook's inline backend shows every figure left in pyplot's registry when a cell ends; a cell that
    also ends with ``fig`` would then show it twice, and only the value of a cell can carry alt text.

    Args:
        nrows: Rows of panels.
        ncols: Columns of panels.
        width: ``"text"`` (7 in) or ``"wide"`` (8.5 in), for panels side by side.
        height: Height in inches. By default it follows from the width of a panel.
        **kw: Anything else that ``matplotlib.pyplot.subplots`` takes.

    Returns:
        The figure, and its axes as ``matplotlib.pyplot.subplots`` returns them.

    Raises:
        ValueError: If the width has no such name or the height is not positive.
    """
    if width not in _WIDTHS:
        raise ValueError(f"width must be one of {tuple(_WIDTHS)}, got {width!r}")
    if height is not None and not height > 0:
        raise ValueError(f"height must be positive, got {height}")
    inches = _WIDTHS[width]
    if height is None:
        height = nrows * (1.3 + 0.42 * inches / ncols)
    options = {"figsize": (inches, height), "dpi": _DPI, "facecolor": "white", "layout": "constrained"}
    fig, axes = plt.subplots(nrows, ncols, **(options | kw))
    for ax in fig.axes:
        ax.set_facecolor("white")
    plt.close(fig)
    return fig, axes


def iteration_cmap() -> Colormap:
    """Return the map that colours iterations: dark is early and light is late, as in the 2020 paper.

    Lightness alone orders the colours, so the order survives colour blindness and a grey print, and the light
    end stays dark enough to be seen on white.
    """
    return sns.cubehelix_palette(
        start=0.5, rot=-0.85, hue=1.0, dark=0.12, light=0.7, reverse=True, as_cmap=True
    )


def scatter_by_iteration(
    ax: Axes,
    x,
    y,
    iteration,
    *,
    label: str | None = None,
    marker: str = "o",
    size: float = 14.0,
    colorbar: bool = True,
    colorbar_label: str = "iteration",
) -> PathCollection:
    """Scatter y against x on logarithmic axes, coloured by iteration.

    Args:
        ax: Axes of a figure made by :func:`figure`.
        x: Positive values, shape (n,).
        y: Positive values, shape (n,).
        iteration: The iteration of each point, shape (n,).
        label: Entry in the legend.
        marker: Marker of the points.
        size: Area of a marker in points squared.
        colorbar: Whether to add the colour bar that explains the colours.
        colorbar_label: Label of the colour bar.

    Returns:
        The drawn collection.

    Raises:
        ValueError: If the lengths differ, there are no points, or a value cannot be drawn on a logarithmic
            axis: matplotlib would drop such a point without a word.
    """
    x, y, iteration = (np.asarray(v, dtype=float) for v in (x, y, iteration))
    if not (x.ndim == 1 and x.shape == y.shape == iteration.shape):
        raise ValueError(
            f"x, y and iteration must be vectors of one length, got {x.shape}, {y.shape}, {iteration.shape}"
        )
    if x.size == 0:
        raise ValueError("there must be at least one point, got 0")
    for name, values in (("x", x), ("y", y)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise ValueError(
                f"{name} must be positive and finite on a log axis, got {values[bad[0]]} at index {bad[0]}"
            )
    # The last points would hide the first ones, which are the rare ones: late iterations go to the back.
    order = np.argsort(-iteration, kind="stable")
    ax.set_xscale("log")
    ax.set_yscale("log")
    points = ax.scatter(
        x[order],
        y[order],
        c=iteration[order],
        s=size,
        marker=marker,
        cmap=iteration_cmap(),
        linewidths=0,
        label=label,
    )
    if colorbar:
        bar = ax.figure.colorbar(points, ax=ax, pad=0.02, aspect=30)
        bar.set_label(colorbar_label)
        bar.outline.set_visible(False)
    return points


def plain_numbers(ax: Axes) -> None:
    """Label logarithmic axes with 0.5, 1, 2 in place of powers of ten, and minor ticks not at all.

    A panel is often within one decade, where matplotlib writes 3×10⁻¹, 4×10⁻¹ over one another.

    Args:
        ax: Axes; a linear axis is left alone.
    """
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())


def label_point(ax: Axes, x: float, y: float, text: str, *, dx: float = 6, dy: float = 4, **kw) -> Annotation:
    """Write a label beside a point of the data, ``dx`` and ``dy`` printer's points away from it.

    A label beside its curve needs no legend to look up. The white outline keeps it legible across a line.
    """
    options = {
        "xytext": (dx, dy),
        "textcoords": "offset points",
        "fontsize": mpl.rcParams["legend.fontsize"],
        "path_effects": [path_effects.withStroke(linewidth=3, foreground="white")],
    }
    return ax.annotate(text, (x, y), **(options | kw))
