"""WebDataset: labels in members of their own, and in fields of JSON."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_sources import card, error, png, records, tar

ANIMALS = ({"species": "wren", "meta": {"id": 7, "tags": ["bird", "small"]}}, {"species": "ant", "meta": {"id": 212}})


def animals(folder: Path, label: str, *contents: bytes) -> Any:
    """Return the card of a tar with one image for each JSON text."""
    members = {}
    for number, content in enumerate(contents or [json.dumps(animal).encode() for animal in ANIMALS]):
        members[f"{number}.png"] = png(number)
        members[f"{number}.json"] = content
    path = tar(folder / "t.tar", members)
    return card("webdataset", {"train": {"tars": str(path)}}, label=label)


@pytest.mark.parametrize(("label", "classes"), [("json.species", ("ant", "wren")), ("json.meta.id", ("7", "212"))])
def test_a_label_in_a_field_of_json(tmp_path: Path, label: str, classes: tuple[str, ...]) -> None:
    names, splits = records(animals(tmp_path, label), tmp_path)
    assert names == classes
    assert sorted(record.label for record in splits["train"]) == [0, 1]


def test_an_element_of_a_json_list(tmp_path: Path) -> None:
    names, _ = records(animals(tmp_path, "json.meta.tags.1", json.dumps(ANIMALS[0]).encode()), tmp_path)
    assert names == ("small",)


def test_json_that_is_one_value_is_a_label(tmp_path: Path) -> None:
    names, _ = records(animals(tmp_path, "json", b'"wren"', b'"ant"'), tmp_path)
    assert names == ("ant", "wren")


def test_an_extension_with_dots_is_no_field(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", {"a.png": png(0), "a.json.cls": b"ant"})
    names, _ = records(card("webdataset", {"train": {"tars": str(path)}}, label="json.cls"), tmp_path)
    assert names == ("ant",)


@pytest.mark.parametrize(
    ("label", "contents", "reason"),
    [
        ("json", [], "0.json holds several values: set label to one field, json.FIELD; fields: species, meta"),
        ("json.meta", [], "holds several values"),
        ("json.specie", [], "has no field 'specie' in json, which is an object; did you mean 'species'?"),
        ("json.species.x", [], "has no field 'x' in json.species, which is str"),
        ("json.species", [b'{"species": null}'], "has no label in the field 'species'"),
        ("json.species", [b"{"], "is not JSON"),
        ("json.species", [b"[" * 100_000], "is not JSON"),
        ("json.species", [b""], "is empty"),
        ("jsn", [], "0 has no .jsn"),
    ],
)
def test_mistakes_in_json_labels_are_one_line(tmp_path: Path, label: str, contents: list[bytes], reason: str) -> None:
    message = error(animals(tmp_path, label, *contents), tmp_path)
    assert reason in message
    assert len(message) < 600


def test_nearly_as_many_classes_as_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = [json.dumps({"caption": f"picture {number}"}).encode() for number in range(30)]
    records(animals(tmp_path, "json.caption", *contents), tmp_path)
    assert "30 classes for 30 images, such as 'picture 0': check the labels" in capsys.readouterr().err
