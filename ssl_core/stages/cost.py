"""The stage `cost`: cost of a network's pre-training and inference, as a result beside the percentages."""

from pathlib import Path
from typing import Any

import torch

from ssl_core.config import parse
from ssl_core.evaluations import cost
from ssl_core.files import read_json, write_json
from ssl_core.networks.backbones import load_backbone
from ssl_core.provenance import canonical, digest, file_digest, hardware, versions
from ssl_core.stages.evaluate import describe, numbers
from ssl_core.tracking.run import start


def run(
    experiment: str,
    evaluation: str,
    *,
    spec: dict[str, Any],
    code: str,
    backbone: Path,
    onnx: Path,
    pretrain: Path | None,
    output: Path,
) -> None:
    """Measure `backbone` and its export `onnx` by the section `spec` and write the results to `output`.

    `pretrain` is the summary of the pre-training; None for weights that were trained elsewhere.
    """
    torch.set_num_threads(1)
    config = parse(cost.Config, spec, f"evaluations.{evaluation}")
    network, header = load_backbone(backbone)
    pretraining = read_json(pretrain) if pretrain else None
    outcome = cost.measure(config, network, int(header["image_size"]), onnx=onnx, pretraining=pretraining)
    digests = {
        "spec": digest(canonical(spec)),
        "code": code,
        "backbone": file_digest(backbone),
        "onnx": file_digest(onnx),
    }
    metrics = numbers(outcome.metrics["pretrained"])
    parameters = {"evaluation": evaluation, **config.model_dump(mode="json", exclude_none=True)}
    with start(
        evaluation, experiment, digest=header.get("version", digests["backbone"]), parameters=parameters
    ) as tracked:
        result = describe(experiment, evaluation, outcome, dataset=config.dataset.name, seed=config.seed)
        write_json(output, {**result, "digests": digests, "versions": versions(), "hardware": hardware()})
        tracked.metrics({f"{outcome.protocol} {name}": value for name, value in metrics.items()})
        tracked.headline({f"{outcome.protocol} {name}": metrics[name] for name in ("macs", "latency_ms")})
        tracked.artifact(output)
    print(f"{outcome.protocol}: {metrics['macs'] / 1e6:.1f} million MACs, {metrics['latency_ms']:.2f} ms -> {output}")
