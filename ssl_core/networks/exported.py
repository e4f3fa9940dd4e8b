"""Exported networks on the CPU, and ONNX files, of the stages `export` and `quantise`, in ONNX Runtime."""

import json
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn


class ExportedFile(nn.Module):
    """The network of a file: (batch, 3, size, size) -> (batch, num_features); `facts` are its metadata."""

    format: ClassVar[str] = ""  # its name in messages

    def __init__(self, facts: dict[str, str]) -> None:
        super().__init__()
        self.facts = facts

    @property
    def image_size(self) -> int:
        """Side of the square images."""
        return int(self.facts["image_size"])

    @property
    def normalises(self) -> bool:
        """Whether the file normalises its images, which are pixels in 0..1."""
        return "normalise" in self.facts

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, of pixels in 0..1, that images must be normalised by."""
        if self.normalises:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        mean, std = (tuple(json.loads(self.facts[key])) for key in ("mean", "std"))
        return mean, std


class ExportedNetwork(ExportedFile):
    """The network of an ONNX file."""

    format = "ONNX"

    def __init__(self, model: bytes | Path, *, threads: int = 1) -> None:
        import onnxruntime  # takes a second

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        super().__init__(dict(session.get_modelmeta().custom_metadata_map))
        self.session = session

    def forward(self, images: Tensor) -> Tensor:
        """Return the features on the CPU; `images` may have any memory format."""
        (features,) = self.session.run(None, {"images": images.cpu().contiguous().numpy()})
        return torch.from_numpy(features)
