"""Zips of image folders, and .npz files of arrays."""

import stat
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_core.data.sharding import write_shards
from tests.data.test_sources import PLACES, card, error, folder, labels, png, records

METHODS = {"stored": zipfile.ZIP_STORED, "deflate": zipfile.ZIP_DEFLATED, "bzip2": zipfile.ZIP_BZIP2}


def zipped(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # of a name that occurs twice
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_a_zip_of_a_folder_gives_the_records_of_the_folder(tmp_path: Path, method: str) -> None:
    root = folder(tmp_path / "folder")
    members = {place: (root / place).read_bytes() for place in reversed(PLACES)}
    archive = zipped(tmp_path / "folder.zip", members, METHODS[method])
    assert records(card("image_zip", path=str(archive)), tmp_path) == records(
        card("image_folder", path=str(root)), tmp_path
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder.zip"]  # nothing was unpacked


def test_shards_of_a_zip_by_several_processes(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {f"train/cat/{number}.png": png(number) for number in range(30)})
    source = card("image_zip", {"train": {"folder": "train"}}, path=str(archive))
    one, four = (write_shards(source, tmp_path / str(threads), threads=threads) for threads in (1, 4))
    assert one.content()["splits"] == four.content()["splits"]


def test_a_zip_with_a_prefix_of_another_program_is_read(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"cat/1.png": png(1)})
    path = tmp_path / "prefixed.zip"
    path.write_bytes(b"#!/bin/sh\n" + archive.read_bytes())
    assert records(card("image_zip", {"train": {}}, path=str(path)), tmp_path)[1]["train"][0].image == png(1)


def test_odd_members_of_a_zip(tmp_path: Path) -> None:
    archive = zipped(
        tmp_path / "a.zip",
        {"cat\\1.png": png(1), "../2.png": png(2), "/abs/3.png": png(3), "__MACOSX/cat/._1.png": b"", "dog/": b""},
    )
    with zipfile.ZipFile(archive, "a") as file:
        link = zipfile.ZipInfo("cat/4.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
    _, splits = records(card("image_zip", {"train": {}}, path=str(archive)), tmp_path)
    assert labels(splits["train"]) == [("cat/1.png", 0)]


def test_mistakes_in_a_zip_are_reported_in_one_line(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"cat/1.png": png(1) * 9}, zipfile.ZIP_STORED)
    content = archive.read_bytes()
    (tmp_path / "cut.zip").write_bytes(content[:-30])
    (tmp_path / "crc.zip").write_bytes(content.replace(b"IDAT", b"IDAX", 1))
    secret = bytearray(content)
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        secret[content.index(signature) + flags] |= 1
    (tmp_path / "secret.zip").write_bytes(secret)
    for kind, name, split, reason in (
        ("image_tar", "a.zip", "", "is a zip: set type: image_zip"),
        ("image_folder", "a.zip", "", "is a zip: set type: image_zip"),
        ("image_zip", "cut.zip", "", "is damaged or not a zip"),
        ("image_zip", "crc.zip", "", "it is damaged in"),
        ("image_zip", "secret.zip", "", "is encrypted ('cat/1.png')"),
        ("image_zip", "a.zip", "train", "has no images below 'train'; folders in it: cat"),
        ("image_zip", "nowhere.zip", "", "nowhere.zip does not exist"),
        ("image_zip", "", "", "is a folder: set type: image_folder"),
    ):
        assert reason in error(card(kind, {"train": {"folder": split}}, path=str(tmp_path / name)), tmp_path)
    assert "another sha256" in error(card("image_zip", {"train": {}}, path=str(archive), sha256="0" * 64), tmp_path)


# Arrays


def npz(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def colours(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def pixels(record: Any) -> np.ndarray:
    return np.asarray(record.image)


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 3), (28, 28, 1), (3, 28, 28), (28, 28, 4)])
def test_the_layout_of_medmnist(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = {f"{name}_images": colours(4, *shape) for name in ("train", "test")}
    arrays |= {f"{name}_labels": np.array([[0], [2], [1], [0]], np.uint8) for name in ("train", "test")}
    path = npz(tmp_path / "m.npz", **arrays)
    classes, splits = records(card("npz", {"train": {}, "test": {}}, path=str(path)), tmp_path)
    assert classes is None
    assert labels(splits["test"])[:2] == [("m.npz/test[0]", 0), ("m.npz/test[1]", 2)]
    expected = arrays["train_images"][1]
    expected = expected.transpose(1, 2, 0) if shape[0] == 3 else expected.squeeze()
    assert np.array_equal(pixels(splits["train"][1]), expected)
    assert [file.name for file in tmp_path.iterdir()] == ["m.npz"]


def test_arrays_with_other_names(tmp_path: Path) -> None:
    path = npz(tmp_path / "k.npz", x_train=colours(2, 8, 8), y_train=np.array([b"b", b"a"]), x_extra=colours(1, 8, 8))
    splits = {"train": {"images": "x_{split}", "labels": "y_{split}"}, "extra": {"images": "x_extra", "labels": None}}
    classes, found = records(card("npz", splits, path=str(path)), tmp_path)
    assert classes == ("a", "b")
    assert [record.label for record in (*found["train"], *found["extra"])] == [1, 0, -1]


def test_shards_of_arrays(tmp_path: Path) -> None:
    path = npz(tmp_path / "m.npz", train_images=colours(5, 9, 7, 3), train_labels=np.array([0, 1, 0, 1, 0]))
    manifest = write_shards(card("npz", {"train": {}}, path=str(path)), tmp_path / "out", threads=2)
    assert manifest.split("train").class_counts == (3, 2)


def test_mistakes_in_arrays_are_reported_in_one_line(tmp_path: Path) -> None:
    good, ids = colours(3, 8, 8), np.arange(3)
    for arrays, reason in (
        ({"train_image": good, "train_labels": ids}, "has no array 'train_images'; did you mean 'train_image'?"),
        ({"train_images": good}, "has no array 'train_labels'"),
        (
            {"train_images": good / 255, "train_labels": ids},
            "is (3, 8, 8) of float64: expected (images, height, width)",
        ),
        ({"train_images": colours(3, 8, 8, 8), "train_labels": ids}, "is (3, 8, 8, 8) of uint8"),
        ({"train_images": good, "train_labels": ids[:2]}, "is (2,): expected one label for each of 3 images"),
        ({"train_images": good, "train_labels": np.eye(3)}, "is (3, 3): expected one label"),
        ({"train_images": good, "train_labels": np.array([None] * 3)}, "cannot be read: it holds Python objects"),
        ({"train_images": good[:0], "train_labels": ids}, "cannot be read: it is empty"),
    ):
        path = npz(tmp_path / "m.npz", **arrays)
        assert reason in error(card("npz", {"train": {}}, path=str(path)), tmp_path)
    (tmp_path / "x.npz").write_bytes(png(0))
    assert "is not an .npz file" in error(card("npz", {"train": {}}, path=str(tmp_path / "x.npz")), tmp_path)


def test_labels_that_are_no_class_are_named(tmp_path: Path) -> None:
    for labels_of_images, reason in (
        (np.array([0, 1, np.nan]), "label 2 of 'train' is empty or NaN"),
        (np.array(["a", "", "b"]), "label 1 of 'train' is empty or NaN"),
    ):
        path = npz(tmp_path / "m.npz", train_images=colours(3, 8, 8), train_labels=labels_of_images)
        assert reason in error(card("npz", {"train": {}}, path=str(path)), tmp_path)


def test_an_archive_in_an_archive_is_named(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"train.zip": b"PK"})
    assert "unpack train.zip" in error(card("image_zip", {"train": {"folder": "train"}}, path=str(archive)), tmp_path)
