"""Whatever a card, a configuration or a manifest says: it is read, or refused in one line. Found with hypothesis."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ssl_core import mistakes
from ssl_core.data.card import load_card
from ssl_core.data.shards import Manifest
from ssl_core.experiments import checks, sweeps
from ssl_core.provenance import canonical
from ssl_core.training.checkpoint import Identity

CARD = {
    "name": "demo",
    "image_size": 16,
    "source": {"type": "image_folder", "path": "images", "splits": {"train": {"folder": "a"}}},
    "classes": ["a", "b"],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.2, 0.2, 0.2],
    "avoid": ["flip"],
}
SHARD = {"file": "train-000000.tar", "images": 3, "bytes": 10240, "sha256": "0" * 64}
SPLIT = {"images": 3, "labelled": True, "bytes": 10240, "class_counts": [1, 2], "shards": [SHARD], "rejected": []}
MANIFEST = {"version": 1, "dataset": "demo", "image_size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
MANIFEST |= {"classes": ["a", "b"], "avoid": [], "splits": {"train": SPLIT}}
CONFIG = {
    "experiments": {
        "one": {
            "dataset": {"name": "demo", "subset": {"images": 9}},
            "backbone": {"name": "resnet18", "stem": "tiny"},
            "method": {"name": "ressl", "queue_size": 64},
            "training": {"epochs": 3, "seed": 1, "learning_rate": 0.1},
        }
    },
    "evaluations": {"knn": {"protocol": "knn", "k": 5}},
    "sweeps": {"heat": {"base": "one", "grid": {"method.student_temperature": [0.1, 0.2]}}},
}
STRUCTURE = json.loads((Path(__file__).parents[2] / "workflow/schemas/config.schema.json").read_text())
LONG = "--long" in sys.argv
EXAMPLES = settings(
    max_examples=3000 if LONG else 40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much),
)

LETTERS = st.characters(exclude_categories=("Cs",)) if LONG else st.sampled_from("aZ09_-. \té日\n\0")
words = st.sampled_from(
    [
        *(*CARD, *MANIFEST, *SPLIT, *SHARD, *CONFIG, *CONFIG["experiments"]["one"], "type", "path", "name", "grid"),
        *(
            "image_folder",
            "webdataset",
            "table",
            "torchvision",
            "ressl",
            "knn",
            "${HOME}",
            "~x",
            "",
            "../x",
            "\n",
            "\0",
        ),
    ]
)
numbers = st.booleans() | st.integers() | st.floats()
scalars = (
    st.none()
    | numbers
    | st.text(LETTERS, max_size=8)
    | words
    | st.sampled_from(["\n", "\0", "\ud800"])
    | st.dates()
    | st.binary(max_size=3)
)
keys = words | st.text(LETTERS, max_size=5) | st.integers() | st.booleans() | st.none() | st.dates()
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List all places in nested mappings and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, below in inner for place in places(below, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, valid: dict[str, Any]) -> Any:
    """Draw a valid mapping with up to three places replaced, removed or added to."""
    whole = json.loads(json.dumps(valid))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(whole)))
        if not path:
            continue
        parent = whole
        for key in path[:-1]:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                parent[path[-1]] = draw(anything)
            case "remove":
                del parent[path[-1]]
            case "add" if isinstance(parent, dict):
                parent[draw(keys)] = draw(anything)
    return whole


def one_line(read: Callable[[], Any]) -> Any:
    """Return what reading gives, or None where it is refused by a `ValueError` that is shown as one line."""
    try:
        return read()
    except ValueError as error:
        text = mistakes.explain(error)
    assert text
    assert "\n" not in text
    return None


@EXAMPLES
@given(content=changed(CARD) | anything)
@example(content={**CARD, "mean": [float("nan")] * 3})
@example(content={**CARD, "std": [float("inf")] * 3})
@example(content={**CARD, 1: 2})
def test_any_card_is_read_or_refused_in_one_line(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "demo.yaml"
    path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    card = one_line(lambda: load_card(path))
    if card is not None:
        json.dumps(card.model_dump(mode="json"), allow_nan=False)


@EXAMPLES
@given(
    text=st.text(alphabet=st.sampled_from("-:?[]{},#&*!|>'\"%@`~ \n\tab1.e0<=\0\ud800é"), max_size=40)
    | st.text(LETTERS, max_size=40)
)
def test_any_text_is_a_card_or_refused_in_one_line(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "demo.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert one_line(lambda: load_card(path)) is None


@EXAMPLES
@given(content=changed(MANIFEST) | anything)
@example(content={**MANIFEST, "mean": [float("nan")] * 3})
@example(content={**MANIFEST, "sha256": "0" * 64})
@example(content={**MANIFEST, "sha256": 1})
def test_any_manifest_is_read_or_refused_in_one_line(content: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "manifest.json"
    path.write_text(json.dumps(content, default=str, skipkeys=True))
    manifest = one_line(lambda: Manifest.load(path))
    if manifest is not None:
        path.write_text(json.dumps(manifest.content(), allow_nan=False))
        assert Manifest.load(path) == manifest


@EXAMPLES
@given(content=st.binary(max_size=60))
def test_any_bytes_are_no_manifest(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "manifest.json"
    path.write_bytes(content)
    assert one_line(lambda: Manifest.load(path)) is None


@EXAMPLES
@given(content=changed(CONFIG) | st.dictionaries(keys, anything, max_size=4) | anything)
@example(content={**CONFIG, "experiments": {1: CONFIG["experiments"]["one"]}})
@example(content={**CONFIG, "sweeps": {"a": {"base": "one", "grid": {1: [2]}}}})
@example(content={**CONFIG, "sweeps": {"a": {"base": "one", "grid": {"method": [float("nan")]}}}})
def test_any_configuration_is_checked_or_refused_in_one_line(content: Any) -> None:
    def read() -> Any:
        checks.check(content, STRUCTURE, ["demo", "other"])
        checks.check_targets(content, ["results/one/knn.json"])
        return sweeps.experiments(content)

    experiments = one_line(read)
    for name, section in (experiments or {}).items():
        assert isinstance(name, str)
        canonical(section)  # what the rules make of it


@EXAMPLES
@given(mine=anything, theirs=anything)
def test_any_two_sections_can_be_told_apart(mine: Any, theirs: Any) -> None:
    one, other = (json.dumps(section, default=str, skipkeys=True) for section in (mine, theirs))
    assert Identity(spec=one, code="c", data="d").differences(Identity(spec=one, code="c", data="d")) == []
    differences = Identity(spec=one, code="c", data="d").differences(Identity(spec=other, code="c", data="d"))
    assert bool(differences) >= (leaves(json.loads(one)) != leaves(json.loads(other)))


def leaves(section: Any) -> list[str]:
    """List the values in nested mappings."""
    if isinstance(section, dict):
        return sorted(leaf for inner in section.values() for leaf in leaves(inner))
    return [json.dumps(section)]
