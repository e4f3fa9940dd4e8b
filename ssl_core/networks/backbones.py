"""Backbones: torchvision's and timm's networks without their classifier, fitted to the image size by their stem.

Parameter names stay those of torchvision and timm, so that a file written here loads into theirs (only the classifier
is missing) and the other way round. Sources of the variants: CW and RS for the small stems, SH for `deit_tiny`.
"""

import copy
import difflib
import hashlib
import json
from collections.abc import Mapping
from functools import partialmethod
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torchvision
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torchvision.models import EfficientNet, MobileNetV2, MobileNetV3, ResNet

from ssl_core.config import Backbone
from ssl_core.files import atomic

CONVOLUTIONAL = (
    "resnet18",
    "resnet34",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_b1",
)
IMAGE_SIZE = TypeAdapter(Annotated[int, Field(ge=1, le=8192)])  # what a file may ask for
CHECKSUM = "ssl_core_sha256"  # a file's own, in its metadata
TRANSFORMERS: dict[str, dict[str, int]] = {
    "vit_tiny_16": {"patch_size": 16, "embed_dim": 192, "num_heads": 3},
    "vit_tiny_32": {"patch_size": 32, "embed_dim": 192, "num_heads": 3},
    "vit_small_16": {"patch_size": 16, "embed_dim": 384, "num_heads": 6},
    "deit_tiny": {"patch_size": 16, "embed_dim": 192, "num_heads": 6},
}
NAMES = (*CONVOLUTIONAL, *TRANSFORMERS)
# pixels of the image behind one cell of the last map; the same for all families that have stems
STEM_STRIDES = {"imagenet": 32, "tiny": 16, "small": 8}
CLASSIFIERS = ("fc", "classifier", "head", "heads")


class Network(nn.Module):
    """What a type checker sees of a backbone: (batch, 3, size, size) -> (batch, num_features)."""

    num_features: int


def build_backbone(config: Backbone, image_size: int) -> Network:
    """Build a randomly initialised backbone for square images of `image_size` pixels.

    Raises ValueError for an unknown name, for a stem the network does not have, and for images it cannot take.
    """
    if config.name in TRANSFORMERS:
        module = _transformer(config.name, image_size)
    elif config.name.startswith("timm/"):
        module = _timm(config.name, image_size)
    else:
        module = _torchvision(config)
    _fit_stem(module, config)
    network = cast(Network, module)
    network.num_features = check_image_size(module, config, image_size)
    return network


def check_image_size(module: nn.Module, config: Backbone, image_size: int) -> int:
    """Return the width of the features of images of `image_size` pixels, by giving it two; ask it for every crop.

    Raises ValueError when the network cannot take images of that size.
    """
    stride = STEM_STRIDES[config.stem]
    if isinstance(module, ResNet | MobileNetV2 | MobileNetV3 | EfficientNet) and image_size < stride:
        fitting = [stem for stem, pixels in STEM_STRIDES.items() if pixels <= image_size]
        advice = f"use backbone.stem: {' or '.join(fitting)}, or larger images" if fitting else "use larger images"
        raise ValueError(
            f"{config.name} with the {config.stem} stem divides {image_size}-pixel images by {stride}, "
            f"which leaves less than 1x1: {advice}"
        )
    # Train mode shows outputs that networks give in training alone (Inception's auxiliary ones); two images, because
    # batch norm refuses one. The meta device would compute nothing, but imports SymPy, which takes a second.
    shadow = copy.deepcopy(module).train()
    for layer in shadow.modules():
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and max(layer.kernel_size) > 1:
            layer.register_forward_pre_hook(_refuse_single_pixels)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout draws
            output = shadow(torch.zeros(2, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{config.name} cannot take images of {image_size}x{image_size} pixels: {reason}") from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{config.name} cannot be a backbone: it gives {found} where (batch, features) is needed")
    return output.shape[1]


def _refuse_single_pixels(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Stop where a network strides over one pixel: nothing is left to see, and oneDNN's bfloat16 weight gradient of
    that very case is uninitialised memory (oneDNN of torch 2.14)."""
    if max(inputs[0].shape[2:]) == 1:
        raise ValueError("only one pixel is left before the last stride; use larger images or another stem")


def _torchvision(config: Backbone) -> nn.Module:
    """Build a network of torchvision with its last linear layer made an identity."""
    name = config.name.removeprefix("torchvision/")
    available = torchvision.models.list_models(module=torchvision.models)
    if name not in available or (config.name == name and name not in CONVOLUTIONAL):
        raise ValueError(_unknown(config.name))
    module = torchvision.models.get_model(name, weights=None)
    if isinstance(module, MobileNetV2) or (isinstance(module, MobileNetV3) and not config.hidden_layer):
        # The pooled map is the feature. MobileNetV3 otherwise keeps Linear, h-swish and dropout, EfficientNet its
        # dropout, as SEED, SH and RS train them (recipes section 3).
        module.classifier = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        return module
    linear = [path for path, child in module.named_modules() if isinstance(child, nn.Linear)]
    if not linear or linear[-1].split(".")[0] not in CLASSIFIERS:
        raise ValueError(f"{config.name} cannot be a backbone: it does not end in a linear classifier")
    parent, _, attribute = linear[-1].rpartition(".")
    setattr(module.get_submodule(parent), attribute, nn.Identity())
    return module


def _transformer(name: str, image_size: int) -> nn.Module:
    """Build a vision transformer whose position embeddings follow the image size (bicubic)."""
    # timm takes seconds to import, and most experiments do without it
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import VisionTransformer

    arguments: dict[str, Any] = {**TRANSFORMERS[name], "depth": 12, "num_classes": 0, "dynamic_img_size": True}
    if image_size < arguments["patch_size"] or image_size % arguments["patch_size"]:
        raise ValueError(
            f"{name} cuts images into patches of {arguments['patch_size']} pixels, which does not divide "
            f"image_size {image_size}: resize the images to a multiple of {arguments['patch_size']}"
        )
    if name != "deit_tiny":
        return VisionTransformer(img_size=image_size, **arguments)
    # SH's code: 6 heads of 64 (not 192 / 6) without bias, dropout .1, weights as PyTorch draws them, cls and position
    # embeddings N(0, 1), and the patch projection frozen as it is drawn (MoCo v3's trick).
    wide = type("WideAttention", (Attention,), {"__init__": partialmethod(Attention.__init__, attn_head_dim=64)})
    module = VisionTransformer(
        img_size=image_size,
        qkv_bias=False,
        attn_layer=wide,
        pos_drop_rate=0.1,
        proj_drop_rate=0.1,
        weight_init="skip",
        **arguments,
    )
    for embedding in (module.cls_token, module.pos_embed):
        nn.init.normal_(cast(Tensor, embedding))
    module.patch_embed.requires_grad_(False)
    return module


def _timm(name: str, image_size: int) -> nn.Module:
    """Build any network of timm; those with resizable position embeddings get them."""
    import timm

    model = name.removeprefix("timm/")
    if not timm.is_model(model):
        raise ValueError(_unknown(name))
    module = timm.create_model(model, pretrained=False, num_classes=0)
    if hasattr(module, "dynamic_img_size"):
        module = timm.create_model(model, pretrained=False, num_classes=0, img_size=image_size, dynamic_img_size=True)
    return module


def _unknown(name: str) -> str:
    """Say that a backbone is unknown and which names are nearest."""
    import timm

    others = [f"torchvision/{other}" for other in torchvision.models.list_models(module=torchvision.models)]
    others += [f"timm/{other}" for other in timm.list_models()]
    wanted = name.rpartition("/")[2]
    same = [other for other in others if other.endswith(f"/{wanted}")]
    nearest = same or difflib.get_close_matches(name, [*NAMES, *others], n=3, cutoff=0.5)
    listed = ", ".join(NAMES)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    return f"unknown backbone {name!r}: {hint}Known are {listed}, and timm/<name>, torchvision/<name>"


def _fit_stem(module: nn.Module, config: Backbone) -> None:
    """Lower the stride of the first layers in place: `small` from 32 to 8 in all, `tiny` to 16."""
    if config.stem == "imagenet":
        return
    if isinstance(module, ResNet):
        stride = 1 if config.stem == "small" else 2
        module.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=stride, padding=1, bias=False)
        nn.init.kaiming_normal_(module.conv1.weight, mode="fan_out", nonlinearity="relu")
        module.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(module, MobileNetV2 | MobileNetV3 | EfficientNet):
        # `small` is CW's MobileNetV2 for CIFAR: the first layer and the first strided stage at stride 1
        strided = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)]
        for layer in strided[:2] if config.stem == "small" else strided[1:2]:
            layer.stride = (1, 1)
    else:
        raise ValueError(
            f"backbone.stem: {config.name} has no {config.stem} stem, use imagenet "
            "(tiny and small exist for torchvision's ResNets, MobileNets and EfficientNets)"
        )


def save_backbone(
    path: Path, module: nn.Module, config: Backbone, image_size: int, metadata: Mapping[str, str]
) -> None:
    """Write the weights and all that `load_backbone` needs into one safetensors file, the same bytes every time.

    `metadata` joins the header: normalisation, digests; all its values are strings.
    """
    header = {
        "backbone": config.model_dump_json(),
        "image_size": str(image_size),
        "num_features": str(module.num_features),
        **metadata,
    }
    write_tensors(path, module.state_dict(), header)


def load_backbone(path: Path) -> tuple[Network, dict[str, str]]:
    """Rebuild the backbone that `save_backbone` wrote, on the CPU, and return it with the file's header.

    Raises ValueError naming the file and the weight that is missing, unknown or of another shape.
    """
    weights, header = read_tensors(path)
    if "backbone" not in header or "image_size" not in header:
        raise ValueError(f"{path} is no backbone of this project: its header does not say which network it holds")
    try:
        config = Backbone.model_validate_json(header["backbone"])
        image_size = IMAGE_SIZE.validate_python(header["image_size"])
    except ValidationError as error:
        raise ValueError(f"{path}: its header describes no known backbone: {error.errors()[0]['msg']}") from None
    module = build_backbone(config, image_size)
    load_strictly(module, weights, path)
    return module, header


def load_weights(module: nn.Module, path: Path) -> list[str]:
    """Load a plain torchvision or timm safetensors file into a backbone; return what was left over of its classifier.

    Only a classifier may be left over, and only batch norm's counter of batches, which files from before torch 0.4.1
    lack and evaluation never reads, may be missing. Raises ValueError naming the file and the weight that is missing,
    unknown or of another shape.
    """
    weights, _ = read_tensors(path)
    own = module.state_dict()
    dropped = [name for name in weights if name not in own and name.split(".")[0] in CLASSIFIERS]
    counters = {name: own[name] for name in own if name.endswith(".num_batches_tracked")}
    known = {name: weight for name, weight in weights.items() if name not in dropped}
    load_strictly(module, {**counters, **known}, path)
    return dropped


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically, the same bytes for the same content.

    The metadata also get the sha256 of the whole file, taken while zeros stand in its place.
    """
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    # safetensors writes its metadata in the order of a randomly seeded hash map
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted({**metadata, CHECKSUM: "0" * 64}.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    with atomic(path) as temporary:
        temporary.write_bytes(_with_checksum(content, "0" * 64, hashlib.sha256(content).hexdigest()))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file; a missing or broken one is a `ValueError`.

    A file that says its own sha256, as those written here do, is checked against it.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): write it again") from None
    said = metadata.pop(CHECKSUM, None)
    if said is not None and hashlib.sha256(_with_checksum(path.read_bytes(), said, "0" * 64)).hexdigest() != said:
        raise ValueError(f"{path} is not the file that was written (its sha256 differs): write it again")
    return tensors, metadata


def _with_checksum(content: bytes, old: str, new: str) -> bytes:
    return content.replace(f'"{CHECKSUM}":"{old}"'.encode(), f'"{CHECKSUM}":"{new}"'.encode(), 1)


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy the weights into the module if names and shapes agree exactly, else raise ValueError."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} does not fit {type(module).__name__}: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(weights)
