"""The stage `adopt`: weights that were trained elsewhere become a backbone file as a pre-training writes it.

The file's own normalisation and image size matter as much as its weights: with others every number is worse, silently.
"""

import json
import sys
from pathlib import Path
from typing import Any

from ssl_core.config import Adopted, Backbone, Normalisation, parse
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

IMAGENET = Normalisation(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
SEED = "0"  # of the untrained network that evaluations set beside it, where the file does not say its own


def run(experiment: str, *, spec: dict[str, Any], code: str, manifest: Path, output: Path) -> None:
    """Write the network of `spec` with the weights of its file to `output`.

    A file by torchvision or timm is rebuilt as `spec.backbone` says, for images of `spec.image_size` pixels, else of
    the data set's; its classifier is left out, all else must fit. A file of ours keeps the image size, normalisation
    and seed of its header. Raises `ValueError` for a wrong key, a file that does not fit or holds another network.
    """
    config = parse(Adopted, spec, f"experiments.{experiment}")
    path, shards = Path(config.weights), Manifest.load(manifest)
    _, header = read_tensors(path)
    if "backbone" in header:
        module, size, metadata = _ours(config, path, header)
    else:
        module, size, metadata = _foreign(config, path, shards)
    digests = {
        "spec": digest(canonical(spec)),
        "code": code,
        "data": file_digest(manifest),
        "weights": file_digest(path),
    }
    metadata |= {f"digest_{name}": value for name, value in digests.items()}
    save_backbone(output, module, config.backbone, size, metadata)
    print(f"{experiment}: {config.backbone.name} for {size}-pixel images from {path} -> {output}")


def _ours(config: Adopted, path: Path, header: dict[str, str]) -> tuple[Network, int, dict[str, str]]:
    """Rebuild a backbone.safetensors with what its header says of it."""
    holds = Backbone.model_validate_json(header["backbone"])
    if holds != config.backbone:
        raise ValueError(f"backbone: {path} holds {holds.model_dump(mode='json')}; say so or name another file")
    for key in ("image_size", "normalisation"):
        if getattr(config, key) is not None:
            raise ValueError(f"{key}: {path} says its own; leave the key out")
    module, header = load_backbone(path)
    known = {name: header[name] for name in ("mean", "std", "seed") if name in header}
    return module, int(header["image_size"]), known


def _foreign(config: Adopted, path: Path, shards: Manifest) -> tuple[Network, int, dict[str, str]]:
    """Build the network that the section describes and load a state dict by torchvision or timm into it."""
    size = config.image_size or shards.image_size
    module = build_backbone(config.backbone, size)
    dropped = load_weights(module, path)
    if dropped:
        print(f"{path}: left out the classifier ({', '.join(dropped)})", file=sys.stderr)
    pixels = config.normalisation or "imagenet"
    if pixels == "imagenet":
        pixels = IMAGENET
    elif pixels == "dataset":
        pixels = Normalisation(mean=shards.mean, std=shards.std)
    said = {"mean": json.dumps(pixels.mean), "std": json.dumps(pixels.std), "seed": SEED}
    return module, size, said
