"""Images of several labels: from VOC's and COCO's annotations through shards to low-shot SVMs."""

import json
import tarfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ssl_core.config import Dataset, Subset
from ssl_core.data import multilabels
from ssl_core.data.card import load_card
from ssl_core.data.multilabels import ABSENT, DIFFICULT, PRESENT
from ssl_core.data.shards import Manifest
from ssl_core.data.sources.dispatch import open_source
from ssl_core.evaluations import knn
from ssl_core.evaluations.low_shot import Config, average_precision, mean_average_precision, read_targets, run
from ssl_core.evaluations.parts.features import center_view, read_split
from ssl_core.stages import shard

from .conftest import quiet

COLOURS = {"cat": (200, 60, 60), "dog": (60, 200, 60), "person": (60, 60, 200)}
NAMES = ("cat", "dog", "person")
TRAIN = Dataset(name="animals")


def objects_of(image: int) -> list[tuple[str, int]]:
    """The halves of image i show two classes, or one twice; one of them is difficult in each fifth image."""
    left, right = list(product(NAMES, NAMES))[image % 9]
    return [(left, int(image % 5 == 0)), (right, 0)]


def states_of(image: int) -> list[int]:
    easy = {name for name, difficult in objects_of(image) if not difficult}
    hard = {name for name, difficult in objects_of(image) if difficult}
    return [PRESENT if name in easy else DIFFICULT if name in hard else ABSENT for name in NAMES]


def write_voc(folder: Path, splits: dict[str, range]) -> Path:
    """Write VOC's layout; image number i is `00000i.jpg`."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, images in splits.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("".join(f"{image:06d}\n" for image in images))
        for image in images:
            halves = [np.full((16, 8, 3), COLOURS[name]) for name, _ in objects_of(image)]
            pixels = np.concatenate(halves, axis=1) + generator.normal(0, 10, (16, 16, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"JPEGImages/{image:06d}.jpg")
            objects = "".join(
                f"<object><name>{name}</name><difficult>{difficult}</difficult></object>"
                for name, difficult in objects_of(image)
            )
            (folder / f"Annotations/{image:06d}.xml").write_text(f"<annotation>{objects}</annotation>")
    return folder


def write_card(folder: Path, **source) -> Path:
    """A card named `animals`; `source` replaces keys of VOC's."""
    splits = {"train": {"images": "trainval"}, "test": {"images": "test"}}
    card = {"name": "animals", "image_size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}
    card["source"] = {"type": "voc", "path": str(folder / "VOC2007"), "splits": splits} | source
    folder.joinpath("animals.yaml").write_text(yaml.safe_dump(card | {"on_error": "skip"}))
    return folder / "animals.yaml"


@pytest.fixture(scope="module")
def voc(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("voc")
    write_voc(folder / "VOC2007", {"trainval": range(1, 46), "test": range(46, 82)})
    shard.run(write_card(folder), folder / "shards", threads=1)
    return folder


@pytest.fixture(scope="module")
def animals(voc) -> Manifest:
    return Manifest.load(voc / "shards/manifest.json")


def test_labels_are_those_of_the_annotations(animals):
    assert animals.classes == NAMES
    assert multilabels.read_labels(animals, "train").tolist() == [states_of(image) for image in range(1, 46)]
    assert multilabels.read_labels(animals, "test").tolist() == [states_of(image) for image in range(46, 82)]
    assert {ABSENT, PRESENT, DIFFICULT} == set(multilabels.read_labels(animals, "test").flatten().tolist())


def test_an_image_left_out_takes_its_labels_with_it(tmp_path):
    write_voc(tmp_path / "VOC2007", {"trainval": range(1, 13), "test": range(13, 16)})
    (tmp_path / "VOC2007/JPEGImages/000004.jpg").write_bytes(b"no image")
    shard.run(write_card(tmp_path), tmp_path / "shards", threads=1)
    manifest = Manifest.load(tmp_path / "shards/manifest.json")
    assert [bad.name for bad in manifest.split("train").rejected] == ["JPEGImages/000004.jpg"]
    expected = [states_of(image) for image in range(1, 13) if image != 4]
    assert multilabels.read_labels(manifest, "train").tolist() == expected


def test_the_manifest_changes_with_the_labels_alone(voc, tmp_path):
    write_voc(tmp_path / "VOC2007", {"trainval": range(1, 46), "test": range(46, 82)})
    first, second = (tmp_path / f"VOC2007/Annotations/{image:06d}.xml" for image in (2, 4))
    one, other = first.read_text(), second.read_text()
    first.write_text(other)  # as many images of each class as before
    second.write_text(one)
    shard.run(write_card(tmp_path), tmp_path / "shards", threads=1)
    assert (tmp_path / "shards/manifest.json").read_bytes() != (voc / "shards/manifest.json").read_bytes()


def test_a_tar_of_the_folder_reads_the_same(voc, animals, tmp_path):
    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        for part in ("JPEGImages", "Annotations", "ImageSets"):
            tar.add(voc / "VOC2007" / part, part)
    shard.run(write_card(tmp_path, path=str(tmp_path / "voc.tar")), tmp_path / "shards", threads=1)
    assert (tmp_path / "shards/manifest.json").read_bytes() == (voc / "shards/manifest.json").read_bytes()


def test_cocos_annotations_say_which_classes_an_image_shows(shared_data, root, monkeypatch, tmp_path):
    archive = shared_data / "coco128.tar"
    monkeypatch.setenv("COCO128_TAR", str(archive))
    with tarfile.open(archive) as tar:
        notes = json.load(tar.extractfile("coco128/annotations/instances_train2017.json"))  # pyright: ignore
    names = {each["id"]: each["name"] for each in notes["categories"]}
    with open_source(load_card(root / "datasets/coco128.yaml"), scratch=tmp_path) as opened:
        assert opened.classes is not None
        assert opened.classes[:3] == ("person", "bicycle", "car")
        assert len(opened.classes) == 80
        samples = opened.splits["train"]
        images = {f"coco128/train2017/{each['file_name']}": each["id"] for each in notes["images"]}
        assert samples.size == 128
        for index in (0, 1, 64, 127):
            record = samples.read(index)
            shown = {name for name, state in zip(opened.classes, record.labels or b"", strict=True) if state == PRESENT}
            found = [each for each in notes["annotations"] if each["image_id"] == images[record.name]]
            assert shown == {names[each["category_id"]] for each in found}


def test_the_card_of_voc_2007_reads_its_published_layout(root, monkeypatch, tmp_path):
    write_voc(tmp_path / "VOCdevkit/VOC2007", {"trainval": range(1, 4), "test": range(4, 6)})
    monkeypatch.setenv("SSL_DATA", str(tmp_path))
    with open_source(load_card(root / "datasets/voc2007.yaml"), scratch=tmp_path) as opened:
        assert {name: samples.size for name, samples in opened.splits.items()} == {"train": 3, "test": 2}
        assert len(opened.classes or ()) == 20
        first = opened.splits["train"].read(0)
        assert first.name == "JPEGImages/000001.jpg"
        assert [name for name, state in zip(opened.classes or (), first.labels or b"", strict=True) if state] == [
            "cat",
            "dog",
        ]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "ImageSets/Main/test.txt").unlink(), r"has no file 'ImageSets/Main/test\.txt'"),
        (lambda folder: (folder / "Annotations/000002.xml").write_text("<a>"), r"Annotations/000002\.xml is not XML"),
        (lambda folder: (folder / "Annotations/000002.xml").unlink(), r"has no file 'Annotations/000002\.xml'"),
    ],
)
def test_missing_and_broken_annotations_are_a_clear_error(tmp_path, spoil, message):
    spoil(write_voc(tmp_path / "VOC2007", {"trainval": range(1, 4), "test": range(4, 6)}))
    with pytest.raises(ValueError, match=message), open_source(load_card(write_card(tmp_path)), scratch=tmp_path):
        pass


def test_protocols_of_one_label_an_image_refuse_such_data(subjects, animals):
    with pytest.raises(ValueError, match="'animals': images have several labels each, expected one"):
        knn.run(knn.Config(dataset=TRAIN), subjects, animals, quiet)


def test_classes_beside_each_other_are_found_by_few_shots(subjects, animals):
    outcome = run(Config(dataset=TRAIN, shots=(4, 8), draws=2), subjects, animals, quiet)
    assert list(outcome.metrics["pixels"]) == ["map_full", "map_4", "map_8", "std_by_shots"]
    assert outcome.metrics["pixels"]["map_full"] > 80  # nine of ten test images of a class's halves
    assert (outcome.num_train, outcome.num_test) == (45, 36)
    assert outcome.hyperparameters["labels"] == "several per image"
    most = outcome.hyperparameters["training_images"]["8"]
    assert max(most) < 24  # images drawn for two classes train once


def test_difficult_objects_are_no_positives_and_counted_or_not(subjects, animals):
    scores = {}
    for difficult in ("negative", "ignore"):
        config = Config(dataset=TRAIN, shots=(), difficult=difficult)
        scores[difficult] = run(config, subjects, animals, quiet).metrics["pixels"]["map_full"]
    assert scores["ignore"] > scores["negative"]  # there they show the class, and count against it


def test_a_subset_keeps_images_and_labels_together(subjects, animals):
    part = Dataset(name="animals", subset=Subset(images=20, seed=3))
    features = read_split(subjects, animals, part, center_view(16), "test")
    targets, _ = read_targets(animals, part, features)
    whole = read_split(subjects, animals, TRAIN, center_view(16), "test")
    everything, _ = read_targets(animals, TRAIN, whole)
    for row, label in zip(features.by_network["pixels"], targets):
        same = (whole.by_network["pixels"] == row).all(dim=1)
        assert torch.equal(everything[same][0], label)


def test_images_that_do_not_count_are_as_if_they_were_not_there():
    generator = torch.Generator().manual_seed(0)
    scores, targets = torch.rand(40, 3, generator=generator), torch.rand(40, 3, generator=generator) < 0.3
    counted = torch.rand(40, 3, generator=generator) < 0.7
    rows = [(counted[:, label], label) for label in range(3)]
    expected = np.mean([average_precision(scores[own, c], targets[own, c]) for own, c in rows])
    assert mean_average_precision(scores, targets, counted) == pytest.approx(100 * expected, abs=1e-3)
