"""ExecuTorch files (.pte): written by executorch for its XNNPACK backend, and run by its Python runtime.

A file takes one image a time, (1, 3, size, size) float32.
"""

# Its packages are only installed by the extra `executorch`.
# pyright: reportMissingImports=false

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_core.networks.exported import ExportedFile

FACTS = "facts"  # a method of the file that returns its metadata as JSON


def to_executorch(network: nn.Module, image_size: int, facts: Mapping[str, str]) -> bytes:
    """Return a network (batch, 3, size, size) -> (batch, dim) in eval mode as an ExecuTorch file with metadata."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = to_edge_transform_and_lower(
        torch.export.export(network, (torch.zeros(1, 3, image_size, image_size),)),
        partitioner=[XnnpackPartitioner()],
        constant_methods={FACTS: json.dumps(dict(sorted(facts.items())))},
    )
    return bytes(program.to_executorch().buffer)


def quantise_executorch(network: nn.Module, images: Tensor) -> nn.Module:
    """Return the network with 8-bit weights, per channel, and activations, calibrated on `images` (n, 3, size, size).

    `to_executorch` turns it into a file. Inputs and outputs stay float32.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantiser = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    observed = prepare_pt2e(torch.export.export(network, (images[:1],)).module(), quantiser)
    with torch.no_grad():
        for image in images.split(1):
            observed(image)
    return convert_pt2e(observed)


class ExecuTorchNetwork(ExportedFile):
    """The network of an ExecuTorch file; `threads` are those of all such networks of the process."""

    format = "ExecuTorch"

    def __init__(self, model: bytes | Path, *, threads: int = 1) -> None:
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        _unsafe_reset_threadpool(threads)  # no other call sets their number

        program: Any = Runtime.get().load_program(model)
        super().__init__(json.loads(program.load_method(FACTS).execute([])[0]))
        self._program = program  # its methods do not keep it alive
        self._method: Any = program.load_method("forward")

    def forward(self, images: Tensor) -> Tensor:
        """Return the features on the CPU; `images` may have any memory format.

        The runtime reads the memory of a tensor as if it were contiguous, whatever its format.
        """
        rows = [self._method.execute([image.contiguous()])[0].clone() for image in images.cpu().split(1)]
        return torch.cat(rows)
