"""What `config.yaml` may say, checked in one readable line, and which experiments its seeds and sweeps make.

Torch-free, since each dry run calls it.
"""

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_core.config import nearest
from ssl_core.experiments.structure import check_structure
from ssl_core.provenance import canonical, digest

Config = Mapping[str, Any]

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SEEDED = re.compile(r"-seed\d+$")  # what `seeds` puts behind an experiment's name
# Names of other files and folders under results/.
RESERVED = {"experiments": {"sweeps"}, "evaluations": {"pretrain", "export"}, "sweeps": set()}
ENTRIES = ("experiments", "evaluations", "sweeps", "reported")
# Keys that name a file of weights; it may be another experiment's result.
FILES = ("weights", "method.initial", "method.teacher.weights", "method.teacher.projector")
# What only a pre-training leaves.
PRETRAINED = ("model.safetensors", "pretrain.json", "history.csv", "views.png", "curves.png", "curves.svg")


def check(config: Config, schema: Mapping[str, Any], cards: Iterable[str]) -> None:
    """Raise a one-line `ValueError` for the first thing that no run could use: its path, the fault, the nearest word.

    `cards` are the names of the data sets there are (`datasets/<name>.yaml`).
    """
    _check_values(config, "at the top")
    check_structure(config, schema, ())
    bases = config["experiments"]
    for section in ("experiments", "evaluations", "sweeps"):
        for name in config.get(section) or {}:
            _check_name(section, str(name))
    for name, experiment in bases.items():
        _check_kind(experiment, f"experiments.{name}")
    for name, sweep in (config.get("sweeps") or {}).items():
        base = sweep["base"]
        if base not in bases:
            raise ValueError(f"sweeps.{name}.base: there is no experiment '{base}'{nearest(base, bases)}")
        if "seeds" in bases[base] and "training.seed" in sweep["grid"]:
            raise ValueError(f"sweeps.{name}.grid.training.seed: experiments.{base}.seeds sets it; drop one")
        for experiment in variants(name, config).values():
            part = {"$ref": "#/$defs/experiment", "$defs": schema["$defs"]}
            check_structure(experiment, part, ("sweeps", name, "grid"))
            _check_kind(experiment, f"sweeps.{name}.grid")
    cards = list(cards)
    for place, dataset in _datasets(config).items():
        if dataset not in cards:
            raise ValueError(
                f"{place}: there is no data set '{dataset}' (no datasets/{dataset}.yaml){nearest(dataset, cards)}"
            )
    _check_reported(config)


def check_targets(config: Config, targets: Iterable[str]) -> None:
    """Raise a one-line `ValueError` for a file under `results/` whose experiment, evaluation or sweep there is not."""
    known = experiments(config)
    sweeps = config.get("sweeps") or {}
    evaluations = {*(config.get("evaluations") or {}), "pretrain"}
    for target in targets:
        parts = Path(target).parts
        if len(parts) < 3 or parts[0] != "results":
            continue
        name, file = parts[1], Path(parts[2])
        if name == "sweeps":
            if file.stem not in sweeps:
                raise ValueError(f"{target}: there is no sweep '{file.stem}'{nearest(file.stem, sweeps)}")
        elif name not in known:
            raise ValueError(f"{target}: {unknown(name, config)} (more than config.yaml: --configfile)")
        elif len(parts) == 3 and file.suffix == ".json" and file.stem not in evaluations:
            raise ValueError(f"{target}: there is no evaluation '{file.stem}'{nearest(file.stem, evaluations)}")
        elif len(parts) == 3 and file.name in PRETRAINED and "weights" in known[name]:
            raise ValueError(f"{target}: '{name}' takes its weights from a file, so nothing is pre-trained")


def check_files(config: Config, targets: Iterable[str]) -> None:
    """Raise a one-line `ValueError` for a file of weights that is not there, in the experiments that `targets` name.

    Where they name none, those written out count. A file that another experiment will write need not be there yet.
    """
    known = experiments(config)
    named = {parts[1] for parts in (Path(target).parts for target in targets) if len(parts) > 2}
    for name in [name for name in known if name in named] or written(config):
        for key, file in files(known[name]).items():
            folder, _, last = file.rpartition("/")
            made = folder.removeprefix("results/") in known and last in ("backbone.safetensors", "model.safetensors")
            if not made and not Path(file).is_file():
                raise ValueError(f"experiments.{name}.{key}: there is no file '{file}' (seen from the project's root)")


def files(experiment: Config) -> dict[str, str]:
    """Return the files of weights that an experiment names, by the path of their key."""
    found = {}
    for key in FILES:
        value: Any = experiment
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            found[key] = str(value)
    return found


def datasets(config: Config) -> list[str]:
    """Return the names of all data sets that experiments and evaluations use, each once."""
    return list(dict.fromkeys(_datasets(config).values()))


def written(config: Config) -> dict[str, Config]:
    """Return the experiments that are written out, by name, one for each of their seeds."""
    return {name: run for base, section in config["experiments"].items() for name, run in runs(base, section).items()}


def experiments(config: Config) -> dict[str, Config]:
    """Return all experiments by name, those of the sweeps after those written out.

    Raises `ValueError` where seeds or a sweep make a name that is taken.
    """
    found = dict(config["experiments"])
    made = [(f"experiments.{base}.seeds", runs(base, section)) for base, section in found.items() if "seeds" in section]
    made += [(f"sweeps.{sweep}", expand(sweep, config)) for sweep in config.get("sweeps") or {}]
    for place, more in made:
        for name, experiment in more.items():
            if name in found:
                raise ValueError(f"{place}: it makes an experiment '{name}', which exists already; rename one")
            found[name] = experiment
    return {name: experiment for name, experiment in found.items() if "seeds" not in experiment}


def runs(name: str, experiment: Config) -> dict[str, Config]:
    """Return an experiment by its name, or, where it has `seeds`, one of each: `<name>-seed<seed>`."""
    if "seeds" not in experiment:
        return {name: experiment}
    rest = {key: value for key, value in experiment.items() if key != "seeds"}
    return {f"{name}-seed{seed}": _replaced(rest, ["training", "seed"], seed) for seed in experiment["seeds"]}


def seeds(sections: Mapping[str, Config]) -> dict[str, dict[str, int]]:
    """Return, for each of these sections that has seeds, the seed of each of its experiments by name."""
    repeated = {name: section for name, section in sections.items() if "seeds" in section}
    return {name: dict(zip(runs(name, part), part["seeds"], strict=True)) for name, part in repeated.items()}


def reported(sections: Mapping[str, Config], config: Config) -> dict[str, Config]:
    """Return what is reported of these sections and of their seeds' experiments, by name."""
    names = {*sections, *(run for group in seeds(sections).values() for run in group)}
    return {name: entry for name, entry in (config.get("reported") or {}).items() if name in names}


def variants(sweep: str, config: Config) -> dict[str, Config]:
    """Return a sweep's experiments by name as their base has them, seeds included."""
    found = {}
    for name, values in points(sweep, config).items():
        experiment = config["experiments"][config["sweeps"][sweep]["base"]]
        for path, value in values.items():
            experiment = _replaced(experiment, path.split("."), value)
        found[name] = experiment
    return found


def expand(sweep: str, config: Config) -> dict[str, Config]:
    """Return a sweep's experiments by name, one for each of their seeds."""
    return {name: run for base, section in variants(sweep, config).items() for name, run in runs(base, section).items()}


def unknown(name: str, config: Config) -> str:
    """Say that there is no such experiment, and what is there instead."""
    groups = seeds(named(config))
    if name in groups:
        return f"experiment '{name}' has seeds: ask for {', '.join(groups[name])}"
    return f"there is no experiment '{name}'{nearest(name, experiments(config))}"


def points(sweep: str, config: Config) -> dict[str, dict[str, Any]]:
    """Return what each experiment of a sweep sets; its name is `<sweep>-<value>-<value>` in the order of the grid."""
    grid: Config = config["sweeps"][sweep]["grid"]
    found: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*grid.values()):
        name = "-".join([sweep, *map(_label, values)])
        if name in found:
            raise ValueError(f"sweeps.{sweep}.grid: two of its values give the experiment '{name}'; drop one")
        found[name] = dict(zip(grid, values, strict=True))
    return found


def merge(config: Config, overlay: Config) -> dict[str, Any]:
    """Lay one configuration over another, section by section, as Snakemake does for `--configfile`."""
    merged = dict(config)
    for key, value in overlay.items():
        below = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def without_nulls(config: Config) -> dict[str, Any]:
    """Leave out the entries that an overlay sets to null, and what is reported of them."""
    left, gone = {key: value for key, value in config.items() if value is not None}, {}
    for key in ENTRIES:
        section = left.get(key)
        gone[key] = [name for name, entry in section.items() if entry is None] if isinstance(section, Mapping) else []
        if gone[key]:
            left[key] = {name: entry for name, entry in left[key].items() if entry is not None}
    if isinstance(left.get("reported"), Mapping) and any(gone.values()):
        kept, made = (
            left.get("experiments") or {},
            tuple(f"{name}-" for name in (*gone["experiments"], *gone["sweeps"])),
        )
        left["reported"] = {
            name: _without_results(entry, gone["evaluations"])
            for name, entry in left["reported"].items()
            if SEEDED.sub("", str(name)) in kept or not (name in gone["experiments"] or str(name).startswith(made))
        }
    return left


def _check_values(value: Any, place: str) -> None:
    """Refuse what YAML can say and JSON cannot: keys that are no text, dates, bytes, numbers that are not finite."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place}: the key {key!r} is no text: write it in quotes")
            _check_values(inner, key if place == "at the top" else f"{place}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            _check_values(inner, f"{place}.{number}")
    elif not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{place}: {value!r} is no text, finite number, true, false or null; dates stand in quotes")


def _check_name(section: str, name: str) -> None:
    """Refuse names that make no portable file name or that another file has."""
    if not FILE_NAME.fullmatch(name):
        raise ValueError(
            f"{section}.{name}: names become files; begin with a letter or digit, then also '.', '_' and '-' may stand"
        )
    if name in RESERVED[section]:
        raise ValueError(f"{section}.{name}: this name is taken by another file of the results; choose another")


def _check_kind(experiment: Config, place: str) -> None:
    """Refuse what does not go together: an experiment has either a method or the weights of another training."""
    if "weights" not in experiment:
        if "method" not in experiment:
            raise ValueError(f"{place}: the key 'method' is missing (or 'weights', for a network trained elsewhere)")
        for key in ("normalisation", "image_size"):
            if key in experiment:
                raise ValueError(f"{place}.{key}: it belongs to 'weights'; pre-training takes the data set's own")
        return
    for key in ("method", "training", "views", "seeds"):
        if key in experiment:
            raise ValueError(f"{place}.{key}: 'weights' names a network that is trained already; drop one")
    if {"split", "subset"} & experiment["dataset"].keys():
        raise ValueError(f"{place}.dataset: nothing is trained on it; drop split and subset, evaluations have theirs")


def _check_reported(config: Config) -> None:
    known = {*named(config), *experiments(config)}
    evaluations = config.get("evaluations") or {}
    for name, entry in (config.get("reported") or {}).items():
        if name not in known:
            raise ValueError(f"reported.{name}: there is no experiment '{name}'{nearest(name, known)}")
        for evaluation in entry["results"]:
            if evaluation not in evaluations:
                place = f"reported.{name}.results.{evaluation}"
                raise ValueError(f"{place}: there is no such evaluation{nearest(evaluation, evaluations)}")


def _without_results(entry: Any, evaluations: Sequence[str]) -> Any:
    """Leave out what is reported of evaluations that were removed."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("results"), Mapping):
        return entry
    return {**entry, "results": {key: value for key, value in entry["results"].items() if key not in evaluations}}


def named(config: Config) -> dict[str, Config]:
    """Return the experiments as written and as sweeps vary them, before seeds multiply them."""
    varied = {name: part for sweep in config.get("sweeps") or {} for name, part in variants(sweep, config).items()}
    return {**config["experiments"], **varied}


def _datasets(config: Config) -> dict[str, str]:
    """Return the data set that stands at each place."""
    sections = {f"experiments.{name}": section for name, section in experiments(config).items()}
    sections |= {f"evaluations.{name}": section for name, section in (config.get("evaluations") or {}).items()}
    used = {place: section["dataset"]["name"] for place, section in sections.items() if "dataset" in section}
    return {f"{place}.dataset.name": name for place, name in used.items()}


def _replaced(section: Config, path: Sequence[str], value: Any) -> Config:
    """Copy a section with one value, however deep, replaced."""
    key, *rest = path
    below = section.get(key)
    return {**section, key: _replaced(below if isinstance(below, Mapping) else {}, rest, value) if rest else value}


def _label(value: Any) -> str:
    """Write a value as a part of a file name, the same every time; what does not fit is digested."""
    text = value if isinstance(value, str) else canonical(value)
    return text if re.fullmatch(r"[A-Za-z0-9._-]+", text) else digest(text)[:8]
