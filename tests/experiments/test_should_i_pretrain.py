"""The runs that the page "Should I pre-train?" compares, and the faults of a configuration that lacks some."""

from typing import Any

import pytest

from ssl_core.experiments import checks, needs, should_i_pretrain
from ssl_core.experiments.should_i_pretrain import TARGET

from .conftest import CARDS

MOCO = {"name": "moco", "queue_size": 64}
PLACE = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18", "stem": "tiny"}}
CONFIG: dict[str, Any] = {
    "experiments": {
        "pretrained": {**PLACE, "method": MOCO, "seeds": [0, 1, 2]},
        "given": {**PLACE, "weights": "there.safetensors"},
        "continued": {**PLACE, "method": {**MOCO, "initial": "results/given/backbone.safetensors"}, "seeds": [1]},
        "distilled": {
            **PLACE,
            "method": {"name": "seed", "teacher": {"weights": "results/larger/backbone.safetensors"}},
            "training": {"seed": 1},
        },
        "larger": {**PLACE, "method": MOCO},
        "unrelated": {**PLACE, "method": MOCO},
    },
    "evaluations": {
        "labels_1-seed0": {"protocol": "finetune", "fraction": 0.01},
        "labels_1-seed1": {"protocol": "finetune", "fraction": 0.01, "seed": 1},
        "labels_100-seed3": {"protocol": "finetune", "fraction": 1.0, "seed": 3},
        "knn": {"protocol": "knn"},
    },
}


def with_section(part: str, name: str, section: Any) -> dict[str, Any]:
    """Return the configuration with one section replaced, or left out where it is None."""
    sections = {**CONFIG[part], name: section}
    return {**CONFIG, part: {key: value for key, value in sections.items() if value is not None}}


def test_the_configuration_is_valid(schema: dict[str, Any]) -> None:
    checks.check(CONFIG, schema, CARDS)
    checks.check_targets(CONFIG, [TARGET])


def test_a_run_has_the_labels_of_its_seed_and_given_weights_have_those_of_all() -> None:
    every = [("given", "labels_1-seed0"), ("given", "labels_1-seed1"), ("given", "labels_100-seed3")]
    pretrained = [("pretrained-seed0", "labels_1-seed0"), ("pretrained-seed1", "labels_1-seed1")]
    others = [("continued-seed1", "labels_1-seed1"), ("distilled", "labels_1-seed1")]
    assert should_i_pretrain.all_pairs(CONFIG) == [*every, *pretrained, *others]


def test_evaluations_of_other_seeds_are_those_of_the_comparison_alone() -> None:
    assert should_i_pretrain.of_other_seeds("pretrained-seed0", CONFIG) == {"labels_1-seed1", "labels_100-seed3"}
    assert should_i_pretrain.of_other_seeds("given", CONFIG) == set()
    assert should_i_pretrain.of_other_seeds("unrelated", CONFIG) == set()


def test_the_plan_has_all_seeds_and_the_networks_that_a_way_starts_from() -> None:
    plan = should_i_pretrain.plan(CONFIG)
    assert plan["seeds"] == [0, 1, 2, 3]
    assert plan["ways"]["distilled"] == {"experiments": ["distilled"], "sources": ["larger"]}
    assert plan["ways"]["continued"] == {"experiments": ["continued-seed1"], "sources": ["given"]}
    trained = ["pretrained-seed0", "pretrained-seed1", "continued-seed1", "distilled", "larger"]
    assert should_i_pretrain.pretrainings(CONFIG) == trained


FAULTS: list[tuple[str, str, Any, str]] = [
    ("experiments", "pretrained", None, "there is no experiment 'pretrained': add --configfile="),
    ("experiments", "pretrained", CONFIG["experiments"]["given"], "this experiment is pre-trained here; name it"),
    ("experiments", "pretrained", {**PLACE, "method": MOCO, "seeds": [7]}, r"evaluations labels_... \(\[0, 1, 3\]\)"),
    ("evaluations", "labels_1", {"protocol": "knn"}, r"evaluations.labels_1: .* needs `protocol: finetune` with a"),
    ("evaluations", "labels_1", {"protocol": "finetune"}, r"with a `fraction` of the labels"),
]


@pytest.mark.parametrize(("part", "name", "section", "message"), FAULTS)
def test_a_fault_is_named_before_anything_runs(part: str, name: str, section: Any, message: str) -> None:
    config = with_section(part, name, section)
    with pytest.raises(ValueError, match=message):
        checks.check_targets(config, [TARGET])
    checks.check_targets(config, ["results/table.csv"])  # other targets do not mind


def test_evaluations_are_needed() -> None:
    with pytest.raises(ValueError, match=r"there is no evaluation named labels_\.\.\.: add --configfile="):
        checks.check_targets({**CONFIG, "evaluations": {"knn": {"protocol": "knn"}}}, [TARGET])


def test_the_target_needs_labels(schema: dict[str, Any]) -> None:
    without = {"demo": {"train": "none", "test": "one"}}
    with pytest.raises(ValueError, match=r"evaluations.labels_1-seed0: for experiment 'given': data set 'demo': split"):
        needs.check_needs(CONFIG, schema, without, [TARGET])  # pyright: ignore
    needs.check_needs(CONFIG, schema, without, ["results/pretrained-seed0/pretrain.json"])  # pyright: ignore
