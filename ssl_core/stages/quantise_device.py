"""The stage `quantise_device`: write a backbone with 8-bit integers for LiteRT (.tflite) or ExecuTorch (.pte)."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ssl_core.config import Dataset, Quantise, parse
from ssl_core.data.shards import Manifest
from ssl_core.experiments import needs
from ssl_core.files import write_bytes
from ssl_core.networks.executorch import ExecuTorchNetwork, quantise_executorch, to_executorch
from ssl_core.networks.exported import ExportedFile
from ssl_core.networks.litert import LiteRTNetwork, quantise_litert, to_litert, with_litert_facts
from ssl_core.stages.export_device import converting, prepare
from ssl_core.stages.quantise import features, read_images, relative_error, too_large


def splits(arguments: Mapping[str, Any]) -> list[str]:
    """Return the splits that the stage reads."""
    return [needs.training_split(arguments)]


def run(
    experiment: str,
    *,
    spec: Mapping[str, Any],
    dataset: Mapping[str, Any],
    backbone: Path,
    manifest: Path,
    output: Path,
    threads: int,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write `backbone` with 8-bit integers to `output`, in the format of its suffix: .tflite or .pte.

    Images and the largest error are those of the stage `quantise`, with the same `spec` and `dataset`; weights have one
    scale per channel. Raises ValueError as that stage does, and without the format's packages.
    """
    torch.set_num_threads(threads)
    config = parse(Quantise, spec, "quantise")
    network, size, facts = prepare(backbone, options)
    images = read_images(config, parse(Dataset, dataset, "dataset"), Manifest.load(manifest), ExportedFile(facts))
    with torch.no_grad():
        expected = network(images)
    with converting(output):
        if output.suffix == ".pte":
            write, read = partial(to_executorch, quantise_executorch(network, images), size), ExecuTorchNetwork
        else:
            write, read = partial(with_litert_facts, quantise_litert(to_litert(network, size), images)), LiteRTNetwork
        error = relative_error(features(read(write(facts)), images), expected)
    if error > config.largest_error:
        raise ValueError(too_large(backbone, error, config))
    facts |= {
        "quantisation": "int8, weights per channel",
        "calibration_images": str(len(images)),
        "calibration_error": f"{error:.2g}",
    }
    write_bytes(output, write(facts))
    print(f"{experiment}: 8-bit integers change the features by a share of their variance of {error:.2g} -> {output}")
