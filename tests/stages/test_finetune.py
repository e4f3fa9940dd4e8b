"""The stage `finetune`: the files of the trained network, and a continued run that gives the same bytes."""

import csv
import io
import json
import shutil
from pathlib import Path

import onnxruntime
import pytest
import torch
from PIL import Image

import ssl_core
from ssl_core import cli
from ssl_core.data.shards import Manifest, read_index, read_member, sample_index
from ssl_core.evaluations.finetune import Model
from ssl_core.networks.classifiers import load_classifier
from ssl_core.stages import export_classifier, finetune
from ssl_core.training.checkpoint import previous_checkpoint
from tests.evaluations.conftest import backbone_path, manifest_path  # noqa: F401

SPEC = {"protocol": "finetune", "dataset": {"name": "squares"}, "epochs": 2, "batch_size": 12}
WRITTEN = ("few.json", "few/backbone.safetensors", "few/classifier.safetensors")


class Killed(Exception):
    """The process ends at once."""


@pytest.fixture
def run(backbone_path, manifest_path, tmp_path):  # noqa: F811
    """Return a function that runs the stage into a folder and returns the folder."""

    def stage(name, **changes):
        folder = tmp_path / name
        files = {"output": folder / "few.json", "checkpoint": folder / "few.pt"}
        files |= {"backbone": backbone_path, "manifest": manifest_path}
        finetune.run("mine", "few", spec=SPEC | changes, code="c0de", threads=1, **files)
        return folder

    return stage


@pytest.mark.parametrize("steps", [3, pytest.param(7, marks=pytest.mark.long)])
def test_a_continued_run_equals_an_undisturbed_one(run, steps, monkeypatch):
    whole = run("whole", checkpoint_minutes=1e-9)
    take_step, taken = Model.step, []

    def interrupted(*arguments):
        taken.append(arguments)
        if len(taken) > 3 * steps:  # three networks
            raise Killed
        return take_step(*arguments)

    monkeypatch.setattr(Model, "step", interrupted)
    with pytest.raises(Killed):
        run("parts", checkpoint_minutes=1e-9)
    assert not (whole.parent / "parts" / "few.json").exists()
    monkeypatch.setattr(Model, "step", take_step)
    parts = run("parts", checkpoint_minutes=1e-9)
    for name in WRITTEN:
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert not (parts / "few.pt").exists()
    assert not previous_checkpoint(parts / "few.pt").exists()


def test_the_kept_network_gives_the_accuracy_of_the_results(run, manifest_path):  # noqa: F811
    folder = run("kept", resize=1.25, epochs=6)
    network = ssl_core.load(folder / "few")
    assert network.view.resize == 20
    layer, classes, header = load_classifier(folder / "few" / "classifier.safetensors")
    assert classes == ("red", "green", "blue")
    assert header["backbone_sha256"] == network.digest
    pictures, labels = read_images(Manifest.load(manifest_path), "test")
    with torch.no_grad():
        predicted = layer(ssl_core.embed(network, pictures, threads=1).features).argmax(dim=1)
    accuracy = 100 * (predicted == torch.tensor(labels)).float().mean().item()
    metrics = json.loads((folder / "few.json").read_text())["metrics"]
    assert metrics["top1"] == pytest.approx(accuracy, abs=1e-3)


@pytest.mark.long
def test_the_exported_classifier_gives_the_same_classes(run):
    folder = run("exported", epochs=6) / "few"
    files = {name: folder / f"{name}.safetensors" for name in ("backbone", "classifier")}
    export_classifier.run("mine", "few", **files, output=folder / "classifier.onnx", threads=1)
    session = onnxruntime.InferenceSession(folder / "classifier.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    network = ssl_core.load(folder)
    images = torch.randn(4, 3, network.image_size, network.image_size)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    layer, classes, _ = load_classifier(files["classifier"])
    assert json.loads(facts["classes"]) == list(classes)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), layer(network(images)), atol=1e-4, rtol=1e-4)


def test_predict_writes_the_class_of_each_image(run, manifest_path, tmp_path, monkeypatch, capsys):  # noqa: F811
    run("predicted", epochs=6)
    monkeypatch.chdir(tmp_path)
    Path("squares").mkdir()
    pictures, labels = read_images(Manifest.load(manifest_path), "test")
    for number, picture in enumerate(pictures):
        picture.save(f"squares/{number:02d}.png")
    words = ["predict", "squares", "--network", "predicted/few", "--threads", "1"]
    assert cli.main([*words, "-o", "classes.csv"]) == 0
    rows = list(csv.DictReader(Path("classes.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == sorted(path.name for path in Path("squares").iterdir())
    metrics = json.loads(Path("predicted/few.json").read_text())["metrics"]
    hits = [("red", "green", "blue")[label] == row["class"] for label, row in zip(labels, rows)]
    assert 100 * sum(hits) / len(hits) == pytest.approx(metrics["top1"], abs=1e-3)
    assert all(1 / 3 <= float(row["probability"]) <= 1 for row in rows)
    assert cli.main([*words, "-o", "classes.csv"]) == 2
    capsys.readouterr()
    assert cli.main(words) == 0
    assert capsys.readouterr().out == Path("classes.csv").read_text()


def test_predict_refuses_a_network_without_a_classifier_of_its_own(
    run,
    backbone_path,  # noqa: F811
    tmp_path,
    capsys,
):
    Image.new("RGB", (20, 20)).save(tmp_path / "1.png")
    words = ["predict", str(tmp_path), "--network"]
    assert cli.main([*words, str(backbone_path)]) == 2
    assert "has no classifier.safetensors: give the folder of an evaluation" in capsys.readouterr().err
    folder = run("other") / "few"
    shutil.copy(backbone_path, folder / "backbone.safetensors")
    assert cli.main([*words, str(folder)]) == 2
    assert "the backbone beside it are of different runs: fine-tune again" in capsys.readouterr().err


def read_images(manifest, split):
    """Return the images and labels of a split of the squares, whose label is their index modulo 3."""
    pictures, labels = [], []
    (tar,) = manifest.tars(split)
    with open(tar, "rb") as file:
        for fields in read_index(tar):
            pictures.append(Image.open(io.BytesIO(read_member(file, fields, 0))))
            labels.append(sample_index(fields) % 3)
    return pictures, labels
