"""What `config.yaml` may say: the generated JSON schema, its check in one readable line, and sweeps as experiments.

`generate` imports every method and protocol, and so torch. All else here is torch-free: each dry run calls it.
"""

import importlib
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from ssl_core.config import Experiment, nearest
from ssl_core.provenance import canonical, digest

Config = Mapping[str, Any]

DIALECT = "https://json-schema.org/draft/2020-12/schema"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
RESERVED = {"experiments": {"sweeps"}, "evaluations": {"pretrain"}, "sweeps": set()}  # names of files under results/
KINDS = {"object": "a mapping", "array": "a list", "null": "null", "integer": "a whole number", "string": "a text"}
NOISE = {"title", "description", "default"}  # the schema says what may stand where; defaults live in the code


def check(config: Config, schema: Mapping[str, Any], cards: Iterable[str]) -> None:
    """Raise a one-line `ValueError` for the first thing that no run could use: its path, the fault, the nearest word.

    `cards` are the names of the data sets there are (`datasets/<name>.yaml`).
    """
    _check_structure(config, schema, ())
    bases = config["experiments"]
    for section in ("experiments", "evaluations", "sweeps"):
        for name in config.get(section) or {}:
            _check_name(section, str(name))
    for name, sweep in (config.get("sweeps") or {}).items():
        base = sweep["base"]
        if base not in bases:
            raise ValueError(f"sweeps.{name}.base: there is no experiment '{base}'{nearest(base, bases)}")
        for experiment in expand(name, config).values():
            part = {"$ref": "#/$defs/experiment", "$defs": schema["$defs"]}
            _check_structure(experiment, part, ("sweeps", name, "grid"))
    cards = list(cards)
    for place, dataset in _datasets(config).items():
        if dataset not in cards:
            raise ValueError(
                f"{place}: there is no data set '{dataset}' (no datasets/{dataset}.yaml){nearest(dataset, cards)}"
            )


def check_targets(config: Config, targets: Iterable[str]) -> None:
    """Raise a one-line `ValueError` for a file under `results/` whose experiment, evaluation or sweep there is not."""
    known = experiments(config)
    sweeps = config.get("sweeps") or {}
    evaluations = {*(config.get("evaluations") or {}), *RESERVED["evaluations"]}
    for target in targets:
        parts = Path(target).parts
        if len(parts) != 3 or parts[0] != "results":
            continue
        name, file = parts[1], Path(parts[2])
        if name == "sweeps" and file.stem not in sweeps:
            raise ValueError(f"{target}: there is no sweep '{file.stem}'{nearest(file.stem, sweeps)}")
        if name != "sweeps" and name not in known:
            raise ValueError(
                f"{target}: there is no experiment '{name}'{nearest(name, known)} (more than config.yaml: --configfile)"
            )
        if name != "sweeps" and file.suffix == ".json" and file.stem not in evaluations:
            raise ValueError(f"{target}: there is no evaluation '{file.stem}'{nearest(file.stem, evaluations)}")


def datasets(config: Config) -> list[str]:
    """Return the names of all data sets that experiments and evaluations use, each once."""
    return list(dict.fromkeys(_datasets(config).values()))


def experiments(config: Config) -> dict[str, Config]:
    """Return all experiments by name, those of the sweeps after those written out.

    Raises `ValueError` where a sweep makes a name that is taken.
    """
    found = dict(config["experiments"])
    for sweep in config.get("sweeps") or {}:
        for name, experiment in expand(sweep, config).items():
            if name in found:
                raise ValueError(f"sweeps.{sweep}: it makes an experiment '{name}', which exists already; rename one")
            found[name] = experiment
    return found


def expand(sweep: str, config: Config) -> dict[str, Config]:
    """Return a sweep's experiments by name."""
    found = {}
    for name, values in points(sweep, config).items():
        experiment = config["experiments"][config["sweeps"][sweep]["base"]]
        for path, value in values.items():
            experiment = _replaced(experiment, path.split("."), value)
        found[name] = experiment
    return found


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


def named_configs(folder: str) -> dict[str, type[BaseModel]]:
    """Import every file of `ssl_core/<folder>/` that has a `Config` of its own, by the file's name."""
    found = {}
    for path in sorted((Path(__file__).parent / folder).glob("[a-z]*.py")):
        module = importlib.import_module(f"ssl_core.{folder}.{path.stem}")
        config = getattr(module, "Config", None)
        if isinstance(config, type) and config.__module__ == module.__name__:
            found[path.stem] = config
    return found


def generate() -> dict[str, Any]:
    """Write the schema of `config.yaml` from the typed configuration of every section, method and protocol."""
    from ssl_core.data.views import POLICIES, View

    definitions: dict[str, Any] = {}
    methods = _choice("name", "method", named_configs("methods"), definitions)
    protocols = _choice("protocol", "protocol", named_configs("evaluations"), definitions)
    experiment = _part(Experiment, definitions)
    experiment["properties"]["method"] = methods
    experiment["properties"]["views"] = _sections({"$ref": "#/$defs/change_of_view"})
    experiment["required"] = ["dataset", "backbone", "method"]
    definitions["experiment"] = experiment
    definitions["change_of_view"] = _part(View, definitions) | {"required": []}
    if "Augmentation" in definitions:  # its own keys, a policy's name, or a policy with changes
        policy = {"enum": sorted(POLICIES)}
        definitions["Augmentation"]["properties"]["policy"] = policy
        definitions["Augmentation"] = {"anyOf": [policy, definitions["Augmentation"]]}
    definitions["sweep"] = _mapping(
        base={"type": "string"}, grid=_sections({"type": "array", "minItems": 1}) | {"minProperties": 1}
    )
    whole = _mapping(
        experiments=_sections({"$ref": "#/$defs/experiment"}) | {"minProperties": 1},
        evaluations=_sections(protocols),
        sweeps=_sections({"$ref": "#/$defs/sweep"}),
    )
    return {"$schema": DIALECT} | whole | {"required": ["experiments"], "$defs": dict(sorted(definitions.items()))}


def _choice(key: str, kind: str, models: Mapping[str, type[BaseModel]], definitions: dict[str, Any]) -> dict[str, Any]:
    """Describe a section whose other keys depend on the name that stands under `key`."""
    branches = []
    for name, model in models.items():
        part = _part(model, definitions)
        part["properties"][key] = {"const": name}
        part["required"] = [word for word in part.get("required", []) if word not in (key, "dataset")]
        definitions[f"{kind}.{name}"] = part
        chosen = {"required": [key], "properties": {key: {"const": name}}}
        branches.append({"if": chosen, "then": {"$ref": f"#/$defs/{kind}.{name}"}})
    return {"type": "object", "required": [key], "properties": {key: {"enum": list(models)}}, "allOf": branches}


def _part(model: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    """Describe one typed section; the sections inside it go to `definitions`."""
    part = _bare(TypeAdapter(model).json_schema())
    definitions.update(part.pop("$defs", {}))
    return part


def _bare(schema: Any) -> Any:
    """Leave out titles, descriptions and defaults, so that only a change of structure changes the schema."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _bare(part) for name, part in value.items()} if key in ("properties", "$defs") else _bare(value)
        for key, value in schema.items()
        if key not in NOISE
    }


def _mapping(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(properties)}


def _sections(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": schema}


def _check_structure(section: Any, schema: Mapping[str, Any], place: Sequence[str]) -> None:
    from jsonschema import Draft202012Validator

    for error in Draft202012Validator(schema).iter_errors(section):
        raise ValueError(_explain(error, place)) from None


def _explain(error: Any, place: Sequence[str]) -> str:
    """Say in one line what a schema error means: where, what was found, what was expected."""
    place = [*place, *map(str, error.relative_path)]
    where = ".".join(place) or "at the top"
    if error.validator == "anyOf":
        # The alternative that is meant is the one that fails furthest in; a fault of kind is the fault of them all.
        inner = [part for part in error.context if part.relative_path or part.validator == "additionalProperties"]
        if inner:
            return _explain(inner[0], place)
        kinds = [kind for part in error.context for kind in _expected(part)]
        return f"{where}: expected {' or '.join(kinds)}, found {error.instance!r}"
    if error.validator == "additionalProperties":
        key = next(str(key) for key in error.instance if key not in error.schema["properties"])
        return f"{'.'.join([*place, key])}: unknown key{nearest(key, error.schema['properties'])}"
    if error.validator == "required":
        key = next(key for key in error.validator_value if key not in error.instance)
        return f"{where}: the key '{key}' is missing"
    if error.validator in ("enum", "const"):
        values = error.validator_value if error.validator == "enum" else [error.validator_value]
        return f"{where}: unknown value {error.instance!r}{nearest(str(error.instance), map(str, values))}"
    if error.validator == "type":
        return f"{where}: expected {' or '.join(_expected(error))}, found {error.instance!r}{_hint(error.instance)}"
    return f"{where}: {error.message}"


def _expected(error: Any) -> list[str]:
    if error.validator == "type":
        return [KINDS.get(error.validator_value, f"a {error.validator_value}")]
    if error.validator == "enum":
        return [", ".join(map(str, error.validator_value))]
    return [error.message]


def _hint(found: Any) -> str:
    """YAML 1.1 reads 1e-3 as a text; say so."""
    if isinstance(found, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", found):
        mantissa, exponent = re.split("[eE]", found)
        return f" (YAML wants a point in it: {mantissa}.0e{exponent if exponent[0] in '+-' else '+' + exponent})"
    return ""


def _check_name(section: str, name: str) -> None:
    """Refuse names that make no portable file name or that another file has."""
    if not FILE_NAME.fullmatch(name):
        raise ValueError(
            f"{section}.{name}: names become files; begin with a letter or digit, then also '.', '_' and '-' may stand"
        )
    if name in RESERVED[section]:
        raise ValueError(f"{section}.{name}: this name is taken by another file of the results; choose another")


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
