"""The stage `curves`: the history of a pre-training as a picture."""

from pathlib import Path

from ssl_core.drawing.curves import draw_curves, read_history
from ssl_core.drawing.style import render
from ssl_core.files import write_bytes


def run(experiment: str, *, history: Path, output: Path) -> None:
    """Draw `history` as `output` (.png) and, in the same folder, as .svg.

    Raises `ValueError` for a history without a row.
    """
    figure = draw_curves(read_history(history), title=f"Pre-training of {experiment}")
    for extension, content in render(figure).items():
        write_bytes(output.with_suffix(f".{extension}"), content)
