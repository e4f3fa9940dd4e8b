"""Check a section against a JSON schema and say the first fault as a person would. Torch-free."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_core.config import nearest

KINDS = {"object": "a mapping", "array": "a list", "null": "null", "integer": "a whole number", "string": "a text"}


def check_structure(section: Any, schema: Mapping[str, Any], place: Sequence[str]) -> None:
    """Raise a one-line `ValueError` for the first fault of `section`, itself at `place`, against a JSON schema."""
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
