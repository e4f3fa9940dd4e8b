"""Exported networks: ONNX files of the stages `export` and `quantise`, in ONNX Runtime on the CPU."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn


class ExportedNetwork(nn.Module):
    """The network of an ONNX file: (batch, 3, size, size) -> (batch, num_features); `facts` are its metadata."""

    def __init__(self, model: bytes | Path, *, threads: int = 1) -> None:
        super().__init__()
        import onnxruntime  # takes a second

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self.facts: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)

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

    def forward(self, images: Tensor) -> Tensor:
        """Return the features on the CPU; `images` may have any memory format."""
        (features,) = self.session.run(None, {"images": images.cpu().contiguous().numpy()})
        return torch.from_numpy(features)
