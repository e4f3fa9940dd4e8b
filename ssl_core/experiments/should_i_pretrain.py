"""The runs that results/should_i_pretrain.html compares. Torch-free, since each dry run calls it.

Their names are those of recipes/should_i_pretrain.yaml: an experiment for each way to start a network, and evaluations
`labels_...`, each with a share of the labels and a seed. A run fine-tunes the network of a seed on the labels of that
seed.
"""

from collections.abc import Mapping
from typing import Any

from ssl_core.experiments import sweeps
from ssl_core.experiments.sweeps import Config

TARGET = "results/should_i_pretrain.html"
RECIPE = "--configfile=$(ssl-core recipes should_i_pretrain)"
WAYS = ("given", "pretrained", "continued", "distilled")  # names of experiments; only `pretrained` is needed
LABELS = "labels_"  # how the names of its evaluations begin


def check(config: Config) -> None:
    """Raise a `ValueError` if a configuration lacks experiments or evaluations of the comparison."""
    if "pretrained" not in config["experiments"]:
        raise ValueError(f"{TARGET}: there is no experiment 'pretrained': add {RECIPE}, or name yours so")
    if "weights" in config["experiments"]["pretrained"]:
        raise ValueError("experiments.pretrained.weights: this experiment is pre-trained here; name it 'given'")
    evaluations = _evaluations(config)
    if not evaluations:
        raise ValueError(f"{TARGET}: there is no evaluation named {LABELS}...: add {RECIPE}")
    for name, section in evaluations.items():
        if section["protocol"] != "finetune" or "fraction" not in section or "labels_per_class" in section:
            raise ValueError(
                f"evaluations.{name}: {TARGET} needs `protocol: finetune` with a `fraction` of the labels (or another "
                "name for this evaluation)"
            )
    if not pairs("pretrained", config):
        seeds = sorted({section.get("seed", 0) for section in evaluations.values()})
        raise ValueError(
            f"{TARGET}: no seed of experiments.pretrained is one of the evaluations {LABELS}... ({seeds}): use the "
            "same seeds"
        )


def ways(config: Config) -> list[str]:
    """Return the experiments that are compared, by the names before seeds multiply them."""
    return [name for name in WAYS if name in config["experiments"]]


def pairs(way: str, config: Config) -> list[tuple[str, str]]:
    """Return the experiments and evaluations of one way: those of equal seed, or all for weights trained elsewhere."""
    section = config["experiments"][way]
    found = []
    for experiment, run in sweeps.with_seeds(way, section).items():
        for evaluation, settings in _evaluations(config).items():
            if "weights" in section or settings.get("seed", 0) == _seed(run):
                found.append((experiment, evaluation))
    return found


def all_pairs(config: Config) -> list[tuple[str, str]]:
    """Return the experiments and evaluations of all ways."""
    return [pair for way in ways(config) for pair in pairs(way, config)]


def of_other_seeds(experiment: str, config: Config) -> set[str]:
    """Return the evaluations of the comparison that an experiment has no part in, since its seed is another."""
    own = {evaluation for name, evaluation in all_pairs(config) if name == experiment}
    return _evaluations(config).keys() - own if own else set()


def plan(config: Config) -> dict[str, Any]:
    """Return all seeds of `pretrained` and its evaluations, and each way's experiments and those it starts from."""
    seeds = {settings.get("seed", 0) for settings in _evaluations(config).values()}
    seeds.update(_seed(run) for run in sweeps.with_seeds("pretrained", config["experiments"]["pretrained"]).values())
    return {"seeds": sorted(seeds), "ways": {way: _plan_of(way, config) for way in ways(config)}}


def pretrainings(config: Config) -> list[str]:
    """Return the experiments that are trained here for the comparison, teachers included."""
    every, names = sweeps.experiments(config), {}
    for way in plan(config)["ways"].values():
        names.update(dict.fromkeys([*way["experiments"], *way["sources"]]))
    return [name for name in names if "weights" not in every[name]]


def _plan_of(way: str, config: Config) -> dict[str, list[str]]:
    every = sweeps.experiments(config)
    experiments = list(dict.fromkeys(experiment for experiment, _ in pairs(way, config)))
    sources: dict[str, None] = {}
    for experiment in experiments:
        for file in sweeps.weight_files(every[experiment]).values():
            folder = file.rpartition("/")[0].removeprefix("results/")
            if folder in every:
                sources[folder] = None
    return {"experiments": experiments, "sources": list(sources)}


def _evaluations(config: Config) -> dict[str, Mapping[str, Any]]:
    every = config.get("evaluations") or {}
    return {name: section for name, section in every.items() if name.startswith(LABELS)}


def _seed(experiment: Config) -> int:
    return (experiment.get("training") or {}).get("seed", 0)
