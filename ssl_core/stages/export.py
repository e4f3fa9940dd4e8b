"""The stage `export`: a backbone as others load it, in safetensors and ONNX, with a model card that says how.

Equal inputs give equal bytes, whatever folder the project lies in.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx import OnnxExporterError

from ssl_core.config import Backbone
from ssl_core.data.card import load_card
from ssl_core.files import read_json, write_bytes, write_text
from ssl_core.networks.backbones import Network, load_backbone, write_tensors
from ssl_core.networks.families import architecture
from ssl_core.provenance import file_digest
from ssl_core.report.model_card import write_model_card
from ssl_core.tracking.run import start

TOLERANCE = 1e-4  # between torch's and ONNX Runtime's features, as a share of the largest feature above 1
CARD = "README.md"  # where model hubs look for it


def run(
    experiment: str,
    *,
    spec: Mapping[str, Any],
    backbone: Path,
    card: Path,
    results: list[Path],
    output: Path,
    threads: int,
) -> None:
    """Write `backbone` as backbone.safetensors, backbone.onnx and README.md into the folder `output`.

    `spec` is the experiment's own section, `card` the description of its data set, `results` its evaluations' JSON.
    Raises `ValueError` for a network that ONNX cannot express, and for files that are not what they should be.
    """
    torch.set_num_threads(threads)
    network, header = load_backbone(backbone)
    network.eval()
    facts = describe(network, header)
    model = to_onnx(network, int(header["image_size"]), facts)
    difference = largest_difference(network, model, int(header["image_size"]))
    text = write_model_card(
        experiment,
        spec,
        network,
        header,
        card=load_card(card),
        results=[read_json(path) for path in results],
    )
    write_tensors(output / "backbone.safetensors", network.state_dict(), {**header, **facts})
    write_bytes(output / "backbone.onnx", model)
    write_text(output / CARD, text)
    with start("export", experiment, digest=header.get("version", file_digest(backbone)), parameters=facts) as tracked:
        tracked.artifact(output / CARD, on_parent=True)  # some kilobytes; the weights stay where they are
    print(f"{experiment}: ONNX Runtime's features differ from torch's by {difference:.1e} at most -> {output}")


def describe(network: Network, header: Mapping[str, str]) -> dict[str, str]:
    """Return what one must know to use the weights, as both files carry it."""
    config = Backbone.model_validate_json(header["backbone"])
    library, name = architecture(config)
    said = {key: header[key] for key in ("image_size", "mean", "std", "version") if key in header}
    return {
        "architecture": name,
        "library": library,
        "stem": config.stem,
        "num_features": str(network.num_features),
    } | said


def to_onnx(network: nn.Module, image_size: int, facts: Mapping[str, str]) -> bytes:
    """Return the network as an ONNX file: `images` (batch, 3, size, size), batch free, to `features` (batch, dim).

    Batch norm is folded into the convolutions, and nothing tells where on which machine the network was.
    """
    example = torch.zeros(2, 3, image_size, image_size)  # a batch of one would be taken for a constant
    try:
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: Dim("batch")},),
            input_names=["images"],
            output_names=["features"],
            external_data=False,
            verbose=False,
        )
    except OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{type(network).__name__} cannot be written as ONNX: {reason}") from error
    assert program is not None  # so it is with dynamo=True
    model = program.model_proto
    _forget_the_source(model)
    onnx.helper.set_model_props(model, dict(sorted(facts.items())))
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def largest_difference(network: nn.Module, model: bytes, image_size: int) -> float:
    """Return the largest difference between torch's and ONNX Runtime's features, of one noise image and of five.

    Raises `RuntimeError` above `TOLERANCE`: such a file must not leave the house.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    noise = torch.randn(6, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for images in noise.split([1, 5]):
        with torch.no_grad():
            expected: Tensor = network(images)
        (found,) = session.run(None, {"images": images.numpy()})
        difference = (torch.from_numpy(found) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise RuntimeError(f"the ONNX file gives other features than torch: they differ by {difference:.2g}")
        worst = max(worst, difference)
    return worst


def _forget_the_source(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes: stack traces with the paths of this machine, names of classes, the build of torch."""
    model.producer_version = model.producer_version.split("+")[0]  # not "+cu130": it is the same everywhere
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
