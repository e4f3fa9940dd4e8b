"""The configuration is checked at every depth, in one line that helps."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_core import schema

CARDS = ["demo", "cifar10"]
GOOD: dict[str, Any] = {
    "experiments": {
        "small": {
            "dataset": {"name": "demo", "subset": {"images": 100}},
            "backbone": {"name": "resnet18", "stem": "tiny"},
            "method": {"name": "ressl", "queue_size": 16, "student_augmentation": {"policy": "weak", "hue": 0.1}},
            "views": {"teacher": {"augmentation": "none", "area": [0.9, 1.0]}},
            "training": {"epochs": 1, "learning_rate": 0.1, "gradient_clip": None},
        }
    },
    "evaluations": {
        "linear": {"protocol": "linear"},
        "knn": {"protocol": "knn", "k": 5, "dataset": {"name": "cifar10"}},
    },
    "sweeps": {"heat": {"base": "small", "grid": {"method.teacher_temperature": [0.02, 0.04]}}},
}


@pytest.fixture(scope="module")
def structure(root: Path) -> dict[str, Any]:
    """The schema that ships."""
    return json.loads((root / "workflow" / "schemas" / "config.schema.json").read_text())


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the good configuration with one value set."""
    config = copy.deepcopy(GOOD)
    *parents, key = path.split("/")
    section = config
    for parent in parents:
        section = section[parent]
    section[key] = value
    return config


def test_the_schema_is_fresh(structure: dict[str, Any]) -> None:
    assert schema.generate() == structure, "say `make schema`"


def test_a_good_configuration_passes(structure: dict[str, Any]) -> None:
    schema.check(GOOD, structure, CARDS)


def test_the_configuration_that_ships_passes(root: Path, structure: dict[str, Any]) -> None:
    cards = [path.stem for path in (root / "datasets").glob("*.yaml")]
    shipped = yaml.safe_load((root / "config.yaml").read_text())
    schema.check(shipped, structure, cards)
    for recipe in (root / "recipes").glob("*.yaml"):
        schema.check(schema.merge(shipped, yaml.safe_load(recipe.read_text())), structure, cards)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("experimnts", {}, "experimnts: unknown key; did you mean 'experiments'?"),
        ("experiments/small/trainig", {}, "experiments.small.trainig: unknown key; did you mean 'training'?"),
        (
            "experiments/small/training/epoch",
            3,
            "experiments.small.training.epoch: unknown key; did you mean 'epochs'?",
        ),
        (
            "experiments/small/backbone/steem",
            "tiny",
            "experiments.small.backbone.steem: unknown key; did you mean 'stem'?",
        ),
        (
            "experiments/small/method/queue_sise",
            3,
            "experiments.small.method.queue_sise: unknown key; did you mean 'queue_size'?",
        ),
        (
            "experiments/small/method/student_augmentation/gray_scale",
            0.1,
            "experiments.small.method.student_augmentation.gray_scale: unknown key; did you mean 'grayscale'?",
        ),
        (
            "experiments/small/views/teacher/aera",
            [0.1, 1],
            "experiments.small.views.teacher.aera: unknown key; did you mean 'area'?",
        ),
        (
            "experiments/small/dataset/subset/image",
            3,
            "experiments.small.dataset.subset.image: unknown key; did you mean 'images'?",
        ),
        ("evaluations/knn/temprature", 3, "evaluations.knn.temprature: unknown key; did you mean 'temperature'?"),
        ("evaluations/knn/protocol", "knnn", "evaluations.knn.protocol: unknown value 'knnn'; did you mean 'knn'?"),
        (
            "experiments/small/method/name",
            "resl",
            "experiments.small.method.name: unknown value 'resl'; did you mean 'ressl'?",
        ),
        (
            "experiments/small/training/learning_rate",
            "1e-3",
            "experiments.small.training.learning_rate: expected a number, found '1e-3' (YAML wants a point",
        ),
        ("experiments/small/dataset", "demo", "experiments.small.dataset: expected a mapping, found 'demo'"),
        ("experiments/small/method", {}, "experiments.small.method: the key 'name' is missing"),
        ("experiments/small/training/epochs", 0, "experiments.small.training.epochs: 0 is less than"),
        ("experiments/a b", GOOD["experiments"]["small"], "experiments.a b: names become files"),
        ("experiments/sweeps", GOOD["experiments"]["small"], "experiments.sweeps: this name is taken"),
        ("evaluations/pretrain", {"protocol": "knn"}, "evaluations.pretrain: this name is taken"),
        ("experiments", {}, "experiments: "),
        (
            "experiments/small/dataset/name",
            "demmo",
            "experiments.small.dataset.name: there is no data set 'demmo' (no datasets/demmo.yaml); did you mean 'dem",
        ),
        (
            "evaluations/knn/dataset/name",
            "cifar",
            "evaluations.knn.dataset.name: there is no data set 'cifar' (no datasets/cifar.yaml); did you mean 'cif",
        ),
        ("sweeps/heat/base", "smal", "sweeps.heat.base: there is no experiment 'smal'; did you mean 'small'?"),
        (
            "sweeps/heat/grid",
            {"method.teacher_temprature": [1.0]},
            "sweeps.heat.grid.method.teacher_temprature: unknown key; did you mean 'teacher_temperature'?",
        ),
        ("sweeps/heat/grid", {"metod.x": [1]}, "sweeps.heat.grid.metod: unknown key; did you mean 'method'?"),
        ("sweeps/heat/grid", {"training.seed": [1, 1]}, "sweeps.heat.grid: two of its values give"),
    ],
)
def test_a_fault_is_named_in_one_line(structure: dict[str, Any], path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        schema.check(changed(path, value), structure, CARDS)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_experiments_may_be_missing_altogether_from_nothing(structure: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at the top: the key 'experiments' is missing"):
        schema.check({"evaluations": {"knn": {"protocol": "knn"}}}, structure, CARDS)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("results/smal/knn.json", "results/smal/knn.json: there is no experiment 'smal'; did you mean 'small'?"),
        ("results/small/kn.json", "results/small/kn.json: there is no evaluation 'kn'; did you mean 'knn'?"),
        ("results/sweeps/heet.csv", "results/sweeps/heet.csv: there is no sweep 'heet'; did you mean 'heat'?"),
    ],
)
def test_a_target_that_nothing_makes_is_named(target: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        schema.check_targets(GOOD, [target])
    assert str(caught.value).startswith(message)


def test_targets_that_exist_and_other_words_pass() -> None:
    schema.check_targets(GOOD, ["results/small/pretrain.json", "results/heat-0.02/knn.json", "--cores", "all"])


def test_a_sweep_changes_one_value_and_keeps_the_rest() -> None:
    found = schema.expand("heat", GOOD)
    assert list(found) == ["heat-0.02", "heat-0.04"]
    base = GOOD["experiments"]["small"]
    assert found["heat-0.02"] == base | {"method": base["method"] | {"teacher_temperature": 0.02}}
    assert "teacher_temperature" not in base["method"]


def test_the_points_of_a_sweep_say_what_each_experiment_sets() -> None:
    heat = {name: {"method.teacher_temperature": value} for name, value in (("heat-0.02", 0.02), ("heat-0.04", 0.04))}
    assert schema.points("heat", GOOD) == heat


def test_a_grid_is_a_product_in_its_order() -> None:
    config = changed("sweeps/heat/grid", {"training.seed": [0, 1], "backbone.name": ["resnet18", "timm/x"]})
    first, second, *_, last = schema.expand("heat", config)
    assert first == "heat-0-resnet18"
    assert second.startswith("heat-0-")
    assert "/" not in second
    assert last.startswith("heat-1-")


def test_a_sweep_may_reach_a_section_that_the_base_does_not_have() -> None:
    config = changed("sweeps/heat/grid", {"views.teacher.area": [[0.5, 1.0]]})
    del config["experiments"]["small"]["views"]
    (experiment,) = schema.expand("heat", config).values()
    assert experiment["views"] == {"teacher": {"area": [0.5, 1.0]}}


def test_a_sweep_must_not_make_a_name_that_is_taken() -> None:
    config = changed("experiments/heat-0.02", GOOD["experiments"]["small"])
    with pytest.raises(ValueError, match=r"sweeps\.heat: it makes an experiment 'heat-0\.02', which exists already"):
        schema.experiments(config)


def test_overlays_merge_as_snakemake_merges_them() -> None:
    from snakemake.utils import update_config

    overlay = {
        "experiments": {"small": {"training": {"epochs": 2}}, "new": {"dataset": {"name": "demo"}}},
        "sweeps": None,
    }
    expected = copy.deepcopy(GOOD)
    update_config(expected, overlay)
    assert schema.merge(GOOD, overlay) == expected
