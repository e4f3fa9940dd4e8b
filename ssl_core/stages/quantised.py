"""The stage `quantised`: the 8-bit file of an export beside the float32 one, as a result like the others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssl_core.config import parse
from ssl_core.data.shards import Manifest
from ssl_core.evaluations import quantised
from ssl_core.evaluations.parts.exported import open_exported
from ssl_core.experiments import needs
from ssl_core.files import write_json
from ssl_core.provenance import canonical, digest, file_digest, hardware, versions
from ssl_core.stages.evaluate import describe, track
from ssl_core.tracking.run import start


def splits(arguments: Mapping[str, Any]) -> list[str]:
    """Return the splits that the stage may read."""
    return needs.evaluation_splits(arguments["spec"])


def run(
    experiment: str,
    evaluation: str,
    *,
    spec: dict[str, Any],
    code: str,
    float32: Path,
    int8: Path,
    manifest: Path,
    output: Path,
) -> None:
    """Measure the files `float32` and `int8` with the configuration `spec` and write the results to `output`."""
    torch.set_num_threads(1)
    config = parse(quantised.Config, spec, f"evaluations.{evaluation}")
    shards = Manifest.load(manifest)
    digests = {
        "spec": digest(canonical(spec)),
        "code": code,
        "data": file_digest(manifest),
        "float32": file_digest(float32),
        "int8": file_digest(int8),
    }
    version = open_exported(float32).facts.get("version", digests["float32"])
    parameters = {"evaluation": evaluation, **config.model_dump(mode="json", exclude_none=True)}
    with start(evaluation, experiment, digest=version, parameters=parameters) as tracked:

        def log(values: dict[str, float], epoch: int) -> None:
            tracked.metrics(values, step=epoch)

        outcome = quantised.measure(config, float32, int8, shards, log)
        result = describe(experiment, evaluation, outcome, dataset=config.dataset.name, seed=config.seed)
        write_json(output, {**result, "digests": digests, "versions": versions(), "hardware": hardware()})
        track(tracked, outcome, evaluation, config.protocol)
        tracked.artifact(output)
    for name, metrics in outcome.metrics.items():
        label = "int8" if name == "pretrained" else name
        print(f"{label}: top1 {metrics['top1']:.1f} %, {metrics['latency_ms']:.2f} ms, {metrics['bytes'] / 1e6:.1f} MB")
