"""The stage `quantise`: write an exported network with 8-bit weights and activations (ONNX Runtime, static, QDQ).

Equal inputs give equal bytes on one machine.
"""

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quant_pre_process, quantize_static
from torch import Tensor

from ssl_core.config import Dataset, Quantise, parse
from ssl_core.data.loader import draw_subset
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.parts.exported import subjects_of
from ssl_core.evaluations.parts.features import GROUP, center_view, make_loader
from ssl_core.experiments import needs
from ssl_core.files import write_bytes
from ssl_core.networks.exported import ExportedFile, ExportedNetwork

LEAST_IMAGES = 32  # with fewer, the ranges of activations depend on the draw
SCHEMES = ("per channel", "per tensor")  # scales of the weights
BATCH_SIZE = 32  # of calibration; affects memory, never results


def splits(arguments: Mapping[str, Any]) -> list[str]:
    """Return the splits that the stage reads."""
    return [needs.training_split(arguments)]


def run(
    experiment: str,
    *,
    spec: Mapping[str, Any],
    dataset: Mapping[str, Any],
    onnx: Path,
    manifest: Path,
    output: Path,
) -> None:
    """Write the network of the file `onnx` with 8-bit integers to `output`.

    Training images of `dataset` calibrate it as evaluations read them. Weights have one scale per channel or one per
    tensor, whichever changes the features of these images less. Raises ValueError for too few images, and for a
    network whose features change by more than `spec`, the section `quantise`, allows.
    """
    config = parse(Quantise, spec, "quantise")
    network = ExportedNetwork(onnx)
    images = read_images(config, parse(Dataset, dataset, "dataset"), Manifest.load(manifest), network)
    expected = features(network, images)
    models, errors = quantise(onnx, images), {}
    for scheme, model in models.items():
        errors[scheme] = relative_error(features(ExportedNetwork(model), images), expected)
    scheme = min(errors, key=errors.__getitem__)
    if errors[scheme] > config.largest_error:
        raise ValueError(too_large(onnx, errors[scheme], config))
    facts = {
        "quantisation": f"int8, weights {scheme}",
        "calibration_images": str(len(images)),
        "calibration_error": f"{errors[scheme]:.2g}",
    }
    write_bytes(output, with_facts(models[scheme], network.facts | facts))
    both = ", ".join(f"{error:.2g} {scheme}" for scheme, error in errors.items())
    print(f"{experiment}: 8-bit integers change the features by a share of their variance of {both} -> {output}")


def too_large(path: Path, error: float, config: Quantise) -> str:
    """Return the message for a network that 8-bit integers ruin."""
    return (
        f"8-bit integers change the features of {path} by {error:.2g} of their variance, expected at most "
        f"{config.largest_error:g}: use the float32 file or another backbone, or raise quantise.largest_error"
    )


def read_images(config: Quantise, dataset: Dataset, manifest: Manifest, network: ExportedFile) -> Tensor:
    """Return (images, 3, size, size) drawn from the pre-training's images; raises ValueError if there are too few."""
    name = f"{dataset.name}/{dataset.split}"
    total = manifest.split(dataset.split).images
    candidates = np.arange(total) if dataset.subset is None else draw_subset(total, dataset.subset, name)
    chosen = np.random.default_rng(config.seed).permutation(candidates)[: config.images]
    if len(chosen) < LEAST_IMAGES:
        raise ValueError(
            f"{len(chosen)} images of {name} to calibrate 8-bit integers, expected at least {LEAST_IMAGES}: raise "
            "quantise.images, or use an experiment with more training images"
        )
    view = center_view(network.image_size)
    with make_loader(subjects_of({}, network), manifest, dataset, view, only=chosen.tolist()) as loader:
        return torch.cat([batch.views[GROUP][0] for batch in loader.epoch()]).contiguous()


def quantise(path: Path, images: Tensor) -> dict[str, bytes]:
    """Return the ONNX file with 8-bit weights and activations for each scheme, calibrated on `images`."""
    models = {}
    with tempfile.TemporaryDirectory(prefix="ssl-core-quantise-") as folder:
        prepared, quantised = Path(folder, "prepared.onnx"), Path(folder, "quantised.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        for scheme in SCHEMES:
            quantize_static(
                prepared,
                quantised,
                _Batches(images),
                per_channel=scheme == "per channel",
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            models[scheme] = quantised.read_bytes()
    return models


def features(network: ExportedFile, images: Tensor) -> Tensor:
    """Return the features of all images."""
    return torch.cat([network(batch) for batch in images.split(BATCH_SIZE)])


def relative_error(changed: Tensor, expected: Tensor) -> float:
    """Return the squared error of features (images, dim) as a share of their variance: 1 if they tell nothing.

    A cosine would hide the error behind the mean, which is most of the length of features after a ReLU.
    """
    variance = (expected - expected.mean(dim=0)).double().square().sum()
    error = ((changed - expected).double().square().sum() / variance).item()
    return error if math.isfinite(error) else math.inf


def with_facts(content: bytes, facts: Mapping[str, str]) -> bytes:
    """Return an ONNX file with these metadata alone."""
    model = onnx.load_from_string(content)
    onnx.helper.set_model_props(model, dict(sorted(facts.items())))
    return model.SerializeToString(deterministic=True)


class _Batches(CalibrationDataReader):
    """Images in batches, as ONNX Runtime's calibration reads them."""

    def __init__(self, images: Tensor) -> None:
        self._batches = iter(images.split(BATCH_SIZE))

    def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}
