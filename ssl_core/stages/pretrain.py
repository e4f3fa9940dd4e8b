"""Pre-train a backbone: from a manifest and an experiment's own section to weights, history and a picture of the views."""

import csv
import io
import json
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ssl_core import provenance, tracking
from ssl_core.config import Experiment
from ssl_core.data.loader import Loader
from ssl_core.data.picture import draw_views
from ssl_core.data.shards import Manifest, verify
from ssl_core.data.views import POLICIES, View, Views, adjust
from ssl_core.files import write_json, write_text
from ssl_core.methods.base import method_class, resolve
from ssl_core.networks.backbones import build_backbone, check_image_size, save_backbone, write_tensors
from ssl_core.training import checkpoint as checkpoints
from ssl_core.training import distributed
from ssl_core.training.loop import Trainer
from ssl_core.training.monitor import online_knn
from ssl_core.training.schedules import forward_batch_size, learning_rate

PROBE_IMAGES = 5000  # the online kNN looks at no more
OUTPUTS = ("model.safetensors", "history.csv", "views.png", "pretrain.json", "backbone.safetensors")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process needs to know; travels to every rank."""

    experiment: str
    spec: dict[str, Any]
    code: str
    manifest: Path
    output: Path
    checkpoint: Path
    threads: int


def run(
    experiment: str, *, spec: dict[str, Any], code: str, manifest: Path, output: Path, checkpoint: Path, threads: int
) -> None:
    """Pre-train `experiment` as `spec` says, continuing from `checkpoint` if that belongs to the same spec, code and data.

    Writes backbone.safetensors, model.safetensors, pretrain.json, history.csv and views.png into `output` at the end.
    """
    job = Job(
        experiment=experiment, spec=spec, code=code, manifest=manifest, output=output, checkpoint=checkpoint, threads=threads
    )  # fmt: skip
    resolved = resolve(spec)
    forward_batch_size(resolved.training)
    learning_rate(0, training=resolved.training, steps_per_epoch=1)
    data = Manifest.load(manifest)
    verify(data, resolved.dataset.split)
    processes = resolved.training.gpus
    if processes == 1:
        return _work(job)
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise ValueError(f"training.gpus is {processes}, this machine has {torch.cuda.device_count()}: ask for fewer")
    launch = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0
    )  # fmt: skip
    try:
        elastic_launch(launch, _work)(job)
    except ChildFailedError as error:
        failure = next(iter(error.failures.values()))
        reason = failure.message["message"] if isinstance(failure.message, dict) else failure.message
        raise ValueError(f"process {failure.local_rank} of {processes} failed ({reason}); its words are above") from None


def _work(job: Job) -> None:
    """Train in this process: the only one, or one rank of several."""
    resolved = resolve(job.spec)
    training = resolved.training
    device = _start_process(training.gpus, job.threads)
    main = distributed.rank() == 0
    manifest = Manifest.load(job.manifest)

    # The backbone comes first after the seed, so that the evaluations' untrained baseline is this very network.
    torch.manual_seed(training.seed)
    backbone = build_backbone(resolved.backbone, manifest.image_size)
    views = _views(resolved, manifest)
    for view in views.values():
        check_image_size(backbone, resolved.backbone, view.size)
    loader = _loader(job, resolved, manifest, views, device)
    method = method_class(resolved.method.name)(
        resolved.method,
        backbone,
        num_images=loader.num_images,
        batch_size=training.batch_size,
        seed=training.seed,
    )
    if distributed.is_distributed() and training.sync_batchnorm:
        distributed.synchronise_batchnorm(method)
    torch.manual_seed(training.seed + distributed.rank())
    trainer = Trainer(method, loader, training, device=device)

    identity = checkpoints.Identity(
        spec=provenance.canonical(job.spec), code=job.code, data=provenance.file_digest(job.manifest)
    )
    state = checkpoints.load(job.checkpoint, identity)
    if state is not None:
        trainer.restore(state)
        if main:
            print(f"{job.experiment}: continuing at step {trainer.step} of {trainer.total_steps}", file=sys.stderr)
    if not main:
        return trainer.run(save=lambda: _discard(trainer.state()), log=lambda row: None)

    picture = job.checkpoint.with_suffix(".views.png")
    with Loader(manifest, resolved.dataset, views, batch_size=8, seed=training.seed, threads=1, shuffle=False) as few:
        draw_views(few.next(), views, picture, mean=manifest.mean, std=manifest.std)
    with tracking.start(
        "pretrain",
        job.experiment,
        digest=provenance.digest(identity.spec + identity.code + identity.data),
        parameters=resolved.model_dump(mode="json"),
        run_id=state["tracking_run"] if state else None,
    ) as tracked:
        tracked.dataset(manifest.dataset, digest=identity.data, num_images=loader.num_images)
        tracked.artifact(picture)
        probe = _probe(resolved, manifest, job.threads)

        def save() -> None:
            checkpoints.save(job.checkpoint, {**trainer.state(), "tracking_run": tracked.id}, identity)

        def log(row: dict[str, float]) -> None:
            whole_epoch = trainer.step % trainer.steps_per_epoch == 0
            epoch = trainer.step // trainer.steps_per_epoch
            last = trainer.step == trainer.total_steps
            if probe is not None and (last or (whole_epoch and epoch % training.monitor_epochs == 0)):
                row["online_knn"] = online_knn(method.backbone, probe, device)
            speed = {"images_per_second": training.batch_size * trainer.step / trainer.seconds}
            tracked.metrics({**row, **speed, "data_wait_share": trainer.waited / trainer.seconds}, step=trainer.step)

        trainer.run(save=save, log=log)
        report = _report(job, resolved, views, trainer, identity)
        _write(job, resolved, manifest, trainer, report, picture)
        tracked.headline({f"pretrain_{name}": value for name, value in report["final"].items()})
        for name in ("pretrain.json", "history.csv"):
            tracked.artifact(job.output / name)
    job.checkpoint.unlink(missing_ok=True)


def _start_process(processes: int, threads: int) -> torch.device:
    torch.set_num_threads(max(1, threads // processes))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("high")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    if processes > 1:
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def _views(resolved: Experiment, manifest: Manifest) -> Views:
    """Return the method's views with the experiment's changes, less what would change this data set's labels."""
    views = method_class(resolved.method.name).views(resolved.method, manifest.image_size)
    return adjust(views, resolved.views, avoid=manifest.avoid)


def _loader(job: Job, resolved: Experiment, manifest: Manifest, views: Views, device: torch.device) -> Loader:
    training = resolved.training
    return Loader(
        manifest,
        resolved.dataset,
        views,
        batch_size=forward_batch_size(training),
        seed=training.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=device.type,
        threads=1 if device.type == "cpu" else max(1, job.threads // training.gpus),
    )


def _probe(resolved: Experiment, manifest: Manifest, threads: int) -> Loader | None:
    """Return the images that the online kNN looks at, or None where they have no labels."""
    split = manifest.split(resolved.dataset.split)
    if not split.labelled:
        return None
    size = manifest.image_size
    view = View(size=size, resize=size, crop="center", augmentation=POLICIES["none"], seen_by=("probe",))
    images = resolved.dataset.subset.images if resolved.dataset.subset else split.images
    dataset = resolved.dataset
    if images > PROBE_IMAGES:
        dataset = dataset.model_copy(update={"subset": {"images": PROBE_IMAGES, "seed": 0}})
        dataset = type(dataset).model_validate(dataset.model_dump())
    return Loader(manifest, dataset, {"probe": view}, batch_size=256, seed=0, shuffle=False, threads=threads)


def _report(
    job: Job, resolved: Experiment, views: Views, trainer: Trainer, identity: checkpoints.Identity
) -> dict[str, Any]:
    training, cuda = resolved.training, trainer.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    students = sum(view.count for view in views.values() if "student" in view.seen_by)
    return {
        "experiment": job.experiment,
        "resolved": resolved.model_dump(mode="json"),
        "num_images": trainer.loader.num_images,
        "steps": trainer.total_steps,
        "final": {name: value for name, value in trainer.history[-1].items() if name not in ("step", "epoch")},
        "cost": {
            "seconds": round(trainer.seconds, 1),
            "images_per_second": round(training.batch_size * trainer.total_steps / trainer.seconds, 1),
            "peak_memory_mb": round(peak / 2**20),
            "data_wait_share": round(trainer.waited / trainer.seconds, 4),
            "backward_passes": students * training.batch_size * trainer.total_steps,
        },
        "digests": {"spec": provenance.digest(identity.spec), "code": identity.code, "data": identity.data},
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
    }


def _write(
    job: Job, resolved: Experiment, manifest: Manifest, trainer: Trainer, report: dict[str, Any], picture: Path
) -> None:
    """Write all outputs under temporary names, then rename them together: half a result never stands there."""
    new = {name: job.output / f".new-{name}" for name in OUTPUTS}
    job.output.mkdir(parents=True, exist_ok=True)
    write_tensors(new["model.safetensors"], trainer.method.state_dict(), {"experiment": job.experiment, **report["digests"]})
    write_text(new["history.csv"], _csv(trainer.history))
    write_json(new["pretrain.json"], report)
    os.replace(picture, new["views.png"])
    metadata = {
        "seed": str(resolved.training.seed),
        "mean": json.dumps(manifest.mean),
        "std": json.dumps(manifest.std),
        **{f"digest_{name}": value for name, value in report["digests"].items()},
    }
    save_backbone(
        new["backbone.safetensors"], trainer.method.backbone, resolved.backbone, manifest.image_size, metadata
    )
    for name in OUTPUTS:
        os.replace(new[name], job.output / name)


def _csv(history: list[dict[str, float]]) -> str:
    columns = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return text.getvalue()


def _discard(state: dict[str, Any]) -> None:
    """Ranks other than the first take part in gathering the state and leave the writing to it."""
