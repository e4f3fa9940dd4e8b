"""Backbones in two parts, for methods that look at the last map before it is pooled: image to map, pooled map on."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import EfficientNet, MobileNetV2, MobileNetV3, ResNet


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the last map (batch, channels, height, width) of `images`, before pooling.

    Raises ValueError for networks without one: transformers and what is neither torchvision's small ones nor timm's.
    """
    if isinstance(backbone, ResNet):
        for name, layer in backbone.named_children():
            if name == "avgpool":
                break
            images = layer(images)
        return images
    if isinstance(backbone, MobileNetV2 | MobileNetV3 | EfficientNet):
        return backbone.features(images)
    if hasattr(backbone, "forward_features"):  # timm's
        result = backbone.forward_features(images)  # pyright: ignore[reportCallIssue]
        if isinstance(result, Tensor) and result.ndim == 4:
            return result
    raise ValueError(
        f"{type(backbone).__name__} has no map of features: use a ResNet, a MobileNet, an EfficientNet "
        "or one of timm's convolutional networks"
    )


def pooled_features(backbone: nn.Module, pooled: Tensor) -> Tensor:
    """Return the features (rows, num_features) that the backbone makes of averages (rows, channels) over its map."""
    if isinstance(backbone, ResNet):
        return pooled
    if isinstance(backbone, MobileNetV2 | MobileNetV3 | EfficientNet):
        return backbone.classifier(pooled)  # MobileNetV3's hidden layer, EfficientNet's dropout
    return backbone.forward_head(pooled[:, :, None, None], pre_logits=True)  # pyright: ignore[reportCallIssue]


def quadrants(maps: Tensor) -> Tensor:
    """Average the quadrants of maps (batch, channels, height, width), 4 * batch rows: all top left ones first, then
    top right, bottom left and bottom right.

    Maps of an odd side are first interpolated to the next even one, as JigClu's 7 x 7 are to 8 x 8. Raises ValueError
    for maps of one cell, whose quadrants would all be the same.
    """
    side = min(maps.shape[2:])
    if side < 2:
        raise ValueError("the last map has one cell, no quadrants: use larger images or backbone.stem: small")
    if side % 2:
        maps = functional.interpolate(maps, size=(side + 1, side + 1), mode="bilinear", align_corners=False)
    cells = functional.adaptive_avg_pool2d(maps, 2)  # (batch, channels, 2, 2)
    return torch.cat([*cells.flatten(2).unbind(2)])
