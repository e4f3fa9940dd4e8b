"""The contract of protocols, tested on every file of ssl_core/evaluations/, so that a new one needs no test for it."""

import json
import re
from typing import Any

import pytest
import torch

from ssl_core.config import parse
from ssl_core.data.shards import Manifest
from ssl_core.evaluations import base
from ssl_core.experiments import checks
from ssl_core.experiments.needs import SplitLabels, check_needs, contracts

from .conftest import Tiny, measure, quiet, write_shards

SQUARES = {"name": "squares"}
# Settings that make a test short. Other protocols run with their defaults.
SHORT: dict[str, dict[str, Any]] = {
    "linear": {"epochs": 2, "learning_rate": 0.1},
    "logistic": {"l2_steps": 3},
    "low_shot": {"shots": [4], "draws": 1, "max_iterations": 50},
    "metrics": {"images_per_class": 4},
    "pictures": {"perplexity": 5, "triangles": 6, "queries": 2, "neighbours": 3, "k": 9},
    "finetune": {"variant": "ressl_10", "epochs": 1},
}
NAMES = base.names()
MEASURING = [name for name in NAMES if hasattr(base.load({"protocol": name}, ""), "run")]  # the others read no images
LABELLED: SplitLabels = {"train": "one", "test": "one"}


def spec_of(name: str, **changes: Any) -> dict[str, Any]:
    return {"protocol": name, "dataset": SQUARES, **SHORT.get(name, {}), **changes}


def run(name: str, subjects: base.Subjects, manifest: Manifest, **changes: Any) -> base.Outcome:
    protocol = base.load({"protocol": name}, "")
    config = parse(protocol.Config, spec_of(name, **changes), "evaluations.mine")
    return base.evaluate(protocol, config, subjects, manifest, quiet)


def needs_of(name: str) -> Any:
    return base.load({"protocol": name}, "").Config.contract.needs


def needing(**needs: str) -> list[str]:
    """List the protocols that read images and have these needs by default."""
    return [name for name in MEASURING if all(getattr(needs_of(name), key) == value for key, value in needs.items())]


LABELS_NEEDED = [name for name in MEASURING if needs_of(name).labels != "none"]
OTHER_SPLIT = needing(test_split="other")


@pytest.fixture
def subjects(subjects: base.Subjects) -> base.Subjects:
    """All three networks, the pre-trained one in training mode."""
    torch.manual_seed(1)
    subjects.networks["untrained"] = Tiny()
    subjects.networks["pretrained"].train()
    return subjects


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("unlabelled")
    return Manifest.load(write_shards(folder, train=[0] * 9, test=[0] * 9, labelled=False))


@pytest.fixture(scope="module")
def results(backbone_path, manifest_path, tmp_path_factory):
    """Run the stage once per protocol; return the results by protocol."""
    folder = tmp_path_factory.mktemp("results")
    written: dict[str, dict[str, Any]] = {}

    def run_stage(name: str) -> dict[str, Any]:
        if name not in written:
            written[name] = measure(spec_of(name), backbone_path, manifest_path, folder / f"{name}.json")
        return written[name]

    return run_stage


@pytest.mark.parametrize("name", MEASURING)
def test_a_second_run_gives_the_same_numbers_and_networks_are_unchanged(name, subjects, manifest):
    network = subjects.networks["pretrained"]
    before = {key: value.clone() for key, value in network.state_dict().items()}
    results = []
    for _ in range(2):
        outcome = run(name, subjects, manifest)
        arrays = {key: array.tobytes() for key, array in outcome.drawing.items()}
        results.append((outcome.metrics, outcome.hyperparameters, outcome.details, arrays))
    assert results[0] == results[1]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training
    assert all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize("name", MEASURING)
def test_baselines_accompany_the_pretrained_network(name, results):
    result = results(name)
    assert "untrained" in result["baselines"]
    assert set(result["baselines"]) <= {"untrained", "pixels"}
    for metrics in result["baselines"].values():
        assert set(metrics) == set(result["metrics"])


@pytest.mark.parametrize("name", MEASURING)
def test_the_headline_and_all_accuracies_are_percentages(name, results):
    result = results(name)
    for metrics in (result["metrics"], *result["baselines"].values()):
        assert 0 <= metrics[result["headline"]] <= 100
        for key, value in metrics.items():
            if key.endswith(("top1", "top5", "mean_per_class")) or key.startswith("map_"):
                assert 0 <= value <= 100, key


@pytest.mark.parametrize("name", MEASURING)
def test_the_results_are_complete(name, results):
    result = results(name)
    assert re.fullmatch(rf"{name}(-[\w.-]+)?/v\d+", result["protocol"])
    assert result["split"] == "test"
    assert result["hyperparameters"]["how"]
    assert set(result["digests"]) == {"spec", "code", "data", "backbone"}
    assert result["num_test"] > 0


@pytest.mark.parametrize("name", OTHER_SPLIT)
def test_the_training_split_cannot_be_the_test_split(name, subjects, manifest):
    with pytest.raises(ValueError, match="'squares': split 'train' trains and tests: set `test_split`"):
        run(name, subjects, manifest, test_split="train")


@pytest.mark.parametrize("name", LABELS_NEEDED)
def test_unlabelled_data_are_refused(name, subjects, unlabelled):
    with pytest.raises(ValueError, match="'squares': split 'test' has no labels: evaluate on another data set"):
        run(name, subjects, unlabelled)


@pytest.mark.parametrize("name", MEASURING)
def test_a_missing_test_split_is_refused(name, subjects, manifest):
    with pytest.raises(ValueError, match="'squares' has no split 'tset': choose one of train, test"):
        run(name, subjects, manifest, test_split="tset")


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_key_is_refused_with_the_nearest(name):
    config = base.load({"protocol": name}, "").Config
    with pytest.raises(ValueError, match=r"^evaluations\.mine\.sede: unknown key; did you mean 'seed'\?$"):
        parse(config, {"dataset": SQUARES, "sede": 3}, "evaluations.mine")


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_names_its_file_and_derives_from_the_base(name):
    config = base.load({"protocol": name}, "").Config
    assert config.model_validate({"dataset": SQUARES}).protocol == name
    assert issubclass(config, base.ProtocolConfig)


@pytest.mark.parametrize("name", NAMES)
def test_the_documentation_has_a_section(name, root):
    assert re.search(rf"^## `{name}`", (root / "docs" / "evaluations.md").read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def schema(root) -> dict[str, Any]:
    return json.loads((root / "workflow" / "schemas" / "config.schema.json").read_text())


def dry_run(schema: dict[str, Any], evaluation: dict[str, Any], labels: Any = None, **changes: Any) -> None:
    """Check one experiment and one evaluation as a dry run does."""
    experiment = {"dataset": SQUARES, "backbone": {"name": "resnet18"}, "method": {"name": "simclr"}, **changes}
    config = {"experiments": {"first": experiment}, "evaluations": {"mine": evaluation}}
    checks.check(config, schema, ["squares"])
    check_needs(config, schema, {"squares": labels or LABELLED}, [])


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_has_the_contract(name, schema):
    assert contracts(schema)[name] == base.load({"protocol": name}, "").Config.contract
    several = base.load({"protocol": name}, "").Config.contract.needs.boxes
    dry_run(schema, {"protocol": name}, {"train": "several", "test": "several"} if several else None)


@pytest.mark.parametrize("name", MEASURING)
def test_the_dry_run_refuses_a_data_set_without_a_test_split(name, schema):
    message = r"^evaluations\.mine: for experiment 'first': data set 'squares' has no test or val split"
    with pytest.raises(ValueError, match=message):
        dry_run(schema, {"protocol": name}, {"train": "one"})


@pytest.mark.parametrize("name", OTHER_SPLIT)
def test_the_dry_run_refuses_equal_splits(name, schema):
    with pytest.raises(ValueError, match=r"^evaluations\.mine: .*split 'train' trains and tests: set `test_split`"):
        dry_run(schema, {"protocol": name, "test_split": "train"})


@pytest.mark.parametrize("name", LABELS_NEEDED)
def test_the_dry_run_refuses_unlabelled_data(name, schema):
    with pytest.raises(ValueError, match=r"^evaluations\.mine: .*split 'train' has no labels: use a labelled split"):
        dry_run(schema, {"protocol": name}, {"train": "none", "test": "one"})


def test_the_dry_run_refuses_data_without_boxes(schema):
    message = r"^evaluations\.mine: .*split 'test' has no boxes: set `dataset: \{name: ...\}` to one whose card"
    with pytest.raises(ValueError, match=message):
        dry_run(schema, {"protocol": "detection"})


@pytest.mark.parametrize("name", needing(labels="one"))
def test_the_dry_run_refuses_several_labels_per_image(name, schema):
    with pytest.raises(ValueError, match=r"^evaluations\.mine: .*several labels each, expected one: .*`low_shot`$"):
        dry_run(schema, {"protocol": name}, {"train": "several", "test": "several"})


@pytest.mark.parametrize("name", [name for name in MEASURING if name not in needing(labels="one")])
def test_the_dry_run_accepts_several_labels_where_the_protocol_does(name, schema):
    dry_run(schema, {"protocol": name}, {"train": "several", "test": "several"})
