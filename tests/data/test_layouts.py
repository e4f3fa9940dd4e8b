"""Cards of public data sets read small files of the official layout."""

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ssl_core.data.card import Torchvision, load_card
from ssl_core.data.sharding import write_shards
from tests.data.test_sources import folder, png, tar

from .conftest import encode

ROOT = Path(__file__).parents[2]


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def imagenette(data: Path) -> None:
    names = [f"imagenette2-320/{split}/{wnid}/{wnid}_1.JPEG" for split in ("train", "val") for wnid in ("n01", "n02")]
    tar(data / "imagenette2-320.tgz", dict.fromkeys(names, png(1)), "w:gz")


def imagenet100(data: Path) -> None:
    wnids = ("n01440764", "n01558993", "n13040303")  # the first is not one of the hundred
    keep = load_card(ROOT / "datasets" / "imagenet100.yaml").keep_classes or ()
    for split in ("train", "val"):
        folder(data / "imagenet", *(f"{split}/{wnid}/{wnid}_1.JPEG" for wnid in {*wnids, *keep}))


def imagenet_1percent(data: Path) -> None:
    folder(
        data / "imagenet",
        *(f"{split}/n0{wnid}/n0{wnid}_{n}.JPEG" for split in ("train", "val") for wnid in (1, 2) for n in (1, 2)),
    )
    (data / "imagenet_subsets").mkdir()
    (data / "imagenet_subsets" / "1percent.txt").write_text("n02_1.JPEG\nn01_2.JPEG\n")


def eurosat(data: Path) -> None:
    names = [f"2750/{name}/{name}_{number}.jpg" for name in ("AnnualCrop", "Forest") for number in range(1, 6)]
    folder(data / "eurosat", *names)


def svhn(data: Path) -> None:
    labels = np.array([[1], [10], [2], [10]])  # 10 is the digit 0
    for split in ("train", "test", "extra"):
        savemat(data / f"{split}_32x32.mat", {"X": pixels(32, 32, 3, 4), "y": labels})


def gtsrb(data: Path) -> None:
    for label in ("00000", "00001"):
        path = data / "gtsrb" / "GTSRB" / "Training" / label / "00000_00000.ppm"
        path.parent.mkdir(parents=True)
        Image.fromarray(pixels(9, 8, 3)).save(path)
    images = data / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    images.mkdir(parents=True)
    Image.fromarray(pixels(9, 8, 3)).save(images / "00000.ppm")
    header = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"
    (data / "gtsrb" / "GT-final_test.csv").write_text(f"{header}\n00000.ppm;8;9;1;1;7;8;1\n")


def pcam(data: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (data / "pcam").mkdir()
    for split in ("train", "valid", "test"):
        for kind, array in (("x", pixels(3, 96, 96, 3)), ("y", np.array([0, 1, 1]).reshape(3, 1, 1, 1))):
            with h5py.File(data / "pcam" / f"camelyonpatch_level_2_split_{split}_{kind}.h5", "w") as file:
                file[kind] = array


def fashion_mnist(data: Path) -> None:
    raw = data / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images, labels = pixels(3, 28, 28), np.array([9, 0, 3], np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, 3, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, 3) + labels.tobytes())


def medmnist(data: Path) -> None:
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = pixels(4, 28, 28, 3)
        arrays[f"{split}_labels"] = np.array([[2], [0], [1], [1]], np.uint8)
    np.savez_compressed(data / "pathmnist.npz", **arrays)


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(Image.new("RGB", (9, 7), (200, 10, 10)), "JPEG"))


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def food101(data: Path) -> None:
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        content = {name: [f"{name}/{number}" for number in numbers] for name in ("pie", "soup")}
        lines(data / f"food-101/meta/{split}.json", json.dumps(content))
        for path in (path for paths in content.values() for path in paths):
            write_picture(data / f"food-101/images/{path}.jpg")


def stanford_cars(data: Path) -> None:
    home = data / "stanford_cars"
    kind = [("class", "O"), ("fname", "O")]
    for images, file, count in (
        ("cars_train", "devkit/cars_train_annos.mat", 4),
        ("cars_test", "cars_test_annos_withlabels.mat", 2),
    ):
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        rows = np.array([(1 + n % 2, f"{n:05d}.jpg") for n in range(count)], dtype=kind)
        savemat(home / file, {"annotations": rows})
        for n in range(count):
            write_picture(home / images / f"{n:05d}.jpg")
    savemat(home / "devkit/cars_meta.mat", {"class_names": np.array(["Fiat 500", "VW Golf"], dtype=object)})


def dtd(data: Path) -> None:
    for split in ("train", "val", "test"):
        names = [f"{name}/{name}_{split}.jpg" for name in ("dotted", "woven")]
        lines(data / f"dtd/dtd/labels/{split}1.txt", *names)
        for name in names:
            write_picture(data / f"dtd/dtd/images/{name}")


def oxford_pets(data: Path) -> None:
    home = data / "oxford-iiit-pet"
    for split, numbers in (("trainval", (1, 2)), ("test", (3,))):
        rows = [f"{breed}_{n} {label} 1 1" for n in numbers for breed, label in (("Abyssinian", 1), ("beagle", 2))]
        lines(home / f"annotations/{split}.txt", *rows)
        for row in rows:
            write_picture(home / f"images/{row.split()[0]}.jpg")


def fgvc_aircraft(data: Path) -> None:
    home = data / "fgvc-aircraft-2013b/data"
    lines(home / "variants.txt", "707-320", "A380")
    for number, split in enumerate(("train", "val", "test")):
        lines(home / f"images_variant_{split}.txt", f"{number}0 707-320", f"{number}1 A380")
        for image in (f"{number}0", f"{number}1"):
            write_picture(home / f"images/{image}.jpg")


def caltech101(data: Path, images: int = 2) -> None:
    for name in ("BACKGROUND_Google", "ant", "yin_yang"):
        for number in range(1, images + 1):
            write_picture(data / f"caltech101/101_ObjectCategories/{name}/image_{number:04d}.jpg")


# Name of the card -> number or names of the classes, images of each split
LAYOUTS: dict[str, tuple[Callable[[Path], None], int | tuple[str, ...], dict[str, int]]] = {
    "imagenette": (imagenette, 2, {"train": 2, "val": 2}),
    "imagenet100": (imagenet100, 100, {"train": 100, "val": 100}),
    "imagenet_1percent": (imagenet_1percent, 2, {"train": 2, "val": 4}),
    "eurosat": (eurosat, 2, {"train": 8, "test": 2}),
    "svhn": (svhn, 10, {"train": 4, "test": 4, "extra": 4}),
    "gtsrb": (gtsrb, 2, {"train": 2, "test": 1}),
    "pcam": (pcam, 2, {"train": 3, "val": 3, "test": 3}),
    "fashion_mnist": (fashion_mnist, 10, {"train": 3, "test": 3}),
    "medmnist": (medmnist, 3, {"train": 4, "val": 4, "test": 4}),
    "food101": (food101, ("pie", "soup"), {"train": 4, "test": 2}),
    "stanford_cars": (stanford_cars, ("Fiat 500", "VW Golf"), {"train": 4, "test": 2}),
    "dtd": (dtd, ("dotted", "woven"), {"train": 2, "val": 2, "test": 2}),
    "oxford_pets": (oxford_pets, ("Abyssinian", "Beagle"), {"train": 4, "test": 2}),
    "fgvc_aircraft": (fgvc_aircraft, ("707-320", "A380"), {"train": 2, "val": 2, "test": 2}),
    "caltech101": (caltech101, 2, {"all": 4}),
    "caltech101_split": (partial(caltech101, images=32), 2, {"train": 60, "test": 4}),
    "caltech101_background": (caltech101, ("BACKGROUND_Google", "ant", "yin_yang"), {"all": 6}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_card_reads_the_official_layout(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, classes, images = LAYOUTS[name]
    data = tmp_path / "data"
    data.mkdir()
    write(data)
    for variable in ("SSL_DATA", "IMAGENET", "IMAGENETTE_TAR", "MEDMNIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    for module in ("svhn", "utils"):  # the checksums are those of the whole files
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    manifest = write_shards(load_card(ROOT / "datasets" / f"{name}.yaml"), tmp_path / "shards", threads=1)
    assert {split: facts.images for split, facts in manifest.splits.items()} == images
    for facts in manifest.splits.values():
        assert len(facts.class_counts or ()) == (classes if isinstance(classes, int) else len(classes))
    assert isinstance(classes, int) or manifest.classes == classes


def test_flowers_have_their_papers_splits() -> None:
    # torchvision checks the digests of its annotation files, so no folder written here will do.
    source = load_card(ROOT / "datasets" / "flowers102.yaml").source
    assert isinstance(source, Torchvision)
    assert source.dataset == "Flowers102"
    splits = {name: split.arguments["split"] for name, split in source.splits.items()}
    assert splits == {"train": "train", "val": "val", "test": "test"}
