"""Which experiments a configuration defines: those written in it, one per seed, and the points of its sweeps.

Torch-free, since each dry run calls it. All functions expect a valid configuration (`checks.check`).
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssl_core.config import nearest
from ssl_core.provenance import canonical, digest

Config = Mapping[str, Any]  # a configuration, or one of its sections

SEED_SUFFIX = re.compile(r"-seed\d+$")  # `seeds: [3]` turns the experiment `x` into `x-seed3`
# Keys of an experiment whose value is the path of a weights file. The file may be written by another experiment.
WEIGHT_KEYS = ("weights", "method.initial", "method.teacher.weights", "method.teacher.projector")


def experiments(config: Config) -> dict[str, Config]:
    """Return all experiments by name: those written in the configuration, then those of seeds, then those of sweeps.

    Raises `ValueError` if seeds or a sweep make a name that is taken.
    """
    sections = dict(config["experiments"])
    for base, section in config["experiments"].items():
        if "seeds" in section:
            _add(sections, with_seeds(base, section), f"experiments.{base}.seeds")
    for sweep in config.get("sweeps") or {}:
        _add(sections, sweep_experiments(sweep, config), f"sweeps.{sweep}")
    return {name: section for name, section in sections.items() if "seeds" not in section}


def _add(sections: dict[str, Config], more: Mapping[str, Config], place: str) -> None:
    """Add the experiments that `place` makes."""
    for name, section in more.items():
        if name in sections:
            raise ValueError(f"{place}: makes an experiment '{name}', which exists already; rename one of them")
        sections[name] = section


def written_experiments(config: Config) -> dict[str, Config]:
    """Return the experiments by name without those of sweeps, one per seed."""
    return _each_seed(config["experiments"])


def sweep_experiments(sweep: str, config: Config) -> dict[str, Config]:
    """Return a sweep's experiments by name, one per point and seed."""
    return _each_seed(variants(sweep, config))


def before_seeds(config: Config) -> dict[str, Config]:
    """Return the experiments written in the configuration and those of all sweeps, before seeds multiply them."""
    sections = dict(config["experiments"])
    for sweep in config.get("sweeps") or {}:
        sections.update(variants(sweep, config))
    return sections


def variants(sweep: str, config: Config) -> dict[str, Config]:
    """Return a sweep's experiments by name, one per point, before seeds multiply them."""
    base = config["experiments"][config["sweeps"][sweep]["base"]]
    sections = {}
    for name, values in points(sweep, config).items():
        section = base
        for key, value in values.items():
            section = _with_value(section, key.split("."), value)
        sections[name] = section
    return sections


def points(sweep: str, config: Config) -> dict[str, dict[str, Any]]:
    """Return the values that each experiment of a sweep sets, by `<sweep>-<value>-<value>` in the order of the grid."""
    grid: Config = config["sweeps"][sweep]["grid"]
    by_name: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*grid.values()):
        name = "-".join([sweep, *map(_label, values)])
        if name in by_name:
            raise ValueError(f"sweeps.{sweep}.grid: two points have the name '{name}'; drop one")
        by_name[name] = dict(zip(grid, values, strict=True))
    return by_name


def with_seeds(name: str, section: Config) -> dict[str, Config]:
    """Return an experiment `<name>-seed<seed>` per seed, or the experiment itself if it has no `seeds`."""
    if "seeds" not in section:
        return {name: section}
    rest = {key: value for key, value in section.items() if key != "seeds"}
    return {f"{name}-seed{seed}": _with_value(rest, ["training", "seed"], seed) for seed in section["seeds"]}


def seeds(sections: Mapping[str, Config]) -> dict[str, dict[str, int]]:
    """Return, for each section with seeds, the seed of each of its experiments by name."""
    by_base = {}
    for base, section in sections.items():
        if "seeds" in section:
            by_base[base] = dict(zip(with_seeds(base, section), section["seeds"], strict=True))
    return by_base


def reported(sections: Mapping[str, Config], config: Config) -> dict[str, Config]:
    """Return the entries of `reported` for these sections and for the experiments of their seeds, by name."""
    names = set(sections)
    for seeded in seeds(sections).values():
        names.update(seeded)
    return {name: entry for name, entry in (config.get("reported") or {}).items() if name in names}


def unknown_experiment(name: str, config: Config) -> str:
    """Return the error message for a name that is no experiment, with the names to use instead."""
    seeded = seeds(before_seeds(config))
    if name in seeded:
        return f"experiment '{name}' has seeds: use {', '.join(seeded[name])}"
    return f"there is no experiment '{name}'{nearest(name, experiments(config))}"


def datasets(config: Config) -> dict[str, str]:
    """Return the name of the data set at each place that names one, for example `experiments.x.dataset.name`."""
    sections = {f"experiments.{name}": section for name, section in experiments(config).items()}
    sections |= {f"evaluations.{name}": section for name, section in (config.get("evaluations") or {}).items()}
    return {
        f"{place}.dataset.name": section["dataset"]["name"]
        for place, section in sections.items()
        if "dataset" in section
    }


def weight_files(experiment: Config) -> dict[str, str]:
    """Return the files of weights that an experiment starts from, by their key."""
    files = {}
    for key in WEIGHT_KEYS:
        value: Any = experiment
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            files[key] = str(value)
    return files


def _each_seed(sections: Mapping[str, Config]) -> dict[str, Config]:
    seeded: dict[str, Config] = {}
    for name, section in sections.items():
        seeded.update(with_seeds(name, section))
    return seeded


def _with_value(section: Config, keys: Sequence[str], value: Any) -> Config:
    """Copy a section with the value at nested `keys` replaced; sections on the way are created."""
    key, *rest = keys
    if rest:
        inner = section.get(key)
        value = _with_value(inner if isinstance(inner, Mapping) else {}, rest, value)
    return {**section, key: value}


def _label(value: Any) -> str:
    """Return a value as a part of a file name; a value with other characters gives its digest."""
    text = value if isinstance(value, str) else canonical(value)
    return text if re.fullmatch(r"[A-Za-z0-9._-]+", text) else digest(text)[:8]


def split_claim(key: str, evaluations: Iterable[str]) -> tuple[str, str | None]:
    """Return the evaluation and the metric of a key of `reported.<experiment>.results`; None: the headline."""
    evaluation, _, metric = key.rpartition(".")
    return (key, None) if not evaluation or key in evaluations else (evaluation, metric)
