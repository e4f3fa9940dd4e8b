"""Detectors: their heads, strict use of the backbone, proposals by seed, and several processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ssl_core.config import Backbone
from ssl_core.data.detection_loader import Batch
from ssl_core.networks.backbones import build_backbone
from ssl_core.networks.batchnorm import synchronise_batchnorm
from ssl_core.networks.detectors import TAPS, build_detector
from ssl_core.training.detection import Losses
from tests.methods.harness import float64, start_in_processes

NORMALISATION: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3}


def detector(name: str, head: Any, *, masks: bool = False) -> Any:
    torch.manual_seed(0)
    backbone = build_backbone(Backbone(name=name), 64)
    options: dict[str, Any] = {"regions": 8, "train_proposals": 40, "test_proposals": 20}
    return build_detector(backbone, name, head, 3, masks=masks, **NORMALISATION, **options)


def batch(numbers: range, *, side: int = 64, masks: bool = False) -> Batch:
    """Square images with one object each, whose place depends on the number of the image."""
    images, targets = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        image = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
        box = torch.tensor([[4.0 + number, 6, 40 + number, 50]])
        mask = torch.zeros(1, side, side, dtype=torch.uint8)
        mask[:, 6:50, 4 + number : 40 + number] = 1
        target = {"boxes": box, "labels": torch.tensor([1 + number % 3])}
        images.append(image)
        targets.append(target | ({"masks": mask} if masks else {}))
    count = len(images)
    return Batch(images, targets, [*numbers], [1000 + number for number in numbers], [(side, side)] * count)


@pytest.mark.parametrize(
    ("name", "head", "masks"),
    [("resnet18", "c4", True), ("resnet18", "fpn", True), *((name, "fpn", False) for name in TAPS)],
)
def test_all_layers_are_trained_and_detections_are_in_the_original_image(name, head, masks):
    model = detector(name, head, masks=masks).train()
    losses = Losses(model)(batch(range(2), masks=masks))
    assert all(loss.isfinite() for loss in losses.values())
    assert ("loss_mask" in losses) == masks
    torch.stack(list(losses.values())).sum().backward()
    assert [key for key, weight in model.named_parameters() if weight.grad is None] == []
    model.eval()
    model.transform.original_sizes = [(128, 128)]
    with torch.no_grad():
        (found,) = model([torch.rand(3, 64, 64)])
    assert found["boxes"].max() > 64
    assert not masks or found["masks"].shape[1:] == (1, 128, 128)


def test_the_head_of_c4_is_the_backbones_layer4():
    torch.manual_seed(0)
    backbone: Any = build_backbone(Backbone(name="resnet18"), 64)
    model: Any = build_detector(backbone, "resnet18", "c4", 3, masks=True, **NORMALISATION)
    assert model.roi_heads.box_head[0].layer4 is backbone.layer4
    assert model.roi_heads.mask_head is model.roi_heads.box_head[0]
    assert model.backbone.layers.conv1 is backbone.conv1
    assert model.backbone.layers.layer3 is backbone.layer3


@pytest.mark.parametrize(("name", "head"), [("mobilenet_v2", "c4"), ("vit_tiny_16", "fpn")])
def test_other_backbones_are_refused(name, head):
    with pytest.raises(ValueError, match=rf"^detection with the head {head} has no {name}: use resnet18, resnet34"):
        build_detector(torch.nn.Identity(), name, head, 3, masks=False, **NORMALISATION)


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_boxes_are_not_computed_in_half_precision(head):
    model = detector("resnet18", head).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model([torch.rand(3, 64, 64)])
    assert found["boxes"].dtype == torch.float32
    assert (found["boxes"] != found["boxes"].bfloat16()).any()


def test_proposals_of_an_image_depend_on_its_seed_alone():
    sampler = detector("mobilenet_v3_small", "fpn").rpn.fg_bg_sampler
    matched = [torch.arange(1000) % 3 - 1 for _ in range(2)]
    sampler.seeds = [5, 6]
    positive, negative = sampler(matched)
    sampler.seeds = [6]
    again = sampler(matched[:1])
    assert torch.equal(positive[1], again[0][0])
    assert torch.equal(negative[1], again[1][0])
    assert not torch.equal(negative[0], negative[1])


# The losses of the proposal network are means over anchors, and processes average means: each image must have as many,
# 256. torchvision computes the objectness in float32.
SIDE = 80


def as_rank(rank: int, path: str, masks: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.rendezvous", rank=rank, world_size=2)
    with float64():
        detect = synchronise_batchnorm(detector("resnet18", "c4", masks=masks), cuda=False)
        model = DistributedDataParallel(Losses(detect))
        losses = model.train()(batch(range(2 * rank, 2 * rank + 2), side=SIDE, masks=masks))
        torch.stack(list(losses.values())).sum().backward()
    means = torch.stack(list(losses.values())).detach() / 2
    dist.all_reduce(means)
    if rank == 0:
        gradients = {key: weight.grad for key, weight in model.module.named_parameters()}
        torch.save((means, gradients), path)
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("masks", [False, True])
def test_two_processes_have_the_losses_and_gradients_of_one(tmp_path: Path, masks: bool):
    start_in_processes(as_rank, str(tmp_path / "ranks"), masks)
    means, gradients = torch.load(tmp_path / "ranks")
    with float64():
        model = Losses(detector("resnet18", "c4", masks=masks)).train()
        losses = model(batch(range(4), side=SIDE, masks=masks))
        torch.stack(list(losses.values())).sum().backward()
    torch.testing.assert_close(means, torch.stack(list(losses.values())).detach(), rtol=1e-6, atol=1e-7)
    for key, weight in model.named_parameters():
        torch.testing.assert_close(gradients[key], weight.grad, rtol=1e-4, atol=1e-6, msg=key)
