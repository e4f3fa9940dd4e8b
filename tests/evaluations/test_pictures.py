import io

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image
from sklearn.metrics import confusion_matrix

from ssl_core.config import Dataset, Subset
from ssl_core.data.shards import Manifest
from ssl_core.drawing import style
from ssl_core.drawing.representation import (
    DASHED,
    RIGHT,
    WRONG,
    Neighbours,
    draw_all,
    draw_confusion,
    draw_neighbours,
    draw_points,
    draw_spectrum,
)
from ssl_core.drawing.style import render
from ssl_core.evaluations import knn, metrics
from ssl_core.evaluations.base import Subjects
from ssl_core.evaluations.parts.features import center_view, read_split
from ssl_core.evaluations.pictures import Config, choose, confusion, embed, run, spectrum
from ssl_core.stages import draw, evaluate

from .conftest import COLOURS, MEAN, SQUARES, STD, Tiny, quiet, write_shards

CONFIG = Config(dataset=SQUARES, perplexity=5, triangles=6, queries=2, neighbours=3, k=9)
NAMES = {
    f"{name}.{kind}" for name in ("tsne", "triangles", "neighbours", "confusion", "spectrum") for kind in ("png", "svg")
}
NOTES = {"pretrained": "divergence 1.00, trustworthiness 0.900", "untrained": "divergence 2.00, trustworthiness 0.800"}


@pytest.fixture(scope="module")
def subjects():
    torch.manual_seed(0)
    networks = {"pretrained": Tiny(), "untrained": Tiny()}
    return Subjects({**networks, "pixels": torch.nn.Flatten()}, 16, MEAN, STD)


@pytest.fixture(scope="module")
def outcome(subjects, manifest):
    return run(CONFIG, subjects, manifest, quiet)


@pytest.fixture(scope="module")
def pictures(outcome):
    return {
        f"{name}.{kind}": content
        for name, figure in draw_all(outcome.drawing).items()
        for kind, content in render(figure).items()
    }


def assert_colours(images, labels):
    """Check that images are squares of the colour of their label."""
    np.testing.assert_allclose(images.mean(axis=(-3, -2)) / 255, np.array(COLOURS)[labels] / 255, atol=0.04)


@pytest.fixture(scope="module")
def features(subjects, manifest):
    """The pre-trained network's features and the labels of training and test images, in the order of their indices."""
    view = center_view(16)
    parts = [read_split(subjects, manifest, split, view, "test") for split in ("train", "test")]
    return [
        (part.by_network["pretrained"][part.indices.argsort()], part.labels[part.indices.argsort()]) for part in parts
    ]


def texts(figure):
    """Return what is written in a figure, and the rectangle of each text in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    written = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if axes.axison:  # a photograph's are off
            low, high = axes.get_xlim(), axes.get_ylim()
            ticks = [tick.label1 for tick in axes.xaxis.get_major_ticks() if min(low) <= tick.get_loc() <= max(low)]
            labels = [
                tick.label2 if axes.yaxis.get_ticks_position() == "right" else tick.label1
                for tick in axes.yaxis.get_major_ticks()
                if min(high) <= tick.get_loc() <= max(high)
            ]
            legend = axes.get_legend()
            written += [
                *axes.texts,
                axes.xaxis.label,
                axes.yaxis.label,
                *ticks,
                *labels,
                *(legend.get_texts() if legend else []),
            ]
    return [(text.get_text(), text.get_window_extent(canvas.get_renderer())) for text in written if text.get_text()]


def cut(figure, boxes):
    """Return the texts that do not lie within the figure."""
    width, height = figure.bbox.size
    return [text for text, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]


def overlapping(boxes):
    """Return pairs of texts that touch each other."""
    return [(a, b) for n, (a, one) in enumerate(boxes) for b, other in boxes[n + 1 :] if one.overlaps(other)]


def test_all_pictures_come_as_png_and_svg_without_a_date(pictures):
    assert set(pictures) == NAMES
    for name, content in pictures.items():
        if name.endswith("png"):
            image = Image.open(io.BytesIO(content))
            assert set(image.info) == {"dpi"}
            assert round(image.info["dpi"][0]) == 150
            assert min(image.size) > 500
            assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)  # a ground of its own in a dark viewer
        else:
            assert b"<dc:date>" not in content


def test_the_numbers_beside_the_pictures_are_those_of_the_other_protocols(outcome, subjects, manifest, features):
    numbers, (_, (tests, _)) = outcome.metrics["pretrained"], features
    other = knn.run(knn.Config(dataset=SQUARES, k=9), subjects, manifest, quiet)
    assert set(outcome.metrics) == {"pretrained", "untrained"}
    assert numbers["top1"] == other.metrics["pretrained"]["top1"]
    assert numbers["rankme"] == pytest.approx(metrics.rankme(tests), abs=1e-3)
    assert numbers["effective_rank"] == pytest.approx(metrics.effective_rank(tests), abs=1e-3)
    assert 0.5 < numbers["trustworthiness"] <= 1
    assert numbers["tsne_kl"] > 0


def test_another_seed_draws_others_and_a_subset_shows_its_own_images(outcome, subjects, manifest):
    part = Dataset(name="squares", subset=Subset(images=20, seed=2))
    other = run(CONFIG.model_copy(update={"dataset": part, "seed": 1}), subjects, manifest, quiet)
    assert other.num_train == 20
    assert other.details["queries"] != outcome.details["queries"]
    assert other.hyperparameters["triangles_set"] != outcome.hyperparameters["triangles_set"]
    for name in NOTES:
        assert_colours(other.drawing[f"{name}.neighbour_images"], other.drawing[f"{name}.neighbour_labels"])


def test_the_neighbours_shown_are_those_of_brute_force(outcome, features):
    (bank, bank_labels), (tests, truth) = ((rows.double().numpy(), labels.numpy()) for rows, labels in features)
    cosines = (tests @ bank.T) / np.linalg.norm(tests, axis=1)[:, None] / np.linalg.norm(bank, axis=1)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :3]
    right = bank_labels[nearest] == truth[:, None]
    assert outcome.metrics["pretrained"]["neighbours_right"] == pytest.approx(100 * right.mean(), abs=1e-3)
    queries = list(map(int, outcome.details["queries"].split()))
    drawing = outcome.drawing
    np.testing.assert_array_equal(drawing["query_labels"], truth[queries])
    np.testing.assert_array_equal(drawing["pretrained.neighbour_labels"], bank_labels[nearest[queries]])
    assert_colours(drawing["query_images"], drawing["query_labels"])
    assert_colours(drawing["pretrained.neighbour_images"], drawing["pretrained.neighbour_labels"])


def test_augmented_queries_are_training_images_that_are_not_their_own_neighbours(subjects, manifest):
    config = CONFIG.model_copy(update={"query_views": ("none", "contrastive"), "k": 9})
    drawing = run(config, subjects, manifest, quiet).drawing
    assert list(drawing["augmented.policies"]) == ["none", "contrastive"] * 2
    labels, images = drawing["augmented.labels"], drawing["augmented.images"]
    assert labels[0] == labels[1] != labels[2] == labels[3]
    assert_colours(images[::2], labels[::2])
    assert not np.array_equal(images[0], images[1])
    neighbours = drawing["augmented.neighbour_images"]
    assert neighbours.shape == (4, 3, 16, 16, 3)
    assert_colours(neighbours, drawing["augmented.neighbour_labels"])
    assert not any(np.array_equal(images[0], other) for other in neighbours[0])


def test_the_stages_measure_once_and_draw_without_measuring(outcome, tmp_path):
    tracked = np.array('{"version": "v", "parameters": {}}')
    for folder in ("first", "again"):
        evaluate.write_arrays(tmp_path / folder / "pictures.npz", {**outcome.drawing, "run": tracked})
        draw.run("mine", "pictures", data=tmp_path / folder / "pictures.npz", output=tmp_path / folder)
    first, again = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("first", "again")
    )
    assert first == again
    assert set(first) == NAMES | {"pictures.npz"}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist: run the evaluation"), (b"x" * 99, "is damaged .*: delete it")]
)
def test_missing_and_damaged_arrays_are_a_clear_error(content, message, tmp_path):
    if content is not None:
        (tmp_path / "pictures.npz").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        draw.run("mine", "pictures", data=tmp_path / "pictures.npz", output=tmp_path)


def test_right_and_wrong_are_marked_by_colour_line_and_sign():
    images = np.zeros((2, 3, 4, 4, 3))
    labels = np.array([[0, 1, 0], [1, 1, 0]])
    figure = draw_neighbours(
        images[:, 0], np.array([0, 1]), {"pretrained": Neighbours(images, labels)}, ["a", "b"], title="T"
    )
    frames = [axes.patches[0] for axes in figure.axes]
    right = [None, True, False, True, None, True, True, False]  # a query, then its three
    assert [to_hex(frame.get_edgecolor()) for frame in frames if to_hex(frame.get_edgecolor()) in (RIGHT, WRONG)] == [
        RIGHT if mark else WRONG for mark in right if mark is not None
    ]
    assert [frame.get_linestyle() == DASHED for frame in frames] == [mark is False for mark in right]
    signs = [text.get_text() for text in figure.texts if text.get_text()[0] in "✓✗" and len(text.get_text()) == 3]
    assert signs == ["✓ a", "✗ b", "✓ a", "✓ b", "✓ b", "✗ a"]
    assert [text.get_text() for text in figure.texts if "/" in text.get_text()] == ["2/3", "2/3"]


def test_the_confusion_matrix_is_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    truth, predicted = torch.randint(0, 4, (2, 90), generator=generator)
    np.testing.assert_array_equal(confusion(truth, predicted, 5), confusion_matrix(truth, predicted, labels=range(5)))


def test_the_confusion_picture_says_shares_of_the_true_class():
    figure = draw_confusion(np.array([[3, 1], [0, 200]]), ["x", "y"], title="T")
    assert [text.get_text() for text in figure.axes[0].texts] == ["75", "25", "100"]
    np.testing.assert_allclose(np.asarray(figure.axes[0].images[0].get_array()), [[75, 25], [0, 100]])


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_the_spectrum_is_numpys(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(3)) + 5
    centered = rows.double().numpy() - rows.double().numpy().mean(axis=0)
    np.testing.assert_allclose(spectrum(rows), np.linalg.svd(centered, compute_uv=False), atol=1e-10)


def test_every_class_has_a_colour_and_a_shape_of_its_own():
    labels, points = np.arange(60) % 20, np.random.default_rng(0).normal(size=(60, 2))
    figure = draw_points({"pretrained": points}, labels, [f"class {n}" for n in range(20)], title="T", notes=NOTES)
    drawn = figure.axes[0].collections
    assert [len(np.asarray(points.get_offsets())) for points in drawn] == [3] * 20
    looks = {(line.get_marker(), line.get_color()) for line in figure.legends[0].get_lines()}
    assert len(looks) == 20
    assert [text.get_text() for text in figure.legends[0].texts] == [f"class {n}" for n in range(20)]


def test_a_triangle_joins_an_image_and_its_two_copies():
    triangles = np.random.default_rng(0).normal(size=(5, 3, 2))
    figure = draw_points({"pretrained": triangles}, np.zeros(5, dtype=int), ["a"], title="T", notes=NOTES)
    polygons, marks = figure.axes[0].collections
    for path, corners in zip(polygons.get_paths(), triangles):
        np.testing.assert_allclose(np.asarray(path.vertices)[:3], corners)
    np.testing.assert_allclose(np.asarray(marks.get_offsets()), triangles[:, 0])


LONG = [
    "Chesapeake Bay retriever and another",
    "$x_1$",
    "_hidden",
    *(f"black-and-tan coonhound {n}" for n in range(17)),
]


@pytest.mark.parametrize("num", [2, 20])
def test_nothing_is_cut_and_no_text_lies_on_another(num):
    generator = np.random.default_rng(0)
    images, found = np.zeros((2, 6, 4, 4, 3)), generator.integers(0, num, (2, 6))
    names = LONG if num == 20 else ["automobile", "airplane"]
    points = {name: generator.normal(size=(100, 2)) for name in NOTES}
    both = {name: Neighbours(images, found) for name in NOTES}
    counts = generator.integers(0, 9, (num, num))
    title = "t-SNE of 10,000 images of tiny_imagenet/test, perplexity 30"
    figures = [
        draw_points(points, np.arange(100) % num, names, title=title, notes=NOTES),
        draw_neighbours(images[:, 0], found[:, 0], both, names, title=title),
        draw_confusion(counts, names, title=f"Weighted 200-nearest-neighbour classifier\n{num} classes"),
        draw_spectrum({name: np.geomspace(1, 1e-6, 512) for name in NOTES}, NOTES, title=title),
    ]
    for figure in figures:
        boxes = texts(figure)
        assert cut(figure, boxes) == []
        assert overlapping(boxes) == []


@pytest.mark.parametrize("num", [40, 100])
def test_many_classes_have_no_numbers_and_then_no_names(num):
    figure = draw_confusion(np.eye(num, dtype=int), [f"class {n}" for n in range(num)], title="T")
    assert len(figure.axes[0].texts) == 0
    boxes = texts(figure)
    assert ("class 3" in dict(boxes)) == (num == 40)
    assert max(figure.get_size_inches()) < 12
    assert cut(figure, boxes) == []


def test_figures_do_not_depend_on_a_readers_settings():
    def draw():
        return render(draw_spectrum({"pretrained": np.array([3.0, 2.0, 1.0])}, NOTES, title="T"))

    plain = draw()
    with style.matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9}):
        assert draw() == plain


def test_classes_images_and_queries_are_drawn_evenly_by_the_seed():
    labels = np.repeat(np.arange(30), 20)
    config = Config(dataset=SQUARES, images=100, classes=5, triangles=10, queries=30)
    shown, cornered, queries = choose(labels, config)
    classes, counts = np.unique(labels[shown], return_counts=True)
    assert counts.tolist() == [20] * 5
    assert np.unique(labels[cornered], return_counts=True)[1].tolist() == [2] * 5
    assert set(cornered) <= set(shown)
    assert sorted(labels[queries]) == list(range(30))  # each class once before any comes again
    assert choose(labels, config) == (shown, cornered, queries)
    other = choose(labels, config.model_copy(update={"seed": 1}))
    assert set(labels[other.shown]) != set(classes)


def test_a_collapsed_backbone_can_be_drawn():
    points, divergence = embed(torch.ones(12, 4), 30, 0)
    assert np.isfinite(points).all()
    assert np.isfinite(divergence)


def test_too_few_images_are_refused(subjects, tmp_path):
    few = Manifest.load(write_shards(tmp_path / "few", train=[0, 1, 2] * 3, test=[0, 1, 2]))
    with pytest.raises(ValueError, match="3 images are too few for pictures"):
        run(CONFIG, subjects, few, quiet)
