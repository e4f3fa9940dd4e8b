"""The protocol `detection`: precision as COCO computes it, exact resume, strict weights, results."""

import io
import json
import pickle
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from pycocotools import mask as codec
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssl_core.config import Backbone, parse
from ssl_core.data.detection_loader import DetectionLoader, Transform
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.detection import VARIANTS, Config
from ssl_core.evaluations.parts.average_precision import average_precision
from ssl_core.networks.backbones import build_backbone, read_tensors, save_backbone, write_tensors
from ssl_core.stages import detect, shard
from tests.rectangles import coco_source, write_card, write_coco

Kind = Literal["bbox", "segm"]
RECTANGLES = {"name": "rectangles"}
KEYS: dict[Kind, tuple[str, str, str]] = {
    "bbox": ("ap", "ap50", "ap75"),
    "segm": ("mask_ap", "mask_ap50", "mask_ap75"),
}
KILLED = """
import pickle, sys
from ssl_core.stages import detect
detect.run("mine", "detection", **pickle.load(sys.stdin.buffer))
"""
SHORT = {
    "dataset": RECTANGLES,
    "iterations": 6,
    "batch_size": 2,
    "warmup_iterations": 2,
    "short_sides": [48, 64],
    "test_side": 48,
    "regions": 8,
    "train_proposals": 30,
    "test_proposals": 20,
    "precise_batches": 2,
    "precision": "fp32",
    "pictures": 2,
}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder = tmp_path_factory.mktemp("rectangles")
    write_coco(folder / "coco", {"train": range(1, 13), "val": range(13, 17)})
    shard.run(
        write_card(folder / "rectangles.yaml", coco_source(folder / "coco", "train", "val")),
        folder / "shards",
        threads=1,
    )
    return Manifest.load(folder / "shards/manifest.json")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone") / "backbone.safetensors", "mobilenet_v3_small")


def write_backbone(path: Path, name: str) -> Path:
    config = Backbone(name=name)
    torch.manual_seed(4)
    metadata = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.25, 0.25, 0.25]", "seed": "3"}
    save_backbone(path, build_backbone(config, 64), config, 64, metadata)
    return path


def arguments(folder: Path, manifest: Manifest, backbone: Path, **changes: Any) -> dict[str, Any]:
    return {
        "spec": {"protocol": "detection", **SHORT, **changes},
        "code": "c0de",
        "backbone": backbone,
        "manifest": manifest.folder / "manifest.json",
        "output": folder / "detection.json",
        "picture": folder / "detection/detections.png",
        "checkpoint": folder / "checkpoints/detection.pt",
        "threads": 1,
    }


def run(folder: Path, manifest: Manifest, backbone: Path, **changes: Any) -> dict[str, Any]:
    detect.run("mine", "detection", **arguments(folder, manifest, backbone, **changes))
    return json.loads((folder / "detection.json").read_text())


def test_results_state_both_networks(manifest, backbone, tmp_path):
    result = run(tmp_path, manifest, backbone)
    assert result["protocol"] == "detection-short/v1"
    assert result["split"] == "val"
    assert (result["num_train"], result["num_test"]) == (12, 4)
    for metrics in (result["metrics"], result["baselines"]["untrained"]):
        assert set(metrics) == {"ap", "ap50", "ap75"}
        assert all(0 <= value <= 100 for value in metrics.values())
    hashes = result["details"]["weights_sha256"]
    assert hashes["pretrained"] != hashes["untrained"]
    assert (tmp_path / "detection/detections.png").stat().st_size > 1000
    assert not list((tmp_path / "checkpoints").iterdir())


def test_masks_have_a_precision_of_their_own(manifest, backbone, tmp_path):
    result = run(tmp_path, manifest, backbone, masks=True, iterations=2, untrained=False)
    assert set(result["metrics"]) == {"ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75"}
    assert result["baselines"] == {}


def test_images_that_train_are_tested_without_the_others_of_their_split(manifest, backbone, tmp_path):
    dataset = {**RECTANGLES, "subset": {"images": 5}}
    result = run(tmp_path, manifest, backbone, dataset=dataset, test_split="train", iterations=1, untrained=False)
    assert (result["num_train"], result["num_test"]) == (5, 5)


@pytest.mark.long
def test_two_processes_give_the_same_weights_again(manifest, backbone, tmp_path):
    first, second = (run(tmp_path / name, manifest, backbone, gpus=2, masks=True) for name in ("first", "second"))
    assert first["hyperparameters"]["gpus"] == 2
    assert first["details"] == second["details"]
    assert first["metrics"] == second["metrics"]
    assert not list((tmp_path / "first/checkpoints").iterdir())


@pytest.mark.long
def test_a_killed_run_continues_to_the_same_weights(manifest, backbone, tmp_path):
    expected = run(tmp_path / "whole", manifest, backbone, iterations=4)
    options = arguments(tmp_path / "killed", manifest, backbone, iterations=4, checkpoint_minutes=1e-6)
    checkpoint = options["checkpoint"]
    command = [sys.executable, "-c", KILLED]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(options))
    process.stdin.close()
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    detect.run("mine", "detection", **options)
    result = json.loads(options["output"].read_text())
    assert result["details"] == expected["details"]
    assert result["metrics"] == expected["metrics"]


def test_a_diverged_training_stops(manifest, backbone, tmp_path):
    with pytest.raises(ValueError, match=r"^training diverged: .*: lower learning_rate, or increase warmup_iterations"):
        run(tmp_path, manifest, backbone, learning_rate=1e9, warmup_iterations=0)


def test_a_renamed_weight_is_refused(manifest, tmp_path):
    path = write_backbone(tmp_path / "backbone.safetensors", "resnet18")
    weights, header = read_tensors(path)
    weights["layer4.0.conv9.weight"] = weights.pop("layer4.0.conv1.weight")
    write_tensors(path, weights, header)
    with pytest.raises(ValueError, match=r"layer4.0.conv1.weight is missing; layer4.0.conv9.weight is unknown"):
        run(tmp_path, manifest, path, head="c4")


def test_shards_from_before_boxes_are_to_be_made_again(manifest, backbone, tmp_path):
    content = json.loads((manifest.folder / "manifest.json").read_text())
    for split in content["splits"].values():
        del split["objects"]
    del content["sha256"]
    old = manifest.folder / "old.json"
    old.write_text(json.dumps(content))
    options = arguments(tmp_path, manifest, backbone) | {"manifest": old}
    with pytest.raises(ValueError, match=r"the shards of 'rectangles' have no boxes: .* shard rectangles again"):
        detect.run("mine", "detection", **options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_complete(variant):
    config = parse(Config, {"dataset": RECTANGLES, "variant": variant}, "evaluations.mine")
    assert config.overridden() == []
    rates = config.schedule()
    assert rates.rate(config.warmup_iterations) == config.learning_rate
    assert rates.rate(config.iterations - 1) == pytest.approx(config.learning_rate / 100)


def test_published_milestones():
    schedule = Config.model_validate({"dataset": RECTANGLES, "variant": "voc0712_c4"}).schedule()
    steps = [step for step in range(101, 24_000) if schedule.rate(step) != schedule.rate(step - 1)]
    assert steps == [18_000, 22_000]


def test_batches_depend_on_the_position_alone(manifest):
    dataset = Config.model_validate({"dataset": RECTANGLES}).dataset
    transform = Transform(short_sides=(48, 64), longest=90, flip=0.5)

    def batches(start: int, threads: int, rank: int = 0, ranks: int = 1) -> list[Any]:
        options: dict[str, Any] = {"batch_size": 4, "training": True, "masks": True, "threads": threads}
        with DetectionLoader(manifest, dataset, transform, **options, rank=rank, world_size=ranks) as loader:
            loader.restore({"step": start})
            return [loader.next() for _ in range(4)]

    one, other = batches(0, 1), batches(2, 3)
    for first, second in zip(one[2:], other[:2], strict=True):
        assert first.indices == second.indices
        assert all(torch.equal(*pair) for pair in zip(first.images, second.images, strict=True))
        assert first.seeds == second.seeds
    for whole, *parts in zip(one, batches(0, 1, 0, 2), batches(0, 1, 1, 2), strict=True):
        assert whole.indices == [index for part in parts for index in part.indices]
    assert sorted(index for batch in one[:3] for index in batch.indices) == list(range(12))


# The precision against COCO's evaluation, called without torchmetrics


def adversarial(seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return detections and targets with ties, crowds, empty images and more than 100 detections."""
    generator = np.random.default_rng(seed)
    detections, targets = [], []
    for image in range(12):
        objects = int(generator.integers(0, 6)) if image % 4 else 0
        corners = generator.integers(0, 60, (objects, 2))
        truth = np.concatenate([corners, corners + generator.integers(4, 40, (objects, 2))], axis=1)
        number = {3: 101 + image, 4: 0}.get(image % 5, objects + 3)
        near = generator.integers(0, 50, (number, 4))
        if objects:
            near = truth[generator.integers(0, objects, number)]
        boxes = near + generator.integers(-3, 4, (number, 4))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = generator.integers(0, 5, number) / 8  # many ties
        targets.append(
            {
                "boxes": torch.tensor(truth, dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor(generator.integers(1, 4, objects)),
                "crowd": torch.tensor(generator.random(objects) < 0.2),
                "area": torch.tensor(np.prod(truth[:, 2:] - truth[:, :2], axis=1), dtype=torch.float32),
            }
        )
        detections.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor(generator.integers(1, 4, number)),
                "scores": torch.tensor(scores, dtype=torch.float32),
            }
        )
    return detections, targets


def with_masks(generator: np.random.Generator, boxes: torch.Tensor) -> torch.Tensor:
    """Return masks (n, 1, 120, 120): 19 in 20 pixels of each box, which may be none."""
    masks = torch.zeros(len(boxes), 1, 120, 120)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().clamp(0, 120).tolist(), strict=True):
        shape = (bottom - top, right - left)
        mask[0, top:bottom, left:right] = torch.from_numpy(generator.random(shape) < 0.95)
    return masks


def entries(images: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return the boxes or masks of detections or targets in COCO's form, with ids from 1."""
    result = []
    for image, each in enumerate(images):
        for number, (left, top, right, bottom) in enumerate(each["boxes"].double().tolist()):
            entry: dict[str, Any] = {
                "id": len(result) + 1,
                "image_id": image,
                "category_id": int(each["labels"][number]),
            }
            if kind == "bbox":
                entry["bbox"] = [left, top, right - left, bottom - top]
            else:
                mask = np.asfortranarray(each["masks"][number].reshape(120, 120).numpy().astype(np.uint8))
                entry["segmentation"] = codec.encode(mask)
            if "scores" in each:
                entry["score"] = float(each["scores"][number])
            else:
                entry |= {"area": float(each["area"][number]), "iscrowd": int(each["crowd"][number])}
            result.append(entry)
    return result


def coco_precision(detections: list[dict[str, Any]], targets: list[dict[str, Any]], kind: Kind) -> list[float]:
    """Return AP, AP50 and AP75 of COCO's own classes."""
    truth, found = entries(targets, kind), entries(detections, kind)
    with redirect_stdout(io.StringIO()):
        coco: Any = COCO()
        images = [{"id": image, "width": 120, "height": 120} for image in range(len(targets))]
        coco.dataset = {"images": images, "annotations": truth, "categories": [{"id": name} for name in (1, 2, 3)]}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats[:3]]


@pytest.mark.parametrize("seed", range(8))
def test_precision_is_that_of_cocos_own_evaluation(seed):
    detections, targets = adversarial(seed)
    generator = np.random.default_rng(seed)
    for each in (*detections, *targets):
        each["masks"] = with_masks(generator, each["boxes"])
    plain = [{**target, "masks": target["masks"][:, 0]} for target in targets]
    ours = average_precision(zip(detections, plain, strict=True), masks=True)
    for kind, keys in KEYS.items():
        expected = coco_precision(detections, targets, kind)
        assert [ours[key] / 100 for key in keys] == pytest.approx(expected, abs=1e-6)
        assert expected[1] > 0.005
    boxes = average_precision(zip(detections, targets, strict=True), masks=False)
    assert boxes == {key: ours[key] for key in KEYS["bbox"]}
