"""A trained network with the preprocessing that it needs."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ssl_core.config import Normalisation
from ssl_core.data.card import default_max_side
from ssl_core.data.views import View
from ssl_core.evaluations.parts.features import center_view, read_header
from ssl_core.mistakes import explain
from ssl_core.networks.backbones import Network, load_backbone
from ssl_core.provenance import file_digest

BACKBONE = "backbone.safetensors"
Colour = tuple[float, float, float]  # a value per channel


class LoadedNetwork(nn.Module):
    """A backbone in eval mode: normalised images (batch, 3, size, size) -> features (batch, num_features).

    `mean` and `std` are those of pixels in 0..1. `digest` identifies the weights.
    """

    def __init__(self, backbone: Network, *, view: View, mean: Colour, std: Colour, digest: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.num_features
        self.view = view
        self.mean, self.std = mean, std
        self.digest = digest
        self.eval().requires_grad_(False)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.view.size

    @property
    def max_side(self) -> int:
        """The longer side to which larger images are reduced before their view is made, as by sharding."""
        return default_max_side({"image_size": self.image_size})

    @property
    def device(self) -> str:
        """The device of the weights: `cpu` or `cuda`."""
        return next(self.parameters()).device.type

    def forward(self, images: Tensor) -> Tensor:
        """Return features."""
        return self.backbone(images)


def load(path: str | Path) -> LoadedNetwork:
    """Load a network in eval mode, on the GPU if there is one.

    `path` is a backbone.safetensors or a folder with one: `results/<experiment>`, its export, or a fine-tuned network's
    folder. Raises `ValueError` if there is none or it is damaged.
    """
    file = find_backbone(Path(path))
    backbone, header = load_backbone(file)
    view = center_view(int(header["image_size"]))
    try:
        if "view" in header:  # of a fine-tuned network
            view = View.model_validate_json(header["view"])
        colours = Normalisation(mean=read_header(header, "mean"), std=read_header(header, "std"))
    except ValueError as error:
        raise ValueError(f"{file} has an invalid header ({explain(error)}): write it again") from None
    network = LoadedNetwork(backbone, view=view, mean=colours.mean, std=colours.std, digest=file_digest(file))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return network.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def find_backbone(path: Path) -> Path:
    """Return the backbone's file for its path or its folder."""
    if path.is_file():
        return path
    if not path.exists():
        raise ValueError(f"{path} does not exist: give a folder such as results/<experiment>, or a {BACKBONE}")
    if not (path / BACKBONE).is_file():
        raise ValueError(f"{path} has no {BACKBONE}: give a folder such as results/<experiment>, once it is trained")
    return path / BACKBONE
