"""WebDataset: tars of other people, with the library's label formats, compression and addresses."""

import errno
import gzip
import io
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from ssl_core.data.sources import webdataset
from ssl_core.data.sources.dispatch import open_source
from tests.data.test_sources import card, error, labels, png, records, tar

ANIMALS = ({"species": "wren", "meta": {"id": 7, "tags": ["bird", "small"]}}, {"species": "ant", "meta": {"id": 212}})


def animals(folder: Path, label: str, *contents: bytes) -> Any:
    """Return the card of a tar with one image for each JSON text."""
    members = {}
    for number, content in enumerate(contents or [json.dumps(animal).encode() for animal in ANIMALS]):
        members[f"{number}.png"] = png(number)
        members[f"{number}.json"] = content
    path = tar(folder / "t.tar", members)
    return card("webdataset", {"train": {"tars": str(path)}}, label=label)


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)  # the same at each collection of the tests


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


# The library's formats


def one_label(folder: Path, extension: str, content: bytes, label: str) -> Any:
    path = tar(folder / "t.tar", {"a.png": png(0), f"a.{extension}": content})
    return card("webdataset", {"train": {"tars": str(path)}}, label=label)


def array(value: Any, save: Any = np.save) -> bytes:
    file = io.BytesIO()
    save(file, value) if save is np.save else save(file, **value)
    return file.getvalue()


@pytest.mark.parametrize(
    ("extension", "content", "label", "expected"),
    [
        ("txt", b"wren\n", "txt", "wren"),
        ("CLS", b"wren", "cls", "wren"),
        ("jsn", b'{"species": "wren"}', "jsn.species", "wren"),
        ("json.gz", packed(b'{"species": "wren"}'), "json.species", "wren"),
        ("top.cls.gz", packed(b"wren"), "top.cls", "wren"),
        ("npy", array(np.array("wren")), "npy", "wren"),
        ("npy", array(np.array([b"ant", b"wren"])), "npy.1", "wren"),
        ("npz", array({"species": np.array(["wren"])}, np.savez), "npz.species", "wren"),
    ],
)
def test_labels_in_the_formats_of_the_library(
    tmp_path: Path, extension: str, content: bytes, label: str, expected: str
) -> None:
    assert records(one_label(tmp_path, extension, content, label), tmp_path)[0] == (expected,)


class Trap:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("witness"),))


@pytest.mark.parametrize(
    ("extension", "content", "label", "reason"),
    [
        ("pyd", pickle.dumps(Trap()), "pyd", "source.label is 'pyd': a pickle can run any program when it is read"),
        ("pkl.gz", packed(pickle.dumps(Trap())), "pkl.gz", "a pickle can run any program"),
        ("npy", array(np.array([Trap()])), "npy", "is not NPY: Object arrays cannot be loaded when allow_pickle=False"),
        ("npz", array({"x": np.array([Trap()])}, np.savez), "npz.x", "is not NPZ: Object arrays cannot be loaded"),
        ("npy", b"\x93NUMPY", "npy", "is not NPY"),
        ("npy", array(np.arange(3)), "npy", "holds several values: set label to one field, npy.FIELD; fields: 0 to 2"),
        ("cls.gz", b"7", "cls", "a.cls: it cannot be decompressed (Not a gzipped file (b'7'))"),
        ("cls.gz", packed(b"7")[:-9], "cls", "it cannot be decompressed"),
        ("cls.gz", packed(bytes(30)), "cls", "it has more than 20 bytes when decompressed"),
        ("CLS", b"\xff", "cls", "is not text"),
    ],
)
def test_labels_that_cannot_be_read_are_one_line_and_no_pickle_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: str, content: bytes, label: str, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if "20 bytes" in reason:
        monkeypatch.setattr(webdataset, "MAX_SIZE", 20)
    assert reason in error(one_label(tmp_path, extension, content, label), tmp_path)
    assert not Path("witness").exists()


def test_a_decoder_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgpack", None)
    message = error(one_label(tmp_path, "msg", b"\x07", "msg"), tmp_path)
    assert "a.msg needs the package msgpack: pip install msgpack" in message


def test_compressed_images_are_decompressed(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", {"a.cls": b"0", "a.png.gz": packed(png(1)), "b.png.gz": b"x", "b.cls": b"0"})
    with open_source(card("webdataset", {"train": {"tars": str(path)}}), scratch=tmp_path) as opened:
        split = opened.splits["train"]
        assert split.read(0).image == png(1)
        with pytest.raises(ValueError, match="it cannot be decompressed"):
            split.read(1)


def test_members_in_any_order_and_case(tmp_path: Path) -> None:
    members = {"v1.0/b.Cls": b"2", "c.cls": b"1", "v1.0/b.JPG": png(2), "._c.jpg": b"", "README": b"", "c.jpg": png(1)}
    path = tar(tmp_path / "t.tar", {**members, "a.txt": b"no image", "v1.0/a.jpg": png(0), "v1.0/a.cls": b"0"})
    _, splits = records(card("webdataset", {"train": {"tars": str(path)}}), tmp_path)
    assert labels(splits["train"]) == [("t.tar/v1.0/b.JPG", 2), ("t.tar/c.jpg", 1), ("t.tar/v1.0/a.jpg", 0)]


def test_names_that_differ_in_case_only_are_refused(tmp_path: Path) -> None:
    path = tar(tmp_path / "t.tar", {"a.jpg": png(0), "a.JPG": png(1), "a.cls": b"0"})
    message = error(card("webdataset", {"train": {"tars": str(path)}}), tmp_path)
    assert "t.tar: a.JPG: duplicate file name in tar file jpg" in message
    assert message.endswith("rename one of these members")


def test_a_choice_of_image_extensions(tmp_path: Path) -> None:
    members = {"a.jpg": png(0), "a.seg.png": png(1), "a.cls": b"0", "b.png": png(2), "b.seg.png": png(3), "b.cls": b"0"}
    path = tar(tmp_path / "t.tar", members)
    _, splits = records(card("webdataset", {"train": {"tars": str(path)}}, image="jpg;png"), tmp_path)
    assert [record.name for record in splits["train"]] == ["t.tar/a.jpg", "t.tar/b.png"]


# Remote tars


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of the folder `web`."""
    (tmp_path / "web").mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(403) if "forbidden" in self.path else super().do_GET()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "web")) as http:
        thread = Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def web_tars(folder: Path) -> None:
    (folder / "web").mkdir(exist_ok=True)
    tar(folder / "web" / "t-09.tar", {"a.jpg": png(1), "a.cls": b"1"})
    tar(folder / "web" / "t-10.tar", {"b.jpg": png(2), "b.cls": b"0"}, "w:gz")


@pytest.mark.parametrize(
    "tars",
    [
        "{server}/t-{{09..10}}.tar",
        "{server}/t-09.tar?signature=secret::{server}/t-10.tar",
        "pipe:cat {folder}/web/t-{{09..10}}.tar",
        "file://{folder}/web/t-*.tar",
        "{folder}/web/t-09.tar::{folder}/web/t-1*.tar",
    ],
)
def test_tars_at_addresses_and_from_commands(tmp_path: Path, server: str, tars: str) -> None:
    web_tars(tmp_path)
    source = card("webdataset", {"train": {"tars": tars.format(server=server, folder=tmp_path)}})
    local = card("webdataset", {"train": {"tars": str(tmp_path / "web" / "t-*.tar")}})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert records(source, scratch) == records(local, scratch)
    assert list(scratch.iterdir()) == []


def test_the_identity_of_a_remote_tar_is_its_content(tmp_path: Path, server: str) -> None:
    web_tars(tmp_path)
    identities = []
    for address in (f"{server}/t-09.tar", f"pipe:cat {tmp_path}/web/t-09.tar", f"{server}/t-09.tar"):
        source = card("webdataset", {"train": {"tars": address}})
        with open_source(source, scratch=tmp_path) as opened:
            identities.append(opened.splits["train"].identity)
        if len(identities) == 2:
            tar(tmp_path / "web" / "t-09.tar", {"a.jpg": png(3), "a.cls": b"1"})
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.parametrize(
    ("tars", "reason"),
    [
        ("{server}/nowhere.tar?key=secret", "/nowhere.tar does not exist: correct the address"),
        ("{server}/forbidden.tar?key=secret", "/forbidden.tar cannot be read (ClientResponseError: 403, message="),
        ("http://me:secret@127.0.0.1:9/t.tar", "http://127.0.0.1:9/t.tar cannot be read (ClientConnectorError: "),
        ("s3://bucket/t.tar", "s3://bucket/t.tar needs another package: Install s3fs to access S3"),
        ("nowhere://t.tar", "nowhere://t.tar cannot be read (ValueError: Protocol not known: nowhere)"),
        ("pipe:exit 3", "pipe:exit 3 failed with exit status 3: run the command by hand"),
        ("pipe:head -c 700 {folder}/web/t-09.tar", "t-09.tar is damaged or not a tar"),
        ("pipe:true", "pipe:true is damaged or not a tar (empty file)"),
        ("{server}/t-{{09..10.tar", "its braces do not match"),
    ],
)
def test_mistakes_in_addresses_are_one_line_without_secrets(
    tmp_path: Path, server: str, tars: str, reason: str
) -> None:
    web_tars(tmp_path)
    message = error(card("webdataset", {"train": {"tars": tars.format(server=server, folder=tmp_path)}}), tmp_path)
    assert reason in message
    assert "secret" not in message
    assert not list(tmp_path.glob(".spill*"))


def test_a_command_ends_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    message = error(card("webdataset", {"train": {"tars": "pipe:sleep 60"}}), tmp_path)
    assert "No space left on device" in message
