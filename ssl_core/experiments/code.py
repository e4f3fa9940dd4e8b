"""Digests of the code that can move a stage's numbers, and of nothing else. Torch-free: every dry run computes them.

From a stage's entry points the package's definitions (functions, classes, constants) are followed by name. Each one is
reduced to its meaning: comments, docstrings, type hints, imports, messages and the names of modules, of definitions and
of local variables are left out. The digest is taken over the set of these reductions, so that code can be moved,
renamed and reworded without running anything again. README.md lists the edits that re-run something, and
tests/experiments/test_code.py makes each of them.
"""

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ssl_core.experiments.definitions import Key, ancestors, fields_of, is_outside, meaning_of, module_of
from ssl_core.provenance import canonical, digest

DRAWING = ("curves", "draw", "figure", "should_i_pretrain", "table")  # stages that write pictures
PROVEN = Path(__file__).with_name("proven.json")


def pretraining_code(spec: Mapping[str, Any]) -> str:
    """Digest the code that pre-trains an experiment: the stage, its method and the preset that it starts from."""
    return code_digest(*_pretraining(spec), spec=spec)


def evaluation_code(spec: Mapping[str, Any]) -> str:
    """Digest the code of one evaluation: the stage and the protocol."""
    return code_digest(*_evaluation(spec), spec=spec)


def detection_code(spec: Mapping[str, Any]) -> str:
    """Digest the code of a detection: the stage and the settings of the protocol."""
    return code_digest(*_stage("detect"), Key("ssl_core.evaluations.detection", "Config"), spec=spec)


def finetuning_code(spec: Mapping[str, Any]) -> str:
    """Digest the code of a fine-tuning: the stage and the settings of the protocol."""
    return code_digest(*_stage("finetune"), Key("ssl_core.evaluations.finetune", "Config"), spec=spec)


def views_code(spec: Mapping[str, Any]) -> str:
    """Digest the code that draws an experiment's views."""
    return code_digest(*_stage("sample_views"), *_method(spec), spec=spec, drawing=True)


def export_code(spec: Mapping[str, Any]) -> str:
    """Digest the code that exports an experiment, with the settings of its method, which the model card lists."""
    return code_digest(*_stage("export"), *_settings(spec), spec=spec)


def stage_code(stage: str, spec: Any = None) -> str:
    """Digest the code of a stage that needs no method and no protocol."""
    return code_digest(*_stage(stage), spec=spec, drawing=stage in DRAWING)


def _stage(name: str) -> list[Key]:
    return [Key(f"ssl_core.stages.{name}", "run")]


def _pretraining(spec: Mapping[str, Any]) -> list[Key]:
    return [*_stage("pretrain"), *_method(spec)]


def _evaluation(spec: Mapping[str, Any]) -> list[Key]:
    module = f"ssl_core.evaluations.{spec['protocol']}"
    return [*_stage("evaluate"), Key(module, "run"), Key(module, "Config")]


def _method(spec: Mapping[str, Any]) -> list[Key]:
    """List the definitions of the method's file that an experiment uses: the method's class and its settings."""
    module = f"ssl_core.methods.{spec['method']['name']}"
    base = Key("ssl_core.methods.base", "Method")
    names = (name for name, nodes in module_of(module).definitions.items() if isinstance(nodes[0], ast.ClassDef))
    classes = [Key(module, name) for name in names if base in ancestors(Key(module, name))]
    return [*classes, *_settings(spec)]


def _settings(spec: Mapping[str, Any]) -> list[Key]:
    """List the configuration of an experiment's method and the preset in use; nothing for adopted weights."""
    section = spec.get("method")
    if section is None:
        return []
    module = f"ssl_core.methods.{section['name']}"
    presets = module_of(module).tables.get("PRESETS", {})
    preset = section.get("preset") or next(iter(presets), None)
    keys = [Key(module, "PRESETS", preset)] if preset in presets else []
    return [*keys, *([Key(module, "Config")] if "Config" in module_of(module).definitions else [])]


def code_digest(*roots: Key, spec: Any = None, drawing: bool = False) -> str:
    """Digest all that `roots` reach; raise `ValueError` for an unknown root.

    The texts in `spec`, the stage's own section, select the entries of tables that are looked up by name. Pictures
    count for the stages that write them, with `drawing`.
    """
    return _digest(roots, frozenset(_texts(spec)), drawing)


def meanings(*roots: Key, spec: Any = None, drawing: bool = False) -> dict[str, Key]:
    """Return the digest of each definition that `roots` reach, with its name."""
    return _reach(roots, frozenset(_texts(spec)), drawing)


@cache
def _digest(roots: tuple[Key, ...], texts: frozenset[str], drawing: bool) -> str:
    found = set(_reach(roots, texts, drawing))
    for proof in _proofs():
        if found.issuperset(proof["now"]) and proof["now"]:
            found = found.difference(proof["now"]).union(proof["before"])
    return digest(canonical(sorted(found)))


@cache
def _proofs() -> list[dict[str, Any]]:
    return json.loads(PROVEN.read_text(encoding="utf-8"))["proofs"] if PROVEN.is_file() else []


def _reach(roots: tuple[Key, ...], texts: frozenset[str], drawing: bool) -> dict[str, Key]:
    """Follow references from `roots` until nothing new is reached."""
    reached: dict[Key, str] = {}
    named, read = set(texts), set()
    waiting = [*roots]
    while waiting:
        key = waiting.pop()
        if key not in reached and not is_outside(key.module, drawing):
            meaning = meaning_of(key)
            reached[key] = _deep(key, drawing)
            named |= meaning.texts
            read |= meaning.texts | meaning.attributes
            waiting += [*meaning.references, *_statements(key.module)]
        if not waiting:
            waiting = [part for part in _parts(reached, named, read) if part not in reached]
    return {value: key for key, value in reached.items()}


def _parts(reached: Iterable[Key], named: set[str], read: set[str]) -> Iterator[Key]:
    """Yield the entries of reached tables whose key occurs as a text, and the fields that are read of sections."""
    for key in reached:
        if key.part:
            continue
        module = module_of(key.module)
        for part in module.tables.get(key.name, {}):
            if part in named:
                yield Key(key.module, key.name, part)
        for part in fields_of(key):
            if part in read:
                yield Key(key.module, key.name, part)


@cache
def _deep(key: Key, drawing: bool) -> str:
    """Digest a definition with the shapes, not the names, of those it refers to."""
    others = [_shallow(other, drawing) for other in meaning_of(key).references]
    return digest(canonical([key.part, _shallow(key, drawing), others]))


@cache
def _shallow(key: Key, drawing: bool) -> str:
    return "" if is_outside(key.module, drawing) else digest(meaning_of(key).shape)


def _texts(section: Any) -> Iterator[str]:
    """Yield all texts of a section, keys included."""
    if isinstance(section, Mapping):
        for key, value in section.items():
            yield str(key)
            yield from _texts(value)
    elif isinstance(section, list | tuple):
        for value in section:
            yield from _texts(value)
    elif isinstance(section, str):
        yield section


@cache
def _statements(module: str) -> list[Key]:
    """List what importing a module runs: its own statements and those of the packages it lies in."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return [Key(name, "") for name in names if module_of(name).effects]
