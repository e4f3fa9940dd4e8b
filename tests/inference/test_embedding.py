import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ssl_core
from ssl_core.config import Dataset
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.parts.features import center_view, gather_subjects, read_split
from ssl_core.inference import embedding
from ssl_core.networks.backbones import load_backbone, read_tensors, write_tensors
from ssl_core.networks.classifiers import load_classifier

from .conftest import NAMES


@pytest.fixture
def loaded(network):
    return ssl_core.load(network)


def test_importing_the_package_imports_no_torch():
    program = "import sys, ssl_core; print({'torch', 'nvidia.dali', 'pyarrow'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"


def test_a_loaded_network_has_its_preprocessing(network, loaded):
    assert (loaded.image_size, loaded.mean, loaded.std) == (16, (0.5, 0.4, 0.3), (0.25, 0.2, 0.25))
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    assert loaded(torch.zeros(2, 3, 16, 16, device=loaded.device)).shape == (2, loaded.num_features)
    assert ssl_core.load(network / "backbone.safetensors").digest == loaded.digest


def test_embeddings_equal_the_features_of_the_evaluations(photos, network, loaded):
    backbone, header = load_backbone(network / "backbone.safetensors")
    subjects = gather_subjects(backbone, header, image_size=None, threads=1)
    expected = read_split(subjects, Manifest.load(photos.manifest), Dataset(name="photos"), center_view(16), "test")
    rows = expected.by_network["pretrained"][expected.indices.argsort()]
    names, features, skipped = ssl_core.embed(loaded, photos.folder, threads=2)
    assert (names, skipped) == (NAMES, {})
    torch.testing.assert_close(features, rows, atol=1e-6, rtol=0)


def test_a_list_keeps_its_order_and_takes_pictures_of_pil(photos, loaded):
    files = [photos.folder / name for name in reversed(NAMES)]
    pictures = []
    for file in files:
        if file.suffix != ".jpg":
            with Image.open(file) as picture:
                pictures.append(picture.convert("RGB"))
    names, features, _ = ssl_core.embed(loaded, [*files, *pictures], threads=1)
    assert names == [*map(str, files), "5", "6"]
    ordered = ssl_core.embed(loaded, photos.folder, threads=1).features
    torch.testing.assert_close(features[:5], ordered.flip(0), atol=1e-6, rtol=0)
    torch.testing.assert_close(features[5:], ordered[[3, 1]], atol=1e-6, rtol=0)


def test_one_file_is_a_list_of_one(photos, loaded):
    file = photos.folder / NAMES[0]
    for images in (file, str(file)):
        names, features, _ = ssl_core.embed(loaded, images, threads=1)
        assert names == [str(file)]
        torch.testing.assert_close(features, ssl_core.embed(loaded, [file], threads=1).features)


def test_batches_move_no_feature(photos, loaded, monkeypatch):
    whole = ssl_core.embed(loaded, photos.folder, threads=1)
    monkeypatch.setattr(embedding, "BATCH_SIZE", 2)
    parts = ssl_core.embed(loaded, photos.folder, threads=1)
    assert parts.names == whole.names
    torch.testing.assert_close(parts.features, whole.features, atol=1e-6, rtol=0)


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A folder with a readable image between two others."""
    (tmp_path / "1.jpg").write_bytes(b"no image")
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "2.png")
    (tmp_path / "3.png").touch()
    return tmp_path


def test_an_unreadable_image_is_named_and_refused(damaged, loaded):
    with pytest.raises(ValueError, match=r"^1\.jpg: it is no image of a format .*; repair or remove it, or skip"):
        ssl_core.embed(loaded, damaged, threads=1)


def test_unreadable_images_are_skipped_on_request(damaged, loaded, monkeypatch):
    monkeypatch.setattr(embedding, "BATCH_SIZE", 1)  # also a batch without a readable image
    names, features, skipped = ssl_core.embed(loaded, damaged, skip_unreadable=True, threads=1)
    assert (names, features.shape[0]) == (["2.png"], 1)
    assert list(skipped) == ["1.jpg", "3.png"]
    assert skipped["3.png"] == "it cannot be decoded: the file is empty"


def test_a_folder_without_a_readable_image_is_refused(damaged, loaded):
    (damaged / "2.png").unlink()
    with pytest.raises(ValueError, match=r"^none of 2 images can be read; first failure: 1\.jpg: it is no image"):
        ssl_core.embed(loaded, damaged, skip_unreadable=True, threads=1)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("absent", "absent is no image and no folder: correct the path"),
        ("empty", r"empty has no images, expected files such as 1\.jpg or 1\.png in it or in its folders$"),
        ("phone", "phone has no images.*; convert its 1 .heic"),
        ("file.jpg", "file.jpg: it cannot be decoded: the file is empty; give another image"),
        ([], "the list of images is empty"),
    ],
)
def test_nothing_to_embed_is_one_line(images, message, loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "phone"):
        Path(folder).mkdir()
    Path("phone", "1.heic").touch()
    Path("file.jpg").touch()
    with pytest.raises(ValueError, match=message):
        ssl_core.embed(loaded, images, threads=1)


def test_no_network_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"has no backbone\.safetensors: give a folder such as results/<experiment>"):
        ssl_core.load(tmp_path)
    with pytest.raises(ValueError, match="absent does not exist: give a folder"):
        ssl_core.load(tmp_path / "absent")


def test_an_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="module 'ssl_core' has no attribute 'lod'"):
        ssl_core.lod  # noqa: B018


@pytest.mark.parametrize(
    ("key", "text"), [("mean", "nope"), ("mean", "[0.5]"), ("std", "[0, 0, 0]"), ("view", "{}"), ("view", "red")]
)
def test_an_invalid_header_is_refused_with_the_file(key, text, network, tmp_path):
    weights, header = read_tensors(network / "backbone.safetensors")
    write_tensors(tmp_path / "backbone.safetensors", weights, header | {key: text})
    with pytest.raises(ValueError, match=r"backbone\.safetensors has an invalid header \(.+\): write it again$"):
        ssl_core.load(tmp_path)


@pytest.mark.parametrize("classes", ["nope", "3", "[]", "[1]", None])
def test_a_classifier_without_names_of_classes_is_refused(classes, tmp_path):
    header = {} if classes is None else {"classes": classes}
    write_tensors(tmp_path / "classifier.safetensors", {"weight": torch.ones(1, 2)}, header)
    with pytest.raises(ValueError, match="is no classifier of this project"):
        load_classifier(tmp_path / "classifier.safetensors")
