"""The stage `export-classifier`: write a fine-tuned backbone with its classifier as one ONNX file."""

import json
from pathlib import Path

import torch
from torch import nn

from ssl_core.data.views import View
from ssl_core.files import write_bytes
from ssl_core.networks.backbones import load_backbone
from ssl_core.networks.classifiers import load_classifier
from ssl_core.networks.exported import ExportedNetwork
from ssl_core.stages.export import describe, largest_difference, to_onnx


def run(experiment: str, evaluation: str, *, backbone: Path, classifier: Path, output: Path, threads: int) -> None:
    """Write `output` (.onnx): normalised `images` (batch, 3, size, size) to `logits` (batch, classes).

    Its metadata have the names of the classes, mean, std and the view of images. Raises ValueError for a classifier
    on a projector, which is not kept.
    """
    torch.set_num_threads(threads)
    network, header = load_backbone(backbone)
    head = load_classifier(classifier, on_backbone=True)
    model = nn.Sequential(network, head.layer).eval()
    size = View.model_validate_json(header["view"]).size
    facts = {**describe(network, header), "view": header["view"], "classes": json.dumps(head.classes)}
    content = to_onnx(model, size, facts | {"image_size": str(size)}, output="logits")
    difference = largest_difference(model, ExportedNetwork(content), size)
    write_bytes(output, content)
    print(f"{experiment}: logits of ONNX Runtime and torch differ by at most {difference:.1e} -> {output}")
