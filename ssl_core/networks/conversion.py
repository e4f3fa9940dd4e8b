"""Public checkpoints of self-supervised training, converted to one file with backbone and projector.

The names of their tensors are those of the authors' repositories (docs/sources.md#checkpoints).
"""

import json
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssl_core.config import IMAGENET, Backbone, Normalisation
from ssl_core.files import check_output
from ssl_core.mistakes import excerpt
from ssl_core.networks.backbones import build_backbone, load_strictly, save_backbone
from ssl_core.networks.heads import PROTOTYPES, rebuild_mlp
from ssl_core.networks.pickles import is_state_dict, read_pickled
from ssl_core.provenance import file_digest

FIRST_LAYERS = ("conv1.weight", "patch_embed.proj.weight")  # of ResNets and of vision transformers
SEED = "0"  # of the untrained network that evaluations compare with


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The place and the names of a network's tensors in a checkpoint."""

    sections: tuple[str, ...]  # keys of the checkpoint that may contain the tensors; without them it is a state dict
    prefix: str  # regular expression: start of the names of the network
    projector: str  # regular expression: start of the projector's names after `prefix`
    plain: bool = True  # whether the projector consists of plain layers; another head may be missing in a file
    ignored: str | None = None  # regular expression: names after `prefix` that belong to neither
    renamed: Mapping[str, str] | None = None  # start of a name after `prefix` -> its replacement
    normalisation: Normalisation = IMAGENET
    classes: tuple[type, ...] = ()  # that the file may contain beside tensors and plain containers


LAYOUTS = {
    "moco": Layout(sections=("state_dict",), prefix=r"(module\.)?encoder_q\.", projector=r"fc\."),
    "swav": Layout(
        sections=("state_dict",),
        prefix=r"(module\.)?",
        projector=r"projection_head\.",
        ignored=r"prototypes",
        renamed={"prototypes.weight": "projection_head.prototypes"},
        normalisation=Normalisation(mean=IMAGENET.mean, std=(0.228, 0.224, 0.225)),  # as in SwAV's code
    ),
    # No release by the authors: the names of yaox12/BYOL-PyTorch, whose encoder is a sequence of a ResNet's children.
    "byol": Layout(
        sections=("model",),
        prefix=r"(module\.)?online_network\.",
        projector=r"projetion\.",
        renamed={
            "encoder.0.": "conv1.",
            "encoder.1.": "bn1.",
            "encoder.4.": "layer1.",
            "encoder.5.": "layer2.",
            "encoder.6.": "layer3.",
            "encoder.7.": "layer4.",
            "projetion.l1.": "projetion.0.",
            "projetion.bn1.": "projetion.1.",
            "projetion.l2.": "projetion.3.",
        },
    ),
    "simsiam": Layout(sections=("state_dict",), prefix=r"(module\.)?encoder\.", projector=r"fc\."),
    # Its head has GELU between its layers and weight-normalised outputs (`Head` of ssl_core/methods/dino.py). The last
    # layout, since it accepts plain networks.
    "dino": Layout(
        sections=("teacher",),
        prefix=r"(module\.)?(backbone\.)?",
        projector=r"head\.(?=layers\.|direction$|length$)",
        plain=False,
        ignored=r"head\.|fc\.",
        renamed={
            "head.mlp.": "head.layers.",
            "head.last_layer.weight_v": "head.direction",
            "head.last_layer.weight_g": "head.length",
        },
        classes=(Namespace,),
    ),
}


def convert(
    checkpoint: Path,
    *,
    layout: str,
    output: Path,
    backbone: Backbone,
    image_size: int,
    backbone_only: bool = False,
    force: bool = False,
) -> str:
    """Write backbone and projector of a checkpoint to `output`, in the form of a backbone.safetensors; describe it.

    Raises ValueError for an existing output, a file that contains code, another layout, a missing projector and another
    network.
    """
    check_output(output, force=force)
    if not checkpoint.is_file():
        raise ValueError(f"{checkpoint} {'is a folder' if checkpoint.is_dir() else 'does not exist'}: give a file")
    if output.exists() and output.samefile(checkpoint):
        raise ValueError(f"{output} is the checkpoint itself: give another name for the output")
    form = LAYOUTS[layout]
    content = read_pickled(checkpoint, *form.classes)
    network, projector = split(content, form)
    if not is_network(network):
        raise ValueError(f"{checkpoint} does not have the layout {layout}: {_advice(content)}")
    if backbone_only or (not form.plain and "direction" not in projector):
        projector = {}
    elif not projector:
        raise ValueError(
            f"{checkpoint} has no projector, expected one in the layout {layout}: add --backbone-only to convert the "
            "backbone alone"
        )
    module = build_backbone(backbone, image_size)
    counters = {name: value for name, value in module.state_dict().items() if name.endswith(".num_batches_tracked")}
    load_strictly(module, {**counters, **network}, checkpoint)
    width = _describe_projector(projector, module.num_features, checkpoint)
    metadata = {
        "mean": json.dumps(form.normalisation.mean),
        "std": json.dumps(form.normalisation.std),
        "seed": SEED,
        "layout": layout,
        "digest_weights": file_digest(checkpoint),
    }
    save_backbone(output, module, backbone, image_size, metadata, projector)
    return f"{backbone.name} for {image_size}-pixel images, {width} -> {output}"


def _describe_projector(projector: Mapping[str, Tensor], num_features: int, checkpoint: Path) -> str:
    if not projector:
        return "no projector"
    if "direction" in projector:
        return f"DINO's head with {len(projector['direction'])} outputs"
    try:
        _, dim = rebuild_mlp(projector, num_features)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {error}: add --backbone-only to convert the backbone alone") from error
    prototypes = f" and {len(projector[PROTOTYPES])} prototypes" if PROTOTYPES in projector else ""
    return f"projector to {dim} dimensions{prototypes}"


def split(content: Any, layout: Layout) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of backbone and projector by the names of torchvision or timm; empty for another layout."""
    network: dict[str, Tensor] = {}
    projector: dict[str, Tensor] = {}
    for name, tensor in _tensors(content, layout).items():
        start = re.match(layout.prefix, name)
        if start is None:
            continue
        name = name[start.end() :]
        for old, new in (layout.renamed or {}).items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        head = re.match(layout.projector, name)
        if head is not None:
            projector[name[head.end() :]] = tensor
        elif layout.ignored is None or re.match(layout.ignored, name) is None:
            network[name] = tensor
    if projector.keys() <= {"weight", "bias"}:  # a single layer, as in MoCo v1
        projector = {f"0.{name}": tensor for name, tensor in projector.items()}
    return network, projector


def is_network(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether the tensors include the first layer of a ResNet or a vision transformer."""
    return any(name in tensors for name in FIRST_LAYERS)


def _tensors(content: Any, layout: Layout) -> Mapping[str, Tensor]:
    sections = [content.get(key) for key in layout.sections] if isinstance(content, dict) else []
    for candidate in (*sections, content):
        if is_state_dict(candidate):
            return candidate
    return {}


def _advice(content: Any) -> str:
    """Name the layout that fits, or the names in the file."""
    for name, layout in LAYOUTS.items():
        network, projector = split(content, layout)
        if is_network(network) and (projector or not layout.plain):
            return f"use --layout {name}"
    names = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
    return f"it contains {excerpt(names, 100)}, expected a checkpoint of one of {', '.join(LAYOUTS)}"
