"""config.yaml and the files laid over it: read, merged, checked, and asked which of them said what. Torch-free."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ssl_core.experiments import checks as schema
from ssl_core.files import YamlLoader, read_json

CONFIG = Path("config.yaml")
SCHEMA = Path("workflow/schemas/config.schema.json")
SEEDED = re.compile(r"(.+)-seed\d+")  # what `seeds` makes of an experiment's name

Where = tuple[str, ...]  # a key, as the keys that lead to it


class Layers(NamedTuple):
    """The files from the lowest to the highest, and what they say together."""

    files: dict[Path, dict[str, Any]]
    settings: dict[str, Any]

    def experiment(self, name: str) -> dict[str, Any]:
        """Return an experiment's section, also of one that a sweep or `seeds` makes; `ValueError` if there is none."""
        found = schema.experiments(self.settings)
        if name not in found:
            raise ValueError(schema.unknown(name, self.settings))
        return dict(found[name])

    def origin(self, name: str, where: Where) -> str | None:
        """Say which sweep, `seeds` or file set the key at `where` of an experiment; None if nothing did."""
        base, changed = self._ancestor(name)
        for path, maker in changed.items():
            if where[: len(path)] == path:
                return maker
        for file, content in reversed(self.files.items()):
            found = _said(content, ("experiments", base, *where))
            if found is not None:
                return f"{file}{found}"
        return None

    def touches(self, name: str, where: Where) -> bool:
        """Say whether any file gives something at `where` or below it."""
        base, changed = self._ancestor(name)
        files = (_at(content, ("experiments", base, *where)) for content in self.files.values())
        return any(found is not None for found in files) or any(path[: len(where)] == where for path in changed)

    def _ancestor(self, name: str) -> tuple[str, dict[Where, str]]:
        """Return the experiment that is written out, and what sweeps and seeds change in it."""
        written = self.settings["experiments"]
        if name in written:
            return name, {}
        for sweep, section in (self.settings.get("sweeps") or {}).items():
            points = schema.points(sweep, self.settings)
            if name in points:
                changed = {tuple(path.split(".")): f"sweep {sweep}" for path in points[name]}
                return section["base"], changed
        seeded = SEEDED.fullmatch(name)
        if seeded is None:
            raise ValueError(schema.unknown(name, self.settings))
        base, changed = self._ancestor(seeded[1])
        return base, {**changed, ("training", "seed"): "seeds"}


def load(overlays: Sequence[Path]) -> Layers:
    """Read config.yaml and lay `overlays` over it, as `--configfile` does; a `ValueError` says what is wrong first."""
    files = {path: read_yaml(path) for path in (CONFIG, *overlays)}
    settings: dict[str, Any] = {}
    for content in files.values():
        settings = schema.merge(settings, content)
    settings = schema.without_nulls(settings)
    schema.check(settings, read_json(SCHEMA), [path.stem for path in Path("datasets").glob("*.yaml")])
    return Layers(files, settings)


def check_config_files(paths: Iterable[str | Path]) -> None:
    """Raise a one-line `ValueError` for what Snakemake lets pass: a target taken for a configuration, a key twice."""
    for path in map(Path, paths):
        if path.parts[:1] in (("results",), ("shards",)):
            raise ValueError(
                f"{path} is a target that --configfile took for its own: write targets before --configfile"
            )
        read_yaml(path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file; a `ValueError` names it if it is missing, no YAML, holds no keys or one twice."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)  # a safe loader
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: run from the root of the project") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder: name a YAML file in it") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        tab = "; YAML wants spaces, not tabs" if "'\\t'" in str(error) else ""
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}{tab}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys at the top, found {content!r}")
    return content


def leaves(section: Any, where: Where = ()) -> Iterator[tuple[Where, Any]]:
    """Iterate over all values that are no sections, with the keys that lead to them."""
    if isinstance(section, Mapping) and section:
        for key, value in section.items():
            yield from leaves(value, (*where, str(key)))
    else:
        yield where, section


def _said(content: Any, where: Where) -> str | None:
    """Return "" if `content` gives a value at `where`, the policy's name if it gives one, None if it says nothing."""
    policy = None
    for key in where:
        if not isinstance(content, Mapping):
            return f" ({content})" if isinstance(content, str) else ""  # a policy's name stands for all its keys
        if isinstance(content.get("policy"), str):
            policy = f" ({content['policy']})"
        if key not in content:
            return policy
        content = content[key]
    return ""


def _at(content: Any, where: Where) -> Any:
    for key in where:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content
