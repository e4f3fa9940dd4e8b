"""Backbones: networks of torchvision and timm without their classifier, and the safetensors files of their weights.

Parameter names are those of torchvision and timm, so weights load in both directions; only the classifier is missing.
The families are in `families.py`; docs/sources.md#backbones lists the sizes and variants of the papers.
"""

import copy
import difflib
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

from ssl_core.config import Backbone
from ssl_core.files import atomic
from ssl_core.networks.families import (
    CLASSIFIERS,
    FAMILIES,
    TRANSFORMERS,
    WideResNet,
    can_drop_paths,
    family_of,
    fit_stem,
)
from ssl_core.networks.heads import PROJECTOR
from ssl_core.networks.pickles import is_pickled, read_state_dict
from ssl_core.provenance import digest

CONVOLUTIONAL = tuple(name for family in FAMILIES for name in family.names)
NAMES = (*CONVOLUTIONAL, *TRANSFORMERS)
WIDE = "resnet50x2"
IMAGE_SIZE = TypeAdapter(Annotated[int, Field(ge=1, le=8192)])  # bounds for the header of a file
CHECKSUM = "ssl_core_sha256"  # key of the file's checksum in its metadata
NO_CHECKSUM = "0" * 64  # in place of the checksum while it is computed


class Network(nn.Module):
    """Type of a backbone: (batch, 3, size, size) -> (batch, num_features)."""

    num_features: int


def build_backbone(config: Backbone, image_size: int) -> Network:
    """Build a randomly initialised backbone for square images of `image_size` pixels.

    Raises ValueError for an unknown name, for a stem that the network lacks, and for images that it cannot take.
    """
    if config.drop_path and not can_drop_paths(config.name):
        raise ValueError(
            f"backbone.drop_path {config.drop_path:g}: {config.name} cannot drop paths; set 0, or use a network of "
            f"timm or one of {', '.join(TRANSFORMERS)}"
        )
    if config.name in TRANSFORMERS:
        module = _transformer(config.name, image_size, config.drop_path)
    elif config.name.startswith("timm/"):
        module = _timm(config.name, image_size, config.drop_path)
    else:
        module = _torchvision(config)
    fit_stem(module, config)
    network = cast(Network, module)
    network.num_features = check_image_size(module, config, image_size)
    return network


def check_image_size(module: nn.Module, config: Backbone, image_size: int) -> int:
    """Return the number of features for images of `image_size` pixels, from a forward pass; call it per crop size.

    Raises ValueError if the network cannot take images of that size.
    """
    _check_stride(module, config, image_size)
    # In train mode some networks return auxiliary outputs (Inception), which must be refused; batch norm then needs two
    # images. The meta device would compute nothing, but it imports SymPy, which takes a second.
    network = copy.deepcopy(module).train()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and max(layer.kernel_size) > 1:
            layer.register_forward_pre_hook(_refuse_single_pixels)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # dropout draws random numbers
            output = network(torch.zeros(2, 3, image_size, image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{config.name} cannot take images of {image_size}x{image_size} pixels: {reason}") from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{config.name} cannot be a backbone: its output is {kind}, expected (batch, features)")
    return output.shape[1]


def _check_stride(module: nn.Module, config: Backbone, image_size: int) -> None:
    """Raise ValueError if the strides of the stem leave less than one pixel of the image."""
    strides = family_of(module).strides
    stride = strides.get(config.stem, 1)
    if image_size >= stride:
        return
    stems = [stem for stem, pixels in strides.items() if pixels <= image_size]
    advice = f"use backbone.stem: {' or '.join(stems)}, or larger images" if stems else "use larger images"
    raise ValueError(
        f"{config.name} with the {config.stem} stem divides {image_size}-pixel images by {stride}, "
        f"which leaves less than 1x1: {advice}"
    )


def _refuse_single_pixels(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Raise ValueError before a convolution that strides over a single pixel.

    Such a layer uses only the centre of its kernel, and its bfloat16 weight gradient is uninitialised memory in oneDNN
    of torch 2.14.
    """
    if max(inputs[0].shape[2:]) == 1:
        raise ValueError("only one pixel is left before the last stride; use larger images or another stem")


def _torchvision(config: Backbone) -> nn.Module:
    """Build a network of torchvision without its classifier, or ResNet-50x2, which torchvision lacks."""
    name = config.name.removeprefix("torchvision/")
    available = torchvision.models.list_models(module=torchvision.models)
    if config.name == WIDE:
        module = WideResNet()
    elif name in available and (config.name != name or name in CONVOLUTIONAL):
        module = torchvision.models.get_model(name, weights=None)
    else:
        raise ValueError(_unknown(config.name))
    family_of(module).remove_classifier(module, config)
    return module


def _transformer(name: str, image_size: int, drop_path: float) -> nn.Module:
    """Build a vision transformer with position embeddings that are resized to the image (bicubic)."""
    # timm takes seconds to import, and most experiments do not use it
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import VisionTransformer

    shape = TRANSFORMERS[name]
    if image_size < shape.patch_size or image_size % shape.patch_size:
        raise ValueError(
            f"{name} cuts images into patches of {shape.patch_size} pixels, which does not divide "
            f"image_size {image_size}: resize the images to a multiple of {shape.patch_size}"
        )
    arguments: dict[str, Any] = {
        "patch_size": shape.patch_size,
        "embed_dim": shape.embed_dim,
        "num_heads": shape.num_heads,
        "depth": 12,
        "num_classes": 0,
        "dynamic_img_size": True,
        "drop_path_rate": drop_path,
    }
    if name != "deit_tiny":
        return VisionTransformer(img_size=image_size, **arguments)
    # As in the code of Shi et al. (docs/sources.md#shi): 6 heads of 64 (not 192 / 6) without bias, dropout 0.1, weights
    # with PyTorch's default initialisation, class token and position embeddings from N(0, 1), and a frozen random patch
    # projection (the trick of MoCo v3).
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


def _timm(name: str, image_size: int, drop_path: float) -> nn.Module:
    """Build any network of timm, with position embeddings for `image_size` if it has resizable ones."""
    import timm

    model = name.removeprefix("timm/")
    if not timm.is_model(model):
        raise ValueError(_unknown(name))
    options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}  # unknown to some networks
    try:
        module = timm.create_model(model, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        if not drop_path:
            raise
        raise ValueError(f"backbone.drop_path {drop_path:g}: {name} cannot drop paths; set 0") from error
    if hasattr(module, "dynamic_img_size"):
        options |= {"img_size": image_size, "dynamic_img_size": True}
        module = timm.create_model(model, pretrained=False, num_classes=0, **options)
    return module


def backbone_names() -> list[str]:
    """Return all valid names but those of timm."""
    return [*NAMES, *(f"torchvision/{name}" for name in torchvision.models.list_models(module=torchvision.models))]


def _unknown(name: str) -> str:
    """Return the error message for an unknown backbone, with the most similar names."""
    import timm

    names = [*backbone_names(), *(f"timm/{other}" for other in timm.list_models())]
    model = name.rpartition("/")[2]
    same_model = [other for other in names if other.endswith(f"/{model}")]
    nearest = same_model or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    return f"unknown backbone {name!r}: {hint}Use {', '.join(NAMES)}, timm/<name> or torchvision/<name>"


def save_backbone(
    path: Path,
    module: nn.Module,
    config: Backbone,
    image_size: int,
    metadata: Mapping[str, str],
    projector: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights and a header that `load_backbone` can rebuild the network from; equal inputs give equal bytes.

    `metadata` joins the header: normalisation, digests; all values are strings. The tensors of a `projector` are
    written beside the backbone's.
    """
    header = {
        "backbone": config.model_dump_json(exclude={"drop_path"}),  # paths are dropped in pre-training only
        "image_size": str(image_size),
        "num_features": str(module.num_features),
        **metadata,
    }
    head = {f"{PROJECTOR}{name}": tensor for name, tensor in (projector or {}).items()}
    write_tensors(path, {**module.state_dict(), **head}, header)


def load_backbone(path: Path) -> tuple[Network, dict[str, str]]:
    """Rebuild the backbone of a file by `save_backbone` on the CPU; return it with the file's header.

    Raises ValueError with the file and the weight that is missing, unknown or of another shape.
    """
    weights, header = read_tensors(path)
    if "backbone" not in header or "image_size" not in header:
        raise ValueError(f"{path} is no backbone of this project: its header has no backbone and image_size")
    try:
        config = Backbone.model_validate_json(header["backbone"])
        image_size = IMAGE_SIZE.validate_python(header["image_size"])
    except ValidationError as error:
        raise ValueError(f"{path}: its header describes no known backbone: {error.errors()[0]['msg']}") from None
    module = build_backbone(config, image_size)
    load_strictly(module, without_projector(weights), path)
    return module, header


def without_projector(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file without those of a converted checkpoint's projector."""
    return {name: weight for name, weight in weights.items() if not name.startswith(PROJECTOR)}


def load_weights(module: nn.Module, path: Path) -> list[str]:
    """Load a file with the names of torchvision or timm; return the names that were dropped.

    Only the classifier is dropped. Only the batch counters of batch norm may be missing: files from before torch 0.4.1
    lack them, and evaluation does not read them. Raises ValueError with the file and the weight that is missing,
    unknown or of another shape.
    """
    weights, _ = read_tensors(path)
    initial = module.state_dict()
    dropped = [name for name in weights if name not in initial and name.split(".")[0] in CLASSIFIERS]
    counters = {name: value for name, value in initial.items() if name.endswith(".num_batches_tracked")}
    kept = {name: weight for name, weight in weights.items() if name not in dropped}
    load_strictly(module, {**counters, **kept}, path)
    return dropped


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; equal content gives equal bytes.

    The metadata also get the sha256 of the whole file, computed with zeros in place of the checksum. Raises ValueError
    for a tensor that is not finite, before anything is written.
    """
    _refuse_infinite(tensors, f"{path} is not written")
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    # safetensors writes its metadata in the order of a randomly seeded hash map
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted({**metadata, CHECKSUM: NO_CHECKSUM}.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    content = len(text).to_bytes(8, "little") + text + content[8 + length :]
    with atomic(path) as temporary:
        temporary.write_bytes(_with_checksum(content, old=NO_CHECKSUM, new=digest(content)))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file, or a state dict by `torch.save`, which has none.

    Raises ValueError if the file is missing or broken, has a tensor that is not finite, or differs from the checksum in
    its metadata, if there is one.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if is_pickled(path):
        tensors = read_state_dict(path)
        _refuse_infinite(tensors, f"{path} cannot be used")
        return tensors, {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): write it again") from None
    checksum = metadata.pop(CHECKSUM, None)
    if checksum is not None and digest(_with_checksum(path.read_bytes(), old=checksum, new=NO_CHECKSUM)) != checksum:
        raise ValueError(f"{path} is not the file that was written (its sha256 differs): write it again")
    _refuse_infinite(tensors, f"{path} cannot be used")
    return tensors, metadata


def find_infinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a value that is infinite or not a number."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return None


def _refuse_infinite(tensors: Mapping[str, Tensor], consequence: str) -> None:
    name = find_infinite(tensors)
    if name is not None:
        values = tensors[name]
        count = values.numel() - int(values.isfinite().sum())
        raise ValueError(
            f"{consequence}: {count} of {values.numel()} values of its tensor '{name}' are not finite, "
            "so the training that made it diverged; use weights of another training or epoch"
        )


def _with_checksum(content: bytes, *, old: str, new: str) -> bytes:
    return content.replace(f'"{CHECKSUM}":"{old}"'.encode(), f'"{CHECKSUM}":"{new}"'.encode(), 1)


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy the weights into the module; raises ValueError unless names and shapes agree exactly."""
    expected = module.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in expected]
    for name in expected:
        if name in weights and weights[name].shape != expected[name].shape:
            problems.append(f"{name} is {tuple(weights[name].shape)}, not {tuple(expected[name].shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"{path} does not fit {type(module).__name__}: {'; '.join(problems[:3])}{more}")
    module.load_state_dict(weights)
