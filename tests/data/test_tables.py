"""Tables: Parquet as Hugging Face's `datasets` writes it, labels of every kind, and mistakes of spreadsheets."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from ssl_core.data.card import Card
from ssl_core.data.records import Record
from ssl_core.data.sharding import write_shards
from tests.data.test_sources import card, error, folder, labels, png, records

NAMES = ["wren", "ant", "cat"]  # not sorted: the order of the ids


def hugging_face_table(first: int, count: int, *, names: list[str] | None = NAMES) -> pyarrow.Table:
    """Return images and labels in the layout of `datasets`: a struct, and class names in the schema's metadata."""
    images = [{"bytes": png(first + number), "path": f"{first + number}.png"} for number in range(count)]
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = [pyarrow.array(images, struct), pyarrow.array([number % 3 for number in range(count)], pyarrow.int64())]
    table = pyarrow.table(columns, ["image", "label"])
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return table.replace_schema_metadata(metadata if names else {})


def table_card(file: Path, **more: Any) -> Any:
    return card("table", {"train": {"file": str(file)}}, **more)


def csv(folder: Path, text: str) -> Path:
    (folder / "t.csv").write_text(text, encoding="utf-8")
    return folder / "t.csv"


# Hugging Face


def test_parquet_of_hugging_face_by_glob(tmp_path: Path) -> None:
    for number in range(2):
        pyarrow.parquet.write_table(
            hugging_face_table(3 * number, 3), tmp_path / f"train-0000{number}.parquet", row_group_size=2
        )
    classes, splits = records(table_card(tmp_path / "train-*.parquet", image="image"), tmp_path)
    assert classes == tuple(NAMES)  # the ids keep their meaning
    assert [record.image for record in splits["train"]] == [png(value) for value in range(6)]
    assert [record.label for record in splits["train"]] == [0, 1, 2, 0, 1, 2]
    assert splits["train"][4].name == "train-00001.parquet[1]"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".parquet", ".parquet"]  # nothing was unpacked


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in range(2):
        table = hugging_face_table(3 * number, 3)
        with pyarrow.ipc.new_stream(tmp_path / "train" / f"data-{number}.arrow", table.schema) as writer:
            writer.write_table(table)
    state = {"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]}
    (tmp_path / "train" / "state.json").write_text(json.dumps(state))
    classes, splits = records(table_card(tmp_path / "train", image="image"), tmp_path)
    assert classes == tuple(NAMES)
    assert [record.image for record in splits["train"]] == [png(value) for value in (3, 4, 5, 0, 1, 2)]
    assert "without .parquet or .arrow files; folders in it: train" in error(table_card(tmp_path), tmp_path)


def test_the_card_orders_the_classes_of_hugging_face(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(hugging_face_table(0, 3), tmp_path / "t.parquet")
    _, splits = records(table_card(tmp_path / "t.parquet", image="image", classes=sorted(NAMES)), tmp_path)
    assert [record.label for record in splits["train"]] == [2, 0, 1]


def test_a_column_of_bytes_and_a_label_of_minus_one(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [png(0), png(1)], "label": [-1, -1]})
    table = table.replace_schema_metadata(hugging_face_table(0, 1).schema.metadata)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    _, splits = records(table_card(tmp_path / "t.parquet", image="image"), tmp_path)
    assert splits["train"] == [Record("t.parquet[0]", png(0), -1), Record("t.parquet[1]", png(1), -1)]


def test_shards_of_embedded_images(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(hugging_face_table(0, 6), tmp_path / "t.parquet")
    manifest = write_shards(table_card(tmp_path / "t.parquet", image="image"), tmp_path / "out", threads=2)
    assert manifest.split("train").class_counts == (2, 2, 2)


def test_no_message_prints_the_bytes_of_an_image(tmp_path: Path) -> None:
    content = os.urandom(3000)
    struct = [{"bytes": content, "path": None}]
    broken: list[tuple[dict[str, list[Any]], str, str]] = [
        ({"image": struct, "label": [None]}, "label", "a row has no 'label'"),
        ({"image": struct, "label": [content]}, "label", "the label is a bytes"),
        ({"image": struct, "label": [struct[0]]}, "label", "the label is a dict"),
        ({"image": [[1] * 3000], "label": [0]}, "label", "has a list: expected a path, bytes"),
        ({"image": ["x" * 3000 + "\0"], "label": [0]}, "label", "has a NUL byte"),
        ({"image": ["../" + "x" * 3000], "label": [0]}, "label", "lies outside"),
        ({"image": struct * 2, "label": ["x" * 3000, "y"], "n" * 3000: [0, 0]}, "missing", "has no column 'missing'"),
    ]
    for number, (columns, label, reason) in enumerate(broken):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
        message = error(table_card(path, image="image", label=label), tmp_path)
        assert reason in message
        assert len(message) < 700


# Labels


def labelled(folder_: Path, values: tuple[str, ...], **more: Any) -> Any:
    """Return the card of a table with a row per label."""
    rows = [f"{number}.png,{value}" for number, value in enumerate(values)]
    return table_card(csv(folder_, "\n".join(["path,label", *rows])), **more)


def labels_of(folder_: Path, *values: str, **more: Any) -> tuple[Any, list[int]]:
    classes, splits = records(labelled(folder_, values, **more), folder_)
    return classes, [record.label for record in splits["train"]]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with the images 0.png, 1.png and 2.png."""
    return folder(tmp_path, "0.png", "1.png", "2.png")


def test_codes_with_leading_zeros_are_names(images: Path) -> None:
    assert labels_of(images, "007", "07", "7") == (("007", "07", "7"), [0, 1, 2])
    assert labels_of(images, "01", "10", "02") == (("01", "02", "10"), [0, 2, 1])


def test_integers_without_a_gap_are_label_ids(images: Path) -> None:
    assert labels_of(images, "2", "0", "1") == (None, [2, 0, 1])


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (("70000", "3", "3"), ("3", "70000")),
        (("3017853", "212", "99999999999999999999"), ("212", "3017853", "99999999999999999999")),
        (("1", "2", "10"), ("1", "2", "10")),
        (("1.0", "0.0", "1.0"), ("0.0", "1.0")),
    ],
)
def test_other_numbers_are_names(images: Path, values: tuple[str, ...], classes: tuple[str, ...]) -> None:
    names, ids = labels_of(images, *values)
    assert sorted(names) == sorted(classes)
    assert [names[label] for label in ids] == list(values)


def test_numbers_that_become_names_are_reported(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels_of(images, "3", "70000", "3")
    assert "the labels are 2 numbers from 3 to 70000 without 0: they become class names" in capsys.readouterr().err


def test_listed_classes_decide_what_a_number_is(images: Path) -> None:
    assert labels_of(images, "0", "2", "2", classes=["a", "b", "c"]) == (("a", "b", "c"), [0, 2, 2])
    assert labels_of(images, "3", "5", "5", classes=["5", "3"]) == (("5", "3"), [1, 0, 0])
    assert "the label 5 is outside 0..1" in error(labelled(images, ("0", "5"), classes=["a", "b"]), images)


def test_labels_that_cannot_be_numbered_are_refused(images: Path) -> None:
    assert "the label -1 is below 0: number classes from 0" in error(labelled(images, ("-1", "0")), images)
    message = "some labels are class names ('cat') and others are numbers"
    assert message in error(labelled(images, ("3", "cat")), images)


def test_blanks_at_the_ends_are_removed_and_reported(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert labels_of(images, "a", "a ", "\u00a0b") == (("a", "b"), [0, 0, 1])
    assert "removed blanks at the ends of 2 labels or paths" in capsys.readouterr().err


def test_names_that_look_alike_are_reported(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels_of(images, "Cat", "cat", "e\u0301")
    assert "the classes 'Cat' and 'cat' look alike" in capsys.readouterr().err


def test_nearly_as_many_classes_as_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, *(f"{number}.png" for number in range(30)))
    labels_of(tmp_path, *(f"text {number}" for number in range(30)))
    assert "30 classes for 30 images, such as 'text 0': check the labels" in capsys.readouterr().err


# Rows


def test_a_path_with_two_labels_is_refused_with_its_rows(images: Path) -> None:
    path = csv(images, "path,label\n0.png,a\n1.png,b\n./0.png,b\n")
    assert error(table_card(path), images) == (
        f"{path} line 2 and {path} line 4: the image ./0.png has the labels 'a' and 'b': keep one row"
    )


def test_a_repeated_row_is_reported(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv(images, "path,label\n0.png,a\n1.png,b\n0.png,a \n0.png,a\n")
    _, splits = records(table_card(path), images)
    assert labels(splits["train"]) == [("0.png", 0), ("1.png", 1), ("0.png", 0), ("0.png", 0)]
    assert f"{path} line 2 and {path} line 4: the same image; 2 rows repeat an image" in capsys.readouterr().err


def test_paths_outside_of_the_folder_need_the_cards_permission(tmp_path: Path) -> None:
    inside, other = folder(tmp_path / "in", "0.png"), folder(tmp_path / "out", "1.png") / "1.png"
    (inside / "..odd.png").write_bytes(png(2))
    (tmp_path / "in2.png").write_bytes(png(3))
    for outside in ("../out/1.png", "a/../../out/1.png", str(other), "../in2.png"):
        path = csv(inside, f"path,label\n{outside},a\n")
        message = error(table_card(path), tmp_path)
        assert message.startswith(f"{path} line 2: {outside!r} lies outside of {inside}: ")
        assert message.endswith("set outside: true in the card's source")
        if outside != "a/../../out/1.png":  # there is no folder a
            assert len(records(table_card(path, outside=True), tmp_path)[1]["train"]) == 1
    path = csv(inside, f"path,label\n..odd.png,a\n{inside}/0.png,b\n")  # both lie inside
    assert [record.image for record in records(table_card(path), tmp_path)[1]["train"]] == [png(2), png(0)]


def test_a_pipe_in_place_of_the_table_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    assert "pipe.csv is not a regular file" in error(table_card(tmp_path / "pipe.csv"), tmp_path)


def test_mistakes_of_spreadsheets_name_file_and_line(images: Path) -> None:
    path = images / "t.csv"
    for text, reason in (
        (b"path,label\n0.png,a\n1\0.png,b\n", "line 3: the path '1\\x00.png' has a NUL byte"),
        (b"path,label\n0.png,a\n1.png,caf\xe9\n", "line 3 is not UTF-8: save the table as UTF-8"),
        (b"path,label\n0.png,a\n1,5.png,b\n", "line 3 has 3 cells, but the header has 2: quote values"),
        (b'path,label\n0.png,a\n"1.png,b\n', "is not a CSV file; after line 2: unexpected end of data"),
        (b"path,label\n0.png,a\n1.png\n", "line 3: a row has no 'label'"),
        (b"path,label,label\n0.png,a,b\n", "has several columns 'label'"),
        (b"", "has no column 'path'"),
        (b"file,label\n", "has no column 'path'; possible: file, label"),
        (b"path,lable\n1.png,\n", "has no column 'label'; did you mean 'lable'?"),
    ):
        path.write_bytes(text)
        message = error(table_card(path), images)
        assert message.startswith(str(path))
        assert reason in message


def test_tables_of_spreadsheets_in_other_forms_are_read(images: Path) -> None:
    expected = [("0.png", 1), ("1.png", 0)]
    for name, content in (
        ("semicolons.csv", b"path;label\r\n0.png;b\r\n1.png;a\r\n"),
        ("tabs.tsv", b"path\tlabel\n0.png\tb\n1.png\ta\n"),
        ("utf16.csv", "path,label\r\n0.png,b\r\n1.png,a\r\n".encode("utf-16")),
        ("marked.csv", b"\xef\xbb\xbfpath, label\n0.png,b\n\n1.png,a,\n"),
        ("packed.csv.gz", gzip.compress(b"path,label\n0.png,b\n1.png,a\n")),
    ):
        (images / name).write_bytes(content)
        assert labels(records(table_card(images / name), images)[1]["train"]) == expected, name


def test_where_without_a_row_shows_the_values_of_the_table(images: Path) -> None:
    path = images / "t.csv"
    path.write_text("path,label,part,valid\n0.png,a,train,false\n1.png,b,train,TRUE\n")
    source = {"type": "table", "label": "label"}
    for where, keep, reason in (
        ({"part": "tset"}, None, "t.csv has no row with part: tset; a row has part: train: correct `where`"),
        ({"part": "tset"}, ["a"], "t.csv has no row with part: tset"),
    ):
        splits = {"train": {"file": str(path)}, "test": {"file": str(path), "where": where}}
        content = {"name": "x", "image_size": 4, "source": {**source, "splits": splits}}
        made = Card.model_validate(content | ({"keep_classes": keep} if keep else {}))
        assert reason in error(made, images)
    for value, name in ((True, "1.png"), (False, "0.png")):
        splits = {"train": {"file": str(path), "where": {"valid": value}}}
        made = Card.model_validate({"name": "x", "image_size": 4, "source": {**source, "splits": splits}})
        assert [record.name for record in records(made, images)[1]["train"]] == [name]


def test_the_extension_of_parquet_in_capitals(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"image": [png(0), png(1)], "label": ["a", "b"]}), tmp_path / "T.PARQUET")
    splits = {"train": {"file": str(tmp_path / "T.PARQUET")}}
    _, read = records(card("table", splits, image="image"), tmp_path)
    assert [record.label for record in read["train"]] == [0, 1]
