import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ssl_core.drawing.curves import draw_curves, read_history
from ssl_core.stages import curves

HISTORY = """step,epoch,loss/total,loss/contrast,schedule/learning_rate,embedding/spread,online/knn
1,0.5,3.0,2.5,0.1,0.9,
2,1.0,2.0,,0.05,0.8,
3,1.5,1.5,,0.02,0.7,55.5
"""


@pytest.fixture
def history(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text(HISTORY)
    return path


def test_missing_measurements_are_nan(history):
    columns = read_history(history)
    np.testing.assert_array_equal(columns["online/knn"], [np.nan, np.nan, 55.5])
    np.testing.assert_array_equal(columns["epoch"], [0.5, 1.0, 1.5])


def test_losses_share_a_panel_and_every_other_column_has_its_own(history):
    figure = draw_curves(read_history(history), title="Pre-training of mine")
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(panels) == ["loss", "learning rate", "spread of the embedding", "online kNN, % right"]
    total, contrast = panels["loss"].lines
    np.testing.assert_array_equal(total.get_xydata(), [[0.5, 3.0], [1.0, 2.0], [1.5, 1.5]])
    np.testing.assert_array_equal(contrast.get_xydata(), [[0.5, 2.5]])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    inside = figure.get_tightbbox(canvas.get_renderer())
    assert inside is not None
    assert inside.x0 >= 0
    assert inside.y0 >= 0
    assert inside.x1 <= figure.get_figwidth()
    assert inside.y1 <= figure.get_figheight()


def test_a_history_becomes_a_png_and_an_svg_the_same_each_time(history, tmp_path):
    history.write_text("step,epoch,loss/total\n1,0.5,3.0\n2,1.0,2.0\n")

    def draw(name):
        curves.run("mine", history=history, output=tmp_path / name / "curves.png")
        return [(tmp_path / name / f"curves.{kind}").read_bytes() for kind in ("png", "svg")]

    png, svg = draw("first")
    assert [png, svg] == draw("again")
    assert Image.open(io.BytesIO(png)).size == (1650, 435)
    assert b"<dc:date>" not in svg


def test_a_history_without_rows_is_refused(tmp_path):
    (tmp_path / "history.csv").write_text("step,epoch\n")
    with pytest.raises(ValueError, match=r"history\.csv has no row"):
        curves.run("mine", history=tmp_path / "history.csv", output=tmp_path / "curves.png")
