"""Networks that end in the first two layers of the pre-training's projector (SSLight's semi-supervised protocol).

Of a projector with three layers (DINO, BYOL, SimSiam, NPID's `mlp`) these are Linear, BatchNorm and activation, twice.
Of a projector with two layers (MoCo, SwAV, SimCLR, ReSSL, ...) the second is the output, without an activation.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssl_core.config import Backbone, parse
from ssl_core.evaluations.base import Subjects
from ssl_core.files import read_json
from ssl_core.methods.base import method_class
from ssl_core.networks.backbones import build_backbone, load_strictly, read_tensors
from ssl_core.networks.batchnorm import split_batchnorm


def with_projector(subjects: Subjects) -> Subjects:
    """Append two layers of the trained projector to the pre-trained network, and new ones to the untrained network.

    The raw-pixel baseline is unchanged. Raises `ValueError` if there is no such projector or its weights do not fit.
    """
    if subjects.model is None:
        raise ValueError("this variant needs a projector and the backbone has none: choose another variant")
    projector = load_projector(subjects.model, subjects.header).to(subjects.device)
    fresh = copy.deepcopy(projector)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(subjects.header["seed"]))
        for layer in fresh:
            if isinstance(layer, nn.Linear | nn.BatchNorm1d):
                layer.reset_parameters()
    networks = dict(subjects.networks)
    networks["pretrained"] = nn.Sequential(networks["pretrained"], projector)
    networks["untrained"] = nn.Sequential(networks["untrained"], fresh.to(subjects.device))
    return replace(subjects, networks=networks)


def load_projector(model: Path, header: Mapping[str, str]) -> nn.Sequential:
    """Rebuild the method of a model.safetensors, load it strictly and return the first two layers of its projector.

    `header` is that of the backbone's file. The settings come from `pretrain.json` in the folder of `model`.
    """
    weights, metadata = read_tensors(model)
    if any(metadata.get(name) != header.get(f"digest_{name}") for name in ("spec", "code", "data")):
        raise ValueError(f"{model} and the backbone are of different pre-trainings: take both from one folder")
    report = read_json(model.with_name("pretrain.json"))
    resolved = report["resolved"]
    kind = method_class(resolved["method"]["name"])
    with torch.random.fork_rng(devices=[]):
        method = kind(
            parse(kind.Config, resolved["method"], "method"),
            build_backbone(parse(Backbone, resolved["backbone"], "backbone"), int(header["image_size"])),
            num_images=report["num_images"],
            batch_size=resolved["training"]["batch_size"],
            seed=resolved["training"]["seed"],
        )
    load_strictly(method, weights, model)
    return first_two_layers(method, resolved["method"]["name"])


def first_two_layers(method: Any, name: str) -> nn.Sequential:
    """Return the projector's layers before its third linear layer; a `ValueError` if it has no second."""
    projector = getattr(getattr(method, "head", method), "layers", getattr(method, "projector", None))
    layers = list(projector) if isinstance(projector, nn.Sequential) else []
    linear = [position for position, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
    if len(linear) < 2:
        raise ValueError(
            f"method '{name}' has no projector of two layers, which this variant needs: choose a variant that needs "
            "the backbone alone"
        )
    kept = nn.Sequential(*layers[: linear[2]] if len(linear) > 2 else layers)
    split_batchnorm(kept, 1)  # split statistics belong to the pre-training
    return kept.requires_grad_(False)
