"""The stage `detect`: train detectors on a backbone and on its untrained counterpart, and measure their precision."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_core import provenance
from ssl_core.blocks import distributed
from ssl_core.config import parse
from ssl_core.data.shards import Manifest
from ssl_core.drawing.detections import draw_detections
from ssl_core.evaluations import detection
from ssl_core.evaluations.base import find_test_split
from ssl_core.evaluations.parts.features import gather_subjects
from ssl_core.experiments import needs
from ssl_core.networks.backbones import load_backbone
from ssl_core.stages.evaluate import describe, publish, summary
from ssl_core.stages.pretrain import start_process
from ssl_core.stages.ranks import start_ranks
from ssl_core.tracking.run import start
from ssl_core.training.checkpoint import Identity, load_checkpoint, remove_checkpoint, save_checkpoint


@dataclass(frozen=True, kw_only=True)
class Job:
    """The arguments of the stage; sent to every rank."""

    experiment: str
    evaluation: str
    spec: dict[str, Any]
    code: str
    backbone: Path
    manifest: Path
    output: Path
    picture: Path
    checkpoint: Path
    threads: int


def splits(arguments: Mapping[str, Any]) -> list[str]:
    """Return the splits that the stage may read."""
    return needs.evaluation_splits(arguments["spec"])


def run(experiment: str, evaluation: str, **arguments: Any) -> None:
    """Train and measure by the configuration `spec`; write `output` (.json) and `picture` (.png) at the end.

    Continues from a `checkpoint` of the same spec, code, data and backbone.
    """
    job = Job(experiment=experiment, evaluation=evaluation, **arguments)
    config = parse(detection.Config, job.spec, f"evaluations.{evaluation}")
    manifest = Manifest.load(job.manifest)
    find_test_split(config, manifest)
    start_ranks(_work, job, f"{experiment}.{evaluation}", config.gpus)


def _work(job: Job) -> None:
    """Train in this process: the only one, or one rank of several."""
    config = parse(detection.Config, job.spec, f"evaluations.{job.evaluation}")
    start_process(config.training(), job.threads)
    manifest = Manifest.load(job.manifest)
    network, header = load_backbone(job.backbone)
    threads = max(1, job.threads // config.gpus)
    subjects = gather_subjects(network, header, image_size=None, threads=threads)
    digests = {"data": provenance.file_digest(job.manifest), "backbone": provenance.file_digest(job.backbone)}
    identity = Identity(spec=provenance.canonical(job.spec), code=job.code, data="".join(digests.values()))
    state = load_checkpoint(job.checkpoint, identity) or {}
    if distributed.rank() > 0:
        detection.train(config, subjects, manifest, state, log=_ignore, save=_ignore)
        return
    if state:
        print(f"{job.evaluation} of {job.experiment}: continuing from {job.checkpoint}", file=sys.stderr)
    version = header.get("version", digests["backbone"])
    parameters = {"evaluation": job.evaluation, **config.model_dump(mode="json", exclude_none=True)}
    with start(
        job.evaluation, job.experiment, digest=version, parameters=parameters, run_id=state.pop("tracking_run", None)
    ) as tracked:

        def save(state: dict[str, Any]) -> None:
            save_checkpoint(job.checkpoint, {**state, "tracking_run": tracked.id}, identity)

        def log(values: dict[str, float], step: int) -> None:
            tracked.metrics(values, step=step)

        weights = detection.train(config, subjects, manifest, state, log=log, save=save)
        outcome = detection.measure(config, subjects, manifest, weights)
        result = describe(job.experiment, job.evaluation, outcome, dataset=config.dataset.name, seed=config.seed)
        digests |= {"spec": provenance.digest(identity.spec), "code": job.code}
        draw_detections(outcome.drawing, manifest.classes or (), job.picture)
        publish(
            tracked,
            outcome,
            {**result, "digests": digests},
            config.protocol,
            shards=manifest,
            manifest=job.manifest,
            output=job.output,
        )
        tracked.artifact(job.picture)
    remove_checkpoint(job.checkpoint)
    print(summary(outcome, config.dataset.name, job.output))


def _ignore(*arguments: Any) -> None:
    """Leave logging and saving to the first rank."""
