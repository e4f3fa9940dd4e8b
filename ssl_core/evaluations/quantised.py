"""An 8-bit network beside its float32 original: kNN accuracy, latency and size of the exported files.

The rule `quantised` runs it, since it reads exported files instead of the backbone. Timings differ from run to run, so
nothing but the table may depend on this protocol.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from ssl_core.data.shards import Manifest
from ssl_core.evaluations import knn
from ssl_core.evaluations.base import Log, Outcome, find_test_split
from ssl_core.evaluations.parts.exported import TimedConfig, latency, open_exported, runtime, subjects_of
from ssl_core.experiments.needs import Contract

FACTS = ("quantisation", "calibration_images", "calibration_error")


class Config(TimedConfig):
    """The kNN classifier, as in `knn`, and how often the networks are timed."""

    contract: ClassVar = Contract(rule="quantised")

    protocol: Literal["quantised"] = "quantised"
    format: Literal["onnx", "tflite", "pte"] = "onnx"  # of both files
    test_split: str | None = None  # default: test, else val
    resize: float = Field(default=1.0, ge=1)  # shorter side before the center crop, as a multiple of the image size
    k: PositiveInt = 200  # at most the number of training images
    temperature: PositiveFloat | None = None  # default: that of `knn`


def measure(config: Config, float32: Path, int8: Path, manifest: Manifest, log: Log) -> Outcome:
    """Measure both files; the original is the baseline of the 8-bit network."""
    find_test_split(config, manifest)
    files = {"pretrained": int8, "float32": float32}
    networks = {name: open_exported(path) for name, path in files.items()}
    exported = networks["pretrained"]
    shared = config.model_dump(include={"dataset", "test_split", "resize", "k", "temperature"})
    outcome = knn.run(knn.Config(**shared), subjects_of({**networks}, exported), manifest, log)
    metrics: dict[str, dict[str, Any]] = {}
    for name, path in files.items():
        size = {"bytes": path.stat().st_size}
        metrics[name] = outcome.metrics[name] | size | latency(config, networks[name], exported.image_size)
    facts = {name: exported.facts[name] for name in FACTS}
    resolved = {key: outcome.hyperparameters[key] for key in ("k", "how", "temperature", "image_size")}
    return Outcome(
        "quantised/v1",
        outcome.split,
        metrics,
        config.settings(**resolved, **facts, batch_size=1, threads=1, runtime=runtime(int8)),
        num_train=outcome.num_train,
        num_test=outcome.num_test,
    )
