"""Backbones by torchvision or timm alone: their names there, and the code that rebuilds them without this package."""

import re

from torch import nn
from torchvision.models import ResNet

from ssl_core.config import Backbone
from ssl_core.networks.backbones import CLASSIFIERS, TRANSFORMERS

# timm's models that become ours, and what they are told
TIMM = {
    "vit_tiny_16": ("vit_tiny_patch16_224", ""),
    "vit_tiny_32": ("vit_tiny_patch16_224", ", patch_size=32"),
    "vit_small_16": ("vit_small_patch16_224", ""),
    "deit_tiny": ("vit_tiny_patch16_224", ", num_heads=6, qkv_bias=False, attn_layer=WideAttention"),
}
WIDE_ATTENTION = """\
from timm.layers import Attention


class WideAttention(Attention):  # 6 heads of 64, not of 192 / 6
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options, attn_head_dim=64)

"""


def architecture(config: Backbone) -> tuple[str, str]:
    """Return the library that has this network, "torchvision" or "timm", and its name there."""
    library, _, name = config.name.rpartition("/")
    if library:
        return library, name
    return ("timm", TIMM[name][0]) if name in TRANSFORMERS else ("torchvision", name)


def rebuilding_code(backbone: nn.Module, config: Backbone, image_size: int) -> str:
    """Write the Python that builds `backbone` as `model`, without weights, by its library alone."""
    library, name = architecture(config)
    if library == "torchvision":
        return "\n".join(_torchvision(backbone, config, name))
    options = TIMM[config.name][1] if config.name in TIMM else ""
    if hasattr(backbone, "dynamic_img_size"):  # its position embeddings follow the image
        options = f", img_size={image_size}, dynamic_img_size=True{options}"
    preparation = WIDE_ATTENTION if config.name == "deit_tiny" else ""
    return f'import timm\n{preparation}\nmodel = timm.create_model("{name}", num_classes=0{options})'


def stem_in_words(backbone: nn.Module, config: Backbone) -> str:
    """Say how the stem differs from the library's."""
    if config.stem == "imagenet":
        return "The stem is the library's own."
    if isinstance(backbone, ResNet):
        stride = backbone.conv1.stride[0]
        return (
            f"The stem is not torchvision's: `conv1` is a 3x3 convolution of stride {stride} and there is no max-pool, "
            "for small images."
        )
    which = "first two strided convolutions have" if config.stem == "small" else "second strided convolution has"
    return (
        f"The stem is not torchvision's: the {which} stride 1, for small images. The weights' names and shapes are the "
        "same, so they load without this change, too, but the features are then others."
    )


def _torchvision(backbone: nn.Module, config: Backbone, name: str) -> list[str]:
    classifier = next(
        path
        for path, child in backbone.named_modules()
        if isinstance(child, nn.Identity) and path.split(".")[0] in CLASSIFIERS
    )
    classifier = re.sub(r"\.(\d+)", r"[\1]", classifier)
    lines = ["import torch, torchvision", "", f"model = torchvision.models.{name}()"]
    lines += [f"model.{classifier} = torch.nn.Identity()  # features instead of classes"]
    if config.stem == "imagenet":
        return lines
    if isinstance(backbone, ResNet):
        stride = backbone.conv1.stride[0]
        lines += [f"model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride={stride}, padding=1, bias=False)"]
        return [*lines, "model.maxpool = torch.nn.Identity()"]
    part = "[:2]" if config.stem == "small" else "[1:2]"
    return [
        *lines,
        "strided = [layer for layer in model.modules() if getattr(layer, 'stride', 1) == (2, 2)]",
        f"for layer in strided{part}:",
        "    layer.stride = (1, 1)",
    ]
