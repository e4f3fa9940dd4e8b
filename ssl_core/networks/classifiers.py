"""The file of a classifier: one linear layer on a backbone's features, with the names of its classes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError
from torch import nn

from ssl_core.networks.backbones import load_strictly, read_tensors, write_tensors

CLASSIFIER = "classifier.safetensors"
CLASSES = TypeAdapter(tuple[str, ...])


class Classifier(NamedTuple):
    """A linear layer from features to classes, and the metadata of its file."""

    layer: nn.Linear
    classes: tuple[str, ...]
    header: dict[str, str]


def save_classifier(path: Path, layer: nn.Linear, classes: Sequence[str], metadata: Mapping[str, str]) -> None:
    """Write a classifier; equal inputs give equal bytes. All values of `metadata` are strings."""
    write_tensors(path, layer.state_dict(), {"classes": json.dumps(list(classes)), **metadata})


def load_classifier(path: Path, *, on_backbone: bool = False) -> Classifier:
    """Read the file of a classifier; raise `ValueError` if it is damaged or another file.

    With `on_backbone` also if its input is the output of a projector.
    """
    weights, header = read_tensors(path)
    weight = weights.get("weight")
    try:
        classes = CLASSES.validate_json(header.get("classes", ""))
    except ValidationError:
        classes = ()
    if not classes or weight is None or weight.ndim != 2:
        raise ValueError(f"{path} is no classifier of this project: its header has no classes, or it has no weight")
    if on_backbone and header.get("input") != "backbone":
        raise ValueError(
            f"{path} classifies the output of a projector, which is not kept: fine-tune by a variant without projector"
        )
    layer = nn.Linear(weight.shape[1], len(classes))
    load_strictly(layer, weights, path)
    return Classifier(layer, classes, header)
