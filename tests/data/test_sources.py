"""Sources: every kind returns the same records, and mistakes are reported in one line."""

import colorsys
import gzip
import io
import os
import resource
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssl_core.data.card import Card
from ssl_core.data.records import Record
from ssl_core.data.sources.dispatch import open_source
from ssl_core.data.sources.library import library_split

from .conftest import encode

PLACES = ("train/cat/1.png", "train/cat/2.png", "train/ant/deep/3.png", "test/dog/4.png")


def png(value: int) -> bytes:
    return encode(Image.new("RGB", (4, 4), (value, 0, 0)))


def folder(root: Path, *places: str) -> Path:
    for value, place in enumerate(places or PLACES):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_bytes(png(value))
    return root


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def card(type: str, splits: dict[str, Any] | None = None, classes: list[str] | None = None, **source: Any) -> Card:
    splits = splits or {"train": {"folder": "train"}, "test": {"folder": "test"}}
    content = {"name": "x", "image_size": 4, "classes": classes, "source": {"type": type, "splits": splits, **source}}
    return Card.model_validate(content)


def records(card: Card, scratch: Path) -> tuple[tuple[str, ...] | None, dict[str, list[Record]]]:
    with open_source(card, scratch=scratch) as opened:
        return opened.classes, {
            name: [split.read(index) for index in range(split.size)] for name, split in opened.splits.items()
        }


def labels(split: list[Record]) -> list[tuple[str, int]]:
    return [(record.name, record.label) for record in split]


def error(card: Card, scratch: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        records(card, scratch)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_classes_are_sorted_and_label_ids_shared_by_the_splits(tmp_path: Path) -> None:
    classes, splits = records(card("image_folder", path=str(folder(tmp_path))), tmp_path)
    assert classes == ("ant", "cat", "dog")
    assert labels(splits["train"]) == [("ant/deep/3.png", 0), ("cat/1.png", 1), ("cat/2.png", 1)]
    assert labels(splits["test"]) == [("dog/4.png", 2)]
    assert splits["test"][0].image == png(3)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_of_a_folder_gives_the_records_of_the_folder(tmp_path: Path, mode: str) -> None:
    root = folder(tmp_path / "folder")
    members = {f"./{place}": (root / place).read_bytes() for place in reversed(PLACES)}
    archive = tar(tmp_path / "folder.tar", members, mode)
    assert records(card("image_tar", path=str(archive)), tmp_path) == records(
        card("image_folder", path=str(root)), tmp_path
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "folder.tar"]  # nothing was unpacked


def test_the_cards_order_of_classes_wins(tmp_path: Path) -> None:
    source = card("image_folder", path=str(folder(tmp_path)), classes=["dog", "cat", "ant"])
    classes, splits = records(source, tmp_path)
    assert classes == ("dog", "cat", "ant")
    assert [record.label for record in splits["train"]] == [2, 1, 1]


def test_a_class_that_is_not_in_the_card_is_named(tmp_path: Path) -> None:
    source = card("image_folder", path=str(folder(tmp_path)), classes=["dogs", "cat", "ant"])
    assert "the class 'dog' is not among the card's classes; did you mean 'dogs'?" in error(source, tmp_path)


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    folder(tmp_path, "b.png", "a.png")
    classes, splits = records(card("image_folder", {"train": {"labels": "none"}}, path=str(tmp_path)), tmp_path)
    assert classes is None
    assert labels(splits["train"]) == [("a.png", -1), ("b.png", -1)]


def test_files_without_an_image_name_are_left_out(tmp_path: Path) -> None:
    folder(tmp_path, "cat/1.PNG")
    (tmp_path / ".Trash-1000" / "files").mkdir(parents=True)
    for name in ("cat/Thumbs.db", "cat/notes.txt", "cat/._1.png", "cat/.hidden.png", ".Trash-1000/files/2.png"):
        (tmp_path / name).write_bytes(b"no image")
    archive = tar(tmp_path / "a.tar", dict.fromkeys(("cat/1.PNG", ".Trash-1000/2.png", "cat/.thumbs/1.png"), b""))
    for kind, path in (("image_folder", tmp_path), ("image_tar", archive)):
        classes, splits = records(card(kind, {"train": {}}, path=str(path)), tmp_path)
        assert classes == ("cat",)
        assert labels(splits["train"]) == [("cat/1.PNG", 0)]


def test_pictures_of_formats_that_are_not_read_are_counted(tmp_path: Path) -> None:
    names = ("cat/1.png", "cat/2.HEIC", "cat/3.heic", "dog/4.jxl", "dog/5.txt", "dog/.6.tga", "dog/7.mpo")
    root = folder(tmp_path / "root", *names)
    archive = tar(tmp_path / "a.tar", {name: png(0) for name in names})
    for kind, path in (("image_folder", root), ("image_tar", archive)):
        with open_source(card(kind, {"train": {}}, path=str(path)), scratch=tmp_path) as opened:
            assert opened.splits["train"].size == 1
            assert opened.splits["train"].unread == {".heic": 2, ".jxl": 1, ".mpo": 1}
    (root / "cat" / "1.png").unlink()
    assert error(card("image_folder", {"train": {}}, path=str(root)), tmp_path).endswith(
        "; convert its 2 .heic, 1 .jxl, 1 .mpo"
    )


def make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("a named pipe", os.mkfifo),
        ("a socket", make_socket),
        ("a device", lambda path: os.symlink("/dev/zero", path)),
        ("a named pipe", lambda path: (os.mkfifo(f"{path}.pipe"), os.symlink(f"{path}.pipe", path))),
    ],
)
def test_only_regular_files_are_read(
    tmp_path: Path, kind: str, make: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "root", "cat/1.png")
    monkeypatch.chdir(tmp_path / "root" / "cat")  # the path of a socket is limited to 108 bytes
    make("x.png")
    (tmp_path / "table.csv").write_text("path,label\ncat/x.png,cat\n")
    table = card("table", {"train": {"file": str(tmp_path / "table.csv")}}, folder=str(tmp_path / "root"))
    for source, index in ((card("image_folder", {"train": {}}, path=str(tmp_path / "root")), 1), (table, 0)):
        with (
            open_source(source, scratch=tmp_path) as opened,
            pytest.raises(OSError, match=f"it is {kind} instead of a regular file"),
        ):
            opened.splits["train"].read(index)


def test_linked_folders_count_and_loops_and_unreadable_folders_are_refused(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", "cat/1.png")
    folder(tmp_path / "elsewhere", "2.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    source = card("image_folder", {"train": {}}, path=str(root))
    assert labels(records(source, tmp_path)[1]["train"]) == [("cat/1.png", 0), ("dog/2.png", 1)]
    (root / "cat" / "back").symlink_to(root)
    assert "cat/back/ is a link back to a folder it lies in" in error(source, tmp_path)
    (root / "cat" / "back").unlink()
    (root / "cat" / "back").symlink_to(root / "cat" / "back")
    assert "cat/back is a link that leads back to itself: remove it" in error(source, tmp_path)


def test_annotations_label_the_images_of_a_folder(tmp_path: Path) -> None:
    folder(tmp_path, "train/n1/images/a.png", "train/n2/images/b.png", "val/images/v0.png", "val/images/v1.png")
    (tmp_path / "val" / "notes.txt").write_text("v1.png\tn1\t0\t0\nv0.png\tn2\t0\t0\n")
    splits = {"train": {"folder": "train"}, "val": {"folder": "val/images", "annotations": {"file": "val/notes.txt"}}}
    _, found = records(card("image_folder", splits, path=str(tmp_path)), tmp_path)
    assert labels(found["val"]) == [("v0.png", 1), ("v1.png", 0)]
    (tmp_path / "val" / "notes.txt").write_text("v1.png\tn1\n")
    assert "notes.txt has no line for" in error(card("image_folder", splits, path=str(tmp_path)), tmp_path)
    (tmp_path / "val" / "notes.txt").unlink()
    found = error(card("image_folder", splits, path=str(tmp_path)), tmp_path)
    assert found == "annotations.file val/notes.txt cannot be read: No such file or directory"


def test_a_table_of_kaggles_kind_labels_images_by_names_without_extension(tmp_path: Path) -> None:
    folder(tmp_path, "train/0a.png", "train/0b.png")
    (tmp_path / "train.csv").write_text('\ufeffid,note,label\n0b,"a, b",1\n0a,,0\n\n', encoding="utf-8")
    annotations: dict[str, Any] = {
        "file": "train.csv", "separator": ",", "image_column": "id", "class_column": "label"
    }  # fmt: skip
    splits = {"train": {"folder": "train", "annotations": annotations}}
    source = card("image_folder", splits, path=str(tmp_path))
    assert labels(records(source, tmp_path)[1]["train"]) == [("0a.png", 0), ("0b.png", 1)]
    (tmp_path / "train.csv").write_text("id,label\n0b,1\n0a,0\n0a,1\n")
    assert "train.csv line 4: the image 0a has the classes 0 and 1" in error(source, tmp_path)
    annotations["class_column"] = "lable"
    found = error(card("image_folder", splits, path=str(tmp_path)), tmp_path)
    assert found == "train.csv has no column 'lable' in its first line (id, label): correct the card"
    annotations["class_column"] = 1
    with pytest.raises(ValueError, match="write both as numbers, or both as names"):
        card("image_folder", splits, path=str(tmp_path))


def test_a_pattern_takes_the_class_from_the_path(tmp_path: Path) -> None:
    folder(tmp_path, "cat.0.png", "dog.0.png", "dog.1.png")
    splits = {"train": {"class_pattern": "^(.+?)[.]"}}
    classes, found = records(card("image_folder", splits, path=str(tmp_path)), tmp_path)
    assert (classes, labels(found["train"])) == (
        ("cat", "dog"), [("cat.0.png", 0), ("dog.0.png", 1), ("dog.1.png", 1)]
    )  # fmt: skip
    found = error(card("image_folder", {"train": {"class_pattern": "(cat)"}}, path=str(tmp_path)), tmp_path)
    assert "dog.0.png does not match class_pattern (cat): correct the pattern" in found
    for pattern, fault in (("cat", "has 0 groups, not one"), ("(cat", "is not a regular expression")):
        with pytest.raises(ValueError, match=fault):
            card("image_folder", {"train": {"class_pattern": pattern}}, path=str(tmp_path))
    with pytest.raises(ValueError, match="set one of labels: none, annotations and class_pattern"):
        card("image_folder", {"train": {"class_pattern": "(cat)", "labels": "none"}}, path=str(tmp_path))


def test_a_class_pattern_that_searches_without_end_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("ssl_core.data.sources.image_folder.SEARCH_SECONDS", 0.1)
    folder(tmp_path, f"{'a' * 40}.png")
    found = error(card("image_folder", {"train": {"class_pattern": "^((?:a+)+)$"}}, path=str(tmp_path)), tmp_path)
    assert "takes more than 0.1 seconds" in found
    assert "write it without a repetition inside a repetition" in found


def test_tiny_imagenet_in_its_original_layout(root: Path, shared_data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from ssl_core.data.card import load_card

    monkeypatch.setenv("TINY_IMAGENET_TAR", str(shared_data / "tiny-imagenet-200-subset.tar.gz"))
    with open_source(load_card(root / "datasets" / "tiny_imagenet_tar.yaml"), scratch=tmp_path) as opened:
        assert opened.classes is not None
        assert len(opened.classes) == 200
        assert [split.size for split in opened.splits.values()] == [20_000, 10_000]
        record = opened.splits["val"].read(0)
        assert (record.name, opened.classes[record.label]) == ("val_0.JPEG", "n03444034")


def test_links_devices_and_names_that_point_outside_are_left_out(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "evil.tar",
        {"cat/1.png": png(1), "../out/2.png": png(2), "/abs/3.png": png(3), "cat/../../4.png": png(4)},
    )
    with tarfile.open(archive, "a") as file:
        for name, kind in (
            ("cat/5.png", tarfile.SYMTYPE),
            ("cat/6.png", tarfile.LNKTYPE),
            ("cat/7.png", tarfile.CHRTYPE),
            ("cat/8.png", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    _, splits = records(card("image_tar", {"train": {}}, path=str(archive)), tmp_path)
    assert labels(splits["train"]) == [("cat/1.png", 0)]


def broken_archives(root: Path) -> dict[str, Path]:
    members = {f"train/cat/{number}.png": png(number) for number in range(40)}
    whole = tar(root / "whole.tar", members).read_bytes()
    contents = {
        "text": b"this is no archive" * 100,
        "empty": b"",
        "cut in a member": whole[: 20 * 1024 + 700],
        "cut between members": whole[: 20 * 1024],
        "header damaged": whole[: 20 * 1024] + b"\xff" * 512 + whole[20 * 1024 + 512 :],
        "gzip cut": gzip.compress(whole)[:-200],
        "gzip damaged": gzip.compress(whole, 0)[:5000] + b"\xff\xff\xff" + gzip.compress(whole, 0)[5003:],
        "gzip of text": gzip.compress(b"no tar" * 1000),
    }
    for name, content in contents.items():
        (root / name).write_bytes(content)
    return {name: root / name for name in contents}


def test_a_damaged_archive_is_named_in_one_line(tmp_path: Path) -> None:
    for path in broken_archives(tmp_path).values():
        found = error(card("image_tar", {"train": {}}, path=str(path)), tmp_path)
        assert found.startswith(f"{path} is damaged or not a tar"), path
        assert found.endswith("get the archive again")
    assert not list(tmp_path.glob(".spill*"))


def test_an_archive_with_another_sha256_is_refused(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar", {"cat/1.png": png(1)})
    source = card("image_tar", {"train": {}}, path=str(archive), sha256="0" * 64)
    assert "another sha256" in error(source, tmp_path)


def test_mistakes_in_a_folder_are_reported(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", "train/loose.png", "other/a/1.png")
    (root / "empty").mkdir()
    archive = tar(tmp_path / "a.tar", {"cat/1.png": png(1)})
    for kind, path, split, reason in (
        ("image_folder", tmp_path / "nowhere", "", "nowhere does not exist: put the data there"),
        ("image_tar", tmp_path / "nowhere.tar", "", "nowhere.tar does not exist: put the data there"),
        ("image_folder", archive, "", "set type: image_tar"),
        ("image_tar", root, "", "set type: image_folder"),
        ("image_folder", root, "tran", "has no folder 'tran'; it has: empty, other, train"),
        ("image_tar", archive, "train", "has no images below 'train'; folders in it: cat"),
        ("image_folder", root, "empty", "empty has no images"),
        ("image_folder", root, "train", "train/loose.png is in no class folder"),
    ):
        assert reason in error(card(kind, {"train": {"folder": split}}, path=str(path)), tmp_path)


# WebDataset, tables


def test_webdataset_tars_by_braces_and_by_glob(tmp_path: Path) -> None:
    tar(tmp_path / "t-0.tar", {"a.jpg": png(1), "a.cls": b"1", "a.json": b"{}"})
    tar(tmp_path / "t-1.tar", {"b.cls": b"0\n", "b.seg.png": png(2)})
    for pattern in ("t-{0..1}.tar", "t-*.tar"):
        source = card("webdataset", {"train": {"tars": str(tmp_path / pattern)}})
        classes, splits = records(source, tmp_path)
        assert classes is None
        assert labels(splits["train"]) == [("t-0.tar/a.jpg", 1), ("t-1.tar/b.seg.png", 0)]


def test_webdataset_keys_with_several_images_need_the_extension_of_one(tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", {"a.jpg": png(1), "a.seg.png": png(2), "a.cls": b"0"})
    splits = {"train": {"tars": str(tmp_path / "t.tar")}}
    assert "a has several images: set image to the extension of one" in error(card("webdataset", splits), tmp_path)
    for image, value in (("jpg", 1), ("seg.png", 2)):
        _, found = records(card("webdataset", splits, image=image), tmp_path)
        assert found["train"] == [Record(f"t.tar/a.{image}", png(value), 0)]


def test_too_many_tars_for_the_limit_of_open_files_are_reported_as_that(tmp_path: Path) -> None:
    for number in range(40):
        tar(tmp_path / f"t-{number}.tar", {"a.jpg": png(1), "a.cls": b"3"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            records(card("webdataset", {"train": {"tars": str(tmp_path / "t-*.tar")}}), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_webdataset_labels_may_be_missing_only_with_label_null(tmp_path: Path) -> None:
    tar(tmp_path / "t.tar", {"a.jpg": png(1)})
    splits = {"train": {"tars": str(tmp_path / "t.tar")}}
    assert "a has no .cls" in error(card("webdataset", splits), tmp_path)
    _, found = records(card("webdataset", splits, label=None), tmp_path)
    assert found["train"][0].label == -1


def test_tables_of_paths(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    folder(tmp_path, "i/1.png", "i/2.png", "i/3.png")
    rows = [("i/1.png", "b", "train"), ("i/2.png", "a", "train"), ("i/3.png", "b", "test")]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,part", *map(",".join, rows)]))
    columns = dict(zip(("path", "label", "part"), map(list, zip(*rows))))
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    for name in ("t.csv", "t.parquet"):
        file = str(tmp_path / name)
        splits = {part: {"file": file, "where": {"part": part}} for part in ("train", "test")}
        classes, found = records(card("table", splits), tmp_path)
        assert classes == ("a", "b")
        assert labels(found["train"]) == [("i/1.png", 1), ("i/2.png", 0)]
        assert found["test"] == [Record("i/3.png", png(2), 1)]


# Libraries


def torchvision_card(dataset: str, root: Path | None = None, **arguments: Any) -> Card:
    extra: dict[str, Any] = {} if root is None else {"root": str(root)}
    return card("torchvision", {"train": {}}, dataset=dataset, arguments=arguments, **extra)


def test_a_torchvision_data_set_by_name(tmp_path: Path) -> None:
    _, splits = records(torchvision_card("FakeData", size=5, image_size=[3, 8, 6], num_classes=3), tmp_path)
    assert [record.name for record in splits["train"]] == [f"FakeData.train[{index}]" for index in range(5)]
    assert all(isinstance(record.image, Image.Image) and record.image.size == (6, 8) for record in splits["train"])
    assert {record.label for record in splits["train"]} <= {0, 1, 2}


def test_torchvision_data_sets_of_files_keep_the_bytes(tmp_path: Path) -> None:
    classes, splits = records(torchvision_card("ImageFolder", folder(tmp_path, "cat/1.png", "dog/2.png")), tmp_path)
    assert classes == ("cat", "dog")
    assert splits["train"] == [Record("ImageFolder.train[0]", png(0), 0), Record("ImageFolder.train[1]", png(1), 1)]


def test_a_broken_image_of_a_library_does_not_stop_the_listing() -> None:
    def get(index: int) -> tuple[bytes, int]:
        if index == 1:
            raise OSError("image file is truncated")
        return png(index), index

    samples = library_split("pets", 3, get)
    assert samples.size == 3
    with pytest.raises(OSError, match="truncated"):
        samples.read(1)
    assert samples.identity == library_split("pets", 3, get).identity


def test_mistakes_in_a_torchvision_card_are_reported(tmp_path: Path) -> None:
    assert "no data set 'CIFAR11'; did you mean 'CIFAR10'?" in error(torchvision_card("CIFAR11", tmp_path), tmp_path)
    assert "unexpected keyword argument 'sise'" in error(torchvision_card("FakeData", sise=3), tmp_path)
    assert "You can use download=True" in error(torchvision_card("CIFAR10", tmp_path, download=False), tmp_path)
    found = error(card("torchvision", {"train": {}}, dataset="VOCSegmentation", root=str(tmp_path)), tmp_path)
    assert "torchvision.datasets.VOCSegmentation: " in found


DIGITS = {"train": {"images": 1437}, "test": {"images": 360}}


def test_the_coloured_digits_are_drawn_once_and_divided(tmp_path: Path) -> None:
    with open_source(card("sklearn_digits", DIGITS), scratch=tmp_path) as opened:
        assert [split.size for split in opened.splits.values()] == [1437, 360]
        digits = [split.read(index) for split in opened.splits.values() for index in range(split.size)]
    counts = np.bincount([record.label for record in digits])
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # each of scikit-learn's once
    assert len({record.image.tobytes() for record in digits if isinstance(record.image, Image.Image)}) == 1797
    first = digits[0].image
    assert isinstance(first, Image.Image)
    assert (first.mode, first.size) == ("RGB", (16, 16))


def test_the_coloured_digits_depend_on_the_seed_alone(tmp_path: Path) -> None:
    def some(seed: int) -> list[Record]:
        with open_source(card("sklearn_digits", DIGITS, seed=seed), scratch=tmp_path) as opened:
            return [opened.splits["test"].read(index) for index in range(20)]

    assert some(0) == some(0)
    assert some(0) != some(1)


def test_the_ground_of_a_coloured_digit_is_dark(tmp_path: Path) -> None:
    with open_source(card("sklearn_digits", DIGITS), scratch=tmp_path) as opened:
        images = [opened.splits["test"].read(index).image for index in range(100)]
    corners = [image.getpixel((0, 0)) for image in images if isinstance(image, Image.Image)]
    values = [colorsys.rgb_to_hsv(*(channel / 255 for channel in corner))[2] for corner in corners]  # type: ignore[union-attr]
    assert max(values) <= 0.46
    assert np.ptp(values) > 0.3


def test_too_many_digits_are_refused(tmp_path: Path) -> None:
    assert "1797" in error(card("sklearn_digits", {"train": {"images": 1798}}), tmp_path)


def test_tables_of_labels_inside_a_folder_are_checked(tmp_path: Path) -> None:
    root = folder(tmp_path / "root", "img/1.png", "img/2.png")
    columns = {"file": "t.csv", "separator": ",", "image_column": "id", "class_column": "label"}
    splits = {"train": {"folder": "img", "annotations": columns}}
    for text, reason in (
        ('id,label\n1.png,"a\n2.png,b\n', "t.csv is not a table; after line"),
        ('id,label\n1.png,"a\n' + "2.png,b\n" * 30_000, "field larger than field limit"),
        ("id,label\n1.png,\n2.png,b\n", "t.csv line 2: the image 1.png has no class"),
        ("id,label,label\n1.png,a,b\n", "t.csv has several columns 'label'"),
    ):
        (root / "t.csv").write_text(text)
        assert reason in error(card("image_folder", splits, path=str(root)), tmp_path)


def test_a_tar_that_cat_appended_is_read(tmp_path: Path) -> None:
    first = tar(tmp_path / "a.tar", {"cat/1.png": png(1)}).read_bytes()
    second = tar(tmp_path / "b.tar", {"dog/2.png": png(2)}).read_bytes()
    joined = tmp_path / "joined.tar"
    for content in (first + second, first + second + b"a signature" * 100):
        joined.write_bytes(content)
        _, splits = records(card("image_tar", {"train": {}}, path=str(joined)), tmp_path)
        assert [(record.name, record.image) for record in splits["train"]] == [
            ("cat/1.png", png(1)),
            ("dog/2.png", png(2)),
        ]
    joined.write_bytes(first + second[:700])
    assert "damaged or not a tar" in error(card("image_tar", {"train": {}}, path=str(joined)), tmp_path)


def test_a_sparse_image_in_a_tar_is_refused(tmp_path: Path) -> None:
    archive = tar(tmp_path / "a.tar", {"cat/1.png": png(1)})
    with tarfile.open(archive, "a") as file:
        member = tarfile.TarInfo("cat/2.png")
        member.type = tarfile.GNUTYPE_SPARSE
        file.addfile(member)
    assert "cat/2.png is a sparse member" in error(card("image_tar", {"train": {}}, path=str(archive)), tmp_path)
