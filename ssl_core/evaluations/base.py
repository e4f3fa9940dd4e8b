"""The contract of a protocol: its configuration, what it needs, what it is given and what it returns.

A protocol is one file in this folder with a `Config` and a function `run(config, subjects, manifest, log) -> Outcome`.
`evaluate` checks the needs and then calls it.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from torch import nn

from ssl_core.config import Dataset, Strict, nearest
from ssl_core.data import multilabels
from ssl_core.data.shards import Manifest
from ssl_core.experiments import needs
from ssl_core.experiments.needs import Contract, Labels, Needs

# Precision of the frozen networks' forward passes. Classifiers and distances are always float32 or more.
Precision = Literal["fp32", "bf16"]
Log = Callable[[dict[str, float], int], None]  # (metrics, epoch), for curves


class ProtocolConfig(Strict):
    """Settings of every protocol. A protocol's own `Config` also sets `protocol` to the name of its file."""

    contract: ClassVar[Contract] = Contract()
    # Published settings per `variant`: they replace the defaults, and keys of the configuration replace them.
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    dataset: Dataset
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _fill_in_variant(cls, section: Any) -> Any:
        if not cls.published or not isinstance(section, dict):
            return section
        variant = section.get("variant", cls.model_fields["variant"].default)
        return {**cls.published.get(variant, {}), **section}

    def needs(self) -> Needs:
        """Return the needs of this evaluation."""
        return self.contract.needs_of(self.model_dump(mode="json"))

    def overridden(self) -> list[str]:
        """List the settings that differ from those of the variant."""
        variant = dict(self)["variant"]
        original = type(self).model_validate({"dataset": self.dataset, "variant": variant})
        keys = type(self).model_fields.keys() - {*SHARED_KEYS, "variant", "image_size"}
        return sorted(key for key in keys if getattr(self, key) != getattr(original, key))

    def settings(self, **resolved: Any) -> dict[str, Any]:
        """Return all settings for the results; values that were decided at run time replace configured ones."""
        return self.model_dump(mode="json", exclude=SHARED_KEYS) | resolved


SHARED_KEYS = {"protocol", "dataset", "test_split", "seed"}  # the results state these outside the hyperparameters


class ImageConfig(ProtocolConfig):
    """Settings of protocols that read images."""

    test_split: str | None = None  # default: test, else val
    image_size: PositiveInt | None = None  # default: the pre-training's
    resize: float = Field(default=1.0, ge=1)  # shorter side before the center crop, as a multiple of the image size


class FrozenConfig(ImageConfig):
    """Settings of protocols that only read features of frozen networks."""

    precision: Precision = "fp32"


@dataclass(frozen=True)
class Subjects:
    """The networks that one evaluation compares, how they see images, and the device they are on."""

    networks: dict[str, nn.Module]  # "pretrained", "untrained" and "pixels"; each (batch, 3, h, w) -> (batch, dim)
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: str = "cpu"
    threads: int = 1
    header: Mapping[str, str] = field(default_factory=dict)  # of the backbone's file
    model: Path | None = None  # the whole pre-trained model, for protocols that need its projector


@dataclass(frozen=True)
class Outcome:
    """The result of a protocol; `metrics` has one entry per network, accuracies in percent."""

    protocol: str  # with its version, for example "knn/v1"
    split: str
    metrics: dict[str, dict[str, Any]]
    hyperparameters: dict[str, Any]
    num_train: int
    num_test: int
    headline: str = "top1"  # the metric, in percent, that represents the evaluation
    details: dict[str, Any] = field(default_factory=dict)  # too long for a table, for example indices of images
    drawing: dict[str, np.ndarray] = field(default_factory=dict)  # arrays from which the stage `draw` makes pictures


def evaluate(protocol: ModuleType, config: Any, subjects: Subjects, manifest: Manifest, log: Log) -> Outcome:
    """Check the needs of `config` against the data set, then run the protocol."""
    find_test_split(config, manifest)
    return protocol.run(config, subjects, manifest, log)


def find_test_split(config: Any, manifest: Manifest) -> str:
    """Return the split to test on; a `ValueError` names the first need of the protocol that the data set lacks."""
    split = needs.find_test_split(
        config.needs(),
        manifest.dataset,
        {name: _labels(manifest, name) for name in manifest.splits},
        training=config.dataset.split,
        test=config.test_split,
    )
    assert split is not None
    return split


def names() -> list[str]:
    """List the protocols by the names of their files."""
    files = Path(__file__).parent.glob("[a-z]*.py")
    return sorted(path.stem for path in files if path.stem != "base")


def load(section: Mapping[str, Any], path: str) -> ModuleType:
    """Import the protocol that the configuration `section` at `path` names; an unknown one is a `ValueError`."""
    name = section.get("protocol")
    if name not in names():
        raise ValueError(f"{path}.protocol: unknown protocol {name!r}{nearest(str(name), names())}")
    return importlib.import_module(f"ssl_core.evaluations.{name}")


def _labels(manifest: Manifest, split: str) -> Labels:
    if manifest.split(split).labelled:
        return "one"
    return "several" if multilabels.has_labels(manifest, split) else "none"
