"""Accuracy over the share of labels, one line per way to start a network."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ssl_core.drawing.style import COLOURS, FAINT, INK, SOFT, marker_of, panels, styled
from ssl_core.report.ways import PIXELS, SCRATCH, Way, percent

SIZE = (5.2, 4.2)  # inches; its letters are still readable at the width of a phone
LOOKS = ("given", "pretrained", "continued", "", "distilled")  # the fourth colour is grey, like that of the pixels
APART = 0.04  # between the points of two ways, as a part of a factor of ten


@styled
def draw_ways(ways: Sequence[Way], shares: Sequence[float], *, title: str) -> Figure:
    """Draw means over seeds; error bars are standard deviations of the sample."""
    figure, (axes,) = panels(1, 1, SIZE, title)
    for position, way in enumerate(ways):
        drawn = [(share, summary) for share in shares if (summary := way.accuracy(share))]
        colour, dashes, marker = _look(way.name)
        shift = 10 ** (APART * (position - (len(ways) - 1) / 2))  # so that error bars do not hide each other
        axes.errorbar(
            [100 * share * shift for share, _ in drawn],
            [summary.mean for _, summary in drawn],
            yerr=[summary.deviation or 0 for _, summary in drawn],
            label=way.title,
            linewidth=1.4,
            markersize=5,
            elinewidth=1,
            capsize=2,
            color=colour,
            linestyle=dashes,
            marker=marker,
        )
    axes.set_xscale("log")
    axes.set_xticks([100 * share for share in shares], [percent(share) for share in shares])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="share of the labels", ylabel="test top 1 in %")
    axes.grid(color=FAINT, linewidth=0.5)
    figure.legend(loc="outside lower left", ncols=2)
    return figure


def _look(name: str) -> tuple[str, str, str]:
    """Return colour, line and marker of a way, the same in all pictures."""
    if name == PIXELS:
        return SOFT, ":", "."
    if name == SCRATCH:
        return INK, "--", "o"
    return COLOURS[LOOKS.index(name)], "-", marker_of(LOOKS.index(name) + 1)
