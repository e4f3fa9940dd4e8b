"""Detection on the official layouts of VOC and COCO, from the source to the results, under Snakemake."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from ssl_core.config import Backbone
from ssl_core.networks.backbones import build_backbone, write_tensors
from tests.rectangles import coco_source, write_card, write_coco, write_voc

from .conftest import finish

SHORT = {
    "protocol": "detection",
    "iterations": 2,
    "batch_size": 2,
    "short_sides": [48],
    "test_side": 48,
    "regions": 8,
    "train_proposals": 30,
    "test_proposals": 20,
    "precise_batches": 1,
    "pictures": 1,
}


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with adopted weights, a card of two years of VOC and a card of COCO."""
    folder = tmp_path_factory.mktemp("detection")
    shutil.copy(root / "Snakefile", folder)
    shutil.copytree(root / "workflow", folder / "workflow")
    write_voc(folder / "VOCdevkit/VOC2007", {"trainval": range(1, 5), "test": range(5, 8)})
    write_voc(folder / "VOCdevkit/VOC2012", {"trainval": range(8, 11)})
    write_coco(folder / "coco2017", {"train": range(1, 7), "val": range(7, 10)})
    (folder / "datasets").mkdir()
    lists = {"train": {"images": ["VOC2007/trainval", "VOC2012/trainval"]}, "test": {"images": "VOC2007/test"}}
    voc = {"type": "voc", "path": str(folder / "VOCdevkit"), "splits": lists}
    write_card(folder / "datasets/voc.yaml", voc)
    write_card(folder / "datasets/coco.yaml", coco_source(folder / "coco2017", "train", "val"))
    torch.manual_seed(0)
    network = build_backbone(Backbone(name="mobilenet_v3_small"), 64)
    write_tensors(folder / "weights.safetensors", network.state_dict(), {})
    backbone = {"name": "mobilenet_v3_small"}
    experiment = {"dataset": {"name": "coco"}, "backbone": backbone, "weights": "weights.safetensors"}
    boxes, masks = SHORT | {"dataset": {"name": "voc"}}, SHORT | {"masks": True}
    config = {"experiments": {"mine": experiment}, "evaluations": {"boxes": boxes, "masks": masks}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.long
def test_both_layouts_give_results(project: Path) -> None:
    finish(project, "results/mine/boxes.json", "results/mine/masks.json")
    boxes, masks = (json.loads((project / f"results/mine/{name}.json").read_text()) for name in ("boxes", "masks"))
    assert (boxes["split"], boxes["num_train"], boxes["num_test"]) == ("test", 7, 3)
    assert (masks["split"], masks["num_train"], masks["num_test"]) == ("val", 6, 3)
    assert set(masks["metrics"]) - set(boxes["metrics"]) == {"mask_ap", "mask_ap50", "mask_ap75"}
    assert (project / "results/mine/boxes/detections.png").exists()
    assert not list((project / "checkpoints/mine").iterdir())
