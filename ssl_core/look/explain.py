"""Show an experiment before it runs: settings with their origins, views, networks, steps and cost.

The settings are YAML and the rest are comments, so that the output can be copied as an experiment's section.
"""

import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ssl_core.blocks.schedules import effective_learning_rate, forward_batch_size, learning_rate
from ssl_core.config import Backbone, Dataset, Experiment, parse
from ssl_core.data.card import Card, load_card
from ssl_core.data.loader import draw_subset
from ssl_core.data.views import POLICIES, Augmentation, View, Views
from ssl_core.evaluations.detection import Config as DetectionConfig
from ssl_core.experiments import bundled, checks
from ssl_core.experiments.needs import check_needs
from ssl_core.experiments.overlays import Configuration, Keys, leaves, load_configuration
from ssl_core.files import read_json
from ssl_core.look import detection_forecast, forecast
from ssl_core.look.subject import Subject, find_subject, shard_command
from ssl_core.methods import base
from ssl_core.networks.backbones import Network, build_backbone
from ssl_core.provenance import hardware
from ssl_core.training.memory import capacity, count, device, estimate, shortage

WIDTH = 98  # columns
ORIGIN = 46  # first column of the origins
Origin = Callable[[Keys], str]
JOINED = "\N{NO-BREAK SPACE}"  # between a number and its unit, so that lines do not break there
ASSUMED_IMAGES = 100_000  # of a data set that is not sharded yet


def explain(name: str, overlays: Sequence[Path], *, timed: bool | None, threads: int) -> None:
    """Print everything about the experiment `name`, with the time of ten steps if `timed` (None: if there are shards).

    Raises the same `ValueError`s as pre-training, without running it.
    """
    layers = load_configuration(overlays)
    spec = layers.experiment(name)
    checks.check_files(layers.settings, [f"results/{name}/backbone.safetensors"])
    _check_evaluations(name, spec, layers)
    print(f"# {name}: {', '.join(map(str, layers.files))}")
    if "weights" in spec:
        _adopted(name, spec, layers, timed=timed is True)
        return
    subject = find_subject(spec, layers.address)
    resolved, views = subject.resolved, subject.views
    forward_batch_size(resolved.training)
    learning_rate(0, training=resolved.training, steps_per_epoch=1)
    sections = resolved.model_dump(mode="json", serialize_as_any=True)
    if not sections["views"]:
        del sections["views"]
    for key in resolved.method.ineffective():
        del sections["method"][key]
    preset_name, preset = base.preset_of(resolved.method)
    source = f"preset {preset_name}: {preset.source}"
    print(textwrap.fill(source, WIDTH, initial_indent="# ", subsequent_indent="#     "))
    print(*_settings(sections, name, layers, _default_origin(resolved)), sep="\n")
    images = _num_images(subject)
    batch_size = resolved.training.batch_size
    num_images = images if images is not None else max(ASSUMED_IMAGES, getattr(resolved.method, "queue_size", 0))
    method = forecast.build(resolved, subject.card.image_size, views, num_images=num_images)
    _comment("What the networks see", _views(views, subject.card))
    _comment("Networks", _networks(method, resolved.backbone))
    steps = None if images is None else images // batch_size
    if steps == 0:
        raise ValueError(
            f"training.batch_size {batch_size} is larger than the data set ({images} images): give {images} or less"
        )
    _comment("Steps", _steps(resolved, images, steps))
    walked = forecast.walk(method, views, resolved.training)
    _comment("Cost", _cost(method, subject, walked, num_images, steps))
    if timed or (timed is None and subject.shards is not None):
        _comment("Time", _time(method, subject, walked, steps, threads))
    else:
        _comment("Time", ["not measured (--time measures ten steps)"])
    _detections(
        spec,
        layers,
        resolved.backbone,
        subject.card.image_size,
        timed=timed or (timed is None and subject.shards is not None),
    )


def _check_evaluations(name: str, spec: Mapping[str, Any], layers: Configuration) -> None:
    """Raise a `ValueError` for the first evaluation whose needs this experiment or its data cannot meet."""
    evaluations = (layers.settings.get("evaluations") or {}).values()
    datasets = {spec["dataset"]["name"], *(part["dataset"]["name"] for part in evaluations if "dataset" in part)}
    labels = {dataset: load_card(bundled.card_path(dataset)).labels for dataset in datasets}
    check_needs(layers.settings, read_json(bundled.SCHEMA), labels, [f"results/{name}/export/README.md"])


def _detections(
    spec: Mapping[str, Any], layers: Configuration, backbone: Backbone, image_size: int, *, timed: bool
) -> None:
    """Print the disk, memory and time of each detection, which are measured if `timed`."""
    for name, section in (layers.settings.get("evaluations") or {}).items():
        if section["protocol"] != "detection":
            continue
        dataset = {"dataset": {"name": spec["dataset"]["name"]}}
        config = parse(DetectionConfig, dataset | section, f"evaluations.{name}")
        images = config.iterations * config.batch_size
        lines = [f"{config.head}, {config.iterations} iterations of {config.batch_size} images, {images} in all"]
        if not timed:
            _comment(f"Detection '{name}'", [*lines, "cost not measured (--time measures one image)"])
            continue
        cost = detection_forecast.forecast(config, backbone, image_size)
        networks = len(config.networks())
        each = " each of the pretrained and the untrained network" if networks > 1 else ""
        size = "x".join(map(str, cost.size))
        lines += [
            f"{_si(cost.parameters)} parameters; checkpoints need {_si(networks * cost.disk, 'B')} of disk",
            f"memory per process, roughly: {_si(cost.memory, 'B')}",
            f"about {_duration(cost.seconds)}{each} on this processor, from one image of {size} pixels",
        ]
        _comment(f"Detection '{name}'", lines)


def _adopted(name: str, spec: Mapping[str, Any], layers: Configuration, *, timed: bool) -> None:
    """Print an experiment with weights from a file, without training."""
    print(*_settings(spec, name, layers, lambda where: "default"), sep="\n")
    card = load_card(bundled.card_path(parse(Dataset, spec["dataset"], "dataset").name))
    config = parse(Backbone, spec["backbone"], "backbone")
    backbone = build_backbone(config, card.image_size)
    flop = forecast.forward_flop(backbone, card.image_size)
    forward = f"{_si(flop, 'FLOP')} per image of {card.image_size} px, forward"
    _comment("Network (nothing is trained)", [_backbone(backbone, config), forward])
    _detections(spec, layers, config, spec.get("image_size") or card.image_size, timed=timed)


# Settings


def _default_origin(resolved: Experiment) -> Origin:
    """Return a function that names the origin of a value that no file sets: the method's preset or our default."""
    name, preset = base.preset_of(resolved.method)

    def origin(where: Keys) -> str:
        in_preset = where[0] == "training" and where[1] in preset.training
        drops_paths = where == ("backbone", "drop_path") and bool(resolved.backbone.drop_path)
        return f"preset {name}" if where[0] == "method" or in_preset or drops_paths else "default"

    return origin


def _settings(sections: Mapping[str, Any], name: str, layers: Configuration, default_origin: Origin) -> Iterator[str]:
    """Yield the sections as YAML, with the origin of each value in a comment."""
    previous: Keys = ()
    for where, value in leaves(sections):
        *parents, key = where
        shared = len([*takewhile(lambda pair: pair[0] == pair[1], zip(previous, where))])
        for depth in range(min(shared, len(parents)), len(parents)):
            yield f"{'  ' * depth}{parents[depth]}:"
        previous = where
        origin = layers.origin(name, where)
        if origin is None:
            # If a file sets a part of a nested section, the rest of the section has its own defaults, not the paper's.
            is_partly_set = len(where) > 2 and layers.touches(name, where[:2])
            origin = "default" if is_partly_set else default_origin(where)
        text = f"{'  ' * len(parents)}{key}: {_value(value)}"
        yield f"{text:<{ORIGIN}}  # {origin}"


def _value(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


# Consequences of the settings


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
    """Describe the active operations, with their probabilities first."""
    if how == POLICIES["none"]:
        return "no augmentation"
    colours = ", ".join(f"{part} {getattr(how, part):g}" for part in ("brightness", "contrast", "saturation", "hue"))
    names = [name for name, policy in POLICIES.items() if policy == how]
    details = {"jitter": f" ({colours})", "blur": f" (sigma {how.blur_sigma[0]:g}-{how.blur_sigma[1]:g} px)"}
    parts = []
    for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
        if getattr(how, name):
            parts.append(f"{name} {getattr(how, name):g}{details.get(name, '')}")
    parts += [f"{how.randaugment} RandAugment operations"] if how.randaugment else []
    return f"{names[0]}: {', '.join(parts)}" if names else ", ".join(parts)


def _networks(method: base.Method, config: Backbone) -> list[str]:
    lines = [_backbone(method.backbone, config)]
    for name, child in method.named_children():
        if name != "backbone" and (count(child) or list(child.buffers())):
            lines.append(f"{name}: {_head(child)}")
    for name, tensor in method.named_buffers(recurse=False):
        if tensor.dim():
            lines.append(f"{name}: {_shape(tensor)} numbers")
    for name, tensor in method.named_parameters(recurse=False):
        lines.append(f"{name}: {_shape(tensor)} numbers, trained")
    trained = count(method, trained=True)
    return [*lines, f"all: {_si(count(method))} parameters, {_si(trained)} of them trained by gradient"]


def _backbone(backbone: Network, config: Backbone) -> str:
    return (
        f"backbone: {config.name}, {config.stem} stem, {backbone.num_features} features, "
        f"{_si(count(backbone))} parameters"
    )


def _head(module: nn.Module) -> str:
    """Describe a module: its linear layers or its type, its size, whether it has a gradient."""
    size = count(module)
    if not size:  # a queue, a bank
        return ", ".join(f"{_shape(buffer)} numbers" for buffer in module.buffers() if buffer.dim())
    gradient = "" if count(module, trained=True) else ", no gradient"
    return f"{_kind(module)}, {_si(size)} parameters{gradient}"


def _kind(module: nn.Module) -> str:
    linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if any(isinstance(layer, nn.Conv2d | nn.MultiheadAttention) for layer in module.modules()):
        return "a network with its head" if linear else "a network"
    if not linear:
        return type(module).__name__
    dims = [linear[0].in_features, *(layer.out_features for layer in linear)]
    has_batchnorm = any("BatchNorm" in type(layer).__name__ for layer in module.modules())
    return " -> ".join(map(str, dims)) + (" with BatchNorm" if has_batchnorm else "")


def _shape(tensor: Any) -> str:
    return " x ".join(map(str, tensor.shape))


def _num_images(subject: Subject) -> int | None:
    """Return the number of images of an experiment, None if its data set is not sharded."""
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
    processes = "1 process" if training.processes == 1 else f"{training.processes} processes"
    if training.nodes > 1:
        processes += f" on {training.nodes} nodes"
    accumulated = f" x {training.accumulation} accumulated parts" if training.accumulation > 1 else ""
    lines = [f"effective batch: {training.batch_size} images = {processes}{accumulated} x {each} at once"]
    if training.gpus > 1 and device().type == "cpu":
        lines.append(f"no GPU on this machine: the {processes} share the processor (gloo)")
    scaled = f" = {training.learning_rate:g} x {training.batch_size} / 256"
    rate = f"effective learning rate: {effective_learning_rate(training):g}"
    rate += scaled if training.learning_rate_scaling == "linear" else " (not scaled by the batch)"
    lines.append(f"{rate}, {training.optimizer}, warm-up to epoch {training.warmup_epochs:g}, then {training.schedule}")
    if images is None or steps is None:
        command = shard_command(resolved.dataset.name).replace(" ", JOINED)
        lines.append(f"the number of images is unknown before `{command}`")
    else:
        left = images - steps * training.batch_size
        over = f" (each epoch leaves out {left} other images)" if left else ""
        lines.append(f"{images} images: {steps} steps per epoch, {steps * training.epochs} in all{over}")
    return lines


def _cost(
    method: base.Method, subject: Subject, walked: forecast.Walk, num_images: int, steps: int | None
) -> list[str]:
    training = subject.resolved.training
    size = max(view.size for view in subject.views.values())
    lines = [
        f"backbone: {_si(walked.backbone, 'FLOP')} per view of {size} px, forward; a multiply-add counts as two",
        f"method: {_si(walked.step, 'FLOP')} per image, all its views forward and backward",
    ]
    if steps is not None:
        images = steps * training.epochs * training.batch_size
        lines.append(f"the whole run: {_si(walked.step * images, 'FLOP')} for {_si(images)} images")
    decoded = None
    if subject.shards is not None:
        decoded = forecast.decoded_pixels(subject.shards, subject.resolved.dataset.split)
        lines.append(
            f"stored images: {_si(decoded.mean(), 'pixels')} on average, {_si(decoded.max(), 'pixels')} at most; "
            f"`max_side` in {subject.card.name}'s card reduces them"
        )
    memory = estimate(method, subject.views, training, activations=walked.activations, num_images=num_images)
    if decoded is not None:
        memory["decoded images"] = 3.0 * forecast.largest_batch(decoded, forward_batch_size(training))
    parts = ", ".join(f"{part} {_si(number, 'B')}" for part, number in memory.items())
    lines.append(f"memory per process, roughly: {_si(sum(memory.values()), 'B')} ({parts})")
    too_large = shortage(memory, training, capacity(training))
    if too_large is not None:
        print(f"warning: {too_large}", file=sys.stderr)
        lines.append(f"does not fit: {too_large}")
    if steps is None:
        lines.append(f"(computed for {num_images} images, without decoded images: their sizes are not known yet)")
    return lines


def _time(method: base.Method, subject: Subject, walked: forecast.Walk, steps: int | None, threads: int) -> list[str]:
    print("timing up to ten steps ...", file=sys.stderr)
    load = os.getloadavg()[0]  # of the last minute, from other processes
    training = subject.resolved.training
    timing = forecast.time_steps(
        method, subject.resolved, subject.views, subject.shards, walked=walked, threads=threads
    )
    speed = timing.batch_size / timing.seconds
    rate = walked.step * speed
    busy = f"; the machine was busy (load {load:.1f}), so it may be faster" if load > 0.5 * threads else ""
    lines = [
        f"{timing.steps} steps of {timing.batch_size} images took {timing.seconds:.3g} s each: {speed:.3g} images/s, "
        f"{_si(rate, 'FLOP')}/s in {timing.dtype}, {100 * timing.waited:.0f} % waiting for "
        + ("data" if subject.shards is not None else "random images, since there are no shards"),
        f"measured with {threads} thread{'s' * (threads > 1)} of {hardware()}{busy}",
    ]
    if timing.batch_size < forward_batch_size(training):
        lines.append(f"(with {timing.batch_size} images instead of {forward_batch_size(training)}, to save time)")
    if training.compile:
        lines.append("(without training.compile)")
    if steps is None:
        return lines
    gpus = training.processes if device().type == "cuda" else training.nodes
    seconds = steps * training.epochs * training.batch_size / speed / gpus
    number = training.processes
    ideal = f", if {number} GPUs are {number} times as fast" if number > 1 else ""
    return [f"about {_duration(seconds)} for {steps * training.epochs} steps{ideal}, without evaluations", *lines]


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _si(number: float, unit: str = "") -> str:
    """Format a number with three digits and a prefix: 11.2 M, 1.82 GFLOP."""
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{JOINED}{prefix}{unit}"
    return f"{number:.3g}{JOINED}{unit}".removesuffix(JOINED)
