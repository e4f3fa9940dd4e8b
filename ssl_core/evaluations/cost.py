"""What a network costs (recipes E9, in the spirit of Cao & Wu's Table 1): its pre-training, its size, its use on a CPU.

Timings are no function of the inputs: a second run gives others. Nothing but the table may depend on this protocol.
"""

import copy
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_core.config import Dataset, Strict
from ssl_core.evaluations.parts.features import Outcome, frozen

PRETRAINING = ("images_per_second", "peak_memory_mb", "backward_passes", "seconds")  # what pretrain.json knows


class Config(Strict):
    """How often the exported network is timed."""

    protocol: Literal["cost"] = "cost"
    dataset: Dataset  # beside whose numbers the table shows the cost; no image of it is read
    warmup: NonNegativeInt = 10  # forward passes that do not count
    repeats: PositiveInt = 100
    seed: int = 0  # of the image's noise; recorded as in every protocol


def measure(
    config: Config, network: nn.Module, image_size: int, *, onnx: Path, pretraining: Mapping[str, Any] | None
) -> Outcome:
    """Count `network`, time its export `onnx` and add the cost of its pre-training, the content of a pretrain.json.

    A network that was trained elsewhere has none (`pretraining` is None), and latency stands for its cost.
    """
    trained = {name: pretraining["cost"][name] for name in PRETRAINING} if pretraining else {}
    macs = count_macs(network, image_size)
    counted = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "macs": macs,
        "flops": 2 * macs,
        "onnx_bytes": onnx.stat().st_size,
    }
    how = {
        "image_size": image_size,
        "warmup": config.warmup,
        "repeats": config.repeats,
        "batch_size": 1,
        "threads": 1,
        "runtime": _runtime(),
    }
    if pretraining:
        how["pretraining_hardware"] = pretraining["hardware"]  # not the machine of the latency, perhaps
    return Outcome(
        "cost/v1",
        config.dataset.split,
        {"pretrained": trained | counted | _latency(config, onnx, image_size)},
        how,
        num_train=pretraining["num_images"] if pretraining else 0,
        num_test=0,
        headline="images_per_second" if pretraining else "latency_ms",
    )


def count_macs(network: nn.Module, image_size: int) -> int:
    """Count the multiply-accumulates of one image's forward pass: convolutions, linear layers and attention.

    Norms, activations and additions are left out, as in the papers' numbers.
    """
    # On the meta device nothing is computed, and attention is made of matrix products, which are counted; the fused
    # kernel that the CPU takes is not (torch 2.14).
    shadow = copy.deepcopy(network).to("meta")
    with frozen({"network": shadow}), FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2  # two operations each


def _latency(config: Config, onnx: Path, image_size: int) -> dict[str, float]:
    """Time single images on one thread, in milliseconds: the median, and between what eight of ten lie."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    shape = (1, 3, image_size, image_size)
    images = {"images": np.random.default_rng(config.seed).standard_normal(shape, dtype=np.float32)}
    times = []
    for _ in range(config.warmup + config.repeats):
        started = time.perf_counter()
        session.run(None, images)
        times.append(1000 * (time.perf_counter() - started))
    times = times[config.warmup :]
    low, high = np.percentile(times, [10, 90]).tolist()
    found = {"latency_ms": statistics.median(times), "latency_ms_p10": low, "latency_ms_p90": high}
    return {name: round(value, 4) for name, value in found.items()}


def _runtime() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"
