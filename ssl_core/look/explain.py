"""Say all of an experiment before it runs: settings and where they come from, views, networks, steps and cost.

The settings are YAML and the rest are comments, so that the whole is a section that can be copied.
"""

import os
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import nn

from ssl_core.blocks.schedules import effective_learning_rate, forward_batch_size, learning_rate
from ssl_core.config import Backbone, Dataset, Experiment, parse
from ssl_core.data.card import Card, load_card
from ssl_core.data.loader import draw_subset
from ssl_core.data.shards import Manifest, verify
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.experiments import bundled, checks
from ssl_core.experiments.needs import check_needs
from ssl_core.experiments.overlays import Configuration, Keys, leaves, load_configuration
from ssl_core.files import read_json
from ssl_core.look import forecast
from ssl_core.methods import base
from ssl_core.networks.backbones import Network, build_backbone
from ssl_core.provenance import hardware

WIDTH = 98  # columns
ORIGIN = 46  # the column in which origins stand, at least
JOINED = "\N{NO-BREAK SPACE}"  # between a number and its unit, until lines are broken
UNKNOWN = 100_000  # images of a data set that is not sharded yet, for what depends on their number


class Subject(NamedTuple):
    """An experiment with its data: what both `explain` and `views` look at."""

    resolved: Experiment
    card: Card
    manifest: Manifest | None  # None: not sharded yet
    views: Views


def explain(name: str, overlays: Sequence[Path], *, probe: bool | None, threads: int) -> None:
    """Print everything about the experiment `name`; ten steps are timed on `probe`, by default if there are shards.

    Raises the `ValueError`s that pre-training would, without running it.
    """
    layers = load_configuration(overlays)
    spec = layers.experiment(name)
    checks.check_files(layers.settings, [f"results/{name}/backbone.safetensors"])
    _check_evaluations(name, spec, layers)
    print(f"# {name}: {', '.join(map(str, layers.files))}")
    if "weights" in spec:
        _adopted(name, spec, layers)
        return
    subject = find(spec)
    resolved, views = subject.resolved, subject.views
    forward_batch_size(resolved.training)
    learning_rate(0, training=resolved.training, steps_per_epoch=1)
    sections = resolved.model_dump(mode="json", serialize_as_any=True)
    if not sections["views"]:
        del sections["views"]
    print(*_settings(sections, name, layers, _preset(resolved)), sep="\n")
    images = _num_images(subject)
    batch_size = resolved.training.batch_size
    known = images if images is not None else max(UNKNOWN, getattr(resolved.method, "queue_size", 0))
    method = forecast.build(resolved, subject.card.image_size, views, num_images=known, batch_size=batch_size)
    _comment("What the networks see", _views(views, subject.card))
    _comment("Networks", _networks(method, resolved.backbone))
    steps = None if images is None else images // batch_size
    if steps == 0:
        raise ValueError(
            f"training.batch_size {batch_size} is larger than the data set ({images} images): give {images} or less"
        )
    _comment("Steps", _steps(resolved, images, steps))
    walked = forecast.walk(method, views, resolved.training)
    _comment("Cost", _cost(method, subject, walked, known, steps))
    wanted = subject.manifest is not None if probe is None else probe
    _comment(
        "Time", _time(method, subject, walked, steps, threads) if wanted else ["not measured (--probe times ten steps)"]
    )


def find(spec: Mapping[str, Any]) -> Subject:
    """Resolve an experiment and find its card and, if there are, its intact shards."""
    resolved = base.resolve(spec)
    card = load_card(bundled.card_path(resolved.dataset.name))
    if resolved.dataset.split not in card.splits:
        raise ValueError(f"{card.name} has no split {resolved.dataset.split!r}: it has {', '.join(card.splits)}")
    path = Path("shards", card.name, "manifest.json")
    manifest = Manifest.load(path) if path.exists() else None
    if manifest is not None:
        verify(manifest, resolved.dataset.split)
    return Subject(resolved, card, manifest, base.views_of(resolved, card.image_size, avoid=card.avoid))


def _check_evaluations(name: str, spec: Mapping[str, Any], layers: Configuration) -> None:
    """Raise a `ValueError` for the first evaluation that cannot get what it needs from this experiment or its data."""
    evaluations = (layers.settings.get("evaluations") or {}).values()
    datasets = {spec["dataset"]["name"], *(part["dataset"]["name"] for part in evaluations if "dataset" in part)}
    labels = {dataset: load_card(bundled.card_path(dataset)).labels for dataset in datasets}
    check_needs(layers.settings, read_json(bundled.SCHEMA), labels, [f"results/{name}/export/README.md"])


def shard_command(dataset: str) -> str:
    """Return the command that makes a data set's shards."""
    return f"snakemake --cores all shards/{dataset}/manifest.json"


def _adopted(name: str, spec: Mapping[str, Any], layers: Configuration) -> None:
    """Print an experiment whose weights come from a file: there is nothing to train."""
    print(*_settings(spec, name, layers, lambda where: "default"), sep="\n")
    card = load_card(bundled.card_path(parse(Dataset, spec["dataset"], "dataset").name))
    config = parse(Backbone, spec["backbone"], "backbone")
    backbone = build_backbone(config, card.image_size)
    flop = forecast.forward_flop(backbone, card.image_size)
    told = [_backbone(backbone, config), f"{_si(flop, 'FLOP')} an image of {card.image_size} px, forward"]
    _comment("Network (nothing is trained)", told)


# Settings


def _preset(resolved: Experiment) -> Any:
    """Return what says where a value comes from that no file gives."""
    presets = base.load(resolved.method.name).PRESETS
    chosen = getattr(resolved.method, "preset", next(iter(presets)))
    paper = f"paper default (preset {chosen})"

    def origin(where: Keys) -> str:
        if where[0] == "method":
            return paper
        return paper if where[0] == "training" and where[1] in presets[chosen].training else "default"

    return origin


def _settings(sections: Mapping[str, Any], name: str, layers: Configuration, unsaid: Any) -> Iterator[str]:
    """Write the sections as YAML, each value with its origin behind it."""
    seen: Keys = ()
    for where, value in leaves(sections):
        *parents, key = where
        shared = next((k for k, (old, new) in enumerate(zip(seen, where)) if old != new), len(seen))
        for depth in range(min(shared, len(parents)), len(parents)):
            yield f"{'  ' * depth}{parents[depth]}:"
        seen = where
        origin = layers.origin(name, where)
        if origin is None:
            # Beside what a file gives of a part, the rest of that part is the part's default, not the paper's.
            partly = len(where) > 2 and layers.touches(name, where[:2])
            origin = "default" if partly else unsaid(where)
        text = f"{'  ' * len(parents)}{key}: {_value(value)}"
        yield f"{text:<{ORIGIN}}  # {origin}"


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


# What follows from them


def _comment(title: str, lines: Sequence[str]) -> None:
    print(f"#\n# {title}")
    for line in lines:
        filled = textwrap.fill(line, WIDTH, initial_indent="#   ", subsequent_indent="#       ")
        print(filled.replace(JOINED, " "))


def _views(views: Views, card: Card) -> list[str]:
    width = max(map(len, views))
    lines = [f"{group:<{width}}  {_view(view)}" for group, view in views.items()]
    if card.avoid:
        lines.append(f"({card.name}'s card switches off {', '.join(card.avoid)} unless the experiment names it)")
    return lines


def _view(view: View) -> str:
    crop = "center crop" if view.crop == "center" else f"{view.area[0]:.3g}-{view.area[1]:.3g} of the image"
    if view.region is not None:
        crop += f" within {list(view.region)}"
    number = f"{view.count} views" if view.count > 1 else "1 view"
    return f"{number} of {view.size} px, {crop}, {_augmentation(view.augmentation)}; seen by {', '.join(view.seen_by)}"


def _augmentation(how: Augmentation) -> str:
    """Name what is switched on, probabilities first."""
    if how == POLICIES["none"]:
        return "as it is"
    colours = ", ".join(f"{part} {getattr(how, part):g}" for part in ("brightness", "contrast", "saturation", "hue"))
    names = [name for name, policy in POLICIES.items() if policy == how]
    parts = [f"flip {how.flip:g}"] if how.flip else []
    parts += [f"jitter {how.jitter:g} ({colours})"] if how.jitter else []
    parts += [f"grayscale {how.grayscale:g}"] if how.grayscale else []
    parts += [f"blur {how.blur:g} (sigma {how.blur_sigma[0]:g}-{how.blur_sigma[1]:g} px)"] if how.blur else []
    parts += [f"solarize {how.solarize:g}"] if how.solarize else []
    parts += [f"{how.randaugment} RandAugment operations"] if how.randaugment else []
    return f"{names[0]}: {', '.join(parts)}" if names else ", ".join(parts)


def _networks(method: base.Method, config: Backbone) -> list[str]:
    lines = [_backbone(method.backbone, config)]
    for name, child in method.named_children():
        if name != "backbone" and (forecast.count(child) or list(child.buffers())):
            lines.append(f"{name}: {_head(child)}")
    own = [(name, tensor, "") for name, tensor in method.named_buffers(recurse=False) if tensor.dim()]
    own += [(name, tensor, ", trained") for name, tensor in method.named_parameters(recurse=False)]
    lines += [f"{name}: {_shape(tensor)} numbers{how}" for name, tensor, how in own]
    trained = forecast.count(method, trained=True)
    return [*lines, f"all: {_si(forecast.count(method))} parameters, {_si(trained)} of them trained by gradient"]


def _backbone(backbone: Network, config: Backbone) -> str:
    return (
        f"backbone: {config.name}, {config.stem} stem, {backbone.num_features} features, "
        f"{_si(forecast.count(backbone))} parameters"
    )


def _head(module: nn.Module) -> str:
    """Describe a part: its linear layers or what it is, its size, whether it learns by gradient."""
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    convolves = any(isinstance(layer, nn.Conv2d | nn.MultiheadAttention) for layer in module.modules())
    if convolves:
        what = "a network with its head" if layers else "a network"
    elif layers:
        what = " -> ".join(str(dim) for dim in (layers[0].in_features, *(layer.out_features for layer in layers)))
        what += " with BatchNorm" if any("BatchNorm" in type(layer).__name__ for layer in module.modules()) else ""
    else:
        what = type(module).__name__
    size = forecast.count(module)
    if not size:  # a queue, a bank
        return ", ".join(f"{_shape(buffer)} numbers" for buffer in module.buffers() if buffer.dim())
    return f"{what}, {_si(size)} parameters" + ("" if forecast.count(module, trained=True) else ", no gradient")


def _shape(tensor: Any) -> str:
    return " x ".join(map(str, tensor.shape))


def _num_images(subject: Subject) -> int | None:
    """Count the images of an experiment, or None before its data set is sharded."""
    dataset = subject.resolved.dataset
    if subject.manifest is None:
        return dataset.subset.images if dataset.subset else None
    images = subject.manifest.split(dataset.split).images
    if dataset.subset is not None:
        return len(draw_subset(images, dataset.subset, f"{dataset.name}/{dataset.split}"))
    return images


def _steps(resolved: Experiment, images: int | None, steps: int | None) -> list[str]:
    training = resolved.training
    each = forward_batch_size(training)
    processes = "1 process" if training.gpus == 1 else f"{training.gpus} processes"
    accumulated = f" x {training.accumulation} accumulated parts" if training.accumulation > 1 else ""
    lines = [f"effective batch: {training.batch_size} images = {processes}{accumulated} x {each} at once"]
    if training.gpus > 1 and forecast.device().type == "cpu":
        lines.append(f"no GPU here: the {processes} would share the processor (gloo)")
    scaled = f" = {training.learning_rate:g} x {training.batch_size} / 256"
    rate = f"effective learning rate: {effective_learning_rate(training):g}"
    rate += scaled if training.learning_rate_scaling == "linear" else " (not scaled by the batch)"
    lines.append(f"{rate}, {training.optimizer}, warm-up to epoch {training.warmup_epochs:g}, then {training.schedule}")
    if images is None or steps is None:
        command = shard_command(resolved.dataset.name).replace(" ", JOINED)
        lines.append(f"the number of images is not known before `{command}`")
    else:
        left = images - steps * training.batch_size
        over = f" (an epoch leaves {left} images out, each time others)" if left else ""
        lines.append(f"{images} images: {steps} steps an epoch, {steps * training.epochs} in all{over}")
    return lines


def _cost(
    method: base.Method, subject: Subject, walked: forecast.Walk, num_images: int, steps: int | None
) -> list[str]:
    training = subject.resolved.training
    size = max(view.size for view in subject.views.values())
    lines = [
        f"backbone: {_si(walked.backbone, 'FLOP')} a view of {size} px, forward; a multiply-add counts two",
        f"method: {_si(walked.step, 'FLOP')} an image, all its views forward and backward",
    ]
    if steps is not None:
        images = steps * training.epochs * training.batch_size
        lines.append(f"the whole run: {_si(walked.step * images, 'FLOP')} for {_si(images)} images")
    held = forecast.memory(method, subject.views, training, walked, num_images)
    parts = ", ".join(f"{what} {_si(number, 'B')}" for what, number in held.items())
    lines.append(f"memory of a process, roughly: {_si(sum(held.values()), 'B')} ({parts})")
    if steps is None:
        lines.append(f"(what depends on the number of images: as if there were {num_images})")
    return lines


def _time(method: base.Method, subject: Subject, walked: forecast.Walk, steps: int | None, threads: int) -> list[str]:
    print("timing up to ten steps ...", file=sys.stderr)
    load = os.getloadavg()[0]  # of the last minute: what else runs
    training = subject.resolved.training
    timing = forecast.probe(method, subject.resolved, subject.views, subject.manifest, walked=walked, threads=threads)
    speed = timing.batch_size / timing.seconds
    rate = walked.step * speed
    busy = f"; the machine was busy (load {load:.1f}), alone it may be faster" if load > 0.5 * threads else ""
    lines = [
        f"{timing.steps} steps of {timing.batch_size} images took {timing.seconds:.3g} s each: {speed:.3g} images/s, "
        f"{_si(rate, 'FLOP')}/s in {timing.dtype}, {100 * timing.waited:.0f} % waiting for "
        + ("data" if subject.manifest is not None else "noise in the place of data, since there are no shards"),
        f"measured with {threads} thread{'s' * (threads > 1)} of {hardware()}{busy}",
    ]
    if timing.batch_size < forward_batch_size(training):
        lines.append(f"(with {timing.batch_size} images instead of {forward_batch_size(training)}, to be quick)")
    if training.compile:
        lines.append("(without training.compile)")
    if steps is None:
        return lines
    seconds = (
        steps
        * training.epochs
        * training.batch_size
        / speed
        / (training.gpus if forecast.device().type == "cuda" else 1)
    )
    ideal = f", if {training.gpus} GPUs were {training.gpus} times as fast" if training.gpus > 1 else ""
    return [f"about {_duration(seconds)} for {steps * training.epochs} steps{ideal}, without evaluations", *lines]


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _si(number: float, unit: str = "") -> str:
    """Write a number to three digits with a prefix: 11.2 M, 1.82 GFLOP."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{JOINED}{prefix}{unit}"
    return f"{number:.3g}{JOINED}{unit}".removesuffix(JOINED)
