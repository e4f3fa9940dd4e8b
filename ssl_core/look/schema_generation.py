"""Generate the JSON schema of `config.yaml` from the typed configuration.

Imports every method and protocol, and so torch: dry runs read the file that `make schema` writes instead.
"""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from ssl_core.config import Adopted, Experiment, Export, Quantise, Reported
from ssl_core.experiments.figures import KINDS
from ssl_core.experiments.needs import projector_layers

DIALECT = "https://json-schema.org/draft/2020-12/schema"
NOISE = {"title", "description", "default"}  # only the structure matters; defaults are in the code
SEEDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1, "uniqueItems": True}


def named_configs(folder: str) -> dict[str, type[BaseModel]]:
    """Return the `Config` of every file of `ssl_core/<folder>/` that defines one, by the file's name."""
    configs = {}
    for path in sorted((Path(__file__).parents[1] / folder).glob("[a-z]*.py")):
        module = importlib.import_module(f"ssl_core.{folder}.{path.stem}")
        config = getattr(module, "Config", None)
        if isinstance(config, type) and config.__module__ == module.__name__:
            configs[path.stem] = config
    return configs


def generate() -> dict[str, Any]:
    """Return the schema of `config.yaml`, from the typed configuration of every section, method and protocol."""
    from ssl_core.data.views import POLICIES, View
    from ssl_core.networks.backbones import backbone_names

    definitions: dict[str, Any] = {}
    methods = _choice("name", "method", named_configs("methods"), definitions)
    protocols = _choice("protocol", "protocol", named_configs("evaluations"), definitions)
    _add_contracts(definitions)
    experiment = _part(Experiment, definitions)
    experiment["properties"]["method"] = methods
    experiment["properties"]["seeds"] = SEEDS
    experiment["properties"]["views"] = _sections({"$ref": "#/$defs/change_of_view"})
    adopted = _part(Adopted, definitions)["properties"]
    experiment["properties"] |= {key: adopted[key] for key in ("weights", "image_size", "normalisation")}
    experiment["required"] = ["dataset", "backbone"]  # and a method or weights: the check has a better message
    definitions["experiment"] = experiment
    definitions["Backbone"]["names"] = backbone_names()  # for the dry run, which imports no torch
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
        reported=_sections(_part(Reported, definitions)),
        figures=_sections(_choice("draw", "figure", KINDS, definitions)),
        export=_part(Export, definitions),
        quantise=_part(Quantise, definitions),
        shards={"type": "string"},  # the address of all shards
        container={"type": "string"},  # the image of all jobs with `--sdm apptainer`
    )
    return {"$schema": DIALECT} | whole | {"required": ["experiments"], "$defs": dict(sorted(definitions.items()))}


def _add_contracts(definitions: dict[str, Any]) -> None:
    """Add to protocols their contract, and to methods the layers of their projector per preset, for the dry run."""
    protocols: dict[str, Any] = named_configs("evaluations")
    for name, config in protocols.items():
        definitions[f"protocol.{name}"]["contract"] = config.contract.model_dump(mode="json", exclude_defaults=True)
    for name, config in named_configs("methods").items():
        presets = sys.modules[config.__module__].PRESETS
        layers = {}
        for preset, changes in presets.items():
            resolved = config.model_construct(**changes.method)  # required keys may be missing
            layers[preset] = projector_layers(dict(resolved))
        if None not in layers.values():
            definitions[f"method.{name}"]["projector_layers"] = layers


def _choice(key: str, kind: str, models: Mapping[str, type[BaseModel]], definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a section whose other keys depend on the value of `key`."""
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
    """Return the schema of one typed section; nested sections are added to `definitions`."""
    part = _bare(TypeAdapter(model).json_schema())
    definitions.update(part.pop("$defs", {}))
    return part


def _bare(schema: Any) -> Any:
    """Remove titles, descriptions and defaults, so that only a change of structure changes the schema."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    bare: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):  # their keys are names, which may be words of NOISE
            bare[key] = {name: _bare(part) for name, part in value.items()}
        elif key not in NOISE:
            bare[key] = _bare(value)
    return bare


def _mapping(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(properties)}


def _sections(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": schema}
