"""Adds the page keys.md to the site: every key of the configuration with its type, default, source and comment.

Keys and types come from the generated schema; defaults, presets and comments from the typed configuration.
"""

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ssl_core import config as settings
from ssl_core.blocks.frozen_teacher import Teacher
from ssl_core.data.views import POLICIES, Augmentation, View
from ssl_core.experiments import bundled
from ssl_core.experiments.figures import KINDS
from ssl_core.look.schema_generation import named_configs

INTRODUCTION = """# Configuration keys

Every key of `config.yaml`, from the code. A key that is not set has the default: a method's is that of its first
preset, a protocol's that of its default variant. Other presets and variants are listed where they differ.
`ssl-core explain EXPERIMENT` prints the resolved value and the source of every key of one experiment.
"""
SHARED = {  # definition of the schema -> the models that it was generated from
    "experiment": (settings.Experiment, settings.Adopted),
    "change_of_view": (View,),
    "Augmentation": (Augmentation,),
    "Backbone": (settings.Backbone,),
    "Dataset": (settings.Dataset,),
    "Normalisation": (settings.Normalisation,),
    "Subset": (settings.Subset,),
    "Teacher": (Teacher,),
    "Training": (settings.Training,),
    "reported": (settings.Reported,),
    "export": (settings.Export,),
    "quantise": (settings.Quantise,),
}
PLACES = {  # definition of the schema -> its place in config.yaml
    "experiment": "experiments.NAME",
    "change_of_view": "experiments.NAME.views.GROUP",
    "Backbone": "backbone",
    "Dataset": "dataset",
    "Training": "training",
    "Augmentation": "An augmentation",
    "Normalisation": "normalisation",
    "Subset": "dataset.subset",
    "Teacher": "method.teacher",
    "reported": "reported.EXPERIMENT",
    "export": "export",
    "quantise": "quantise",
    "sweep": "sweeps.NAME",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated page."""
    files.append(File.generated(config, "keys.md", content=page()))
    return files


def page() -> str:
    """Return the page as Markdown."""
    schema = json.loads(bundled.SCHEMA.read_text())  # kept fresh by a test
    definitions = schema["$defs"] | {
        "reported": schema["properties"]["reported"]["additionalProperties"],
        "export": schema["properties"]["export"],
        "quantise": schema["properties"]["quantise"],
    }
    parts = [INTRODUCTION]
    parts += [_section(name, place, definitions[name]) for name, place in PLACES.items()]
    for name, model in named_configs("methods").items():
        parts.append(_method(name, model, definitions[f"method.{name}"]))
    for name, model in named_configs("evaluations").items():
        parts.append(_protocol(name, model, definitions[f"protocol.{name}"]))
    for name, model in KINDS.items():
        parts.append(_figure(name, model, definitions[f"figure.{name}"]))
    return "\n".join(parts)


def _figure(name: str, model: type[BaseModel], schema: Mapping[str, Any]) -> str:
    title = f"## Figure {name} {{#figure.{name}}}\n"
    page = f"[Section of the figures](configure.md#figures). Defaults: {_places(model)}."
    return "\n".join([title, page + "\n", *_table(list(_rows(f"figure.{name}", model, schema, {"": {}})), "")])


def _section(name: str, place: str, schema: Mapping[str, Any]) -> str:
    models = SHARED.get(name, ())
    fields = _fields(*models)
    source = _places(*models) if models else "`ssl_core/look/schema_generation.py`"
    rows = [
        _row(name, key, part, _default(key, fields, schema), "", _comments(*models).get(key, ""))
        for key, part in _properties(schema).items()
    ]
    return "\n".join([f"## {place} {{#{name}}}\n", f"Defaults: {source}.\n", *_table(rows, "")])


def _method(name: str, model: type[BaseModel], schema: Mapping[str, Any]) -> str:
    presets = sys.modules[model.__module__].PRESETS
    first, *others = presets
    values = {preset: dict(presets[preset].method) for preset in presets}
    rows = list(_rows(f"method.{name}", model, schema, values))
    training = {preset: dict(presets[preset].training) for preset in presets}
    used = {key for preset in training.values() for key in preset}
    order = [key for key in settings.Training.model_fields if key in used]
    definition = {"properties": {key: {"$ref": "#/$defs/Training"} for key in order}}
    for key, *cells in _rows(f"method.{name}.training", settings.Training, definition, training):
        rows.append((key.replace("`", "`training.", 1), *cells))
    title = f"## Method {name} {{#method.{name}}}\n"
    page = f"[Page of the method](methods/{name}.md). Defaults: preset `{first}`, {_linked(presets[first].source)}."
    return "\n".join([title, page + "\n", *_table(rows, "other presets" if others else "")])


def _protocol(name: str, model: type[BaseModel], schema: Mapping[str, Any]) -> str:
    published: Mapping[str, Any] = getattr(model, "published", {})
    default = model.model_fields["variant"].default if published else ""
    values = {default: published.get(default, {})} | {name: dict(changes) for name, changes in published.items()}
    rows = list(_rows(f"protocol.{name}", model, schema, values))
    title = f"## Protocol {name} {{#protocol.{name}}}\n"
    variant = f"variant `{default}`, " if published else ""
    page = f"[Section of the protocol](evaluations.md). Defaults: {variant}{_places(model)}."
    return "\n".join([title, page + "\n", *_table(rows, "other variants" if len(values) > 1 else "")])


Row = tuple[str, str, str, str, str]  # key, type, default, values of other presets, comment


def _rows(
    name: str, model: type[BaseModel], schema: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]
) -> Iterator[Row]:
    """Yield one row per key; the first of `presets` has the defaults."""
    first, *others = presets
    comments = _comments(model)
    fields = _fields(model)
    for key, part in _properties(schema).items():
        usual = _default(key, fields, schema)
        default = _value(presets[first][key]) if key in presets[first] else usual
        values = {preset: _value(presets[preset][key]) if key in presets[preset] else usual for preset in others}
        yield _row(name, key, part, default, _differing(values, default), comments.get(key, ""))


def _differing(values: Mapping[str, str], default: str) -> str:
    """Return the values other than the default, each with the presets that have it."""
    presets: dict[str, list[str]] = {}
    for preset, value in values.items():
        presets.setdefault(value, []).append(preset)
    return "; ".join(f"{', '.join(names)}: {value}" for value, names in presets.items() if value != default)


def _row(section: str, key: str, part: Mapping[str, Any], default: str, others: str, comment: str) -> Row:
    return f'<a id="{section}.{key}"></a>`{key}`', _type(part), default, others, comment


def _table(rows: list[Row], others: str) -> list[str]:
    """Return the lines of a table; without a title for the column of other presets it has no such column."""
    titles = ["key", "type", "default", *([others] if others else []), "comment"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for key, kind, default, differing, comment in rows:
        cells = [key, kind, default, *([differing] if others else []), comment]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _properties(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a section; an augmentation may also be a policy's name."""
    return schema.get("properties") or schema["anyOf"][-1]["properties"]


def _fields(*models: type[BaseModel]) -> dict[str, FieldInfo]:
    return reduce(lambda fields, model: model.model_fields | fields, models, {})


def _default(key: str, fields: Mapping[str, FieldInfo], schema: Mapping[str, Any]) -> str:
    if key in schema.get("required", []):
        return "required"
    field = fields.get(key)
    if key == "dataset":
        return "the experiment's, split `train`"
    return "" if field is None or field.is_required() else _value(field.get_default(call_default_factory=True))


def _value(value: Any) -> str:
    """Return a value as it is written in YAML."""
    if isinstance(value, Augmentation):
        names = [name for name, policy in POLICIES.items() if policy == value]
        value = names[0] if names else value
    plain = yaml.safe_dump(_plain(value), default_flow_style=True, width=1000, sort_keys=False)
    return f"`{plain.removesuffix(chr(10)).removesuffix('...').strip()}`"


def _plain(value: Any) -> Any:
    """Replace tuples by lists and models by mappings, which YAML can write."""
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_defaults=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _type(part: Mapping[str, Any]) -> str:
    """Return the type of a key in words."""
    if "$ref" in part:
        name = part["$ref"].removeprefix("#/$defs/")
        return f"[{PLACES.get(name, name)}](#{name})"
    if "const" in part:
        return _value(part["const"])
    if "enum" in part:
        return ", ".join(_value(value) for value in part["enum"])
    if "anyOf" in part:
        return " or ".join(_type(option) for option in part["anyOf"])
    if "prefixItems" in part:
        return f"list of {len(part['prefixItems'])}: {_type(part['prefixItems'][0])}"
    if part.get("type") == "array":
        return f"list: {_type(part.get('items', {}))}" if part.get("items") else "list"
    if part.get("type") == "object":
        return "sections by name" if part.get("additionalProperties") else "section"
    return " ".join([part.get("type", "any"), *_bounds(part)])


def _bounds(part: Mapping[str, Any]) -> Iterator[str]:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    for name, sign in signs.items():
        if name in part:
            yield f"{sign} {part[name]:g}"


def _places(*models: type[BaseModel]) -> str:
    return " and ".join(f"`{model.__name__}` in `{model.__module__.replace('.', '/')}.py`" for model in models)


def _comments(*models: type[BaseModel]) -> dict[str, str]:
    """Return the comment above or behind each field of the models and their bases."""
    comments: dict[str, str] = {}
    for model in models:
        for base in model.__mro__:
            if issubclass(base, settings.Strict):
                comments = _comments_of(base) | comments
    return comments


def _comments_of(model: type[BaseModel]) -> dict[str, str]:
    comments = {}
    above: list[str] = []
    for line in inspect.getsource(model).splitlines():
        field = re.match(r"    (\w+): [^#]*(?:# *(.*))?$", line)
        if line.strip().startswith("#"):
            above.append(line.strip("# "))
            continue
        if field:
            comment = " ".join([*above, field[2] or ""]).strip()
            comments[field[1]] = _linked(comment.removeprefix("pyright: ignore").replace("None", "null"))
        above = []
    return comments


def _linked(text: str) -> str:
    """Turn references to docs/sources.md into links."""
    return re.sub(r"docs/(sources\.md#[\w-]+)", r"[sources](\1)", text)
