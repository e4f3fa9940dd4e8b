"""The stage `export`: write a backbone as safetensors and ONNX for other programs, with a model card.

Equal inputs give equal bytes, independent of the project's folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx import OnnxExporterError

from ssl_core.config import Backbone, Export, parse
from ssl_core.data.card import load_card
from ssl_core.files import read_json, write_bytes, write_json, write_text
from ssl_core.networks.backbones import Network, load_backbone, write_tensors
from ssl_core.networks.exported import ExportedFile, ExportedNetwork
from ssl_core.networks.families import architecture
from ssl_core.provenance import file_digest
from ssl_core.report.hub import hub_config
from ssl_core.report.model_card import write_model_card
from ssl_core.tracking.run import start

TOLERANCE = 1e-4  # largest difference between the features of torch and of a file, relative to features above 1
CARD = "README.md"  # the name that model hubs read
SIZE_STEP = 32  # pixels to the second size of networks of any size; a multiple of usual patches


def run(
    experiment: str,
    *,
    spec: Mapping[str, Any],
    backbone: Path,
    card: Path,
    results: list[Path],
    output: Path,
    threads: int,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write `backbone` as backbone.safetensors, backbone.onnx, config.json and README.md into the folder `output`.

    `spec` is the experiment's settings, `card` the file of its data set's card, `results` the JSON files of its
    evaluations, `options` the configuration's section `export`. Raises ValueError for a network that ONNX cannot
    express, and for invalid files.
    """
    torch.set_num_threads(threads)
    config = parse(Export, options or {}, "export")
    network, header = load_backbone(backbone)
    network.eval()
    facts = describe(network, header)
    size = int(header["image_size"])
    exported = Normalised(network, header).eval() if config.normalise else network
    chosen = {key: "true" for key, value in config.model_dump().items() if value}
    model = to_onnx(exported, size, facts | chosen, dynamic_size=config.dynamic_size)
    difference = largest_difference(exported, ExportedNetwork(model), size)
    if config.dynamic_size:
        difference = max(difference, largest_difference(exported, ExportedNetwork(model), size + SIZE_STEP))
    text = write_model_card(
        experiment,
        spec,
        network,
        header,
        card=load_card(card),
        results=[read_json(path) for path in results],
        options=config,
    )
    write_tensors(output / "backbone.safetensors", network.state_dict(), {**header, **facts})
    write_bytes(output / "backbone.onnx", model)
    write_json(output / "config.json", hub_config(network, header))
    write_text(output / CARD, text)
    with start("export", experiment, digest=header.get("version", file_digest(backbone)), parameters=facts) as tracked:
        tracked.artifact(output / CARD, on_parent=True)  # some kilobytes; the weights are not copied
    print(f"{experiment}: features of ONNX Runtime and torch differ by at most {difference:.1e} -> {output}")


class Normalised(nn.Module):
    """A network that takes pixels in 0..1 and normalises them by the mean and standard deviation of its header."""

    def __init__(self, network: nn.Module, header: Mapping[str, str]) -> None:
        super().__init__()
        self.network = network
        mean, std = (torch.tensor(json.loads(header[name]))[:, None, None] for name in ("mean", "std"))
        self.mean, self.std = nn.Buffer(mean), nn.Buffer(std)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def describe(network: Network, header: Mapping[str, str]) -> dict[str, str]:
    """Return the facts that are needed to use the weights, for the headers of both files."""
    config = Backbone.model_validate_json(header["backbone"])
    library, name = architecture(config)
    facts = {
        "architecture": name,
        "library": library,
        "stem": config.stem,
        "num_features": str(network.num_features),
    }
    return facts | {key: header[key] for key in ("image_size", "mean", "std", "version") if key in header}


def to_onnx(
    network: nn.Module,
    image_size: int,
    facts: Mapping[str, str],
    *,
    output: str = "features",
    dynamic_size: bool = False,
) -> bytes:
    """Return the network as an ONNX file: `images` (batch, 3, size, size) to `output` (batch, dim), for any batch.

    With `dynamic_size` height and width are free too; raises ValueError for networks of a fixed size. Batch norm is
    folded into the convolutions. The file contains no paths and names of this machine.
    """
    example = torch.zeros(2, 3, image_size, image_size)  # with a batch of one the exporter takes it for a constant
    dimensions = {0: Dim("batch")}
    if dynamic_size:
        _check_other_size(network, image_size + SIZE_STEP)
        dimensions |= {2: Dim("height"), 3: Dim("width")}
    try:
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            dynamic_shapes=(dimensions,),
            input_names=["images"],
            output_names=[output],
            external_data=False,
            verbose=False,
        )
    except OnnxExporterError as error:
        if dynamic_size:
            raise ValueError(_refusal(network)) from error
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{type(network).__name__} cannot be written as ONNX: {reason}") from error
    assert program is not None  # with dynamo=True
    model = program.model_proto
    _remove_traces(model)
    onnx.helper.set_model_props(model, dict(sorted(facts.items())))
    onnx.checker.check_model(model)
    return model.SerializeToString(deterministic=True)


def _check_other_size(network: nn.Module, image_size: int) -> None:
    """Refuse a network that takes images of one size: torch would export it as if it took all."""
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, image_size, image_size))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(_refusal(network)) from error


def _refusal(network: nn.Module) -> str:
    name = type(network).__name__
    return f"{name} cannot be written as ONNX for images of any size: leave out export.dynamic_size"


def largest_difference(network: nn.Module, exported: ExportedFile, image_size: int) -> float:
    """Return the largest difference between the features of torch and a file, for one and five images in each layout.

    Raises RuntimeError above `TOLERANCE`, so that no wrong file is written.
    """
    noise = torch.randn(6, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    largest = 0.0
    for images in noise.split([1, 5]):
        with torch.no_grad():
            expected: Tensor = network(images)
        tolerance = TOLERANCE * max(1.0, expected.abs().max().item())
        for memory_format in (torch.contiguous_format, torch.channels_last):
            features = exported(images.to(memory_format=memory_format))
            difference = (features - expected).abs().max().item()
            if not difference <= tolerance:  # also for NaN
                raise RuntimeError(
                    f"features of the {exported.format} file differ from torch's by {difference:.2g}, expected at most "
                    f"{tolerance:.2g}"
                )
            largest = max(largest, difference)
    return largest


def _remove_traces(model: onnx.ModelProto) -> None:
    """Remove stack traces with paths of this machine, names of classes and the build of torch."""
    model.producer_version = model.producer_version.split("+")[0]  # without "+cu130"
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
