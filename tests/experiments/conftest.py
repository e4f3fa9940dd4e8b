"""A valid configuration with an entry of each kind, and the schema it is checked against."""

import copy
import json
from typing import Any

import pytest

from ssl_core.experiments import bundled

CARDS = ["demo", "cifar10"]
VALID: dict[str, Any] = {
    "experiments": {
        "small": {
            "dataset": {"name": "demo", "subset": {"images": 100}},
            "backbone": {"name": "resnet18", "stem": "tiny"},
            "method": {"name": "ressl", "queue_size": 16, "student_augmentation": {"policy": "weak", "hue": 0.1}},
            "views": {"teacher": {"augmentation": "none", "area": [0.9, 1.0]}},
            "training": {"epochs": 1, "learning_rate": 0.1, "gradient_clip": None},
        },
        "many": {
            "dataset": {"name": "demo"},
            "backbone": {"name": "resnet18", "stem": "tiny"},
            "method": {"name": "ressl"},
            "training": {"epochs": 1, "seed": 5},
            "seeds": [3, 0],
        },
        "taken": {
            "dataset": {"name": "demo"},
            "backbone": {"name": "resnet18"},
            "weights": "there.safetensors",
            "normalisation": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        },
    },
    "evaluations": {
        "linear": {"protocol": "linear"},
        "knn": {"protocol": "knn", "k": 5, "dataset": {"name": "cifar10"}},
    },
    "sweeps": {
        "heat": {"base": "small", "grid": {"method.teacher_temperature": [0.02, 0.04]}},
        "many": {"base": "many", "grid": {"training.epochs": [2]}},
    },
    "figures": {
        "heat": {
            "draw": "lines",
            "title": "T",
            "evaluation": "knn",
            "series": {"A": ["heat-0.02", "heat-0.04"]},
            "x": "resolved.method.teacher_temperature",
            "x_label": "temperature",
        },
    },
    "reported": {
        "heat-0.02": {"source": "Table 1", "epochs": 200, "hours": "7", "results": {"linear": 90.8}},
        "many": {"source": "Table 2", "results": {"linear": 91, "knn": 88.0}},
        "many-seed3": {"source": "Table 3", "results": {"knn": 88.0}},
        "many-2": {"source": "Table 4", "results": {"knn": 88.0}},
    },
}


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    """The JSON schema of config.yaml."""
    return json.loads(bundled.SCHEMA.read_text())


def changed(path: str, value: Any, config: dict[str, Any] = VALID) -> dict[str, Any]:
    """Return a configuration with one value set, by default the valid one."""
    config = copy.deepcopy(config)
    *parents, key = path.split("/")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[key] = value
    return config
