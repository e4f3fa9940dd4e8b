"""Needs that depend on the configuration, and the evaluations that a dry run checks."""

import json
from typing import Any

import pytest

from ssl_core.experiments.needs import Contract, Needs, SplitLabels, check_needs, find_test_split, projector_layers

EXPERIMENT = {"dataset": {"name": "squares"}, "backbone": {"name": "resnet18"}, "method": {"name": "simclr"}}
ADOPTED = {"dataset": {"name": "squares"}, "backbone": {"name": "resnet18"}, "weights": "w.safetensors"}
ON_PROJECTOR = {"protocol": "finetune", "variant": "sslight_1"}


@pytest.fixture(scope="module")
def schema(root) -> dict[str, Any]:
    return json.loads((root / "workflow" / "schemas" / "config.schema.json").read_text())


def check(schema, evaluation, experiment=EXPERIMENT, splits=None, targets=()):
    config = {"experiments": {"first": experiment}, "evaluations": {"mine": evaluation, "price": {"protocol": "cost"}}}
    labels: dict[str, SplitLabels] = {"squares": splits or {"train": "one", "test": "one"}, "bare": {"train": "none"}}
    check_needs(config, schema, labels, targets)


@pytest.mark.parametrize(
    ("method", "layers"),
    [
        ({"name": "npid"}, 1),
        ({"name": "pid"}, 0),
        ({"name": "pid", "head": "linear"}, 1),
        ({"name": "moco", "preset": "notebook"}, 1),
        ({"name": "moco", "projector_layers": 1}, 1),
    ],
)
def test_a_method_without_two_layers_is_refused(schema, method, layers):
    message = f"^evaluations.mine: for experiment 'first': method '{method['name']}' has a projector of {layers} linear"
    with pytest.raises(ValueError, match=message):
        check(schema, ON_PROJECTOR, {**EXPERIMENT, "method": method})


@pytest.mark.parametrize(
    "method",
    [
        {"name": "simclr"},
        {"name": "dino"},
        {"name": "npid", "head": "mlp"},
        {"name": "npid", "preset": "code"},
        {"name": "moco", "preset": "notebook", "projector_layers": 2},
        {"name": "unknown_to_the_schema"},
    ],
)
def test_a_method_with_two_layers_is_accepted(schema, method):
    check(schema, ON_PROJECTOR, {**EXPERIMENT, "method": method})


def test_adopted_weights_are_refused_where_a_projector_is_needed(schema):
    with pytest.raises(
        ValueError, match=r"^evaluations\.mine: .*adopted weights have no projector.*: choose a variant"
    ):
        check(schema, ON_PROJECTOR, ADOPTED)
    check(schema, {"protocol": "finetune"}, ADOPTED)


def test_a_protocol_that_divides_one_split_needs_no_other(schema):
    only = {"all": "one"}
    evaluation = {"protocol": "logistic", "dataset": {"name": "squares", "split": "all"}, "train_per_class": 3}
    check(schema, {**evaluation, "test_split": "all"}, splits=only)
    with pytest.raises(
        ValueError, match="this protocol divides one split, found 'all' and 'test': set `test_split: all`"
    ):
        check(schema, evaluation, splits={**only, "test": "one"})


@pytest.mark.parametrize("head", ["fpn", "c4"])
def test_only_the_short_variant_of_a_detection_tests_on_the_images_that_train(schema, head):
    boxes: SplitLabels = {"train": "several"}
    evaluation = {"protocol": "detection", "head": head, "test_split": "train"}
    check(schema, evaluation, splits=boxes)
    check(schema, {**evaluation, "variant": "short"}, splits=boxes)
    with pytest.raises(ValueError, match="'train' trains and tests: set `test_split` to another split"):
        check(schema, {**evaluation, "variant": f"coco_{head}_1x"}, splits=boxes)


def test_an_evaluation_on_another_data_set_is_checked_there(schema):
    with pytest.raises(ValueError, match="data set 'bare' has no test or val split"):
        check(schema, {"protocol": "knn", "dataset": {"name": "bare"}})


@pytest.mark.parametrize(
    ("targets", "refused"),
    [
        ([], True),
        (["--cores", "2", "all"], True),
        (["results/table.csv"], True),
        (["results/first/mine.json"], True),
        (["results/first/mine/tsne.png"], True),
        (["results/first/export/README.md"], True),
        (["results/first/price.json"], False),
        (["results/first/backbone.safetensors"], False),
        (["shards/squares/manifest.json"], False),
        (["--target-jobs", "evaluate:experiment=first,evaluation=price"], False),
    ],
)
def test_only_evaluations_that_the_targets_need_are_checked(schema, targets, refused):
    arguments = (schema, {"protocol": "knn"}, EXPERIMENT, {"train": "one"}, targets)
    if refused:
        with pytest.raises(ValueError, match=r"^evaluations\.mine: "):
            check(*arguments)
    else:
        check(*arguments)


def test_the_default_test_split_is_test_and_then_val():
    both: SplitLabels = {"val": "one", "test": "one", "train": "one"}
    only_val: SplitLabels = {"val": "one", "train": "one"}
    for splits, expected in ((both, "test"), (only_val, "val")):
        assert find_test_split(Needs(), "data", splits, training="train", test=None) == expected


def test_the_value_of_a_key_selects_the_needs():
    contract = Contract(
        needs_by_key={"variant": {"large": Needs(projector=True)}, "number": {"*": Needs(labels="none")}}
    )
    assert contract.needs_of({"variant": "small"}) == contract.needs_of({"number": None}) == Needs()
    assert contract.needs_of({"variant": "large"}).projector
    assert contract.needs_of({"number": 3}).labels == "none"


def test_layers_of_a_projector_follow_from_its_settings():
    assert projector_layers({"projector_layers": 3}) == 3
    assert [projector_layers({"head": head}) for head in ("none", "linear", "mlp")] == [0, 1, 2]
    assert projector_layers({"embedding_dim": 128}) is None


@pytest.mark.parametrize(
    ("settings", "backbone"),
    [({}, "vit_tiny_16"), ({"variant": "voc07_c4"}, "mobilenet_v2"), ({"head": "c4"}, "mobilenet_v2")],
)
def test_a_backbone_without_a_detector_is_refused(schema, settings, backbone):
    splits: SplitLabels = {"train": "several", "test": "several"}
    experiment = {**EXPERIMENT, "backbone": {"name": backbone}}
    with pytest.raises(ValueError, match=f"it takes the backbones resnet18, .*, not {backbone}: leave this evaluation"):
        check(schema, {"protocol": "detection", **settings}, experiment, splits)
    check(schema, {"protocol": "detection", **settings}, EXPERIMENT, splits)
