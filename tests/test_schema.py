"""The configuration is checked at every depth, in one line that helps."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_core.experiments import checks as schema
from ssl_core.look import schema_generation

CARDS = ["demo", "cifar10"]
GOOD: dict[str, Any] = {
    "experiments": {
        "small": {
            "dataset": {"name": "demo", "subset": {"images": 100}},
            "backbone": {"name": "resnet18", "stem": "tiny"},
            "method": {"name": "ressl", "queue_size": 16, "student_augmentation": {"policy": "weak", "hue": 0.1}},
            "views": {"teacher": {"augmentation": "none", "area": [0.9, 1.0]}},
            "training": {"epochs": 1, "learning_rate": 0.1, "gradient_clip": None},
        },
        "many": {
            "dataset": {"name": "demo"},
            "backbone": {"name": "resnet18", "stem": "tiny"},
            "method": {"name": "ressl"},
            "training": {"epochs": 1, "seed": 5},
            "seeds": [3, 0],
        },
        "taken": {
            "dataset": {"name": "demo"},
            "backbone": {"name": "resnet18"},
            "weights": "there.safetensors",
            "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        },
    },
    "evaluations": {
        "linear": {"protocol": "linear"},
        "knn": {"protocol": "knn", "k": 5, "dataset": {"name": "cifar10"}},
    },
    "sweeps": {
        "heat": {"base": "small", "grid": {"method.teacher_temperature": [0.02, 0.04]}},
        "many": {"base": "many", "grid": {"training.epochs": [2]}},
    },
    "reported": {
        "heat-0.02": {"source": "Table 1", "epochs": 200, "hours": "7", "results": {"linear": 90.8}},
        "many": {"source": "Table 2", "results": {"linear": 91, "knn": 88.0}},
        "many-seed3": {"source": "Table 3", "results": {"knn": 88.0}},
        "many-2": {"source": "Table 4", "results": {"knn": 88.0}},
    },
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
    assert schema_generation.generate() == structure, "say `make schema`"


def test_a_good_configuration_passes(structure: dict[str, Any]) -> None:
    schema.check(GOOD, structure, CARDS)


def test_the_configuration_that_ships_passes(root: Path, structure: dict[str, Any]) -> None:
    cards = [path.stem for path in (root / "datasets").glob("*.yaml")]
    shipped = yaml.safe_load((root / "config.yaml").read_text())
    schema.check(shipped, structure, cards)
    for recipe in (root / "recipes").glob("*.yaml"):
        merged = schema.merge(shipped, yaml.safe_load(recipe.read_text()))
        schema.check(schema.without_nulls(merged), structure, cards)


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
        ("experiments/small/seeds", [0, 0], "experiments.small.seeds: [0, 0] has non-unique elements"),
        ("experiments/small/seeds", [], "experiments.small.seeds: [] "),
        ("experiments/small/seeds", 3, "experiments.small.seeds: expected a list, found 3"),
        ("experiments/small/seeds", [-1], "experiments.small.seeds.0: -1 is less than the minimum of 0"),
        ("experiments/small/seed", [1], "experiments.small.seed: unknown key; did you mean 'seeds'?"),
        (
            "experiments/small/weights",
            "x.safetensors",
            "experiments.small.method: 'weights' names a network that is tr",
        ),
        ("experiments/small/normalisation", "imagenet", "experiments.small.normalisation: it belongs to 'weights'"),
        ("experiments/taken/seeds", [0], "experiments.taken.seeds: 'weights' names a network that is trained already"),
        ("experiments/taken/training", {}, "experiments.taken.training: 'weights' names a network that is trained al"),
        (
            "experiments/taken/dataset/subset",
            {"images": 3},
            "experiments.taken.dataset: nothing is trained on it; drop split and subset",
        ),
        ("experiments/taken/normalisation", "imagnet", "experiments.taken.normalisation: "),
        (
            "experiments/taken/normalisation",
            {"mean": [0, 0, 0], "stt": [1, 1, 1]},
            "experiments.taken.normalisation.stt: unknown key; did you mean 'std'?",
        ),
        ("experiments/taken/weigths", "x", "experiments.taken.weigths: unknown key; did you mean 'weights'?"),
        (
            "experiments/neither",
            {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}},
            "experiments.neither: the key 'method' is missing (or 'weights', for a network trained elsewhere)",
        ),
        (
            "sweeps/heat/grid",
            {"weights": ["a.safetensors"]},
            "sweeps.heat.grid.method: 'weights' names a network that is trained already",
        ),
        ("sweeps/many/grid", {"training.seed": [1]}, "sweeps.many.grid.training.seed: experiments.many.seeds sets it"),
        ("reported/smal", {"source": "x", "results": {}}, "reported.smal: there is no experiment 'smal'; did you mean"),
        (
            "reported/small",
            {"source": "x", "results": {"kn": 1}},
            "reported.small.results.kn: there is no such evaluation; did you mean 'knn'?",
        ),
        ("reported/small", {"results": {"knn": 1}}, "reported.small: the key 'source' is missing"),
        ("reported/small", {"source": "x", "knn": 1}, "reported.small.knn: unknown key"),
        ("reported/small", {"source": "x", "results": {"knn": 101}}, "reported.small.results.knn: 101 is greater than"),
        ("reported/small", {"source": "x", "results": {"knn": "a"}}, "reported.small.results.knn: expected a number"),
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
        ("results/many/knn.json", "results/many/knn.json: experiment 'many' has seeds: ask for many-seed3, many-seed0"),
        (
            "results/taken/pretrain.json",
            "results/taken/pretrain.json: 'taken' takes its weights from a file, so nothing",
        ),
        ("results/smal/export/backbone.onnx", "results/smal/export/backbone.onnx: there is no experiment 'smal'"),
    ],
)
def test_a_target_that_nothing_makes_is_named(target: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        schema.check_targets(GOOD, [target])
    assert str(caught.value).startswith(message)


def test_targets_that_exist_and_other_words_pass() -> None:
    targets = ["results/small/pretrain.json", "results/heat-0.02/knn.json", "results/many-2-seed0/knn.json", "--cores"]
    schema.check_targets(GOOD, [*targets, "results/taken/knn.json", "results/small/export/backbone.onnx"])


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


def test_seeds_make_an_experiment_each_and_win_over_the_training_seed() -> None:
    found = schema.experiments(GOOD)
    assert list(found) == [
        *("small", "taken", "many-seed3", "many-seed0"),
        *("heat-0.02", "heat-0.04", "many-2-seed3", "many-2-seed0"),
    ]
    rest = {key: value for key, value in GOOD["experiments"]["many"].items() if key != "seeds"}
    assert found["many-seed0"] == rest | {"training": {"epochs": 1, "seed": 0}}
    assert found["many-2-seed3"] == rest | {"training": {"epochs": 2, "seed": 3}}
    assert list(schema.written(GOOD)) == ["small", "many-seed3", "many-seed0", "taken"]
    assert schema.seeds(GOOD["experiments"]) == {"many": {"many-seed3": 3, "many-seed0": 0}}
    assert schema.seeds(schema.variants("many", GOOD)) == {"many-2": {"many-2-seed3": 3, "many-2-seed0": 0}}


def test_seeds_must_not_make_a_name_that_is_taken() -> None:
    config = changed("experiments/many-seed0", GOOD["experiments"]["small"])
    with pytest.raises(
        ValueError, match=r"experiments\.many\.seeds: it makes an experiment 'many-seed0', which exists"
    ):
        schema.experiments(config)


def test_reported_numbers_go_to_the_table_that_has_their_row_and_into_no_experiment() -> None:
    assert list(schema.reported(GOOD["experiments"], GOOD)) == ["many", "many-seed3"]
    assert list(schema.reported(schema.variants("heat", GOOD), GOOD)) == ["heat-0.02"]
    silent = {key: value for key, value in GOOD.items() if key != "reported"}
    assert schema.experiments(silent) == schema.experiments(GOOD)


def test_null_removes_an_entry_and_what_is_reported_of_it(structure: dict[str, Any]) -> None:
    overlay = {
        "experiments": {"small": None, "taken": {"image_size": 224}},
        "evaluations": {"linear": None},
        "sweeps": {"heat": None, "many": None},
    }
    left = schema.without_nulls(schema.merge(GOOD, overlay))
    assert list(left["experiments"]) == ["many", "taken"]
    assert left["experiments"]["taken"]["image_size"] == 224
    assert list(left["evaluations"]) == ["knn"]
    assert left["sweeps"] == {}
    assert {name: entry["results"] for name, entry in left["reported"].items()} == {
        "many": {"knn": 88.0},
        "many-seed3": {"knn": 88.0},
    }
    schema.check(left, structure, CARDS)
    assert GOOD["experiments"]["small"]["training"]["gradient_clip"] is None  # deeper down null is a value
    assert schema.without_nulls(GOOD) == GOOD


def test_files_of_weights_are_found_by_their_keys() -> None:
    teacher = {"name": "seed", "teacher": {"weights": "t.safetensors", "projector": "p.safetensors", "size": 3}}
    assert schema.files({"method": teacher}) == {
        "method.teacher.weights": "t.safetensors",
        "method.teacher.projector": "p.safetensors",
    }
    assert schema.files({"method": {"name": "moco", "initial": "i.safetensors"}}) == {"method.initial": "i.safetensors"}
    assert schema.files(GOOD["experiments"]["taken"]) == {"weights": "there.safetensors"}
    assert schema.files(GOOD["experiments"]["small"]) == {}


def test_a_missing_file_of_weights_is_named_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"experiments\.taken\.weights: there is no file 'there\.safetensors' \(seen"):
        schema.check_files(GOOD, ["--cores", "2"])
    schema.check_files(GOOD, ["results/small/knn.json"])
    (tmp_path / "there.safetensors").touch()
    schema.check_files(GOOD, [])
    schema.check_files(changed("experiments/taken/weights", "results/small/backbone.safetensors"), [])  # will be made
    with pytest.raises(ValueError, match=r"there is no file 'results/smal/backbone\.safetensors'"):
        schema.check_files(changed("experiments/taken/weights", "results/smal/backbone.safetensors"), [])


def test_overlays_merge_as_snakemake_merges_them() -> None:
    from snakemake.utils import update_config

    overlay = {
        "experiments": {"small": {"training": {"epochs": 2}}, "new": {"dataset": {"name": "demo"}}},
        "sweeps": None,
    }
    expected = copy.deepcopy(GOOD)
    update_config(expected, overlay)
    assert schema.merge(GOOD, overlay) == expected
