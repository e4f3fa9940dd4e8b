"""Cards of public data sets read small files of the official layout."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from ssl_core.data.card import load_card
from ssl_core.data.sharding import write_shards
from tests.data.test_sources import folder, png, tar

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


def eurosat(data: Path) -> None:
    names = [f"2750/{name}/{name}_{number}.jpg" for name in ("AnnualCrop", "Forest") for number in range(1, 6)]
    folder(data / "eurosat", *names)


def svhn(data: Path) -> None:
    labels = np.array([[1], [10], [2], [10]])  # 10 is the digit 0
    for split in ("train", "test", "extra"):
        scipy.io.savemat(data / f"{split}_32x32.mat", {"X": pixels(32, 32, 3, 4), "y": labels})


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


LAYOUTS: dict[Callable[[Path], None], tuple[int, dict[str, int]]] = {  # -> number of classes, images of each split
    imagenette: (2, {"train": 2, "val": 2}),
    imagenet100: (100, {"train": 100, "val": 100}),
    eurosat: (2, {"train": 8, "test": 2}),
    svhn: (10, {"train": 4, "test": 4, "extra": 4}),
    gtsrb: (2, {"train": 2, "test": 1}),
    pcam: (2, {"train": 3, "val": 3, "test": 3}),
    fashion_mnist: (10, {"train": 3, "test": 3}),
    medmnist: (3, {"train": 4, "val": 4, "test": 4}),
}


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_a_card_reads_the_official_layout(
    write: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(data)
    for name in ("SSL_DATA", "IMAGENET", "IMAGENETTE_TAR", "MEDMNIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    for module in ("svhn", "utils"):  # the checksums are those of the whole files
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda *_: True)
    card = load_card(ROOT / "datasets" / f"{write.__name__}.yaml")
    manifest = write_shards(card, tmp_path / "shards", threads=1)
    classes, images = LAYOUTS[write]
    assert {name: split.images for name, split in manifest.splits.items()} == images
    assert all(split.labelled for split in manifest.splits.values())
    assert len(manifest.split("train").class_counts or ()) == classes
