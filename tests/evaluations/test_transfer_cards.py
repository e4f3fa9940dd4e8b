"""Cards of transfer targets, on folders of the layout that torchvision's data sets read; the real ones are not here."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ssl_core.data.card import Torchvision, load_card
from ssl_core.data.sources.dispatch import open_source


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (200, 10, 10)).save(path)


def decoded(image: bytes | Image.Image) -> Image.Image:
    with Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image as opened:
        opened.load()
    return opened


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def food101(data: Path) -> None:
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        content = {name: [f"{name}/{number}" for number in numbers] for name in ("pie", "soup")}
        lines(data / f"food-101/meta/{split}.json", json.dumps(content))
        for path in (path for paths in content.values() for path in paths):
            picture(data / f"food-101/images/{path}.jpg")


def stanford_cars(data: Path) -> None:
    home = data / "stanford_cars"
    kind = [("class", "O"), ("fname", "O")]
    for folder, file, count in (
        ("cars_train", "devkit/cars_train_annos.mat", 4),
        ("cars_test", "cars_test_annos_withlabels.mat", 2),
    ):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        rows = np.array([(1 + n % 2, f"{n:05d}.jpg") for n in range(count)], dtype=kind)
        savemat(home / file, {"annotations": rows})
        for n in range(count):
            picture(home / folder / f"{n:05d}.jpg")
    savemat(home / "devkit/cars_meta.mat", {"class_names": np.array(["Fiat 500", "VW Golf"], dtype=object)})


def dtd(data: Path) -> None:
    for split in ("train", "val", "test"):
        names = [f"{name}/{name}_{split}.jpg" for name in ("dotted", "woven")]
        lines(data / f"dtd/dtd/labels/{split}1.txt", *names)
        for name in names:
            picture(data / f"dtd/dtd/images/{name}")


def oxford_pets(data: Path) -> None:
    home = data / "oxford-iiit-pet"
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        rows = [f"{breed}_{n} {label} 1 1" for n in numbers for breed, label in (("Abyssinian", 1), ("beagle", 2))]
        lines(home / f"annotations/{split}.txt", *rows)
        for row in rows:
            picture(home / f"images/{row.split()[0]}.jpg")


def fgvc_aircraft(data: Path) -> None:
    home = data / "fgvc-aircraft-2013b/data"
    lines(home / "variants.txt", "707-320", "A380")
    for number, split in enumerate(("train", "val", "test")):
        lines(home / f"images_variant_{split}.txt", f"{number}0 707-320", f"{number}1 A380")
        for image in (f"{number}0", f"{number}1"):
            picture(home / f"images/{image}.jpg")


def caltech101(data: Path) -> None:
    for name in ("BACKGROUND_Google", "ant", "yin_yang"):
        for number in (1, 2):
            picture(data / f"caltech101/101_ObjectCategories/{name}/image_{number:04d}.jpg")


@pytest.mark.parametrize(
    ("name", "write", "sizes", "classes"),
    [
        ("food101", food101, {"train": 4, "test": 2}, ("pie", "soup")),
        ("stanford_cars", stanford_cars, {"train": 4, "test": 2}, ("Fiat 500", "VW Golf")),
        ("dtd", dtd, {"train": 2, "val": 2, "test": 2}, ("dotted", "woven")),
        ("oxford_pets", oxford_pets, {"train": 4, "test": 2}, ("Abyssinian", "Beagle")),
        ("fgvc_aircraft", fgvc_aircraft, {"train": 2, "val": 2, "test": 2}, ("707-320", "A380")),
        ("caltech101", caltech101, {"all": 4}, None),
        ("caltech101_background", caltech101, {"all": 6}, ("BACKGROUND_Google", "ant", "yin_yang")),
    ],
)
def test_a_card_reads_its_splits_from_the_published_layout(name, write, sizes, classes, tmp_path, root, monkeypatch):
    monkeypatch.setenv("SSL_DATA", str(tmp_path))
    write(tmp_path)
    card = load_card(root / "datasets" / f"{name}.yaml")
    with open_source(card, scratch=tmp_path) as opened:
        assert {split: samples.size for split, samples in opened.splits.items()} == sizes
        assert opened.classes == classes
        for samples in opened.splits.values():
            records = [samples.read(index) for index in range(samples.size)]
            for record in records:
                assert decoded(record.image).size == (9, 7)
            assert {record.label for record in records} == set(range(2 if classes is None else len(classes)))


def test_flowers_have_their_papers_splits(root):
    # torchvision checks the digests of its annotation files, so no folder written here will do.
    source = load_card(root / "datasets/flowers102.yaml").source
    assert isinstance(source, Torchvision)
    assert source.dataset == "Flowers102"
    assert {name: split.arguments["split"] for name, split in source.splits.items()} == {
        "train": "train",
        "val": "val",
        "test": "test",
    }
