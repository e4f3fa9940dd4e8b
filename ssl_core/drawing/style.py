"""The style of all figures: one font, a white ground, and colours for colour-blind readers beside shapes or lines.

`render` makes a PNG and an SVG of a figure, with equal bytes for equal figures.
"""

import io
import math

import matplotlib.style
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

DPI = 150
INK, SOFT, FAINT = "#1c2430", "#667080", "#c9cfd8"
# Petroff (2021), for colour-blind readers; its last colour is too pale for small points on white
COLOURS = (*map(to_hex, color_sequences["petroff10"][:-1]), INK)
MARKERS = "o^sDvPX<>*"
NETWORKS = {"pretrained": ("pre-trained", COLOURS[0], "-"), "untrained": ("untrained", COLOURS[6], "--")}
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called $x$
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "ssl-core",
}
styled = matplotlib.style.context(["default", STYLE])  # independent of the user's matplotlibrc


@styled
def render(figure: Figure) -> dict[str, bytes]:
    """Return the figure as a PNG of 150 dpi and an SVG, by extension."""
    pictures = {}
    for extension, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=extension, dpi=DPI, metadata=metadata)
        pictures[extension] = buffer.getvalue()
    return pictures


def panels(
    number: int, columns: int, size: tuple[float, float], title: str, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure with `number` panels of `size` (inches) in rows of `columns`, and its panels."""
    rows = math.ceil(number / columns)
    figure = Figure(figsize=(size[0] * columns, 0.4 + size[1] * rows))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    figure.suptitle(title, fontsize=11, x=0.012, ha="left")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=sharex).ravel().tolist()
    for axes in grid[number:]:
        axes.remove()
    return figure, grid[:number]


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def set_title(figure: Figure, title: str) -> None:
    """Write the title into the upper left corner."""
    across, up = figure.get_size_inches()
    figure.text(0.15 / across, 1 - 0.14 / up, title, fontsize=11, va="top")


def shorten(name: str, length: int) -> str:
    """Cut a long name, with an ellipsis as its last character."""
    return name if len(name) <= length else name[: length - 1] + "…"


def colour_of(rank: int) -> str:
    """Return a colour; ten classes or experiments have different ones."""
    return COLOURS[rank % len(COLOURS)]


def marker_of(rank: int) -> str:
    """Return a marker; classes of equal colour have different markers."""
    return MARKERS[(rank + rank // len(MARKERS)) % len(MARKERS)]
