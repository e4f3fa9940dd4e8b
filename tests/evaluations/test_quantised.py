"""The 8-bit file of an export and its float32 original, measured by the same classifier on the same images."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_core.stages import export, quantise, quantised

from .conftest import MEAN, STD, Tiny

SPEC = {"protocol": "quantised", "dataset": {"name": "squares"}, "k": 5, "warmup": 1, "repeats": 3}
FACTS = {"image_size": "16", "mean": json.dumps(MEAN), "std": json.dumps(STD)}


@pytest.fixture(scope="module")
def result(manifest_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("export")
    float32, int8 = folder / "backbone.onnx", folder / "backbone.int8.onnx"
    torch.manual_seed(0)
    float32.write_bytes(export.to_onnx(Tiny().eval(), 16, FACTS))
    dataset = {"name": "squares"}
    quantise.run("mine", spec={}, dataset=dataset, onnx=float32, manifest=manifest_path, output=int8)
    files = {"float32": float32, "int8": int8, "manifest": manifest_path, "output": folder / "small.json"}
    quantised.run("mine", "small", spec=SPEC, code="c0de", **files)
    return json.loads((folder / "small.json").read_text()) | {"sizes": [p.stat().st_size for p in (int8, float32)]}


def test_both_networks_have_the_same_metrics(result: dict[str, Any]) -> None:
    int8, float32 = result["metrics"], result["baselines"]["float32"]
    assert int8.keys() == float32.keys() == {"top1", "bytes", "latency_ms", "latency_ms_p10", "latency_ms_p90"}
    assert [int8["bytes"], float32["bytes"]] == result["sizes"]
    assert int8["top1"] == float32["top1"] == 100  # the label is the colour
    assert 0 < int8["latency_ms_p10"] <= int8["latency_ms"] <= int8["latency_ms_p90"]


def test_the_results_look_like_all_others(result: dict[str, Any]) -> None:
    assert (result["protocol"], result["dataset"], result["headline"]) == ("quantised/v1", "squares", "top1")
    assert set(result["digests"]) == {"spec", "code", "data", "float32", "int8"}
    assert (result["num_train"], result["num_test"]) == (60, 31)


def test_the_settings_have_the_measured_error(result: dict[str, Any]) -> None:
    settings = result["hyperparameters"]
    assert settings["quantisation"].startswith("int8, weights per ")
    assert 0 < float(settings["calibration_error"]) < 0.01
    assert settings["k"] == 5
