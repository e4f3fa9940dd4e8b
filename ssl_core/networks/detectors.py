"""Detectors on backbones: Faster and Mask R-CNN of torchvision, with the C4 head and the pyramids of the papers.

C4 (ResNets): layer1 to layer3 are the map, layer4 and one more batch norm the head of the boxes, as in MoCo's
configuration. FPN: ResNets give four maps; the other networks the last map of stride 16 and the last of stride 32, as
SSLight has it for MobileNetV2. All layers are trained, with ordinary batch norm.

Differences from detectron2, in which the papers trained: torchvision's RoIAlign is not shifted by half a pixel, its box
losses are smooth L1 with beta 1/9 instead of L1, and C4's mask head runs layer4 a second time, on the positive regions
only, where detectron2 uses the features of the boxes again (docs/sources.md#detection).
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

Head = Literal["c4", "fpn"]
Target = dict[str, Tensor]
RATIOS = (0.5, 1.0, 2.0)
POOLED = 14  # pixels of a region of C4 before layer4
MASK_CHANNELS = 256
RESNETS = ("resnet18", "resnet34", "resnet50")
# backbone -> the modules of `features` whose outputs are the last of stride 16 and the last of stride 32
TAPS = {
    "mobilenet_v2": ("13", "18"),
    "mobilenet_v3_small": ("8", "12"),
    "mobilenet_v3_large": ("12", "16"),
    "efficientnet_b0": ("5", "8"),
}


class Proposals(NamedTuple):
    """The number of proposals before and after non-maximum suppression, in training and in evaluation."""

    before: tuple[int, int]
    after: tuple[int, int]


C4_PROPOSALS = Proposals((12_000, 6_000), (2_000, 1_000))
FPN_PROPOSALS = Proposals((2_000, 1_000), (1_000, 1_000))  # for each level
TAPS_PROPOSALS = Proposals((2_000, 1_000), (2_000, 1_000))


def build_detector(
    backbone: nn.Module,
    name: str,
    head: Head,
    num_classes: int,
    *,
    masks: bool,
    mean: Sequence[float],
    std: Sequence[float],
    regions: int = 512,
    train_proposals: int | None = None,
    test_proposals: int | None = None,
) -> nn.Module:
    """Build a detector of `num_classes` classes and the background around `backbone`, which it takes over.

    `regions` is the number of proposals per image that train the head, drawn from `train_proposals`; `test_proposals`
    are classified in evaluation. None takes the numbers of the head's paper. The forward pass takes images in 0..1 that
    are already resized. Raises `ValueError` for a backbone without this head.
    """
    if head == "c4":
        parts = _c4(backbone, name, num_classes, masks)
    elif name in RESNETS:
        parts = _fpn(backbone, num_classes, masks)
    elif name in TAPS:
        parts = _taps(backbone, name, num_classes, masks)
    else:
        raise ValueError(_refusal(name, (*RESNETS, *TAPS), head))
    for key, number in (("train", train_proposals), ("test", test_proposals)):
        if number is not None:
            parts[f"rpn_post_nms_top_n_{key}"] = number
    kind = MaskRCNN if masks else FasterRCNN
    detector: Any = kind(**parts, box_batch_size_per_image=regions)
    _initialise_predictors(detector.roi_heads)
    for module in (detector.rpn.head, detector.roi_heads.box_predictor):
        module.register_forward_hook(_widen)
    detector.transform = Normalise(800, 1333, list(mean), list(std))
    detector.rpn.fg_bg_sampler = SeededSampler(256, 0.5)
    detector.roi_heads.fg_bg_sampler = SeededSampler(regions, 0.25)
    return detector


def _widen(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return the output with float32 in place of half precision.

    torchvision computes boxes in the type of this output. In bfloat16 they are whole pixels at best, and a small box
    may have no area.
    """
    if isinstance(output, Tensor):
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output
    return type(output)(_widen(module, inputs, part) for part in output)


def _initialise_predictors(heads: Any) -> None:
    """Draw the last layers as detectron2 does; torchvision's are so large that training from scratch may diverge."""
    layers = [(heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001)]
    if heads.mask_predictor is not None:
        layers.append((heads.mask_predictor.mask_fcn_logits, 0.001))
    for layer, std in layers:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)


def seed_sampling(detector: Any, seeds: Sequence[int]) -> None:
    """Set the seeds from which the next forward pass draws the proposals of each image that train."""
    for sampler in (detector.rpn.fg_bg_sampler, detector.roi_heads.fg_bg_sampler):
        sampler.seeds = list(seeds)


class SeededSampler(BalancedPositiveNegativeSampler):
    """Draws the proposals of each image by its own seed, so that they do not depend on the other images of a batch."""

    seeds: Sequence[int] = ()

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return one mask of positives and one of negatives for each image."""
        if not self.seeds:
            return super().__call__(matched_idxs)
        positive, negative = [], []
        for seed, matched in zip(self.seeds, matched_idxs, strict=True):
            devices = [matched.device] if matched.is_cuda else []
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                drawn = super().__call__([matched])
            positive += drawn[0]
            negative += drawn[1]
        return positive, negative


class Normalise(GeneralizedRCNNTransform):
    """Normalises images and joins them into a batch. The loader resizes them; detections go back to `original_sizes`.

    The sizes are (height, width) of each image before the loader resized it; None leaves detections as they are.
    """

    original_sizes: list[tuple[int, int]] | None = None

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """Return both unchanged."""
        return image, target

    def postprocess(
        self, result: list[Target], image_shapes: list[tuple[int, int]], original_image_sizes: list[tuple[int, int]]
    ) -> list[Target]:
        """Scale boxes, and paste masks, into the original images."""
        return super().postprocess(result, image_shapes, self.original_sizes or original_image_sizes)


class C4Body(nn.Module):
    """A ResNet up to layer3: (batch, 3, h, w) -> (batch, out_channels, h / 16, w / 16)."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.layers = nn.Sequential(OrderedDict((name, resnet.get_submodule(name)) for name in names))
        self.out_channels = _width(resnet.get_submodule("layer3"))

    def forward(self, images: Tensor) -> Tensor:
        """Return the map of layer3."""
        return self.layers(images)


class Layer4(nn.Module):
    """A ResNet's layer4 with one more batch norm: (regions, channels, 14, 14) -> (regions, num_features, 7, 7)."""

    def __init__(self, resnet: nn.Module) -> None:
        super().__init__()
        self.layer4 = resnet.get_submodule("layer4")
        self.num_features = _width(self.layer4)
        self.norm = nn.BatchNorm2d(self.num_features)

    def forward(self, regions: Tensor) -> Tensor:
        """Return maps of the regions."""
        return self.norm(self.layer4(regions))


def _c4(backbone: nn.Module, name: str, num_classes: int, masks: bool) -> dict[str, Any]:
    if name not in RESNETS:
        raise ValueError(_refusal(name, RESNETS, "c4"))
    layer4 = Layer4(backbone)
    width = layer4.num_features
    parts = {
        "backbone": C4Body(backbone),
        "rpn_anchor_generator": AnchorGenerator(((32, 64, 128, 256, 512),), (RATIOS,)),
        "box_roi_pool": MultiScaleRoIAlign(["0"], POOLED, sampling_ratio=0),
        "box_head": nn.Sequential(layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "box_predictor": FastRCNNPredictor(width, num_classes + 1),
        **_proposals(C4_PROPOSALS),
    }
    if masks:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(["0"], POOLED, sampling_ratio=0)
        parts["mask_head"] = layer4  # shared with the boxes
        parts["mask_predictor"] = MaskRCNNPredictor(width, MASK_CHANNELS, num_classes + 1)
    return parts


def _fpn(backbone: nn.Module, num_classes: int, masks: bool) -> dict[str, Any]:
    layers = {f"layer{number}": str(number - 1) for number in (1, 2, 3, 4)}
    widths = [_width(backbone.get_submodule(layer)) for layer in layers]
    body = BackboneWithFPN(backbone, layers, widths, out_channels=256)
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), (RATIOS,) * 5)
    return _pyramid(body, anchors, FPN_PROPOSALS, num_classes, masks)


def _taps(backbone: nn.Module, name: str, num_classes: int, masks: bool) -> dict[str, Any]:
    features = backbone.get_submodule("features")
    layers = {tap: str(number) for number, tap in enumerate(TAPS[name])}
    body = BackboneWithFPN(features, layers, [_width(features.get_submodule(tap)) for tap in layers], out_channels=256)
    anchors = AnchorGenerator(((32, 64, 128), (64, 128, 256), (128, 256, 512)), (RATIOS,) * 3)
    return _pyramid(body, anchors, TAPS_PROPOSALS, num_classes, masks)


def _pyramid(
    body: BackboneWithFPN, anchors: AnchorGenerator, proposals: Proposals, num_classes: int, masks: bool
) -> dict[str, Any]:
    maps = list(body.body.return_layers.values())  # without the level of the max-pool
    parts = {
        "backbone": body,
        "rpn_anchor_generator": anchors,
        "box_roi_pool": MultiScaleRoIAlign(maps, 7, sampling_ratio=0),
        "box_head": TwoMLPHead(body.out_channels * 7 * 7, 1024),
        "box_predictor": FastRCNNPredictor(1024, num_classes + 1),
        **_proposals(proposals),
    }
    if masks:
        parts["mask_roi_pool"] = MultiScaleRoIAlign(maps, 14, sampling_ratio=0)
        parts["mask_predictor"] = MaskRCNNPredictor(MASK_CHANNELS, MASK_CHANNELS, num_classes + 1)
    return parts


def _proposals(proposals: Proposals) -> dict[str, int]:
    numbers: dict[str, int] = {}
    for when, before, after in zip(("train", "test"), *proposals, strict=True):
        numbers |= {f"rpn_pre_nms_top_n_{when}": before, f"rpn_post_nms_top_n_{when}": after}
    return numbers


def _width(module: nn.Module) -> int:
    """Return the channels of a module's output: those of its last batch norm outside a shortcut."""
    norms = [layer for name, layer in module.named_modules() if "downsample" not in name]
    return [layer.num_features for layer in norms if isinstance(layer, nn.modules.batchnorm._BatchNorm)][-1]


def _refusal(name: str, names: Sequence[str], head: Head) -> str:
    return f"detection with the head {head} has no {name}: use {', '.join(names)}"
