import json

import pytest

from ssl_core.stages import evaluate

SPEC = {"protocol": "knn", "k": 5, "dataset": {"name": "squares"}}
LINEAR = {"protocol": "linear", "epochs": 2, "learning_rate": 0.1, "dataset": {"name": "squares"}}


@pytest.fixture
def run(backbone_path, manifest_path, tmp_path):
    def run(spec, name="out.json"):
        evaluate.run(
            "mine",
            "few",
            spec=spec,
            backbone=backbone_path,
            manifest=manifest_path,
            output=tmp_path / name,
            code="c0de",
            threads=1,
        )
        return tmp_path / name

    return run


@pytest.mark.parametrize("spec", [SPEC, {**LINEAR, "variant": "features"}])
def test_a_second_run_writes_the_same_bytes(run, spec):
    assert run(spec).read_bytes() == run(spec, "again.json").read_bytes()


def test_the_results_state_the_measurement_and_its_settings(run, capsys):
    results = json.loads(run(LINEAR).read_text())
    assert list(results) == [
        "experiment",
        "evaluation",
        "protocol",
        "dataset",
        "split",
        "headline",
        "metrics",
        "baselines",
        "hyperparameters",
        "num_train",
        "num_test",
        "seed",
        "digests",
        "versions",
        "hardware",
    ]
    assert results["protocol"] == "linear/v1"
    assert set(results["baselines"]) == {"untrained", "pixels"}
    assert set(results["metrics"]) == set(results["baselines"]["pixels"]) == {"top1", "best_epoch_top1"}
    assert results["baselines"]["pixels"]["top1"] == 100.0  # percent
    assert results["hyperparameters"]["how"] == "fixed by the configuration"
    assert results["hyperparameters"]["overridden"] == ["epochs", "learning_rate"]
    assert set(results["digests"]) == {"spec", "code", "data", "backbone"}
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
def test_a_wrong_section_is_a_one_line_error(run, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        run({**SPEC, **change})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out.json").exists()
