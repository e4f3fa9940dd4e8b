"""config.yaml and the files that `--configfile` lays over it: reading, merging, the origin of a value. Torch-free."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssl_core.experiments import bundled, checks, sweeps
from ssl_core.experiments.sweeps import Config
from ssl_core.files import YamlLoader, read_json

CONFIG = Path("config.yaml")
SECTIONS = ("experiments", "evaluations", "sweeps", "reported", "figures")  # their entries can be removed by null

Keys = tuple[str, ...]  # the keys from the top of a section to one of its values


class Configuration(NamedTuple):
    """The contents of the files, lowest first, and the settings that they give together."""

    files: dict[Path, dict[str, Any]]
    settings: dict[str, Any]

    @property
    def address(self) -> str | None:
        """The address of all shards; None if they are local."""
        return self.settings.get("shards") or os.environ.get("SSL_SHARDS")

    def experiment(self, name: str) -> dict[str, Any]:
        """Return an experiment's settings, also of one that a sweep or `seeds` makes; `ValueError` if there is none."""
        experiments = sweeps.experiments(self.settings)
        if name not in experiments:
            raise ValueError(sweeps.unknown_experiment(name, self.settings))
        return dict(experiments[name])

    def origin(self, name: str, keys: Keys) -> str | None:
        """Return the sweep, `seeds` or file that set the value at `keys` of an experiment; None if nothing did."""
        base, changes = self._written(name)
        for changed, origin in changes.items():
            if keys[: len(changed)] == changed:
                return origin
        for file, content in reversed(self.files.items()):
            policy = _policy_or_value(content, ("experiments", base, *keys))
            if policy is not None:
                return f"{file}{policy}"
        return None

    def touches(self, name: str, keys: Keys) -> bool:
        """Return whether a file, a sweep or `seeds` sets a value at `keys` of an experiment or below."""
        base, changes = self._written(name)
        if any(changed[: len(keys)] == keys for changed in changes):
            return True
        return any(_value(content, ("experiments", base, *keys)) is not None for content in self.files.values())

    def _written(self, name: str) -> tuple[str, dict[Keys, str]]:
        """Return the experiment in the files that `name` comes from, and the origin of each value that it changes."""
        if name in self.settings["experiments"]:
            return name, {}
        for sweep, section in (self.settings.get("sweeps") or {}).items():
            points = sweeps.points(sweep, self.settings)
            if name in points:
                return section["base"], {tuple(path.split(".")): f"sweep {sweep}" for path in points[name]}
        without_seed = sweeps.SEED_SUFFIX.sub("", name)
        if without_seed == name:
            raise ValueError(sweeps.unknown_experiment(name, self.settings))
        base, changes = self._written(without_seed)
        return base, {**changes, ("training", "seed"): "seeds"}


def load_configuration(overlays: Sequence[Path]) -> Configuration:
    """Read config.yaml with `overlays` laid over it, as `--configfile` does; the first fault is a `ValueError`."""
    files = {path: read_yaml(path) for path in (CONFIG, *overlays)}
    settings: dict[str, Any] = {}
    for content in files.values():
        settings = merge(settings, content)
    settings = without_nulls(settings)
    checks.check(settings, read_json(bundled.SCHEMA), bundled.card_names())
    return Configuration(files, settings)


def check_config_files(paths: Iterable[str | Path]) -> None:
    """Raise a `ValueError` for faults that Snakemake ignores: a target after `--configfile`, a key written twice."""
    for path in map(Path, paths):
        relative = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        if relative.parts[:1] in (("results",), ("shards",)):
            raise ValueError(f"{relative} follows --configfile, but is a target: write targets before --configfile")
        read_yaml(relative)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file; a `ValueError` names one that is missing, no YAML, without keys or with one twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)  # a safe loader
    except FileNotFoundError:
        project = "run in the project's folder (`ssl-core init DIR` makes one)"
        raise ValueError(f"{path} does not exist: {project if path == CONFIG else 'correct the path'}") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: name a YAML file in it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        hint = "; YAML wants spaces, not tabs" if "'\\t'" in str(error) else ""
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}{hint}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys at the top, found {content!r}")
    try:
        json.dumps(content, default=str, skipkeys=True)
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: a section contains itself by a YAML alias (`*name`): write it out") from None
    return content


def merge(config: Config, overlay: Config) -> dict[str, Any]:
    """Lay one configuration over another, section by section, as Snakemake does for `--configfile`."""
    merged = dict(config)
    for key, value in overlay.items():
        if isinstance(value, Mapping):
            lower = merged.get(key)
            merged[key] = merge(lower if isinstance(lower, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def without_nulls(config: Config) -> dict[str, Any]:
    """Leave out the entries that an overlay sets to null, and the reported numbers of those entries."""
    kept = {key: value for key, value in config.items() if value is not None}
    removed: dict[str, list[str]] = {}
    for key in SECTIONS:
        section = kept.get(key)
        removed[key] = []
        if isinstance(section, Mapping):
            removed[key] = [name for name, entry in section.items() if entry is None]
            kept[key] = {name: entry for name, entry in section.items() if entry is not None}
    if isinstance(kept.get("reported"), Mapping) and any(removed.values()):
        kept["reported"] = _without_reports(kept, removed)
    return kept


def _without_reports(config: Config, removed: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return `reported` without the experiments, sweeps and evaluations that were removed."""
    reported = {}
    for name, entry in config["reported"].items():
        if not _is_removed(str(name), config.get("experiments") or {}, removed):
            reported[name] = _without_results(entry, removed["evaluations"])
    return reported


def _is_removed(name: str, experiments: Config, removed: Mapping[str, Sequence[str]]) -> bool:
    """Return whether an experiment is removed, or comes from the seeds or the sweep of a removed entry."""
    if sweeps.SEED_SUFFIX.sub("", name) in experiments:
        return False
    derived = tuple(f"{entry}-" for entry in (*removed["experiments"], *removed["sweeps"]))
    return name in removed["experiments"] or name.startswith(derived)


def _without_results(entry: Any, evaluations: Sequence[str]) -> Any:
    """Leave out the reported numbers of removed evaluations."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("results"), Mapping):
        return entry
    return {**entry, "results": {key: value for key, value in entry["results"].items() if key not in evaluations}}


def leaves(section: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Iterate over all values that are no sections, each with its keys."""
    if isinstance(section, Mapping) and section:
        for key, value in section.items():
            yield from leaves(value, (*keys, str(key)))
    else:
        yield keys, section


def _policy_or_value(content: Any, keys: Keys) -> str | None:
    """Return "" if `content` has a value at `keys`, " (name)" if a named policy gives it one, None if neither."""
    policy = None
    for key in keys:
        if not isinstance(content, Mapping):
            return f" ({content})" if isinstance(content, str) else ""  # the name of a policy sets all its keys
        if isinstance(content.get("policy"), str):
            policy = f" ({content['policy']})"
        if key not in content:
            return policy
        content = content[key]
    return ""


def _value(content: Any, keys: Keys) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content
