"""The commands `embed`, `neighbours` and `predict`, through the command line."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import ssl_core
from ssl_core import cli
from ssl_core.inference import commands, embedding, feature_files
from ssl_core.inference.embedding import Batch
from ssl_core.inference.neighbours import nearest

from .conftest import NAMES, write_backbone


@pytest.fixture
def run(network, photos, tmp_path, monkeypatch, capsys):
    """Return a function that calls a command in a folder with the photographs, and returns code, output and errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photos.folder)

    def command(*words: str) -> tuple[int, str, str]:
        code = cli.main([*words, "--network", str(network), "--threads", "1"])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return command


@pytest.mark.parametrize("name", ["features.parquet", "features.npz"])
def test_the_file_has_names_and_features_in_order(run, network, name, monkeypatch):
    monkeypatch.setattr(embedding, "BATCH_SIZE", 2)
    monkeypatch.setattr(feature_files, "ROWS", 3)
    code, shown, _ = run("embed", "photos", "-o", name)
    assert (code, shown) == (0, f"5 images x 576 features, sorted by name -> {name}\n")
    expected = ssl_core.embed(ssl_core.load(network), "photos", threads=1).features.numpy()
    if name.endswith("parquet"):
        table = pq.read_table(name)
        names, features = table["name"].to_pylist(), np.stack(table["features"].to_numpy())
        assert pq.ParquetFile(name).num_row_groups == 2
    else:
        arrays = np.load(name)
        names, features = arrays["name"].tolist(), arrays["features"]
    assert names == NAMES
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, expected)


@pytest.mark.parametrize("name", ["features.parquet", "features.npz"])
def test_equal_images_give_equal_files(run, name):
    contents = []
    for _ in range(2):
        assert run("embed", "photos", "-o", name, "--force")[0] == 0
        contents.append(Path(name).read_bytes())
    assert contents[0] == contents[1]


def test_nothing_is_overwritten_unless_forced(run):
    Path("features.npz").write_text("mine")
    code, _, errors = run("embed", "photos", "-o", "features.npz")
    message = "error: features.npz exists: give another name, or --force to replace it\n"
    assert (code, errors) == (2, message)
    assert Path("features.npz").read_text() == "mine"
    assert run("embed", "photos", "-o", "features.npz", "--force")[0] == 0


def test_a_device_is_never_replaced(run):
    os.mkfifo("pipe.npz")
    code, _, errors = run("embed", "photos", "-o", "pipe.npz", "--force")
    assert (code, errors) == (2, "error: pipe.npz is a device or a pipe, expected a file: give another name\n")


def test_a_folder_that_cannot_be_made_is_named(run):
    code, _, errors = run("embed", "photos", "-o", "/proc/mine/features.npz")
    assert (code, errors) == (2, "error: the folder /proc/mine cannot be made: choose another path\n")


def test_a_failure_leaves_no_file(run, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").touch()
    code, _, errors = run("embed", "bad", "-o", "new/features.npz")
    assert (code, errors.count("\n")) == (2, 1)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_folder_removed_meanwhile_is_one_line(run, monkeypatch):
    def remove(*arguments, **options):
        shutil.rmtree("new")
        yield from embedding.embed_batches(*arguments, **options)

    monkeypatch.setattr(commands, "embed_batches", remove)
    code, _, errors = run("embed", "photos", "-o", "new/features.npz")
    assert (code, errors) == (
        2,
        "error: new/features.npz cannot be written: its folder takes no files or was removed\n",
    )


def test_skipped_images_are_named_and_counted(run, tmp_path, photos):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "0.jpg").touch()
    (tmp_path / "mixed" / "2.heic").touch()
    (tmp_path / "mixed" / "1.jpg").symlink_to(photos.folder / "a" / "1.jpg")
    code, shown, errors = run("embed", "mixed", "-o", "mixed.npz", "--skip-unreadable")
    assert (code, shown) == (0, "1 images x 576 features, sorted by name -> mixed.npz\n")
    assert "skipped 0.jpg: it cannot be decoded: the file is empty\nunreadable images skipped: 1\n" in errors
    assert "not read: 1 .heic" in errors


@pytest.mark.parametrize("among", ["photos", "features.parquet", "features.npz"])
def test_an_image_is_its_own_nearest_neighbour(run, among):
    if among != "photos":
        run("embed", "photos", "-o", among)
    code, shown, _ = run("neighbours", "photos/b/turned.jpg", "--in", among, "-k", "2")
    title, first, second = shown.splitlines()
    assert code == 0
    assert (title, first) == ("cosine  image", "1.0000  b/turned.jpg")
    assert second.split()[1] in NAMES


def test_neighbours_are_those_of_the_whole_set():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    names = [str(number) for number in range(50)]
    query = features[7] + 0.1
    cosines = torch.cosine_similarity(features, query[None])
    parts = [Batch(names[start : start + 9], features[start : start + 9]) for start in range(0, 50, 9)]
    neighbours = nearest(query, parts, 6)
    assert [neighbour.name for neighbour in neighbours] == [str(n) for n in cosines.topk(6).indices.tolist()]
    assert [neighbour.similarity for neighbour in neighbours] == pytest.approx(cosines.topk(6).values.tolist())


def test_features_of_another_network_are_refused(run, tmp_path, capsys):
    assert run("embed", "photos", "-o", "features.parquet")[0] == 0
    write_backbone(tmp_path / "other.safetensors", seed=1)
    words = ["neighbours", "photos/a/1.jpg", "--in", "features.parquet", "--network", "other.safetensors"]
    assert cli.main([*words, "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: features.parquet has the features of another network (sha256 ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embed", "photos", "-o", "features.csv"], "features.csv: expected a name that ends in .parquet or .npz"),
        (["embed", "photos", "-o", "photos"], "photos: expected a name that ends"),
        (["embed", "absent", "-o", "x.npz"], "absent is no image and no folder: correct the path"),
        (["neighbours", "absent.jpg", "--in", "photos"], "absent.jpg is no file: give the path of one image"),
        (["neighbours", "photos/a/1.jpg", "--in", "x.npz"], "x.npz does not exist: write it with `ssl-core embed`"),
        (["neighbours", "photos/a/1.jpg", "--in", "bad.npz"], "bad.npz is no file of features"),
        (["neighbours", "photos/a/1.jpg", "--in", "bad.parquet"], "bad.parquet is no file of features"),
    ],
)
def test_a_mistake_is_one_line(run, words, message):
    for name in ("bad.npz", "bad.parquet"):
        Path(name).write_bytes(b"PK\3\4 no archive")
    code, _, errors = run(*words)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"error: {message}")


@pytest.fixture
def features(run) -> dict[str, np.ndarray]:
    """The arrays of features.npz, which is also written as features.parquet."""
    for name in ("features.npz", "features.parquet"):
        run("embed", "photos", "-o", name)
    return dict(np.load("features.npz"))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", pickle.dumps({}), None], ids=["empty", "npy", "pickle", "cut"])
@pytest.mark.parametrize("name", ["features.npz", "features.parquet"])
def test_a_damaged_file_of_features_is_one_line(run, features, name, content):
    whole = Path(name).read_bytes()
    Path(name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    code, _, errors = run("neighbours", "photos/a/1.jpg", "--in", name)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"error: {name} is no file of features (")


@pytest.mark.parametrize("name", ["features.npz", "features.parquet"])
def test_a_changed_byte_of_the_features_is_found(run, features, name):
    content = bytearray(Path(name).read_bytes())
    content[len(content) // 2] ^= 1
    Path(name).write_bytes(content)
    code, _, errors = run("neighbours", "photos/a/1.jpg", "--in", name)
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith(f"error: {name} is no file of features (")


@pytest.mark.parametrize(
    "change",
    [
        lambda names, rows: (names, rows[:, :7]),
        lambda names, rows: (names, rows[:2]),
        lambda names, rows: (names, rows.astype(np.float64)),
        lambda names, rows: (names.astype(object), rows),
    ],
    ids=["narrow", "short", "float64", "objects"],
)
def test_other_arrays_are_refused(run, features, change):
    names, rows = change(features["name"], features["features"])
    np.savez("features.npz", name=names, features=rows, network=features["network"])
    code, _, errors = run("neighbours", "photos/a/1.jpg", "--in", "features.npz")
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.startswith("error: features.npz is no file of features (")


def test_a_single_unreadable_image_is_not_skipped(run):
    Path("bad.png").write_text("<svg/>")
    code, _, errors = run("neighbours", "bad.png", "--in", "photos", "--skip-unreadable")
    assert (code, errors.count("\n")) == (2, 1)
    assert errors.endswith("; give another image\n")


@pytest.mark.parametrize("command", ["embed", "neighbours", "predict"])
def test_the_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"example: ssl-core {command} photos" in capsys.readouterr().out
