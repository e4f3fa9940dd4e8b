"""The stage `adopt`: turn weights that were trained elsewhere into a backbone file like that of a pre-training.

Normalisation and image size must be those of the training: with others all results are worse, without an error.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ssl_core.config import IMAGENET, Adopted, Backbone, Normalisation, parse
from ssl_core.data.shards import Manifest
from ssl_core.networks.backbones import (
    Network,
    build_backbone,
    load_backbone,
    load_weights,
    read_tensors,
    save_backbone,
)
from ssl_core.provenance import canonical, digest, file_digest

SEED = "0"  # of the untrained network that evaluations compare with, unless the file has a seed


def run(experiment: str, *, spec: dict[str, Any], code: str, manifest: Path, output: Path) -> None:
    """Write the network of `spec` with the weights of its file to `output`.

    For a file by torchvision or timm the network is built from `spec.backbone`, for images of `spec.image_size` pixels
    (default: the data set's); the classifier is dropped, all other weights must fit. A backbone file of this project
    keeps the image size, normalisation and seed of its header. Raises ValueError for an invalid key, and for a file
    that does not fit or contains another network.
    """
    config = parse(Adopted, spec, f"experiments.{experiment}")
    path = Path(config.weights)
    shards = Manifest.load(manifest)
    _, header = read_tensors(path)
    if "backbone" in header:
        module, size, metadata = _from_backbone_file(config, path)
    else:
        module, size, metadata = _from_state_dict(config, path, shards)
    digests = {
        "spec": digest(canonical(spec)),
        "code": code,
        "data": file_digest(manifest),
        "weights": file_digest(path),
    }
    metadata |= {f"digest_{name}": value for name, value in digests.items()}
    save_backbone(output, module, config.backbone, size, metadata)
    print(f"{experiment}: {config.backbone.name} for {size}-pixel images from {path} -> {output}")


def _from_backbone_file(config: Adopted, path: Path) -> tuple[Network, int, dict[str, str]]:
    """Load a backbone.safetensors with image size, normalisation and seed of its header."""
    module, header = load_backbone(path)
    backbone = Backbone.model_validate_json(header["backbone"])
    if backbone != config.backbone:
        network = backbone.model_dump(mode="json")
        raise ValueError(f"backbone: {path} contains {network}; set `backbone` to that or choose another file")
    for key in ("image_size", "normalisation"):
        if getattr(config, key) is not None:
            raise ValueError(f"{key}: the header of {path} defines it already; remove the key")
    metadata = {name: header[name] for name in ("mean", "std", "seed") if name in header}
    return module, int(header["image_size"]), metadata


def _from_state_dict(config: Adopted, path: Path, shards: Manifest) -> tuple[Network, int, dict[str, str]]:
    """Build the network of the settings and load a state dict of torchvision or timm into it."""
    size = config.image_size or shards.image_size
    module = build_backbone(config.backbone, size)
    dropped = load_weights(module, path)
    if dropped:
        print(f"{path}: dropped the classifier ({', '.join(dropped)})", file=sys.stderr)
    normalisation = config.normalisation or "imagenet"
    if normalisation == "imagenet":
        normalisation = IMAGENET
    elif normalisation == "dataset":
        normalisation = Normalisation(mean=shards.mean, std=shards.std)
    metadata = {"mean": json.dumps(normalisation.mean), "std": json.dumps(normalisation.std), "seed": SEED}
    return module, size, metadata
