"""The stage `evaluate`: one protocol on one backbone and on its baselines, the untrained network and raw pixels."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_core.config import parse
from ssl_core.data.shards import Manifest, verify
from ssl_core.evaluations import base
from ssl_core.evaluations.base import Outcome
from ssl_core.evaluations.parts.features import PIXEL_SIDE, count_images, gather_subjects, pixel_side
from ssl_core.experiments import needs
from ssl_core.experiments.processes import report_bus_error
from ssl_core.files import write_bytes, write_json
from ssl_core.networks.backbones import load_backbone
from ssl_core.provenance import canonical, digest, file_digest, hardware, versions
from ssl_core.tracking.run import Run, start

DRAWING = "pictures.npz"  # in the folder named after the evaluation


def splits(arguments: Mapping[str, Any]) -> list[str]:
    """Return the splits that the stage may read."""
    return needs.evaluation_splits(arguments["spec"])


def run(
    experiment: str,
    evaluation: str,
    *,
    spec: dict[str, Any],
    backbone: Path,
    manifest: Path,
    output: Path,
    code: str,
    threads: int,
    model: Path | None = None,
) -> None:
    """Evaluate `backbone` with the configuration `spec` and write the results to `output` (.json).

    `model` is the whole pre-trained model, for protocols that need its projector. A protocol that measures pictures
    also writes their arrays to `pictures.npz` in the folder named after `output`.

    Raises `ValueError` for an unknown key, a data set that lacks what the protocol needs, and weights that do not fit.
    """
    torch.set_num_threads(threads)
    protocol = base.load(spec, f"evaluations.{evaluation}")
    config = parse(protocol.Config, spec, f"evaluations.{evaluation}")
    shards = Manifest.load(manifest)
    report_bus_error(lambda: [verify(shards, split) for split in shards.splits])
    network, header = load_backbone(backbone)
    # A split that is missing is reported by the protocol's checks.
    num_train = count_images(shards, config.dataset) if config.dataset.split in shards.splits else 0
    subjects = gather_subjects(
        network, header, image_size=config.image_size, threads=threads, model=model, num_train=num_train
    )
    digests = {
        "spec": digest(canonical(spec)),
        "code": code,
        "data": file_digest(manifest),
        "backbone": file_digest(backbone),
    }
    if model:
        digests["model"] = file_digest(model)
    # All stages of one pre-training have its version, so that MLflow shows them under one parent run.
    version = header.get("version", digests["backbone"])
    parameters = {"evaluation": evaluation, **config.model_dump(mode="json", exclude_none=True)}
    with start(evaluation, experiment, digest=version, parameters=parameters) as tracked:

        def log(values: dict[str, float], epoch: int) -> None:
            tracked.metrics(values, step=epoch)

        outcome = base.evaluate(protocol, config, subjects, shards, log)
        result = describe(experiment, evaluation, outcome, dataset=config.dataset.name, seed=config.seed)
        side = pixel_side(num_train)
        if side < PIXEL_SIDE:
            result["hyperparameters"]["pixel_side"] = side
        if outcome.drawing:
            tracked_run = json.dumps({"version": version, "parameters": parameters}, sort_keys=True)
            write_arrays(output.with_suffix("") / DRAWING, {**outcome.drawing, "run": np.array(tracked_run)})
        publish(
            tracked,
            outcome,
            {**result, "digests": digests},
            config.protocol,
            shards=shards,
            manifest=manifest,
            output=output,
        )
    print(summary(outcome, config.dataset.name, output))


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an .npz file; equal arrays give equal bytes, since numpy stores no time."""
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_bytes(path, content.getvalue())


def describe(experiment: str, evaluation: str, outcome: Outcome, *, dataset: str, seed: int) -> dict[str, Any]:
    """Return the results: the metrics of the pre-trained backbone, then those of the baselines."""
    baselines = {name: metrics for name, metrics in outcome.metrics.items() if name != "pretrained"}
    return {
        "experiment": experiment,
        "evaluation": evaluation,
        "protocol": outcome.protocol,
        "dataset": dataset,
        "split": outcome.split,
        "headline": outcome.headline,
        "metrics": outcome.metrics["pretrained"],
        "baselines": baselines,
        "hyperparameters": outcome.hyperparameters,
        "num_train": outcome.num_train,
        "num_test": outcome.num_test,
        "seed": seed,
        **({"details": outcome.details} if outcome.details else {}),
    }


def publish(
    tracked: Run,
    outcome: Outcome,
    result: dict[str, Any],
    protocol: str,
    *,
    shards: Manifest,
    manifest: Path,
    output: Path,
) -> None:
    """Write `result`, that of `describe` with `digests`, to `output`, and log it with its data set.

    `manifest` is the file of `shards`.
    """
    write_json(output, {**result, "versions": versions(), "hardware": hardware()})
    track(tracked, outcome, result["evaluation"], protocol)
    tracked.dataset(
        shards.dataset,
        result["digests"]["data"],
        num_images=outcome.num_test,
        source=manifest,
        context=outcome.split,
    )
    tracked.artifact(output)


def track(tracked: Run, outcome: Outcome, evaluation: str, protocol: str) -> None:
    """Log the numbers of all networks, and those of the pre-trained one as headlines.

    An evaluation named otherwise than its protocol shows both: "linear/v1 top1", "mine linear-features/v1 top1".
    """
    label = outcome.protocol if evaluation == protocol else f"{evaluation} {outcome.protocol}"
    for network, metrics in outcome.metrics.items():
        tracked.metrics({f"{outcome.protocol} {network} {name}": value for name, value in numbers(metrics).items()})
    headline = {f"{label} {name}": value for name, value in numbers(outcome.metrics["pretrained"]).items()}
    tracked.headline(headline, columns=[f"{label} {outcome.headline}"])


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the metrics that are single numbers."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def summary(outcome: Outcome, dataset: str, output: Path) -> str:
    """Return one line with the headline metric of each network."""
    scores = ", ".join(f"{name} {metrics[outcome.headline]:.1f}" for name, metrics in outcome.metrics.items())
    return f"{outcome.protocol} on {dataset}/{outcome.split}, {outcome.headline} in %: {scores} -> {output}"
