"""Chosen classes and splits that are drawn from another: one syntax for all kinds of sources."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssl_core.data.card import Card
from ssl_core.data.records import Record
from ssl_core.data.sharding import write_shards
from tests.data.test_sources import card, error, folder, records, tar
from tests.data.test_tables import csv

ALL = {"train": {}}


def pictures(folder_: Path) -> Path:
    """Write 20 images of each class ant, cat and dog."""
    root = folder_ / "pictures"
    if not root.exists():
        folder(root, *(f"{name}/{number:02d}.png" for name in ("ant", "cat", "dog") for number in range(20)))
    return root


def names(split: list[Record]) -> list[str]:
    return [record.name for record in split]


def selected(folder_: Path, splits: dict[str, Any], **more: Any) -> tuple[Any, dict[str, list[Record]]]:
    return records(animals(folder_, splits, **more), folder_)


def animals(folder_: Path, splits: dict[str, Any], keep: Any = None) -> Card:
    source = {"type": "image_folder", "path": str(pictures(folder_)), "splits": splits}
    return Card.model_validate({"name": "x", "image_size": 4, "source": source, "keep_classes": keep})


def test_a_fraction_of_a_split(tmp_path: Path) -> None:
    splits = {"test": {"from": "train", "fraction": 0.2}, "train": {}}
    classes, drawn = selected(tmp_path, splits)
    assert list(drawn) == ["test", "train"]  # in the card's order
    assert classes == ("ant", "cat", "dog")
    assert (len(drawn["test"]), len(drawn["train"])) == (12, 48)
    together = names(drawn["test"]) + names(drawn["train"])
    assert sorted(together) == names(selected(tmp_path, ALL)[1]["train"])
    assert names(drawn["test"]) == sorted(names(drawn["test"]))
    assert all(record.name.startswith(classes[record.label]) for record in drawn["test"])


def test_the_seed_decides_which_images_are_drawn(tmp_path: Path) -> None:
    def test(**options: Any) -> list[str]:
        return names(selected(tmp_path, {"train": {}, "test": {"from": "train", **options}})[1]["test"])

    assert test(fraction=0.2) == test(fraction=0.2, seed=0)
    assert test(fraction=0.2) != test(fraction=0.2, seed=1)


def test_images_per_class(tmp_path: Path) -> None:
    _, drawn = selected(tmp_path, {"train": {}, "test": {"from": "train", "images_per_class": 5}})
    assert np.bincount([record.label for record in drawn["test"]]).tolist() == [5, 5, 5]
    assert np.bincount([record.label for record in drawn["train"]]).tolist() == [15, 15, 15]


def test_several_splits_drawn_from_one_are_disjoint(tmp_path: Path) -> None:
    splits = {"train": {}, "val": {"from": "train", "fraction": 0.2}, "test": {"from": "train", "fraction": 0.2}}
    _, drawn = selected(tmp_path, splits)
    assert [len(split) for split in drawn.values()] == [36, 12, 12]
    assert len({name for split in drawn.values() for name in names(split)}) == 60


def test_a_published_list_selects_labelled_images_beside_the_whole_split(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("# three of sixty\ndog/03.png\nant/19.png\n\ncat/00.png\ncat/00.png\n")
    classes, drawn = selected(tmp_path, {"train": {}, "few": {"labelled": str(tmp_path / "few.txt")}})
    assert names(drawn["few"]) == ["ant/19.png", "cat/00.png", "dog/03.png"]
    assert [record.label for record in drawn["few"]] == [0, 1, 2]
    assert len(drawn["train"]) == 60
    assert classes == ("ant", "cat", "dog")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("cow/01.png", "no such image; its first is ant/00.png"), ("01.png", "3 images of the split are named so")],
)
def test_a_listed_image_that_is_missing_or_not_the_only_one_is_refused(
    tmp_path: Path, line: str, complaint: str
) -> None:
    (tmp_path / "few.txt").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=re.escape(f"few.txt names {line}, but ")) as caught:
        selected(tmp_path, {"few": {"labelled": str(tmp_path / "few.txt")}})
    assert complaint in str(caught.value)


@pytest.mark.parametrize("keep", [["dog", "ant"], "file"])
def test_chosen_classes(tmp_path: Path, keep: Any) -> None:
    if keep == "file":
        (tmp_path / "keep.txt").write_text("# two of three\ndog\n\nant\n")
        keep = str(tmp_path / "keep.txt")
    classes, drawn = selected(tmp_path, {"train": {}, "test": {"from": "train", "images_per_class": 1}}, keep=keep)
    assert classes == ("ant", "dog")  # in the order of the source
    assert np.bincount([record.label for record in drawn["train"]]).tolist() == [19, 19]
    assert all(record.name.startswith(classes[record.label]) for record in drawn["train"])
    assert len(drawn["test"]) == 2


def sources(root: Path) -> dict[str, Card]:
    """Return a card of each kind of source, with 12 or more images of labels 0, 1 and 2, and of digits."""
    folder(root, *(f"{number:02d}.png" for number in range(12)))
    paths = [root / f"{number:02d}.png" for number in range(12)]
    table = csv(root, "\n".join(["path,label", *(f"{path.name},{number % 3}" for number, path in enumerate(paths))]))
    members = {}
    for number, path in enumerate(paths):
        members |= {path.name: path.read_bytes(), f"{path.stem}.cls": str(number % 3).encode()}
    np.savez(root / "a.npz", train_images=np.zeros((12, 4, 4), np.uint8), train_labels=np.arange(12) % 3)
    derived = {"test": {"from": "train", "images_per_class": 1}}
    made = {
        "table": card("table", {"train": {"file": str(table)}, **derived}),
        "webdataset": card("webdataset", {"train": {"tars": str(tar(root / "t.tar", members))}, **derived}),
        "npz": card("npz", {"train": {}, **derived}, path=str(root / "a.npz")),
        "torchvision": card(
            "torchvision", {"train": {}, **derived}, dataset="FakeData", arguments={"size": 99, "num_classes": 3}
        ),
        "sklearn_digits": card("sklearn_digits", {"train": {"images": 300}, **derived}),
    }
    return {kind: each.model_copy(update={"keep_classes": ("2", "0")}) for kind, each in made.items()}


@pytest.mark.parametrize("kind", ["table", "webdataset", "npz", "torchvision", "sklearn_digits"])
def test_every_kind_of_source_is_selected_alike(tmp_path: Path, kind: str) -> None:
    classes, drawn = records(sources(tmp_path)[kind], tmp_path)
    assert classes == ("0", "2")
    assert sorted(record.label for record in drawn["test"]) == [0, 1]
    assert {record.label for record in drawn["train"]} == {0, 1}


def test_shards_of_a_selection(tmp_path: Path) -> None:
    source = animals(tmp_path, {"train": {}, "test": {"from": "train", "fraction": 0.25}}, keep=["cat", "dog"])
    manifest = write_shards(source, tmp_path / "out", threads=2)
    assert (manifest.classes, manifest.split("train").images, manifest.split("test").images) == (("cat", "dog"), 30, 10)


def test_the_card_tells_the_labels_of_drawn_splits(tmp_path: Path) -> None:
    drawn = {"test": {"from": "train", "fraction": 0.25}}
    assert animals(tmp_path, {**drawn, "train": {}}).labels == {"test": "one", "train": "one"}
    assert animals(tmp_path, {"train": {"labels": "none"}, **drawn}).labels == {"train": "none", "test": "none"}


@pytest.mark.parametrize(
    ("splits", "keep", "reason"),
    [
        ({"test": {"from": "trian", "fraction": 0.2}}, None, "the source has no split 'trian'; did you mean 'train'?"),
        ({"test": {"from": "train"}}, None, "set fraction (such as 0.2) or images_per_class"),
        ({"test": {"from": "train", "fraction": 0.2, "images_per_class": 1}}, None, "has one size"),
        ({"test": {"from": "train", "fraction": 1.5}}, None, "less than 1"),
        ({"test": {"from": "train", "fractoin": 0.5}}, None, "unknown key 'fractoin'; did you mean 'fraction'?"),
        (
            {"val": {"from": "test", "fraction": 0.5}, "test": {"from": "train", "fraction": 0.5}},
            None,
            "no split 'test'",
        ),
        ({"test": {"from": "train", "fraction": 0.001}}, None, "takes 0 of the 60 images of 'train'"),
        ({"test": {"from": "train", "images_per_class": 20}}, None, "the class ant has 20 images: take fewer"),
        ({}, ["cot"], "keep_classes: there is no class 'cot'; did you mean 'cat'?"),
        ({}, [], "keep_classes"),
        ({}, [True], "keep_classes"),
        ({}, "nowhere.txt", "nowhere.txt cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_in_selections_are_reported(tmp_path: Path, splits: dict[str, Any], keep: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        selected(tmp_path, {"train": {}, **splits}, keep=keep)


def test_only_drawn_splits_and_unlabelled_classes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="describe one of the source"):
        animals(tmp_path, {"test": {"from": "train", "fraction": 0.2}})
    splits = {"train": {"labels": "none"}, "test": {"from": "train", "images_per_class": 2}}
    assert "some images have no label: set `fraction`" in error(animals(tmp_path, splits), tmp_path)
