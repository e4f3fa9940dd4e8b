"""Parts of evaluations of exported networks (ONNX files): their images and their latency on a CPU."""

import statistics
import time
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt
from torch import nn

from ssl_core.evaluations.base import ProtocolConfig, Subjects
from ssl_core.networks.exported import ExportedNetwork


class TimedConfig(ProtocolConfig):
    """How often exported networks are timed."""

    warmup: NonNegativeInt = 10  # forward passes before the timed ones
    repeats: PositiveInt = 100


def subjects_of(networks: dict[str, nn.Module], exported: ExportedNetwork) -> Subjects:
    """Return `networks` as subjects that see images as `exported` expects them, on the CPU."""
    mean, std = exported.normalisation
    return Subjects(networks, exported.image_size, mean, std)


def latency(config: TimedConfig, onnx: Path, image_size: int) -> dict[str, float]:
    """Time single images on one thread, in milliseconds: the median and the 10th and 90th percentile."""
    session = ExportedNetwork(onnx).session
    shape = (1, 3, image_size, image_size)
    images = {"images": np.random.default_rng(config.seed).standard_normal(shape, dtype=np.float32)}
    times = []
    for _ in range(config.warmup + config.repeats):
        started = time.perf_counter()
        session.run(None, images)
        times.append(1000 * (time.perf_counter() - started))
    times = times[config.warmup :]
    low, high = np.percentile(times, [10, 90]).tolist()
    latency = {"latency_ms": statistics.median(times), "latency_ms_p10": low, "latency_ms_p90": high}
    return {name: round(value, 4) for name, value in latency.items()}


def runtime() -> str:
    """Return name and version of the runtime."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"
