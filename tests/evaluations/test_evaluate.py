import pytest

from .conftest import measure

LINEAR = {"protocol": "linear", "epochs": 2, "learning_rate": 0.1, "dataset": {"name": "squares"}}


def test_the_results_state_the_measurement_and_its_settings(backbone_path, manifest_path, tmp_path, capsys):
    results = measure(LINEAR, backbone_path, manifest_path, tmp_path / "out.json")
    keys = "experiment evaluation protocol dataset split headline metrics baselines hyperparameters num_train num_test "
    assert list(results) == (keys + "seed digests versions hardware").split()
    assert results["protocol"] == "linear/v1"
    assert set(results["baselines"]) == {"untrained", "pixels"}
    assert set(results["metrics"]) == set(results["baselines"]["pixels"]) == {"top1", "best_epoch_top1"}
    assert results["baselines"]["pixels"]["top1"] == 100.0  # percent
    assert results["hyperparameters"]["how"] == "fixed by the configuration"
    assert results["hyperparameters"]["overridden"] == ["epochs", "learning_rate"]
    assert "linear/v1 on squares/test, top1 in %: pretrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temprature": 0.1}, r"evaluations\.few\.temprature: unknown key; did you mean 'temperature'\?"),
        ({"k": 0}, r"evaluations\.few\.k: .*found 0"),
        ({"protocol": "lineer"}, r"evaluations\.few\.protocol: unknown protocol 'lineer'; did you mean 'linear'\?"),
        ({"protocol": "features"}, "unknown protocol 'features'"),
        ({"protocol": "base"}, "unknown protocol 'base'"),
        ({"dataset": {"name": "squares", "split": "tain"}}, "'squares' has no split 'tain'"),
    ],
)
def test_a_wrong_section_is_a_one_line_error(backbone_path, manifest_path, tmp_path, change, message):
    spec = {"protocol": "knn", "k": 5, "dataset": {"name": "squares"}, **change}
    with pytest.raises(ValueError, match=message) as error:
        measure(spec, backbone_path, manifest_path, tmp_path / "out.json")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.json").exists()
