"""Faults of a configuration are found at every depth and reported in one line."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from ssl_core.experiments import checks, overlays
from ssl_core.look import schema_generation

from .conftest import CARDS, VALID, changed

NEITHER = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}}


def test_the_schema_is_fresh(schema: dict[str, Any]) -> None:
    assert schema_generation.generate() == schema, "run `make schema`"


def test_a_valid_configuration_passes(schema: dict[str, Any]) -> None:
    checks.check(VALID, schema, CARDS)


def test_a_former_protocol_is_refused_with_its_new_name(schema: dict[str, Any]) -> None:
    config = {**VALID, "evaluations": {"few": {"protocol": "semi_supervised"}}}
    with pytest.raises(ValueError, match=r"^evaluations\.few\.protocol: 'semi_supervised' .*`protocol: finetune` with"):
        checks.check(config, schema, CARDS)


def test_the_demonstration_and_all_recipes_pass(root: Path, schema: dict[str, Any]) -> None:
    cards = [path.stem for path in (root / "datasets").glob("*.yaml")]
    demonstration = yaml.safe_load((root / "config.yaml").read_text())
    checks.check(demonstration, schema, cards)
    for recipe in (root / "recipes").glob("*.yaml"):
        merged = overlays.merge(demonstration, yaml.safe_load(recipe.read_text()))
        checks.check(overlays.without_nulls(merged), schema, cards)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("experimnts", "experiments"),
        ("experiments/small/trainig", "training"),
        ("experiments/small/seed", "seeds"),
        ("experiments/small/training/epoch", "epochs"),
        ("experiments/small/training/lr", "learning_rate"),
        ("experiments/small/training/bs", "batch_size"),
        ("experiments/small/training/wd", "weight_decay"),
        ("experiments/small/backbone/steem", "stem"),
        ("experiments/small/method/queue_sise", "queue_size"),
        ("experiments/small/method/student_augmentation/gray_scale", "grayscale"),
        ("experiments/small/views/teacher/aera", "area"),
        ("experiments/small/dataset/subset/image", "images"),
        ("experiments/taken/weigths", "weights"),
        ("evaluations/knn/temprature", "temperature"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(schema: dict[str, Any], path: str, nearest: str) -> None:
    assert fault(schema, path, 3) == f"{path.replace('/', '.')}: unknown key; did you mean '{nearest}'?"


OTHERS = "(others: timm/..., torchvision/...)"
TRAINED = ": 'weights' names a network that is trained already"


@pytest.mark.parametrize(
    ("path", "value", "message"),  # begins with the path
    [
        ("evaluations/knn/protocol", "knnn", ": unknown value 'knnn'; did you mean 'knn'?"),
        ("experiments/small/method/name", "resl", ": unknown value 'resl'; did you mean 'ressl'?"),
        ("experiments/small/training/learning_rate", "1e-3", ": expected a number, found '1e-3' (YAML wants a point"),
        ("experiments/small/dataset", "demo", ": expected a mapping, found 'demo' (write {name: demo})"),
        (
            "experiments/small/backbone/name",
            "resnet81",
            f": there is no backbone 'resnet81'; did you mean 'resnet18'? {OTHERS}",
        ),
        (
            "experiments/small/backbone/name",
            "torchvision/resnet5",
            ": there is no backbone 'torchvision/resnet5'; did you mean 'resnet50'?",
        ),
        (
            "experiments/small/training/batch_size",
            1,
            ": 1 is less than two images per forward pass (gpus x accumulation is 1), which",
        ),
        ("experiments/small/training", {"epochs": 3, "keep_epochs": [2, 4]}, ".keep_epochs: 4 is above epochs (3)"),
        ("figures/heat/draw", "line", ": unknown value 'line'; did you mean 'lines'?"),
        ("experiments/small/training", {"epochs": 3, "warmup_epochs": 3}, ".warmup_epochs: 3 must be below epochs (3)"),
        ("experiments/small/method", {}, ": the key 'name' is missing"),
        ("experiments/small/training/epochs", 0, ": 0 is less than"),
        ("experiments/a b", VALID["experiments"]["small"], ": use letters, digits, '.', '_' or '-'"),
        ("experiments/sweeps", VALID["experiments"]["small"], ": this name is taken"),
        ("evaluations/pretrain", {"protocol": "knn"}, ": this name is taken"),
        ("experiments", {}, ": "),
        (
            "experiments/small/dataset/name",
            "demmo",
            ": there is no data set 'demmo' (no datasets/demmo.yaml); did you mean 'dem",
        ),
        (
            "evaluations/knn/dataset/name",
            "cifar",
            ": there is no data set 'cifar' (no datasets/cifar.yaml); did you mean 'cif",
        ),
        ("sweeps/heat/base", "smal", ": there is no experiment 'smal'; did you mean 'small'?"),
        (
            "sweeps/heat/grid",
            {"method.teacher_temprature": [1.0]},
            ".method.teacher_temprature: unknown key; did you mean 'tea",
        ),
        ("sweeps/heat/grid", {"metod.x": [1]}, ".metod: unknown key; did you mean 'method'?"),
        ("sweeps/heat/grid", {"training.seed": [1, 1]}, ": two points have the name"),
        ("sweeps/heat/grid", {"weights": ["a.safetensors"]}, f".method{TRAINED}"),
        ("sweeps/many/grid", {"training.seed": [1]}, ".training.seed: experiments.many.seeds sets it"),
        (
            "experiments/small/training",
            {"seed": 2**64},
            ".seed: 18446744073709551616 is no seed: use a number from 0 to",
        ),
        (
            "experiments/small/dataset",
            {"name": "demo", "subset": {"images": 3, "seed": -1}},
            ".subset.seed: -1 is no seed",
        ),
        ("sweeps/heat/grid", {"training.seed": [2**40]}, ".training.seed: 1099511627776 is no seed"),
        ("experiments/small/seeds", [0, 0], ": [0, 0] has non-unique elements"),
        ("experiments/small/seeds", [], ": [] "),
        ("experiments/small/seeds", 3, ": expected a list, found 3"),
        ("experiments/small/seeds", [-1], ".0: -1 is less than the minimum of 0"),
        ("experiments/small/normalisation", "imagenet", ": only an experiment with 'weights' has it"),
        ("experiments/taken/method", {"name": "ressl"}, TRAINED),
        ("experiments/taken/seeds", [0], TRAINED),
        ("experiments/taken/training", {}, TRAINED),
        (
            "experiments/taken/dataset",
            {"name": "demo", "subset": {"images": 3}},
            ": nothing is trained on it; drop split and subset",
        ),
        ("experiments/taken/normalisation", "imagnet", ": "),
        (
            "experiments/taken/normalisation",
            {"mean": [0] * 3, "stt": [1] * 3},
            ".stt: unknown key; did you mean 'std'?",
        ),
        (
            "experiments/neither",
            NEITHER,
            ": the key 'method' is missing (or 'weights', for a network trained elsewhere)",
        ),
        ("reported/smal", {"source": "x", "results": {}}, ": there is no experiment 'smal'; did you mean"),
        (
            "reported/small",
            {"source": "x", "results": {"kn": 1}},
            ".results.kn: there is no such evaluation; did you mean 'knn'?",
        ),
        ("reported/small", {"results": {"knn": 1}}, ": the key 'source' is missing"),
        ("reported/small", {"source": "x", "knn": 1}, ".knn: unknown key"),
        ("reported/small", {"source": "x", "results": {"knn": 101}}, ".results.knn: 101 is no percentage"),
        ("reported/small", {"source": "x", "results": {"knn": "a"}}, ".results.knn: expected a number"),
        ("shards", "s3:/bucket", ": expected an address such as s3://bucket/prefix, found 's3:/bucket'"),
        ("shards", "s3://", ": expected an address"),
        ("shards", 3, ": expected a text, found 3"),
    ],
)
def test_a_fault_is_reported_in_one_line(schema: dict[str, Any], path: str, value: Any, message: str) -> None:
    line = fault(schema, path, value)
    assert line.startswith(path.replace("/", ".") + message)
    assert "\n" not in line


def fault(schema: dict[str, Any], path: str, value: Any) -> str:
    """Return the message of a configuration with one value set."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared by the tests
        checks.check(changed(path, value), schema, CARDS)
    return str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("figures/heat/evaluation", "kn", "figures.heat: there is no evaluation 'kn'; did you mean 'knn'?"),
        (
            "figures/heat/series/A",
            ["heat-0.2"],
            "figures.heat: there is no experiment 'heat-0.2'; did you mean 'heat-0.02'?",
        ),
        ("figures/heat/series/A", ["taken"], "figures.heat: 'taken' was trained elsewhere and has no pretrain.json"),
    ],
)
def test_a_figure_of_results_that_no_rule_makes_is_refused(
    path: str, value: Any, message: str, schema: dict[str, Any]
) -> None:
    assert fault(schema, path, value) == message


def test_a_configuration_needs_experiments(schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"at the top: the key 'experiments' is missing"):
        checks.check({"evaluations": {"knn": {"protocol": "knn"}}}, schema, CARDS)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("results/smal/knn.json", "results/smal/knn.json: there is no experiment 'smal'; did you mean 'small'?"),
        ("results/small/kn.json", "results/small/kn.json: there is no evaluation 'kn'; did you mean 'knn'?"),
        ("results/sweeps/heet.csv", "results/sweeps/heet.csv: there is no sweep 'heet'; did you mean 'heat'?"),
        ("results/figures/heet.svg", "results/figures/heet.svg: there is no figure 'heet'; did you mean 'heat'?"),
        (
            "results/small/epoch-7.safetensors",
            "results/small/epoch-7.safetensors: this epoch is not in experiments.small",
        ),
        ("results/many/knn.json", "results/many/knn.json: experiment 'many' has seeds: use many-seed3, many-seed0"),
        (
            "results/taken/pretrain.json",
            "results/taken/pretrain.json: 'taken' takes its weights from a file, so nothing",
        ),
        ("results/smal/export/backbone.onnx", "results/smal/export/backbone.onnx: there is no experiment 'smal'"),
    ],
)
def test_a_target_that_no_rule_makes_is_refused(target: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        checks.check_targets(VALID, [target])
    assert str(caught.value).startswith(message)


def test_valid_targets_and_options_pass() -> None:
    targets = ["results/small/pretrain.json", "results/heat-0.02/knn.json", "results/many-2-seed0/knn.json", "--cores"]
    checks.check_targets(VALID, [*targets, "results/taken/knn.json", "results/small/export/backbone.onnx"])


def test_a_missing_file_of_weights_is_refused_if_a_target_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"experiments\.taken\.weights: there is no file 'there\.safetensors' \(looked in"
    ):
        checks.check_files(VALID, ["--cores", "2"])
    checks.check_files(VALID, ["results/small/knn.json"])
    (tmp_path / "there.safetensors").touch()
    checks.check_files(VALID, [])
    checks.check_files(
        changed("experiments/taken/weights", "results/small/backbone.safetensors"), []
    )  # that experiment writes it
    with pytest.raises(ValueError, match=r"there is no file 'results/smal/backbone\.safetensors'"):
        checks.check_files(changed("experiments/taken/weights", "results/smal/backbone.safetensors"), [])


@pytest.mark.parametrize(
    ("section", "name", "copied"),
    [
        ("experiments", "small.previous", "small"),
        ("experiments", "small.damaged", "small"),
        ("experiments", "table.csv", "small"),
        ("evaluations", "knn.json", "knn"),
        ("evaluations", "history.csv", "knn"),
    ],
)
def test_names_that_collide_with_files_are_refused(
    section: str, name: str, copied: str, schema: dict[str, Any]
) -> None:
    config = copy.deepcopy(VALID)
    config[section][name] = config[section][copied]
    with pytest.raises(ValueError, match=rf"{section}\.{name}: .*choose another"):
        checks.check(config, schema, CARDS)


@pytest.mark.parametrize("name", ["checkpoints", "logs", "results", "shards", "results/small"])
def test_a_file_in_the_place_of_a_folder_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checks.check_folders(VALID)
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).touch()
    with pytest.raises(ValueError, match=f"{name} is a file, but the workflow needs a folder of this name"):
        checks.check_folders(VALID)


def test_a_name_that_is_too_long_for_a_file_is_refused(schema: dict[str, Any]) -> None:
    long = "a" * 201
    section = VALID["experiments"]["small"]
    assert "the name has 201 letters" in fault(schema, f"experiments/{long}", section)
    assert "the name has 201 letters" in fault(schema, f"evaluations/{long}", {"protocol": "knn"})


@pytest.mark.parametrize(
    "address", ["s3://key:hidden@bucket", "s3://key:hid/den@bucket", "s3:key:hidden@b", "s3://b?hidden"]
)
def test_a_password_in_the_address_of_shards_is_refused_and_not_shown(address: str, schema: dict[str, Any]) -> None:
    message = fault(schema, "shards", address)
    assert message.startswith("shards: the address contains '@' or '?'")
    assert "hid" not in message
