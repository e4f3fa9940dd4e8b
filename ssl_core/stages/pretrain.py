"""The stage `pretrain`: from a manifest and an experiment's settings to weights, history and a summary."""

import contextlib
import csv
import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ssl_core import provenance
from ssl_core.blocks import distributed
from ssl_core.blocks.schedules import forward_batch_size, learning_rate
from ssl_core.config import Dataset, Experiment, Subset, Training
from ssl_core.data import remote_shards
from ssl_core.data.bag_loader import BagLoader
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest, verify
from ssl_core.data.views import POLICIES, View, Views
from ssl_core.drawing.views import draw_first_views
from ssl_core.experiments import needs, sweeps
from ssl_core.experiments.code import pretraining_code
from ssl_core.experiments.processes import report_bus_error
from ssl_core.files import write_json, write_text
from ssl_core.methods.base import build, resolve, views_of
from ssl_core.networks.backbones import save_backbone, write_tensors
from ssl_core.networks.batchnorm import synchronise_batchnorm
from ssl_core.stages import nodes
from ssl_core.stages.ranks import check_gpus, start_ranks
from ssl_core.tracking import run as tracking
from ssl_core.training.checkpoint import Identity, load_checkpoint, remove_checkpoint, save_checkpoint
from ssl_core.training.loop import Trainer
from ssl_core.training.memory import capacity, estimate, measure_activations, shortage
from ssl_core.training.monitor import online_knn

HEADLINES = ("loss/total", "embedding/rankme", "online/knn")  # beside the evaluations' numbers
PROBE_IMAGES = 5000  # of the online kNN at most
MEASURED_IMAGES = 8  # of the pass whose memory is measured
KEPT = "kept"  # folder of the backbones of `training.keep_epochs`, from which the rule `keep` copies them
BAGS = "bags.npy"  # which the stage `bags` writes into the folder of the outputs
LOADERS = {"bingo": BagLoader}  # methods that read bags; a table, so that the digests of others leave out this code
OUTPUTS = ("model.safetensors", "history.csv", "pretrain.json", "backbone.safetensors")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The arguments of the stage; sent to every rank."""

    experiment: str
    spec: dict[str, Any]
    code: str
    manifest: Path
    output: Path
    checkpoint: Path
    threads: int


def splits(arguments: Mapping[str, Any]) -> list[str]:
    """Return the splits that the stage reads."""
    return [needs.training_split(arguments["spec"])]


def run(
    experiment: str,
    *,
    spec: dict[str, Any],
    code: str,
    manifest: Path,
    output: Path,
    checkpoint: Path,
    threads: int,
) -> None:
    """Pre-train `experiment` by its settings `spec`; continue from a `checkpoint` of the same spec, code and data.

    Writes backbone.safetensors, model.safetensors, pretrain.json and history.csv into `output` at the end.
    """
    job = Job(
        experiment=experiment,
        spec=spec,
        code=code,
        manifest=manifest,
        output=output,
        checkpoint=checkpoint,
        threads=threads,
    )
    resolved = resolve(spec)
    if forward_batch_size(resolved.training) < 2:
        raise ValueError(
            "training.batch_size gives one image per forward pass, which BatchNorm cannot normalise: use at least two "
            "images per process (gpus x nodes) and part (accumulation)"
        )
    learning_rate(0, training=resolved.training, steps_per_epoch=1)
    late = [epoch for epoch in resolved.training.keep_epochs if epoch > resolved.training.epochs]
    if late:
        raise ValueError(f"training.keep_epochs: {late[0]} is above training.epochs ({resolved.training.epochs})")
    data = Manifest.load(manifest)
    verify(data, resolved.dataset.split)
    _check_memory(resolved, data, threads)
    training = resolved.training
    if training.nodes == 1:
        start_ranks(_work, job, experiment, training.gpus)
        return
    message = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(job).items()}
    with nodes.lead(training.nodes, message, _versions(job)) as team:
        start_ranks(_work, job, experiment, training.gpus, team)


def join(threads: int) -> None:
    """Train as one of several nodes the experiment that the first node sends; that node writes all files."""
    with nodes.join() as (link, message), ExitStack() as stack:
        received = message["job"]
        paths = {name: Path(received[name]) for name in ("manifest", "output", "checkpoint")}
        if message.get("shards"):
            os.environ.setdefault(remote_shards.ADDRESS, message["shards"])
        if remote_shards.address() is not None:  # the first node sends a path in its own cache
            dataset = Dataset.model_validate(received["spec"]["dataset"])
            manifest = Path("shards", dataset.name, "manifest.json")
            paths["manifest"] = stack.enter_context(remote_shards.local_shards(manifest, [dataset.split]))
        job = Job(**{**received, **paths, "threads": threads})
        _join(job, link, message)


def _join(job: Job, link: nodes.Link, message: nodes.Message) -> None:
    versions = _versions(job)
    differences = [name for name, version in message["identity"].items() if versions.get(name) != version]
    if differences:
        raise ValueError(
            f"{', '.join(differences)} differ from those of the first node: use the same versions and shards"
        )
    training = resolve(job.spec).training
    check_gpus(training.gpus)
    with nodes.start(link, message).outcome_is_sent() as team:
        print(f"{job.experiment}: training as node {team.rank + 1} of {team.size}", file=sys.stderr)
        start_ranks(_work, job, job.experiment, training.gpus, team)


def _versions(job: Job) -> dict[str, str]:
    """Return digests and versions that must be the same on all nodes."""
    if not job.manifest.is_file():
        raise ValueError(f"{job.manifest} does not exist: run it in the project's folder, with its shards")
    return {
        "code": pretraining_code(job.spec),
        "shards": provenance.file_digest(job.manifest),
        **provenance.versions(),
    }


def _check_memory(resolved: Experiment, manifest: Manifest, threads: int) -> None:
    """Raise `ValueError` at once for a batch that cannot fit, rather than after the data were read."""
    training = resolved.training
    torch.set_num_threads(threads)
    views = views_of(resolved, manifest.image_size, avoid=manifest.avoid)
    subset = resolved.dataset.subset
    num_images = subset.images if subset else manifest.split(resolved.dataset.split).images
    with contextlib.redirect_stderr(io.StringIO()):  # the training prints the same warnings
        method = build(resolved, manifest.image_size, views, num_images=num_images)
    images = min(MEASURED_IMAGES, forward_batch_size(training))
    activations = measure_activations(method, views, training, images)
    uses = estimate(method, views, training, activations=activations, num_images=num_images)
    message = shortage(uses, training, capacity(training))
    if message is not None:
        raise ValueError(message)


def _work(job: Job) -> None:
    """Train in this process: the only one, or one rank of several."""
    resolved = resolve(job.spec)
    training = resolved.training
    device = start_process(training, job.threads)
    manifest = Manifest.load(job.manifest)
    report_bus_error(lambda: verify(manifest, resolved.dataset.split))
    identity = Identity(spec=_identifying_spec(job.spec), code=job.code, data=_data_digest(job))
    views = views_of(resolved, manifest.image_size, avoid=manifest.avoid)
    with _loader(job, resolved, manifest, views, device) as loader:
        method = build(resolved, manifest.image_size, views, num_images=loader.num_images)
        if distributed.is_distributed() and training.sync_batchnorm:
            synchronise_batchnorm(method, cuda=device.type == "cuda")
        torch.manual_seed(training.seed + distributed.rank())
        trainer = Trainer(method, loader, training, device=device)
        state = load_checkpoint(job.checkpoint, identity)
        _check_same_start(job.checkpoint, state)
        if state is not None:
            trainer.restore(state)
        else:
            _prepare(trainer)
        if distributed.rank() == 0:
            _lead(job, resolved, manifest, views, trainer, identity, state["tracking_run"] if state else None)
        else:
            trainer.run(save=lambda: _discard(trainer.state()), log=lambda row: None)


def _identifying_spec(spec: dict[str, Any]) -> str:
    """Return the settings that numbers depend on: of GPUs and nodes only the number of processes."""
    training = dict(spec.get("training") or {})
    processes = training.get("gpus", 1) * training.pop("nodes", 1)
    if processes > 1:
        training["gpus"] = processes
    return provenance.canonical({**spec, "training": training} if training else spec)


def _check_same_start(checkpoint: Path, state: dict[str, Any] | None) -> None:
    """Raise `ValueError` unless all processes continue at the same step; nodes may have different folders."""
    step = state["step"] if state else 0
    steps = distributed.gather(torch.tensor([step])).tolist()
    if len(set(steps)) > 1:
        raise ValueError(
            f"the processes would continue {checkpoint} at different steps ({', '.join(map(str, steps))}): put the "
            "project's folder on a file system that all nodes share, or copy the first node's checkpoint to the others"
        )


def _data_digest(job: Job) -> str:
    """Digest the data set, the files of weights that the experiment names, and its bags."""
    files = [Path(file) for file in sweeps.weight_files(job.spec).values()]
    files += [job.output / BAGS] if job.spec["method"]["name"] in LOADERS else []
    for missing in (file for file in files if not file.is_file()):
        raise ValueError(f"{missing} does not exist")
    first, *more = [provenance.file_digest(file) for file in (job.manifest, *files)]
    return provenance.digest("".join([first, *more])) if more else first


def _prepare(trainer: Trainer) -> None:
    """Let the method look at the data; training then sees the same batches as if it had not."""
    started, start = time.monotonic(), trainer.loader.state()
    with torch.autocast(trainer.device.type, dtype=trainer.dtype, enabled=trainer.dtype is not None):
        trainer.method.prepare(trainer.loader, trainer.device)
    trainer.loader.restore(start)
    trainer.seconds += time.monotonic() - started


def _lead(
    job: Job,
    resolved: Experiment,
    manifest: Manifest,
    views: Views,
    trainer: Trainer,
    identity: Identity,
    tracking_run: str | None,
) -> None:
    """Train, track, save and write; the other ranks only train."""
    training = resolved.training
    if trainer.step:
        print(f"{job.experiment}: continuing at step {trainer.step} of {trainer.total_steps}", file=sys.stderr)
    settings = resolved.model_dump(mode="json")
    with (
        tracking.start(
            "pretrain", job.experiment, digest=_version(identity), parameters=settings, run_id=tracking_run
        ) as tracked,
        _probe(resolved, manifest, job.threads) or contextlib.nullcontext() as probe,
    ):
        tracked.dataset(manifest.dataset, identity.data, num_images=trainer.loader.num_images, source=job.manifest)
        picture = job.checkpoint.with_suffix(".views.png")
        draw_first_views(manifest, resolved.dataset, views, picture, seed=training.seed)
        tracked.artifact(picture)  # at the start, so that it can be viewed during the training

        def save() -> None:
            save_checkpoint(job.checkpoint, {**trainer.state(), "tracking_run": tracked.id}, identity)

        def log(row: dict[str, float]) -> None:
            epoch, into = divmod(trainer.step, trainer.steps_per_epoch)
            last = trainer.step == trainer.total_steps
            if into == 0 and epoch in training.keep_epochs:
                kept = job.checkpoint.with_suffix(f".{_kept(epoch)}")
                _save_backbone(kept, resolved, manifest, trainer, identity)
            if probe is not None and (last or (into == 0 and epoch % training.monitor_epochs == 0)):
                row["online/knn"] = online_knn(trainer.method.backbone, probe, trainer.device)
            speed = {
                "speed/images_per_second": training.batch_size * trainer.step / trainer.seconds,
                "speed/data_wait_share": trainer.waited / trainer.seconds,
            }
            values = {name: value for name, value in row.items() if name != "step"}
            tracked.metrics({**values, **speed}, step=trainer.step)

        trainer.run(save=save, log=log)
        report = _report(job, resolved, views, trainer, identity)
        _write(job, resolved, manifest, trainer, identity, report)
        tracked.headline({name: report["final"][name] for name in HEADLINES if name in report["final"]})
        for name in ("pretrain.json", "history.csv"):
            tracked.artifact(job.output / name)
        tracked.model(job.output / "backbone.safetensors", settings)
    picture.unlink()
    remove_checkpoint(job.checkpoint)


def _version(identity: Identity) -> str:
    """Return the digest that identifies this pre-training, also for its evaluations."""
    return provenance.digest(identity.spec + identity.code + identity.data)


def start_process(training: Training, threads: int) -> torch.device:
    """Set threads, determinism and the process group of a rank; return its device."""
    torch.set_num_threads(max(1, threads // training.gpus))
    set_determinism(compiled=training.compile)
    torch.set_float32_matmul_precision("high")
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if cuda:
        torch.cuda.set_device(local_rank)
    if training.processes > 1:
        # gloo would resolve the host's name to choose a network interface
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return torch.device("cuda", local_rank) if cuda else torch.device("cpu")


def set_determinism(*, compiled: bool) -> None:
    """Let torch compute the same numbers each time, on this machine."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
    if compiled:
        torch.use_deterministic_algorithms(True, warn_only=True)  # for the compiler too, which it imports
    else:
        torch.set_deterministic_debug_mode("warn")
    # or every new tensor is first filled with NaN
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def _loader(job: Job, resolved: Experiment, manifest: Manifest, views: Views, device: torch.device) -> Loader:
    training, method = resolved.training, resolved.method.name
    options: dict[str, Any] = {
        "batch_size": forward_batch_size(training),
        "seed": training.seed,
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
        "device": device.type,
        "threads": max(1, job.threads // training.gpus),
    }
    if method in LOADERS:
        return LOADERS[method](manifest, resolved.dataset, views, bags=job.output / BAGS, **options)
    return Loader(manifest, resolved.dataset, views, **options)


def _probe(resolved: Experiment, manifest: Manifest, threads: int) -> Loader | None:
    """Return the images of the online kNN, or None without labels."""
    split = manifest.split(resolved.dataset.split)
    if not split.labelled:
        return None
    size = manifest.image_size
    view = View(size=size, resize=size, crop="center", augmentation=POLICIES["none"], seen_by=("probe",))
    dataset = watched(resolved.dataset, split.images)
    return Loader(manifest, dataset, {"probe": view}, batch_size=256, seed=0, shuffle=False, threads=threads)


def watched(dataset: Dataset, images: int) -> Dataset:
    """Return the images of the online kNN: at most `PROBE_IMAGES` of the data set or of its subset."""
    subset = dataset.subset or Subset(images=images)
    if subset.images <= PROBE_IMAGES:
        return dataset
    return dataset.model_copy(update={"subset": subset.model_copy(update={"images": PROBE_IMAGES})})


def _report(job: Job, resolved: Experiment, views: Views, trainer: Trainer, identity: Identity) -> dict[str, Any]:
    training, cuda = resolved.training, trainer.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "experiment": job.experiment,
        "version": _version(identity),
        "resolved": resolved.model_dump(mode="json"),
        "num_images": trainer.loader.num_images,
        "steps": trainer.total_steps,
        "final": {name: value for name, value in trainer.history[-1].items() if name not in ("step", "epoch")},
        "cost": {
            "seconds": round(trainer.seconds, 1),
            "images_per_second": round(training.batch_size * trainer.total_steps / trainer.seconds, 1),
            "peak_memory_mb": round(peak / 2**20),
            "data_wait_share": round(trainer.waited / trainer.seconds, 4),
            "backward_passes": round(students_views(views) * training.batch_size * trainer.total_steps),
        },
        "digests": _digests(identity),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
    }


def students_views(views: Views) -> float:
    """Count the pictures the student sees of an image; a region's view is a tile, a quarter of JigClu's montage."""
    return sum(view.count * (0.25 if view.region else 1.0) for view in views.values() if "student" in view.seen_by)


def _kept(epoch: int) -> str:
    """Return the file name of the backbone after an epoch of `training.keep_epochs`."""
    return f"epoch-{epoch}.safetensors"


def _save_backbone(path: Path, resolved: Experiment, manifest: Manifest, trainer: Trainer, identity: Identity) -> None:
    metadata = {
        "version": _version(identity),
        "seed": str(resolved.training.seed),
        "mean": json.dumps(manifest.mean),
        "std": json.dumps(manifest.std),
        **{f"digest_{name}": value for name, value in _digests(identity).items()},
    }
    save_backbone(path, trainer.method.backbone, resolved.backbone, manifest.image_size, metadata)


def _digests(identity: Identity) -> dict[str, str]:
    return {"spec": provenance.digest(identity.spec), "code": identity.code, "data": identity.data}


def _write(
    job: Job,
    resolved: Experiment,
    manifest: Manifest,
    trainer: Trainer,
    identity: Identity,
    report: dict[str, Any],
) -> None:
    """Write all outputs under temporary names, then rename them together, so that they never mix two runs.

    Backbones of `training.keep_epochs` move from the checkpoint's folder to `kept/`.
    """
    new = {name: job.output / f".new-{name}" for name in OUTPUTS}
    job.output.mkdir(parents=True, exist_ok=True)
    write_tensors(
        new["model.safetensors"], trainer.method.state_dict(), {"experiment": job.experiment, **report["digests"]}
    )
    write_text(new["history.csv"], _csv(trainer.history))
    write_json(new["pretrain.json"], report)
    _save_backbone(new["backbone.safetensors"], resolved, manifest, trainer, identity)
    shutil.rmtree(job.output / KEPT, ignore_errors=True)
    for epoch in resolved.training.keep_epochs:
        (job.output / KEPT).mkdir(exist_ok=True)
        shutil.move(job.checkpoint.with_suffix(f".{_kept(epoch)}"), job.output / KEPT / _kept(epoch))
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
    """Do nothing: ranks other than the first only take part in gathering the state."""
