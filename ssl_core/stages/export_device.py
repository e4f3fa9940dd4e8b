"""The stage `export_device`: write a backbone in float32 for LiteRT (.tflite) or ExecuTorch (.pte), as on phones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ssl_core.config import Export, parse
from ssl_core.files import write_bytes
from ssl_core.networks.backbones import load_backbone
from ssl_core.networks.executorch import ExecuTorchNetwork, to_executorch
from ssl_core.networks.litert import LiteRTNetwork, to_litert, with_litert_facts
from ssl_core.stages.export import Normalised, describe, largest_difference

EXTRAS = {".tflite": "litert", ".pte": "executorch"}  # of pyproject.toml, each with a lock file


def run(
    experiment: str,
    *,
    backbone: Path,
    output: Path,
    threads: int,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write `backbone` to `output`, in the format of its suffix: .tflite or .pte.

    `options` is the configuration's section `export`, whose `dynamic_size` affects ONNX files alone. Raises ValueError
    for a network that the format cannot express, and without the format's packages.
    """
    torch.set_num_threads(threads)
    network, size, facts = prepare(backbone, options)
    with converting(output):
        if output.suffix == ".pte":
            model = to_executorch(network, size, facts)
            exported = ExecuTorchNetwork(model)
        else:
            model = with_litert_facts(to_litert(network, size), facts)
            exported = LiteRTNetwork(model)
    difference = largest_difference(network, exported, size)
    write_bytes(output, model)
    print(f"{experiment}: features of {output.name} and torch differ by at most {difference:.1e} -> {output}")


def prepare(backbone: Path, options: Mapping[str, Any] | None) -> tuple[nn.Module, int, dict[str, str]]:
    """Return the network to export, the side of its images in pixels, and the metadata of its file."""
    config = parse(Export, options or {}, "export")
    network, header = load_backbone(backbone)
    facts = describe(network, header)
    if getattr(network, "dynamic_img_size", False):  # of timm's transformers; neither format can resize the embeddings
        cast(Any, network).dynamic_img_size, cast(Any, network).patch_embed.flatten = False, True
    if not config.normalise:
        return network.eval(), int(header["image_size"]), facts
    return Normalised(network, header).eval(), int(header["image_size"]), facts | {"normalise": "true"}


@contextmanager
def converting(output: Path) -> Iterator[None]:
    """Raise ValueError for the errors of a converter; for a missing package it has the command that installs it."""
    extra = EXTRAS[output.suffix]
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"{output.name} needs packages that are not installed ({error}): run `pip install --no-deps -r "
            f"requirements-{extra}.lock` in the folder of the project"
        ) from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{output.name}: the network cannot be written in this format: {reason}") from error
