"""The cost of a network, after Cao & Wu's Table 1: its pre-training, its size and its latency on a CPU.

The rule `cost` runs it, since it reads the exported network and the summary of the pre-training instead of images.
Timings differ from run to run, so nothing but the table may depend on this protocol.
Source: docs/sources.md#pictures-and-cost.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssl_core.evaluations.base import Outcome
from ssl_core.evaluations.parts.exported import TimedConfig, latency, open_exported, runtime
from ssl_core.evaluations.parts.features import frozen
from ssl_core.experiments.needs import Contract, Needs

PRETRAINING = ("images_per_second", "peak_memory_mb", "backward_passes", "seconds")  # costs in pretrain.json


class Config(TimedConfig):
    """How often the exported network is timed.

    The table shows the cost in the row of `dataset`, whose images are not read. The seed draws the noise image.
    """

    contract: ClassVar = Contract(rule="cost", needs=Needs(labels="none", test_split="none"))

    protocol: Literal["cost"] = "cost"


def measure(
    config: Config, network: nn.Module, image_size: int, *, onnx: Path, pretraining: Mapping[str, Any] | None
) -> Outcome:
    """Measure size and operations of `network`, the latency of its export `onnx`, and the cost of its pre-training.

    `pretraining` is the content of a pretrain.json, or None for a network that was trained elsewhere. Its headline is
    the latency.
    """
    training_cost = {name: pretraining["cost"][name] for name in PRETRAINING} if pretraining else {}
    macs = count_macs(network, image_size)
    size = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "macs": macs,
        "flops": 2 * macs,
        "onnx_bytes": onnx.stat().st_size,
    }
    hyperparameters = config.settings(image_size=image_size, batch_size=1, threads=1, runtime=runtime(onnx))
    if pretraining:
        hyperparameters["pretraining_hardware"] = pretraining["hardware"]  # may differ from that of the latency
    return Outcome(
        "cost/v1",
        config.dataset.split,
        {"pretrained": training_cost | size | latency(config, open_exported(onnx), image_size)},
        hyperparameters,
        num_train=pretraining["num_images"] if pretraining else 0,
        num_test=0,
        headline="images_per_second" if pretraining else "latency_ms",
    )


def count_macs(network: nn.Module, image_size: int) -> int:
    """Count the multiply-accumulates of one image's forward pass: convolutions, linear layers and attention.

    Norms, activations and additions are left out, as in the papers' numbers.
    """
    # On the meta device nothing is computed, and attention runs as matrix products, which are counted. The fused kernel
    # of the CPU is not counted (torch 2.14).
    shadow = copy.deepcopy(network).to("meta")
    with frozen({"network": shadow}), FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() // 2  # a multiply-accumulate is two operations
