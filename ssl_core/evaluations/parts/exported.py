"""Parts of evaluations of exported networks: their runtimes, their images and their latency on a CPU."""

import statistics
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from ssl_core.evaluations.base import ProtocolConfig, Subjects
from ssl_core.networks.executorch import ExecuTorchNetwork
from ssl_core.networks.exported import ExportedFile, ExportedNetwork
from ssl_core.networks.litert import LiteRTNetwork

RUNTIMES = {".onnx": ExportedNetwork, ".tflite": LiteRTNetwork, ".pte": ExecuTorchNetwork}
PACKAGES = {".onnx": "onnxruntime", ".tflite": "ai-edge-litert", ".pte": "executorch"}


class TimedConfig(ProtocolConfig):
    """How often exported networks are timed."""

    warmup: NonNegativeInt = 10  # forward passes before the timed ones
    repeats: PositiveInt = 100


def subjects_of(networks: dict[str, nn.Module], exported: ExportedFile) -> Subjects:
    """Return `networks` as subjects that see images as `exported` expects them, on the CPU."""
    mean, std = exported.normalisation
    return Subjects(networks, exported.image_size, mean, std)


def open_exported(path: Path) -> ExportedFile:
    """Return the network of an ONNX, LiteRT or ExecuTorch file, on one thread."""
    return RUNTIMES[path.suffix](path)


def latency(config: TimedConfig, network: ExportedFile, image_size: int) -> dict[str, float]:
    """Time single images on one thread, in milliseconds: the median and the 10th and 90th percentile."""
    shape = (1, 3, image_size, image_size)
    images = torch.from_numpy(np.random.default_rng(config.seed).standard_normal(shape, dtype=np.float32))
    times = []
    for _ in range(config.warmup + config.repeats):
        started = time.perf_counter()
        network(images)
        times.append(1000 * (time.perf_counter() - started))
    times = times[config.warmup :]
    low, high = np.percentile(times, [10, 90]).tolist()
    latency = {"latency_ms": statistics.median(times), "latency_ms_p10": low, "latency_ms_p90": high}
    return {name: round(value, 4) for name, value in latency.items()}


def runtime(file: Path) -> str:
    """Return name and version of the runtime of a file."""
    package = PACKAGES[file.suffix]
    return f"{package} {metadata.version(package)}"
