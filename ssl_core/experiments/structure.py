"""Check a section of the configuration against a JSON schema; report a fault in one readable line. Torch-free."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_core.config import nearest

KINDS = {"object": "a mapping", "array": "a list", "null": "null", "integer": "a whole number", "string": "a text"}


def check_structure(section: Any, schema: Mapping[str, Any], place: Sequence[str]) -> None:
    """Raise a one-line `ValueError` for the first fault of `section`, whose own keys are `place`."""
    from jsonschema import Draft202012Validator

    for error in Draft202012Validator(schema).iter_errors(section):
        raise ValueError(_message(error, place)) from None


def _message(error: Any, place: Sequence[str]) -> str:
    """Return where the fault is, what was found and what was expected."""
    place = [*place, *map(str, error.relative_path)]
    where = ".".join(place) or "at the top"
    if error.validator == "anyOf":
        return _message_of_alternatives(error, place, where)
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
        return f"{where}: expected {_expected(error)}, found {error.instance!r}{_hint(error)}"
    return f"{where}: {error.message}"


def _message_of_alternatives(error: Any, place: Sequence[str], where: str) -> str:
    """Report the alternative that the user probably meant: the one whose fault is inside it; else all kinds."""
    inner = [part for part in error.context if part.relative_path or part.validator == "additionalProperties"]
    if inner:
        return _message(inner[0], place)
    kinds = " or ".join(_expected(part) for part in error.context)
    return f"{where}: expected {kinds}, found {error.instance!r}"


def _expected(error: Any) -> str:
    if error.validator == "type":
        return KINDS.get(error.validator_value, f"a {error.validator_value}")
    if error.validator == "enum":
        return ", ".join(map(str, error.validator_value))
    return error.message


def _hint(error: Any) -> str:
    """Return how to write a section that has a name, or a number such as 1e-3, which YAML 1.1 reads as a text."""
    value = error.instance
    if not isinstance(value, str):
        return ""
    if error.validator_value == "object" and "name" in error.schema.get("properties", {}):
        return f" (write {{name: {value}}})"
    if not re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
        return ""
    mantissa, exponent = re.split("[eE]", value)
    sign = "" if exponent[0] in "+-" else "+"
    return f" (YAML wants a point in it: {mantissa}.0e{sign}{exponent})"
