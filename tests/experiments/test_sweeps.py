"""The experiments that sweeps and seeds make."""

import pytest

from ssl_core.experiments import sweeps

from .conftest import VALID, changed


def test_a_sweep_changes_one_value_only() -> None:
    experiments = sweeps.sweep_experiments("heat", VALID)
    assert list(experiments) == ["heat-0.02", "heat-0.04"]
    base = VALID["experiments"]["small"]
    assert experiments["heat-0.02"] == base | {"method": base["method"] | {"teacher_temperature": 0.02}}
    assert "teacher_temperature" not in base["method"]


def test_points_are_the_values_that_each_experiment_sets() -> None:
    heat = {name: {"method.teacher_temperature": value} for name, value in (("heat-0.02", 0.02), ("heat-0.04", 0.04))}
    assert sweeps.points("heat", VALID) == heat


def test_a_grid_is_a_product_in_the_order_of_its_keys() -> None:
    config = changed("sweeps/heat/grid", {"training.seed": [0, 1], "backbone.name": ["resnet18", "timm/x"]})
    first, second, *_, last = sweeps.sweep_experiments("heat", config)
    assert first == "heat-0-resnet18"
    assert second.startswith("heat-0-")
    assert "/" not in second
    assert last.startswith("heat-1-")


def test_a_sweep_can_add_a_section() -> None:
    config = changed("sweeps/heat/grid", {"views.teacher.area": [[0.5, 1.0]]})
    del config["experiments"]["small"]["views"]
    (experiment,) = sweeps.sweep_experiments("heat", config).values()
    assert experiment["views"] == {"teacher": {"area": [0.5, 1.0]}}


def test_a_sweep_that_makes_a_taken_name_is_refused() -> None:
    config = changed("experiments/heat-0.02", VALID["experiments"]["small"])
    with pytest.raises(ValueError, match=r"sweeps\.heat: makes an experiment 'heat-0\.02', which exists already"):
        sweeps.experiments(config)


def test_each_seed_makes_an_experiment_and_replaces_the_training_seed() -> None:
    experiments = sweeps.experiments(VALID)
    assert list(experiments) == [
        *("small", "taken", "many-seed3", "many-seed0"),
        *("heat-0.02", "heat-0.04", "many-2-seed3", "many-2-seed0"),
    ]
    rest = {key: value for key, value in VALID["experiments"]["many"].items() if key != "seeds"}
    assert experiments["many-seed0"] == rest | {"training": {"epochs": 1, "seed": 0}}
    assert experiments["many-2-seed3"] == rest | {"training": {"epochs": 2, "seed": 3}}
    assert list(sweeps.written_experiments(VALID)) == ["small", "many-seed3", "many-seed0", "taken"]
    assert sweeps.seeds(VALID["experiments"]) == {"many": {"many-seed3": 3, "many-seed0": 0}}
    assert sweeps.seeds(sweeps.variants("many", VALID)) == {"many-2": {"many-2-seed3": 3, "many-2-seed0": 0}}


def test_seeds_that_make_a_taken_name_are_refused() -> None:
    config = changed("experiments/many-seed0", VALID["experiments"]["small"])
    with pytest.raises(ValueError, match=r"experiments\.many\.seeds: makes an experiment 'many-seed0', which exists"):
        sweeps.experiments(config)


def test_reported_numbers_go_to_the_table_with_their_row_and_into_no_experiment() -> None:
    assert list(sweeps.reported(VALID["experiments"], VALID)) == ["many", "many-seed3"]
    assert list(sweeps.reported(sweeps.variants("heat", VALID), VALID)) == ["heat-0.02"]
    without = {key: value for key, value in VALID.items() if key != "reported"}
    assert sweeps.experiments(without) == sweeps.experiments(VALID)


def test_weight_files_are_listed_by_key() -> None:
    teacher = {"name": "seed", "teacher": {"weights": "t.safetensors", "projector": "p.safetensors", "size": 3}}
    assert sweeps.weight_files({"method": teacher}) == {
        "method.teacher.weights": "t.safetensors",
        "method.teacher.projector": "p.safetensors",
    }
    assert sweeps.weight_files({"method": {"name": "moco", "initial": "i.safetensors"}}) == {
        "method.initial": "i.safetensors"
    }
    assert sweeps.weight_files(VALID["experiments"]["taken"]) == {"weights": "there.safetensors"}
    assert sweeps.weight_files(VALID["experiments"]["small"]) == {}
