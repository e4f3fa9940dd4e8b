"""The stage `finetune`: fine-tune a backbone with a classifier, measure it beside its baselines, and keep both."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ssl_core import provenance
from ssl_core.config import Backbone, parse
from ssl_core.data.shards import Manifest, verify
from ssl_core.evaluations import finetune
from ssl_core.evaluations.base import Subjects, find_test_split
from ssl_core.evaluations.parts.features import count_images, gather_subjects, num_classes
from ssl_core.experiments import needs
from ssl_core.experiments.processes import report_bus_error
from ssl_core.files import write_json
from ssl_core.networks.backbones import load_backbone, save_backbone
from ssl_core.networks.classifiers import CLASSIFIER, save_classifier
from ssl_core.stages.evaluate import describe, publish, summary
from ssl_core.tracking.run import start
from ssl_core.training.checkpoint import Identity, load_checkpoint, remove_checkpoint, save_checkpoint

KEPT = ("mean", "std", "seed", "version")  # keys of the pre-training's header in that of the fine-tuned backbone
BACKBONE = "backbone.safetensors"
COST = "cost.json"  # seconds of training all networks side by side


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
    checkpoint: Path,
    code: str,
    threads: int,
    model: Path | None = None,
) -> None:
    """Train and measure by the configuration `spec`; write `output` (.json) at the end.

    The fine-tuned backbone, its classifier and the cost are written into the folder named after `output`. Continues
    from a `checkpoint` of the same spec, code, data and weights. `model` is the whole pre-trained model, for variants
    that need its projector.
    """
    torch.set_num_threads(threads)
    config = parse(finetune.Config, spec, f"evaluations.{evaluation}")
    shards = Manifest.load(manifest)
    report_bus_error(lambda: [verify(shards, split) for split in shards.splits])
    find_test_split(config, shards)
    network, header = load_backbone(backbone)
    subjects = gather_subjects(
        network,
        header,
        image_size=config.image_size,
        threads=threads,
        model=model,
        num_train=count_images(shards, config.dataset),
    )
    digests = {"data": provenance.file_digest(manifest), "backbone": provenance.file_digest(backbone)}
    if model:
        digests["model"] = provenance.file_digest(model)
    identity = Identity(spec=provenance.canonical(spec), code=code, data="".join(digests.values()))
    state = load_checkpoint(checkpoint, identity) or {}
    if state:
        print(f"{evaluation} of {experiment}: continuing from {checkpoint}", file=sys.stderr)
    version = header.get("version", digests["backbone"])
    parameters = {"evaluation": evaluation, **config.model_dump(mode="json", exclude_none=True)}
    run_id = state.pop("tracking_run", None)
    with start(evaluation, experiment, digest=version, parameters=parameters, run_id=run_id) as tracked:

        def save(state: dict[str, Any]) -> None:
            save_checkpoint(checkpoint, {**state, "tracking_run": tracked.id}, identity)

        def log(values: dict[str, float], step: int) -> None:
            tracked.metrics(values, step=step)

        models, seconds = finetune.train(config, subjects, shards, state, log=log, save=save)
        outcome = finetune.measure(config, subjects, shards, models)
        result = describe(experiment, evaluation, outcome, dataset=config.dataset.name, seed=config.seed)
        digests |= {"spec": provenance.digest(identity.spec), "code": code}
        _keep(models["pretrained"], config, subjects, shards, output.with_suffix(""))
        # Apart from the result, whose bytes do not depend on the machine's speed.
        cost = {"seconds": round(seconds, 1), "networks": list(models), "hardware": provenance.hardware()}
        write_json(output.with_suffix("") / COST, {"experiment": experiment, "evaluation": evaluation, **cost})
        publish(
            tracked,
            outcome,
            {**result, "digests": digests},
            config.protocol,
            shards=shards,
            manifest=manifest,
            output=output,
        )
    remove_checkpoint(checkpoint)
    print(summary(outcome, config.dataset.name, output))


def _keep(model: finetune.Model, config: finetune.Config, subjects: Subjects, manifest: Manifest, folder: Path) -> None:
    """Write the fine-tuned backbone and its classifier."""
    header = subjects.header
    on_projector = config.needs().projector
    network: Any = model.backbone
    if on_projector:
        network = network[0]
    metadata = {key: header[key] for key in KEPT if key in header}
    metadata["view"] = finetune.evaluation_view(config, subjects).model_dump_json()
    backbone = Backbone.model_validate_json(header["backbone"])
    save_backbone(folder / BACKBONE, network, backbone, int(header["image_size"]), metadata)
    number = num_classes(manifest, config.dataset.split)
    classes = manifest.classes or [str(label) for label in range(number)]
    metadata = {
        "input": "projector" if on_projector else "backbone",
        "backbone_sha256": provenance.file_digest(folder / BACKBONE),
    }
    save_classifier(folder / CLASSIFIER, model.classifier, classes, metadata)
