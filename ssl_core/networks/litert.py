"""LiteRT (formerly TensorFlow Lite) files, written by litert-torch and ai-edge-quantizer, run by ai-edge-litert.

A file takes one image a time with its channels last, (1, size, size, 3) float32, the layout of phones.
"""

# Its packages are only installed by the extra `litert`.
# pyright: reportMissingImports=false

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssl_core.networks.exported import ExportedFile

FACTS = "ssl_core"  # the name of the metadata
SIGNATURE = "serving_default"


def to_litert(network: nn.Module, image_size: int) -> bytes:
    """Return a network (batch, 3, size, size) -> (batch, dim) in eval mode as a LiteRT file of float32."""
    import litert_torch

    example = torch.zeros(1, image_size, image_size, 3)
    channels_last = litert_torch.to_channel_last_io(network, args=[0]).eval()
    return litert_torch.convert(channels_last, (example,)).model_content()


def quantise_litert(model: bytes, images: Tensor) -> bytes:
    """Return a file with 8-bit weights, per channel, and activations, calibrated on `images` (n, 3, size, size).

    Inputs and outputs stay float32.
    """
    from ai_edge_quantizer import quantizer, recipe
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe import AlgorithmName

    quantiser = quantizer.Quantizer(bytearray(model), recipe.static_wi8_ai8())
    for operation in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
        quantiser.update_quantization_recipe(".*", operation, algorithm_key=AlgorithmName.NO_QUANTIZE)
    (name,) = _interpreter(model).get_signature_list()[SIGNATURE]["inputs"]
    batches = [{name: image} for image in _channels_last(images)]
    calibration = quantiser.calibrate({SIGNATURE: batches}, num_threads=torch.get_num_threads())
    quantised = quantiser.quantize(calibration, enable_progress_report=False).quantized_model
    assert quantised is not None
    return bytes(quantised)


def with_litert_facts(model: bytes, facts: Mapping[str, str]) -> bytes:
    """Return the file with these metadata alone of ours."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    tree: Any = flatbuffer_utils.read_model_from_bytearray(bytearray(model))
    for stored in tree.buffers:  # a large one is packed byte by byte unless it is an array
        stored.data = None if stored.data is None else np.frombuffer(stored.data, np.uint8)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(json.dumps(dict(sorted(facts.items()))).encode(), np.uint8)
    entry = schema.MetadataT()
    entry.name, entry.buffer = FACTS, len(tree.buffers)
    tree.buffers.append(buffer)
    tree.metadata = [old for old in tree.metadata or [] if old.name != FACTS.encode()] + [entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(tree))


class LiteRTNetwork(ExportedFile):
    """The network of a LiteRT file."""

    format = "LiteRT"

    def __init__(self, model: bytes | Path, *, threads: int = 1) -> None:
        content = model.read_bytes() if isinstance(model, Path) else model
        super().__init__(_read_facts(content))
        self.interpreter = _interpreter(content, threads)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features on the CPU; `images` may have any memory format."""
        (image,), (features,) = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        rows = []
        for pixels in _channels_last(images.cpu()):
            self.interpreter.set_tensor(image["index"], pixels)
            self.interpreter.invoke()
            rows.append(torch.from_numpy(self.interpreter.get_tensor(features["index"])))
        return torch.cat(rows)


def _interpreter(model: bytes, threads: int = 1) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=model, num_threads=threads)
    interpreter.allocate_tensors()
    return interpreter


def _channels_last(images: Tensor) -> list[np.ndarray]:
    """Return each image as (1, size, size, 3)."""
    return list(images.permute(0, 2, 3, 1).contiguous().numpy()[:, None])


def _read_facts(model: bytes) -> dict[str, str]:
    from ai_edge_litert import schema_py_generated as schema

    tree = schema.Model.GetRootAs(model, 0)
    for number in range(tree.MetadataLength()):
        entry = tree.Metadata(number)
        if entry.Name() == FACTS.encode():
            return json.loads(tree.Buffers(entry.Buffer()).DataAsNumpy().tobytes())
    return {}
