"""The stage `bags`: true neighbours by the teacher; and a pre-training that reads them resumes exactly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssl_core.config import Backbone, Dataset, Subset
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import View
from ssl_core.networks.backbones import build_backbone, load_backbone, save_backbone
from ssl_core.stages import bags, pretrain
from tests.methods.harness import failing_at

NETWORK = Backbone(name="mobilenet_v3_small", stem="small")
IMAGES = 96


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with other statistics of pixels than the data's."""
    path = tmp_path_factory.mktemp("teacher") / "backbone.safetensors"
    torch.manual_seed(1)
    header = {"mean": "[0.5, 0.4, 0.3]", "std": "[0.2, 0.3, 0.25]"}
    save_backbone(path, build_backbone(NETWORK, 16), NETWORK, 16, header)
    return path


def spec(weights: Path, **method: Any) -> dict[str, Any]:
    teacher = {"weights": str(weights)}
    return {
        "dataset": {"name": "demo", "subset": {"images": IMAGES}},
        "backbone": NETWORK.model_dump(),
        "method": {"name": "bingo", "teacher": teacher, "queue_size": 40, "projector_hidden": 32, **method},
        "training": {"epochs": 2, "batch_size": 32, "precision": "fp32"},
    }


def make(weights: Path, manifest: Path, output: Path, **method: Any) -> np.ndarray:
    section = spec(weights, **method)
    bags.run("tiny", spec=section, manifest=manifest, output=output, threads=1)
    return np.load(output)


def teachers_features(weights: Path, demo: Path) -> np.ndarray:
    """Return the features of the center crops in the order of their indices, normalised as the teacher's images."""
    view = View(size=16, crop="center", resize=18)
    dataset = Dataset(name="demo", subset=Subset(images=IMAGES))
    options: dict[str, Any] = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25), "shuffle": False}
    with Loader(Manifest.load(demo), dataset, {"view": view}, batch_size=IMAGES, seed=3, **options) as loader:
        batch = loader.next()
    with torch.no_grad():
        features = load_backbone(weights)[0].eval()(batch.views["view"][0])
    return features[batch.indices.argsort()].double().numpy()


def test_a_bag_has_the_nearest_images_by_the_teachers_features(weights: Path, demo: Path, tmp_path: Path) -> None:
    table = make(weights, demo, tmp_path / "bags.npy")
    assert (table.shape, table.dtype) == ((IMAGES, 5), np.dtype(np.int32))
    features = teachers_features(weights, demo)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosines = units @ units.T
    np.fill_diagonal(cosines, -np.inf)
    expected = -np.sort(-cosines, axis=1)[:, :5]
    found = np.take_along_axis(cosines, table, axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # rows, unless two cosines are equal in float32
    assert all(len(set(row)) == 5 for row in table)


def test_the_same_settings_give_the_same_bytes(weights: Path, demo: Path, tmp_path: Path) -> None:
    for name in ("first.npy", "second.npy"):
        make(weights, demo, tmp_path / name, bag_size=2)
    assert (tmp_path / "first.npy").read_bytes() == (tmp_path / "second.npy").read_bytes()


def test_an_image_is_not_in_its_own_bag_even_if_others_are_equal() -> None:
    features = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0], [0.1, 1.0]])
    found = bags.nearest(features, 3)
    for row in range(4):
        assert set(found[row].tolist()) == {0, 1, 2, 3} - {row}
    assert found[4, 0] == 5
    assert found[5, 0] == 4


def test_a_bag_larger_than_the_data_is_refused(weights: Path, demo: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method\.bag_size 96 needs more than 96 images, demo has 96"):
        make(weights, demo, tmp_path / "bags.npy", bag_size=IMAGES)


def train(weights: Path, demo: Path, folder: Path) -> Path:
    output, checkpoint = folder / "results", folder / "checkpoints" / "tiny.pt"
    if not output.exists():
        make(weights, demo, output / "bags.npy")
    section = spec(weights)
    section["training"]["checkpoint_minutes"] = 1e-9
    options: dict[str, Any] = {"code": "code", "manifest": demo, "output": output, "checkpoint": checkpoint}
    pretrain.run("tiny", spec=section, threads=1, **options)
    return output


@pytest.mark.long
def test_an_interrupted_training_continues_to_the_same_bytes(weights: Path, demo: Path, tmp_path: Path) -> None:
    whole = train(weights, demo, tmp_path / "whole")
    with failing_at(4):  # in the second epoch
        train(weights, demo, tmp_path / "interrupted")
    continued = train(weights, demo, tmp_path / "interrupted")
    for name in ("backbone.safetensors", "model.safetensors", "history.csv"):
        assert (continued / name).read_bytes() == (whole / name).read_bytes(), name
