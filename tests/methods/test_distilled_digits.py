"""A timm file and a converted MoCo checkpoint teach a network: kNN rises above the same network untrained."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from ssl_core import cli
from ssl_core.files import read_json
from ssl_core.networks.backbones import load_backbone, read_tensors
from ssl_core.stages import evaluate, pretrain

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
GAIN = 5.0  # percentage points, mean over seeds
SEEDS = (0, 1, 2)
NETWORK = {"name": "resnet18", "stem": "tiny"}
COLOURS = {
    "flip": 0.0,
    "jitter": 1.0,
    "brightness": 0.6,
    "contrast": 0.6,
    "saturation": 0.6,
    "hue": 0.5,
    "grayscale": 0.5,
}
VIEW = {"area": (0.7, 1.0), "augmentation": COLOURS}
TRAINING = {
    "batch_size": 64, "optimizer": "adamw", "learning_rate": 1e-3, "learning_rate_scaling": "none",
    "weight_decay": 0.01, "warmup_epochs": 1, "decay_exclusion": "none", "schedule": "cosine", "schedule_unit": "step",
}  # fmt: skip


def train(folder: Path, manifest: Path, backbone: Any, method: Any, *, epochs: int, seed: int = 0) -> Path:
    training = {**TRAINING, "epochs": epochs, "seed": seed}
    spec = {"dataset": {"name": "demo"}, "backbone": backbone, "method": method, "training": training}
    pretrain.run(
        folder.name, spec=spec, code="test", manifest=manifest, output=folder, checkpoint=folder / "last.pt", threads=1
    )
    return folder


@pytest.fixture(scope="module")
def teachers(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """NPID on the demonstration, its ResNet-18 as a file with timm's names, and as a checkpoint of MoCo's code."""
    folder = train(tmp_path_factory.mktemp("work") / "teacher", demo, NETWORK, {"name": "npid", **VIEW}, epochs=12)
    network, header = load_backbone(folder / "backbone.safetensors")
    state = network.state_dict()
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save({**state, **classifier}, folder / "pytorch_model.bin")
    tensors, _ = read_tensors(folder / "model.safetensors")
    head = {name: rows for name, rows in tensors.items() if name.startswith("projector.")}
    query = {**state, **{name.replace("projector", "fc"): rows for name, rows in head.items()}}
    checkpoint = {"state_dict": {f"module.encoder_q.{name}": rows for name, rows in query.items()}, "epoch": 12}
    torch.save(checkpoint, folder / "moco.pth.tar")
    out = folder / "moco.safetensors"
    options = ["--layout", "moco", "--backbone", "resnet18", "--stem", "tiny", "--image-size", "16", "-o", str(out)]
    assert cli.main(["convert", str(folder / "moco.pth.tar"), *options]) == 0
    normalisation = {name: json.loads(header[name]) for name in ("mean", "std")}
    return {
        "timm": {"weights": str(folder / "pytorch_model.bin"), "backbone": NETWORK, "size": 16, **normalisation},
        "moco": {"weights": str(out), "projector": str(out), **normalisation},
    }


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("timm", {"name": "feature_distillation", "head_hidden": 512}),
        ("moco", {"name": "seed", "queue_size": 256}),
    ],
    ids=["timm file", "converted MoCo checkpoint"],
)
def test_distillation_improves_knn(
    file: str, method: Any, teachers: dict[str, Any], demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gains = []
    for seed in SEEDS:
        section = {**method, "teacher": teachers[file], **VIEW}
        folder = train(tmp_path / f"student{seed}", demo, NETWORK, section, epochs=15, seed=seed)
        evaluate.run(
            "student", "knn", spec={"protocol": "knn", "k": 5, "dataset": {"name": "demo"}}, code="test", threads=1,
            backbone=folder / "backbone.safetensors", manifest=demo, output=folder / "knn.json",
        )  # fmt: skip
        results = read_json(folder / "knn.json")
        trained, untrained = results["metrics"]["top1"], results["baselines"]["untrained"]["top1"]
        gains.append(trained - untrained)
        with capsys.disabled():
            print(f"\n{file}, seed {seed}: kNN {trained:.1f}, untrained {untrained:.1f}")
    assert mean(gains) >= GAIN
