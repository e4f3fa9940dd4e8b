"""Families of networks: stem, last feature map, features of pooled maps and rebuilding code.

A new family is one subclass of `Family` in `FAMILIES`; a new vision transformer is one entry of `TRANSFORMERS`.
"""

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torchvision.models import EfficientNet, MobileNetV2, MobileNetV3, ResNet
from torchvision.models.resnet import Bottleneck

from ssl_core.config import Backbone

CLASSIFIERS = ("fc", "classifier", "head", "heads")  # names of the last submodule in torchvision and timm
STRIDES = {"imagenet": 32, "tiny": 16, "small": 8}


class Family:
    """Networks of torchvision that have only the ImageNet stem and no feature map that methods can use."""

    title = "networks of torchvision"
    names: tuple[str, ...] = ()  # accepted as `backbone.name` without "torchvision/"
    types: tuple[type[nn.Module], ...] = (nn.Module,)
    strides: Mapping[str, int] = {}  # stem -> image pixels per cell of the last map; empty: the ImageNet stem only

    def includes(self, network: nn.Module) -> bool:
        """Return whether the network belongs to this family."""
        return isinstance(network, self.types)

    def remove_classifier(self, network: nn.Module, config: Backbone) -> None:
        """Replace the last linear layer by an identity; raises ValueError if the network does not end in one."""
        linear = [path for path, layer in network.named_modules() if isinstance(layer, nn.Linear)]
        if not linear or linear[-1].split(".")[0] not in CLASSIFIERS:
            raise ValueError(f"{config.name} cannot be a backbone: it does not end in a linear classifier")
        parent, _, attribute = linear[-1].rpartition(".")
        setattr(network.get_submodule(parent), attribute, nn.Identity())

    def lower_stride(self, network: nn.Module, stem: str) -> None:
        """Change the first layers in place from the ImageNet stem to the `tiny` or `small` one."""
        raise NotImplementedError

    def feature_map(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return the last map (batch, channels, height, width) before pooling."""
        raise ValueError(
            f"{type(network).__name__} has no map of features: use a ResNet, a MobileNet, an EfficientNet "
            "or one of timm's convolutional networks"
        )

    def pooled_features(self, network: nn.Module, pooled: Tensor) -> Tensor:
        """Return the features (rows, num_features) of averages (rows, channels) over the last map."""
        raise NotImplementedError

    def features_and_map(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features (batch, num_features) and the last map (batch, channels, height, width)."""
        maps = self.feature_map(network, images)
        return self.pooled_features(network, maps.mean(dim=(2, 3))), maps

    def rebuilding_code(self, network: nn.Module, config: Backbone, image_size: int) -> str:
        """Return Python code that builds the network as `model` with its library alone."""
        _, name = architecture(config)
        identity = next(path for path, layer in network.named_modules() if _is_removed_classifier(path, layer))
        identity = re.sub(r"\.(\d+)", r"[\1]", identity)
        lines = [
            "import torch, torchvision",
            "",
            f"model = torchvision.models.{name}()",
            f"model.{identity} = torch.nn.Identity()  # features instead of classes",
        ]
        if config.stem != "imagenet":
            lines += self.stem_code(config.stem)
        return "\n".join(lines)

    def stem_code(self, stem: str) -> list[str]:
        """Return the lines of code that make the same changes as `lower_stride`."""
        raise NotImplementedError

    def stem_description(self, stem: str) -> str:
        """Return one or two sentences about the changed stem, for the model card."""
        raise NotImplementedError


class WideResNet(ResNet):
    """ResNet-50x2: all layers of ResNet-50 with twice the channels."""

    def __init__(self) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3])

    def _make_layer(
        self, block: type[nn.Module], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        if planes == 64:  # the first stage: the stem is widened too
            self.inplanes = 128
            self.conv1 = nn.Conv2d(3, 128, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(128)
        return super()._make_layer(block, 2 * planes, blocks, stride, dilate)  # pyright: ignore[reportArgumentType]


class ResNetFamily(Family):
    """Small stems replace the 7x7 convolution and the max-pooling by one 3x3 convolution."""

    title = "ResNets"
    names = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet50x2")
    types = (ResNet,)
    strides = STRIDES
    first_stride: Mapping[str, int] = {"tiny": 2, "small": 1}

    def lower_stride(self, network: nn.Module, stem: str) -> None:
        width = len(network.get_parameter("bn1.weight"))
        convolution = nn.Conv2d(3, width, kernel_size=3, stride=self.first_stride[stem], padding=1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        network.conv1 = convolution
        network.maxpool = nn.Identity()

    def feature_map(self, network: nn.Module, images: Tensor) -> Tensor:
        for name, layer in network.named_children():
            if name == "avgpool":
                break
            images = layer(images)
        return images

    def pooled_features(self, network: nn.Module, pooled: Tensor) -> Tensor:
        return pooled

    def rebuilding_code(self, network: nn.Module, config: Backbone, image_size: int) -> str:
        code = super().rebuilding_code(network, config, image_size)
        if not isinstance(network, WideResNet):
            return code
        imports = "from torch import nn\nfrom torchvision.models.resnet import Bottleneck, ResNet\n\n\n"
        code = code.replace("torchvision.models.resnet50x2()", "WideResNet()").replace("Conv2d(3, 64", "Conv2d(3, 128")
        return f"{imports}{inspect.getsource(WideResNet)}\n\n{code}"

    def stem_code(self, stem: str) -> list[str]:
        stride = self.first_stride[stem]
        return [
            f"model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride={stride}, padding=1, bias=False)",
            "model.maxpool = torch.nn.Identity()",
        ]

    def stem_description(self, stem: str) -> str:
        return (
            f"The stem differs from torchvision's: `conv1` is a 3x3 convolution of stride {self.first_stride[stem]} "
            "and there is no max-pooling, for small images."
        )


class EfficientNetFamily(Family):
    """Networks of `features`, pooling and `classifier`; small stems set the stride of early convolutions to 1.

    EfficientNet keeps the dropout in front of its classifier (docs/sources.md#backbones).
    """

    title = "EfficientNets"
    names = ("efficientnet_b0", "efficientnet_b1")
    types = (EfficientNet,)
    strides = STRIDES

    def lower_stride(self, network: nn.Module, stem: str) -> None:
        strided = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
        changed = strided[:2] if stem == "small" else strided[1:2]
        for layer in changed:
            layer.stride = (1, 1)

    def feature_map(self, network: nn.Module, images: Tensor) -> Tensor:
        return network.get_submodule("features")(images)

    def pooled_features(self, network: nn.Module, pooled: Tensor) -> Tensor:
        return network.get_submodule("classifier")(pooled)  # dropout, and MobileNetV3's hidden layer

    def stem_code(self, stem: str) -> list[str]:
        part = "[:2]" if stem == "small" else "[1:2]"
        return [
            "strided = [layer for layer in model.modules() if getattr(layer, 'stride', 1) == (2, 2)]",
            f"for layer in strided{part}:",
            "    layer.stride = (1, 1)",
        ]

    def stem_description(self, stem: str) -> str:
        changed = "first two strided convolutions have" if stem == "small" else "second strided convolution has"
        return (
            f"The stem differs from torchvision's: the {changed} stride 1, for small images. The names and shapes of "
            "the weights are the same, so they load without this change as well, but then give other features."
        )


class MobileNetV2Family(EfficientNetFamily):
    """The pooled map is the feature; the whole classifier goes."""

    title = "MobileNetV2"
    names = ("mobilenet_v2",)
    types = (MobileNetV2,)

    def remove_classifier(self, network: nn.Module, config: Backbone) -> None:
        network.classifier = nn.Identity()


class MobileNetV3Family(EfficientNetFamily):
    """`hidden_layer` keeps Linear, h-swish and dropout behind the pooling."""

    title = "MobileNetV3"
    names = ("mobilenet_v3_small", "mobilenet_v3_large")
    types = (MobileNetV3,)

    def remove_classifier(self, network: nn.Module, config: Backbone) -> None:
        if config.hidden_layer:
            super().remove_classifier(network, config)
        else:
            network.classifier = nn.Identity()


class TimmFamily(Family):
    """All networks of timm, which share `forward_features` and `forward_head`."""

    title = "networks of timm"

    def includes(self, network: nn.Module) -> bool:
        return hasattr(network, "forward_features")

    def feature_map(self, network: nn.Module, images: Tensor) -> Tensor:
        features = network.forward_features(images)  # pyright: ignore[reportCallIssue]
        if isinstance(features, Tensor) and features.ndim == 4:
            return features
        return super().feature_map(network, images)

    def pooled_features(self, network: nn.Module, pooled: Tensor) -> Tensor:
        return network.forward_head(pooled[:, :, None, None], pre_logits=True)  # pyright: ignore[reportCallIssue]

    def features_and_map(self, network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        """The map of a transformer is that of its patches, without class and register tokens."""
        prefix = getattr(network, "num_prefix_tokens", None)
        if prefix is None:
            return super().features_and_map(network, images)
        tokens: Tensor = network.forward_features(images)  # pyright: ignore[reportCallIssue] - (batch, tokens, width)
        features: Tensor = network.forward_head(tokens, pre_logits=True)  # pyright: ignore[reportCallIssue]
        patches = tokens[:, prefix:].transpose(1, 2)
        side = math.isqrt(patches.shape[2])
        return features, patches.unflatten(2, (side, side))

    def rebuilding_code(self, network: nn.Module, config: Backbone, image_size: int) -> str:
        _, name = architecture(config)
        transformer = TRANSFORMERS.get(config.name)
        preparation = transformer.timm_preparation if transformer else ""
        options = transformer.timm_options if transformer else ""
        if hasattr(network, "dynamic_img_size"):  # the position embeddings depend on the image size
            options = f", img_size={image_size}, dynamic_img_size=True{options}"
        return f'import timm\n{preparation}\nmodel = timm.create_model("{name}", num_classes=0{options})'


# The first family that includes a network is the network's; the last one includes all.
FAMILIES = (
    ResNetFamily(),
    MobileNetV2Family(),
    MobileNetV3Family(),
    EfficientNetFamily(),
    TimmFamily(),
    Family(),
)


@dataclass(frozen=True, kw_only=True)
class Transformer:
    """A vision transformer of 12 layers: its shape, and the model and options that rebuild it with timm.

    The defaults are those of ViT-Ti/16.
    """

    patch_size: int = 16
    embed_dim: int = 192
    num_heads: int = 3
    timm_model: str = "vit_tiny_patch16_224"
    timm_options: str = ""
    timm_preparation: str = ""


WIDE_ATTENTION = """\
from timm.layers import Attention


class WideAttention(Attention):  # 6 heads of 64, not of 192 / 6
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options, attn_head_dim=64)

"""
TRANSFORMERS = {
    "vit_tiny_16": Transformer(),
    "vit_tiny_32": Transformer(patch_size=32, timm_options=", patch_size=32"),
    "vit_small_16": Transformer(embed_dim=384, num_heads=6, timm_model="vit_small_patch16_224"),
    "deit_tiny": Transformer(
        num_heads=6,
        timm_options=", num_heads=6, qkv_bias=False, attn_layer=WideAttention",
        timm_preparation=WIDE_ATTENTION,
    ),
}


def family_of(network: nn.Module) -> Family:
    """Return the family of a network."""
    return next(family for family in FAMILIES if family.includes(network))


def is_transformer(network: nn.Module) -> bool:
    """Return whether a network has layers of attention."""
    return any("Attention" in type(layer).__name__ for layer in network.modules())


def can_drop_paths(name: str) -> bool:
    """Return whether a network may have `drop_path`: ours and those of timm."""
    return name in TRANSFORMERS or name.startswith("timm/")


def fit_stem(network: nn.Module, config: Backbone) -> None:
    """Fit the first layers in place to small images; raises ValueError if the family has no such stem."""
    if config.stem == "imagenet":
        return
    family = family_of(network)
    if config.stem not in family.strides:
        *titles, last = [other.title for other in FAMILIES if other.strides]
        raise ValueError(
            f"backbone.stem: {config.name} has no {config.stem} stem, use imagenet "
            f"(tiny and small exist for torchvision's {', '.join(titles)} and {last})"
        )
    family.lower_stride(network, config.stem)


def feature_map(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the last map (batch, channels, height, width) of `images` before pooling.

    Raises ValueError for networks without one: transformers, and other networks of torchvision.
    """
    return family_of(backbone).feature_map(backbone, images)


def features_and_map(backbone: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return pooled features (batch, num_features) and the last map (batch, channels, height, width) of `images`.

    Raises ValueError for networks without a map: other networks of torchvision.
    """
    return family_of(backbone).features_and_map(backbone, images)


def pooled_features(backbone: nn.Module, pooled: Tensor) -> Tensor:
    """Return the features (rows, num_features) of averages (rows, channels) over the backbone's last map."""
    return family_of(backbone).pooled_features(backbone, pooled)


def architecture(config: Backbone) -> tuple[str, str]:
    """Return the library of a network, "torchvision" or "timm", and the network's name in it."""
    library, _, name = config.name.rpartition("/")
    if library:
        return library, name
    if name in TRANSFORMERS:
        return "timm", TRANSFORMERS[name].timm_model
    return "torchvision", name


def timm_arguments(network: nn.Module, config: Backbone, image_size: int) -> dict[str, Any] | None:
    """Return the arguments with which timm's network of the same name loads the weights; None if no network does.

    These are timm's networks, the ViTs but `deit_tiny`, and torchvision's ResNets with the ImageNet stem, which do not
    include `resnet50x2`.
    """
    if config.name == "deit_tiny" or config.stem != "imagenet" or isinstance(network, WideResNet):
        return None
    if isinstance(network, ResNet):  # timm has torchvision's ResNets under the same names
        return {}
    if architecture(config)[0] != "timm":
        return None
    arguments: dict[str, Any] = {}
    if hasattr(network, "dynamic_img_size"):  # the position embeddings depend on the image size
        arguments |= {"img_size": image_size, "dynamic_img_size": True}
    if config.name in TRANSFORMERS:
        arguments["patch_size"] = TRANSFORMERS[config.name].patch_size
    return arguments


def _is_removed_classifier(path: str, layer: nn.Module) -> bool:
    return isinstance(layer, nn.Identity) and path.split(".")[0] in CLASSIFIERS
