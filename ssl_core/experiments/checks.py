"""The faults of a configuration, each a `ValueError` of one line: the key, the fault, the nearest valid word.

Torch-free, since each dry run calls it.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ssl_core.config import nearest
from ssl_core.experiments import figures, should_i_pretrain, sweeps
from ssl_core.experiments.structure import check_structure
from ssl_core.experiments.sweeps import Config

LONGEST_NAME = 200  # of 255 bytes that a file name has; temporary files and checkpoints append to it
LARGEST_SEED = 2**32 - 1  # torch, NumPy and DALI take it
KEPT = re.compile(r"epoch-\d+\.safetensors")  # backbones of `training.keep_epochs`
ADDRESS = re.compile(r"(?!(s3|gs|az):///)[a-z][a-z0-9+.-]*://.*[^/\s]/*")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Names of other files and folders under results/.
RESERVED = {
    "experiments": {"figures", "sweeps", "table.csv", "table.html", Path(should_i_pretrain.TARGET).name},
    "evaluations": {"pretrain", "export"},
    "sweeps": set(),
    "figures": set(),
}
# Former protocols with the settings that give the same numbers.
RENAMED = {"semi_supervised": "`protocol: finetune` with the same `variant` (`ressl_1` where there was none)"}
CHECKPOINTS = ("previous", "damaged", "other")  # checkpoints/<experiment>.<word>.pt belongs to <experiment>
FOLDERS = ("checkpoints", "logs", "results", "shards")
# Files that only a pre-training writes.
PRETRAINED = ("model.safetensors", "pretrain.json", "history.csv", "views.png", "curves.png", "curves.svg")


def check(config: Config, schema: Mapping[str, Any], cards: Iterable[str]) -> None:
    """Raise a `ValueError` for the first fault of a configuration.

    `schema` is the JSON schema of config.yaml, and `cards` are the names of the data sets that have a card.
    """
    _check_values(config, "")
    if isinstance(config, Mapping) and isinstance(config.get("shards"), str):
        check_address(config["shards"], "shards")
    _check_renamed(config)
    check_structure(config, schema, ())
    _check_seeds(config, "")
    for section in ("experiments", "evaluations", "sweeps", "figures"):
        for name in config.get(section) or {}:
            _check_name(section, str(name))
    for name, experiment in config["experiments"].items():
        _check_kind(experiment, f"experiments.{name}")
    for name in config.get("sweeps") or {}:
        _check_sweep(name, config, schema)
    names = sweeps.experiments(config)
    for name in names:
        _check_length("experiments", name)
    _check_checkpoint_names(names)
    _check_evaluation_names(config.get("evaluations") or {})
    for name, experiment in names.items():
        _check_batch_size(experiment.get("training") or {}, f"experiments.{name}.training")
        _check_warmup(experiment.get("training") or {}, f"experiments.{name}.training")
        _check_keep_epochs(experiment.get("training") or {}, f"experiments.{name}.training")
        _check_backbone(experiment, f"experiments.{name}", schema)
    _check_datasets(config, list(cards))
    _check_reported(config)
    figures.check(config.get("figures") or {}, names, config.get("evaluations") or {})


def check_address(address: str, place: str) -> None:
    """Refuse an address of shards that is none or that contains a password, which logs would show."""
    if "@" in address or "?" in address:
        raise ValueError(
            f"{place}: the address contains '@' or '?', so perhaps a password: write s3://bucket/prefix, and export "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not ADDRESS.fullmatch(address):
        raise ValueError(
            f"{place}: expected an address such as s3://bucket/prefix, found {address!r}; local shards need no key"
        )


def _check_renamed(config: Config) -> None:
    """Refuse protocols by their former names."""
    evaluations = config.get("evaluations") if isinstance(config, Mapping) else None
    if not isinstance(evaluations, Mapping):
        return  # the schema names the mistake
    for name, section in evaluations.items():
        former = section.get("protocol") if isinstance(section, Mapping) else None
        if isinstance(former, str) and former in RENAMED:
            raise ValueError(f"evaluations.{name}.protocol: {former!r} has a new name: write {RENAMED[former]}")


def check_targets(config: Config, targets: Iterable[str]) -> None:
    """Raise a `ValueError` for a file under `results/` whose experiment, evaluation or sweep does not exist."""
    experiments = sweeps.experiments(config)
    for target in targets:
        parts = Path(target).parts
        if target == should_i_pretrain.TARGET:
            should_i_pretrain.check(config)
        if len(parts) < 3 or parts[0] != "results":
            continue
        name, file = parts[1], Path(parts[2])
        if name in ("sweeps", "figures"):
            _check_made_target(target, name, file.stem, config)
        elif name not in experiments:
            message = sweeps.unknown_experiment(name, config)
            raise ValueError(f"{target}: {message} (experiments of other files: --configfile)")
        elif len(parts) == 3:
            _check_experiment_target(target, file, experiments[name], config)


def check_files(config: Config, targets: Iterable[str]) -> None:
    """Raise a `ValueError` for a missing file of weights, in the experiments that `targets` name.

    If they name none, all experiments outside sweeps are checked. A file that another experiment writes may be missing.
    """
    experiments = sweeps.experiments(config)
    requested = {path.parts[1] for path in map(Path, targets) if len(path.parts) > 2}
    selected = [name for name in experiments if name in requested] or list(sweeps.written_experiments(config))
    for name in selected:
        for key, file in sweeps.weight_files(experiments[name]).items():
            if not _is_result(file, experiments) and not Path(file).is_file():
                raise ValueError(f"experiments.{name}.{key}: there is no file '{file}' (looked in {Path.cwd()})")


def check_folders(config: Config) -> None:
    """Raise a `ValueError` for a file in the place of a folder that the workflow writes into."""
    experiments = [Path("results", name) for name in sweeps.experiments(config)]
    for folder in [*map(Path, FOLDERS), *experiments]:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file, but the workflow needs a folder of this name: move the file")


def _is_result(file: str, experiments: Mapping[str, Config]) -> bool:
    """Return whether an experiment writes this file."""
    folder, _, name = file.rpartition("/")
    experiment = experiments.get(folder.removeprefix("results/"))
    if experiment is None:
        return False
    return name in ("backbone.safetensors", "model.safetensors") or name in _kept_files(experiment)


def _kept_files(experiment: Config) -> list[str]:
    """Return the names of the backbones of `training.keep_epochs`."""
    epochs = (experiment.get("training") or {}).get("keep_epochs", ())
    return [f"epoch-{epoch}.safetensors" for epoch in epochs]


def _check_made_target(target: str, section: str, name: str, config: Config) -> None:
    names = config.get(section) or {}
    if name not in names:
        raise ValueError(f"{target}: there is no {section.removesuffix('s')} '{name}'{nearest(name, names)}")


def _check_experiment_target(target: str, file: Path, experiment: Config, config: Config) -> None:
    evaluations = {*(config.get("evaluations") or {}), "pretrain"}
    if file.suffix == ".json" and file.stem not in evaluations:
        raise ValueError(f"{target}: there is no evaluation '{file.stem}'{nearest(file.stem, evaluations)}")
    if KEPT.fullmatch(file.name) and file.name not in _kept_files(experiment):
        raise ValueError(f"{target}: this epoch is not in experiments.{Path(target).parts[1]}.training.keep_epochs")
    if file.name in PRETRAINED and "weights" in experiment:
        name = Path(target).parts[1]
        raise ValueError(f"{target}: '{name}' takes its weights from a file, so nothing is pre-trained")


def _check_values(value: Any, place: str) -> None:
    """Refuse YAML values that JSON does not have: keys that are no text, dates, bytes, infinite numbers."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place or 'at the top'}: the key {key!r} is no text: write it in quotes")
            _check_values(inner, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_values(inner, f"{place}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: {value!r} is no finite number")
    elif not isinstance(value, str | int | float | None):
        raise ValueError(f"{place}: {value!r} is no text, number, true, false or null: write dates in quotes")


def _check_seeds(section: Any, place: str) -> None:
    """Refuse seeds that the generators of random numbers do not take."""
    for key, value in section.items() if isinstance(section, Mapping) else ():
        where = f"{place}.{key}".lstrip(".")
        _check_seeds(value, where)
        seeds = value if isinstance(value, list) else [value]
        for seed in seeds if key in ("seed", "seeds", "training.seed") else ():
            if isinstance(seed, int) and not 0 <= seed <= LARGEST_SEED:
                raise ValueError(f"{where}: {seed} is no seed: use a number from 0 to {LARGEST_SEED}")


def _check_length(section: str, name: str) -> None:
    if len(name) > LONGEST_NAME:
        raise ValueError(
            f"{section}.{name[:40]}...: the name has {len(name)} letters, more than {LONGEST_NAME}: shorten it"
            " (the name becomes a file name; a sweep appends its values)"
        )


def _check_name(section: str, name: str) -> None:
    """Refuse names that are no portable file name or the name of another file."""
    if not FILE_NAME.fullmatch(name):
        raise ValueError(
            f"{section}.{name}: use letters, digits, '.', '_' or '-', starting with a letter or digit"
            " (the name becomes a file name)"
        )
    _check_length(section, name)
    if name in RESERVED[section]:
        raise ValueError(f"{section}.{name}: this name is taken by another file of the results; choose another")


def _check_checkpoint_names(names: Iterable[str]) -> None:
    """Refuse an experiment whose checkpoint has the name of another experiment's previous or damaged checkpoint."""
    names = set(names)
    for name in names:
        base, _, word = name.rpartition(".")
        if word in CHECKPOINTS and base in names:
            raise ValueError(f"experiments.{name}: checkpoints/{name}.pt belongs to '{base}'; choose another name")


def _check_evaluation_names(names: Iterable[str]) -> None:
    """Refuse an evaluation whose folder of pictures has the name of a file of the results."""
    taken = {*PRETRAINED, "backbone.safetensors", *(f"{name}.json" for name in names)}
    for name in names:
        if name in taken:
            raise ValueError(f"evaluations.{name}: this name is taken by another file of the results; choose another")


def _check_batch_size(training: Config, place: str) -> None:
    """Refuse one image per forward pass, which BatchNorm cannot normalise."""
    parts = training.get("gpus", 1) * training.get("nodes", 1) * training.get("accumulation", 1)
    if "batch_size" in training and training["batch_size"] // parts < 2:
        raise ValueError(
            f"{place}.batch_size: {training['batch_size']} is less than two images per forward pass (gpus x "
            f"accumulation is {parts}), which BatchNorm needs; use {2 * parts} or more"
        )


def _check_warmup(training: Config, place: str) -> None:
    epochs, warmup = training.get("epochs"), training.get("warmup_epochs")
    if epochs is not None and warmup is not None and warmup >= epochs:
        raise ValueError(
            f"{place}.warmup_epochs: {warmup:g} must be below epochs ({epochs}): "
            "the learning rate would never come down"
        )


def _check_keep_epochs(training: Config, place: str) -> None:
    epochs = training.get("epochs")
    late = [epoch for epoch in training.get("keep_epochs", ()) if epochs is not None and epoch > epochs]
    if late:
        raise ValueError(f"{place}.keep_epochs: {late[0]} is above epochs ({epochs})")


def _check_backbone(section: Config, place: str, schema: Mapping[str, Any]) -> None:
    """Refuse unknown names of backbones, also of teachers; those of timm are known to the stages only."""
    names = schema["$defs"].get("Backbone", {}).get("names", [])
    backbone = section.get("backbone")
    name = backbone.get("name") if isinstance(backbone, Mapping) else None
    if isinstance(name, str) and names and not name.startswith("timm/") and name not in names:
        advice = nearest(name, (known for known in names if "/" not in known))
        raise ValueError(
            f"{place}.backbone.name: there is no backbone '{name}'{advice} (others: timm/..., torchvision/...)"
        )
    for key, inner in section.items():
        if isinstance(inner, Mapping) and key != "backbone":
            _check_backbone(inner, f"{place}.{key}", schema)


def _check_kind(experiment: Config, place: str) -> None:
    """Refuse keys that exclude each other: an experiment has either a method or the weights of another training."""
    if "weights" in experiment:
        _check_adopted(experiment, place)
        return
    if "method" not in experiment:
        raise ValueError(f"{place}: the key 'method' is missing (or 'weights', for a network trained elsewhere)")
    for key in ("normalisation", "image_size"):
        if key in experiment:
            raise ValueError(f"{place}.{key}: only an experiment with 'weights' has it; pre-training uses the card's")


def _check_adopted(experiment: Config, place: str) -> None:
    for key in ("method", "training", "views", "seeds"):
        if key in experiment:
            raise ValueError(f"{place}.{key}: 'weights' names a network that is trained already; drop one")
    if {"split", "subset"} & experiment["dataset"].keys():
        raise ValueError(f"{place}.dataset: nothing is trained on it; drop split and subset, evaluations have theirs")


def _check_sweep(name: str, config: Config, schema: Mapping[str, Any]) -> None:
    """Refuse a sweep whose base does not exist or one of whose experiments is invalid."""
    sweep, bases = config["sweeps"][name], config["experiments"]
    base = sweep["base"]
    if base not in bases:
        raise ValueError(f"sweeps.{name}.base: there is no experiment '{base}'{nearest(base, bases)}")
    if "seeds" in bases[base] and "training.seed" in sweep["grid"]:
        raise ValueError(f"sweeps.{name}.grid.training.seed: experiments.{base}.seeds sets it; drop one")
    experiment_schema = {"$ref": "#/$defs/experiment", "$defs": schema["$defs"]}
    for experiment in sweeps.variants(name, config).values():
        check_structure(experiment, experiment_schema, ("sweeps", name, "grid"))
        _check_kind(experiment, f"sweeps.{name}.grid")


def _check_datasets(config: Config, cards: list[str]) -> None:
    for place, dataset in sweeps.datasets(config).items():
        if dataset not in cards:
            suggestion = nearest(dataset, cards)
            raise ValueError(f"{place}: there is no data set '{dataset}' (no datasets/{dataset}.yaml){suggestion}")


def _check_reported(config: Config) -> None:
    names = {*sweeps.before_seeds(config), *sweeps.experiments(config)}
    evaluations = config.get("evaluations") or {}
    for name, entry in (config.get("reported") or {}).items():
        if name not in names:
            raise ValueError(f"reported.{name}: there is no experiment '{name}'{nearest(name, names)}")
        for key, claim in entry["results"].items():
            place = f"reported.{name}.results.{key}"
            evaluation, metric = sweeps.split_claim(key, evaluations)
            if metric is None and not 0 <= claim <= 100:
                raise ValueError(f"{place}: {claim:g} is no percentage: give a number from 0 to 100")
            if evaluation not in evaluations:
                raise ValueError(f"{place}: there is no such evaluation{nearest(evaluation, evaluations)}")
