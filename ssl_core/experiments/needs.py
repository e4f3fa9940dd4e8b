"""The inputs that a protocol needs, and the check that each evaluation can get them.

Torch-free, because each dry run calls it. Protocols declare their contract on their `Config`; `make schema` copies it
into the generated schema, from which it is read here without importing a protocol.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ssl_core.config import Strict
from ssl_core.experiments import should_i_pretrain
from ssl_core.experiments.figures import pairs
from ssl_core.experiments.sweeps import Config, experiments, sweep_experiments, written_experiments

Labels = Literal["none", "one", "several"]  # per image
SplitLabels = Mapping[str, Labels]  # the splits of a data set, in their order

TEST_SPLITS = ("test", "val")  # the default test split is the first of these that the data set has
ANY = "*"  # matches any value of a key
HEADS = {"none": 0, "linear": 1}  # linear layers of a method's `head`; other heads have two or more


class Needs(Strict):
    """The inputs of an evaluation beside the backbone."""

    labels: Labels = "one"  # `several` accepts one label per image as well
    boxes: bool = False  # which the sources with several labels have
    # `other`: a split that does not train. `any`: also the training split. `same`: the training split, which the
    # protocol divides. `none`: no image is read.
    test_split: Literal["other", "any", "same", "none"] = "other"
    projector: bool = False  # two layers of the pre-training's projector
    backbones: tuple[str, ...] = ()  # names of the only backbones that it takes; empty: all


class Contract(Strict):
    """The needs of a protocol and the rule that runs it, as written into the schema."""

    rule: str = "evaluate"
    needs: Needs = Needs()
    # key of the configuration -> its value or ANY -> needs
    needs_by_key: dict[str, dict[str, Needs]] = Field(default_factory=dict)

    def needs_of(self, section: Mapping[str, Any]) -> Needs:
        """Return the needs of one evaluation; the first key of `needs_by_key` that matches replaces the default."""
        for key, by_value in self.needs_by_key.items():
            value = section.get(key)
            if value is None:
                continue
            needs = by_value.get(str(value), by_value.get(ANY))
            if needs is not None:
                return needs
        return self.needs


def training_split(section: Mapping[str, Any]) -> str:
    """Return the split of images that a stage with these settings trains on."""
    dataset = section.get("dataset")
    return dataset.get("split", "train") if isinstance(dataset, Mapping) else "train"


def evaluation_splits(section: Mapping[str, Any]) -> list[str]:
    """Return the splits that an evaluation may read; a data set need not have them all."""
    named = [section[key] for key in ("test_split", "val_split") if section.get(key)]
    return [training_split(section), *TEST_SPLITS, *named]


def contracts(schema: Mapping[str, Any]) -> dict[str, Contract]:
    """Read the contracts of all protocols from the generated schema."""
    found = {}
    for name, definition in schema["$defs"].items():
        kind, _, protocol = name.partition(".")
        if kind == "protocol":
            found[protocol] = Contract.model_validate(definition.get("contract", {}))
    return found


def check_needs(
    config: Config, schema: Mapping[str, Any], labels: Mapping[str, SplitLabels], arguments: Iterable[str]
) -> None:
    """Raise a one-line `ValueError` for the first evaluation whose needs cannot be met.

    `labels` are those of each data set's splits. Evaluations that no target in `arguments` needs are not checked.
    """
    by_protocol = contracts(schema)
    for name, experiment, evaluation in _pairs(config, list(arguments)):
        section = config["evaluations"][evaluation]
        needs = by_protocol[section["protocol"]].needs_of(section)
        dataset = section.get("dataset") or {"name": experiment["dataset"]["name"]}
        try:
            _check_backbone(experiment["backbone"]["name"], needs)
            find_test_split(
                needs,
                dataset["name"],
                labels[dataset["name"]],
                training=dataset.get("split", "train"),
                test=section.get("test_split"),
            )
            if needs.projector:
                _check_projector(experiment, schema)
        except ValueError as error:
            raise ValueError(f"evaluations.{evaluation}: for experiment '{name}': {error}") from None


def find_test_split(needs: Needs, dataset: str, labels: SplitLabels, *, training: str, test: str | None) -> str | None:
    """Return the split to test on, or None where no image is read; `test` None takes the default.

    Raises a one-line `ValueError` for splits that are missing, equal, or lack the labels that are needed.
    """
    if needs.test_split == "none":
        return None
    if test is None:
        test = next((split for split in TEST_SPLITS if split in labels), None)
    if test is None:
        splits = ", ".join(labels)
        raise ValueError(
            f"data set '{dataset}' has no test or val split (it has {splits}): set `test_split`, divide a split "
            "in the card (`test: {from: train, fraction: 0.2}`), or evaluate on another data set with "
            "`dataset: {name: ...}`"
        )
    used = {test} if needs.test_split == "any" else {training, test}
    for split in sorted(used):
        if split not in labels:
            raise ValueError(f"data set '{dataset}' has no split '{split}': choose one of {', '.join(labels)}")
    if needs.test_split == "other" and test == training:
        raise ValueError(f"data set '{dataset}': split '{test}' trains and tests: set `test_split` to another split")
    if needs.test_split == "same" and test != training:
        raise ValueError(
            f"data set '{dataset}': this protocol divides one split, found '{training}' and '{test}': "
            f"set `test_split: {training}`"
        )
    if needs.labels != "none":
        for split in sorted(used):
            _check_labels(needs, dataset, labels, split)
    return test


def _check_labels(needs: Needs, dataset: str, labels: SplitLabels, split: str) -> None:
    """Refuse a split without labels, and one with several labels per image where one is needed."""
    if labels[split] == "none":
        labelled = ", ".join(name for name, kind in labels.items() if kind != "none")
        remedy = (
            f"use a labelled split: {labelled}" if labelled else "evaluate on another data set: no split has labels"
        )
        raise ValueError(f"data set '{dataset}': split '{split}' has no labels: {remedy}")
    if needs.boxes and labels[split] != "several":
        raise ValueError(
            f"data set '{dataset}': split '{split}' has no boxes: set `dataset: {{name: ...}}` to one whose card has a "
            "source of type voc or coco"
        )
    if labels[split] == "several" and needs.labels == "one":
        raise ValueError(
            f"data set '{dataset}': images have several labels each, expected one: use a protocol for several labels, "
            "for example `low_shot`"
        )


def _check_backbone(name: str, needs: Needs) -> None:
    if needs.backbones and name not in needs.backbones:
        names = ", ".join(needs.backbones)
        raise ValueError(
            f"it takes the backbones {names}, not {name}: leave this evaluation out, or change the backbone"
        )


def projector_layers(method: Mapping[str, Any]) -> int | None:
    """Return the number of linear layers in a method's projector; None where neither of its keys sets it."""
    layers = method.get("projector_layers")
    if isinstance(layers, int):
        return layers
    return HEADS.get(method["head"], 2) if "head" in method else None


def _check_projector(experiment: Config, schema: Mapping[str, Any]) -> None:
    """Refuse an experiment without a projector of two layers; a method that does not declare them is not refused."""
    remedy = "choose a variant that needs the backbone alone, or leave this evaluation out"
    method = experiment.get("method")
    if method is None:
        raise ValueError(f"adopted weights have no projector, which this variant needs: {remedy}")
    layers = projector_layers(method)
    if layers is None:
        by_preset = schema["$defs"].get(f"method.{method['name']}", {}).get("projector_layers", {})
        preset = method.get("preset", next(iter(by_preset), None))
        layers = by_preset.get(preset)
    if layers is not None and layers < 2:
        raise ValueError(
            f"method '{method['name']}' has a projector of {layers} linear layers, this variant needs two: {remedy}"
        )


def _pairs(config: Config, arguments: list[str]) -> Iterator[tuple[str, Config, str]]:
    """Iterate over (name, experiment, evaluation) that the targets need; without targets, over those of `rule all`."""
    if "--target-jobs" in arguments:  # a job of a run that was checked at its start
        return
    evaluations = list(config.get("evaluations") or {})
    every = experiments(config)
    targets = [Path(argument).parts for argument in arguments if argument.startswith(("results/", "shards/"))]
    named: dict[tuple[str, str], None] = {}
    if should_i_pretrain.TARGET in arguments:
        named.update(dict.fromkeys(should_i_pretrain.all_pairs(config)))
    for parts in targets:
        if len(parts) < 3 or parts[1] not in every:
            continue
        evaluation = Path(parts[2]).stem if len(parts) == 3 else parts[2]
        wanted = evaluations if evaluation == "export" else [evaluation]
        named.update({(parts[1], name): None for name in wanted if name in evaluations})
    gathered = {("results", "table.csv"), ("results", "table.html")}
    sweeps = [parts[2].rsplit(".", 1)[0] for parts in targets if len(parts) == 3 and parts[1] == "sweeps"]
    whole: Iterable[str] = ()  # experiments of which all evaluations are needed
    if not targets or gathered.intersection(targets):
        whole = written_experiments(config)
    if "all_evaluations" in arguments:
        whole = every
    for sweep in sweeps:
        whole = [*whole, *sweep_experiments(sweep, config)]
    named.update({(name, evaluation): None for name in whole for evaluation in evaluations})
    figures_ = config.get("figures") or {}
    drawn = [Path(parts[2]).stem for parts in targets if len(parts) == 3 and parts[1] == "figures"]
    named.update(dict.fromkeys(pairs({name: figures_[name] for name in drawn})))
    for name, evaluation in named:
        yield name, every[name], evaluation
