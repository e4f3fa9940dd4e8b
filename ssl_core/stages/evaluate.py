"""The stage `evaluate`: one protocol on one backbone, with the same probe on what it started from and on raw pixels."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ssl_core.config import nearest, parse
from ssl_core.data.shards import Manifest
from ssl_core.evaluations.parts.features import Outcome, gather_subjects
from ssl_core.files import write_bytes, write_json
from ssl_core.networks.backbones import load_backbone
from ssl_core.provenance import canonical, digest, file_digest, hardware, versions
from ssl_core.tracking.run import start

PROTOCOLS = Path(__file__).parent.parent / "evaluations"


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
    """Evaluate `backbone` as the section `spec` says and write the results to `output`.

    `model` is the whole pre-trained model, for the protocols that want more of it than the backbone.

    Raises `ValueError` for a wrong key, a data set or split without labels, and weights that do not fit.
    """
    torch.set_num_threads(threads)
    protocol = load(spec, f"evaluations.{evaluation}")
    config = parse(protocol.Config, spec, f"evaluations.{evaluation}")
    shards = Manifest.load(manifest)
    network, header = load_backbone(backbone)
    subjects = gather_subjects(network, header, image_size=config.image_size, threads=threads, model=model)
    digests = {
        "spec": digest(canonical(spec)),
        "code": code,
        "data": file_digest(manifest),
        "backbone": file_digest(backbone),
        **({"model": file_digest(model)} if model else {}),
    }
    # The version of the pre-training, so that its run in MLflow becomes the parent; a backbone from elsewhere has none.
    version = header.get("version", digests["backbone"])
    parameters = {"evaluation": evaluation, **config.model_dump(mode="json", exclude_none=True)}
    with start(evaluation, experiment, digest=version, parameters=parameters) as tracked:

        def log(values: dict[str, float], epoch: int) -> None:
            tracked.metrics(values, step=epoch)

        outcome = protocol.run(config, subjects, shards, log)
        result = describe(experiment, evaluation, outcome, dataset=config.dataset.name, seed=config.seed)
        for name, content in outcome.pictures.items():
            picture = output.with_suffix("") / name
            write_bytes(picture, content)
            tracked.artifact(picture, folder="pictures")
        write_json(output, {**result, "digests": digests, "versions": versions(), "hardware": hardware()})
        # A number without its protocol meets the wrong ones: "linear/v1 top1", but "mine linear-features/v1 top1".
        label = outcome.protocol if evaluation == config.protocol else f"{evaluation} {outcome.protocol}"
        for network, metrics in outcome.metrics.items():
            tracked.metrics({f"{outcome.protocol} {network} {name}": value for name, value in numbers(metrics).items()})
        found = {f"{label} {name}": value for name, value in numbers(outcome.metrics["pretrained"]).items()}
        tracked.headline(found, columns=[f"{label} {outcome.headline}"])
        tracked.dataset(
            shards.dataset, digests["data"], num_images=outcome.num_test, source=manifest, context=outcome.split
        )
        tracked.artifact(output)
    print(summary(outcome, config.dataset.name, output))


def load(spec: dict[str, Any], where: str) -> ModuleType:
    """Import the file of the protocol that `spec` names; an unknown one is a `ValueError` with the nearest."""
    names = {path.stem for path in PROTOCOLS.glob("[a-z]*.py")}
    name = spec.get("protocol")
    if name not in names:
        raise ValueError(f"{where}.protocol: there is no protocol {name!r}{nearest(str(name), names)}")
    return importlib.import_module(f"ssl_core.evaluations.{name}")


def describe(experiment: str, evaluation: str, outcome: Outcome, *, dataset: str, seed: int) -> dict[str, Any]:
    """Lay out the results: the pre-trained backbone's metrics first, the baselines' beside them."""
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


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Keep the single numbers of a protocol's metrics and leave its tables."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def summary(outcome: Outcome, dataset: str, output: Path) -> str:
    """Say in one line what came out, in percent."""
    scores = ", ".join(f"{name} {metrics[outcome.headline]:.1f}" for name, metrics in outcome.metrics.items())
    return f"{outcome.protocol} on {dataset}/{outcome.split}, {outcome.headline} in %: {scores} -> {output}"
