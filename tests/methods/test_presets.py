"""Presets have the values of their papers and official codes, and settings override them."""

from operator import attrgetter
from typing import Any

import pytest

from ssl_core.config import Training
from ssl_core.methods import base
from tests.methods.harness import resolved

# Method -> keys below `method` or `training` -> their values for each preset.
PUBLISHED: list[tuple[str, str, dict[str, tuple[Any, ...]]]] = [
    (
        "moco",
        "temperature queue_size teacher_momentum learning_rate batch_size epochs",
        {
            "small": (0.2, 2048, 0.999, 0.3, 256, 400),
            "moco_v2": (0.2, 65536, 0.999, 0.03, 256, 200),
            "notebook": (0.1, 4096, 0.99, 0.06, 512, 200),
            "sslight_baseline": (0.2, 65536, 0.999, 0.48, 1024, 200),
            "sslight": (0.2, 65536, 0.999, 0.48, 1024, 200),
            "shi": (0.1, 65536, 0.999, 0.06, 512, 800),
            "light": (0.1, 65536, 0.999, 0.12, 512, 200),
        },
    ),
    (
        "byol",
        "teacher_momentum final_teacher_momentum learning_rate weight_decay batch_size epochs",
        {
            "small": (0.99, None, 0.05, 1e-4, 512, 400),
            "imagenet": (0.996, 1.0, 0.2, 1.5e-6, 4096, 1000),
            "imagenet_300": (0.99, 1.0, 0.3, 1e-6, 4096, 300),
        },
    ),
    (
        "simclr",
        "temperature augmentation.blur embedding_dim optimizer learning_rate batch_size epochs",
        {
            "cifar": (0.5, 0.0, 128, "lars", 1.0, 512, 1000),
            "imagenet": (0.1, 0.5, 128, "lars", 0.3, 4096, 1000),
            "cao_wu": (0.5, 0.0, 256, "sgd", 0.5, 512, 400),
        },
    ),
    (
        "simsiam",
        "projector_layers predictor_hidden constant_predictor_rate learning_rate learning_rate_scaling weight_decay "
        "epochs batch_size warmup_epochs decay_exclusion",
        {
            "cifar": (2, 512, True, 0.03, "linear", 5e-4, 800, 512, 0, "none"),
            "imagenet": (3, 512, True, 0.05, "linear", 1e-4, 100, 512, 0, "none"),
            "cao_wu": (3, 2048, False, 0.05, "none", 5e-4, 400, 512, 0, "none"),
        },
    ),
    (
        "npid",
        "temperature negatives learning_rate_scaling augmentation.blur",
        {
            "npid": (0.1, None, "none", 0),
            "imagenet": (0.07, 65536, "none", 0),
            "paper": (0.2, None, "none", 0),
        },
    ),
    ("npid", "head learning_rate batch_size", {"npid": ("linear", 0.03, 128)}),
    ("npid", "weight_decay milestones", {"imagenet": (1e-4, (120, 160))}),
    (
        "npid",
        "update calibrate cutmix learning_rate epochs batch_size",
        {"paper": ("gradient", True, None, 0.1, 400, 512)},
    ),
    (
        "npid",
        "update embedding_dim cutmix negatives learning_rate epochs schedule_unit learning_rate_scaling "
        "augmentation.blur",
        {"code": ("moving_average", 2048, 0.5, 10_000, 1.0, 200, "epoch", "none", 0)},
    ),
    (
        "pid",
        "head temperature augmentation.blur learning_rate epochs batch_size",
        {"pid": ("none", 1.0, 0.0, 0.1, 400, 512)},
    ),
    (
        "pid",
        "cosine temperature weight_init embedding_dim learning_rate_scaling",
        {"pic": (True, 0.2, 0.01, 128, "linear")},
    ),
    (
        "swav",
        "alpha area local_area batch_size minimum_learning_rate",
        {"sslight": (0.4, (0.3, 1.0), (0.05, 0.3), 1024, 0.0048)},
    ),
    (
        "ressl",
        "teacher_temperature optimizer weight_decay student_augmentation.blur student_augmentation.solarize "
        "student_augmentation.saturation",
        {"imagenet": (0.03, "lars", 1e-6, 0.5, 0.1, 0.2)},
    ),
    (
        "vicreg",
        "invariance_weight variance_weight covariance_weight embedding_dim learning_rate minimum_learning_rate "
        "weight_decay batch_size epochs",
        {
            "imagenet": (25, 25, 1, 8192, 0.2, 0.0016, 1e-6, 2048, 1000),
            "imagenet_100": (25, 25, 1, 8192, 0.3, 0.0006, 1e-6, 512, 100),
        },
    ),
    (
        "barlow_twins",
        "redundancy_weight loss_scale projector_layers embedding_dim optimizer learning_rate weight_decay batch_size "
        "epochs",
        {
            "small": (0.005, 1, 2, 2048, "sgd", 0.12, 5e-4, 128, 200),
            "imagenet": (0.0051, 0.024, 3, 8192, "lars", 0.2, 1e-6, 2048, 1000),
        },
    ),
    (
        "nnclr",
        "temperature queue_size projector_hidden predictor_hidden embedding_dim learning_rate batch_size epochs",
        {"imagenet": (0.1, 98304, 2048, 4096, 256, 0.3, 4096, 1000)},
    ),
    (
        "sce",
        "contrast_weight teacher_temperature queue_size symmetric teacher_momentum learning_rate batch_size epochs "
        "warmup_epochs",
        {
            "small": (0.5, 0.05, 4096, False, 0.99, 0.06, 256, 200, 5),
            "imagenet": (0.5, 0.07, 65536, True, 0.99, 0.3, 4096, 200, 10),
            "imagenet_100": (0.5, 0.07, 65536, True, 0.99, 0.6, 4096, 100, 10),
        },
    ),
    (
        "lejepa",
        "gaussian_weight num_directions num_globals num_locals area local_area learning_rate weight_decay epochs",
        {
            "resnet": (0.05, 1024, 2, 6, (0.3, 1.0), (0.05, 0.3), 5e-4, 5e-4, 100),
            "vit": (0.05, 1024, 2, 6, (0.3, 1.0), (0.05, 0.3), 5e-4, 0.05, 100),
            "minimal": (0.02, 256, 4, 0, (0.08, 1.0), (0.05, 0.14), 2e-3, 0.05, 800),
        },
    ),
    (
        "moco_v3",
        "temperature teacher_momentum area freeze_patches optimizer learning_rate weight_decay epochs warmup_epochs",
        {
            "imagenet": (1.0, 0.99, (0.2, 1.0), False, "lars", 0.45, 1e-6, 100, 10),
            "imagenet_300": (1.0, 0.99, (0.2, 1.0), False, "lars", 0.3, 1e-6, 300, 10),
            "imagenet_1000": (1.0, 0.996, (0.2, 1.0), False, "lars", 0.3, 1.5e-6, 1000, 10),
            "vit": (0.2, 0.99, (0.08, 1.0), True, "adamw", 1.5e-4, 0.1, 300, 40),
        },
    ),
    ("dino", "num_outputs", {"official": (65536,)}),
]
CASES = [(method, preset, keys, values) for method, keys, rows in PUBLISHED for preset, values in rows.items()]


@pytest.mark.parametrize(("method", "preset", "keys", "values"), CASES)
def test_presets_have_the_values_of_their_sources(method: str, preset: str, keys: str, values: tuple[Any, ...]) -> None:
    experiment = resolved(method, preset=preset)
    parts = {key: experiment.training if key in Training.model_fields else experiment.method for key in keys.split()}
    assert tuple(attrgetter(key)(part) for key, part in parts.items()) == values


def test_settings_override_a_preset() -> None:
    method = resolved("ressl", preset="imagenet", queue_size=1024).method
    assert (method.teacher_temperature, method.queue_size) == (0.03, 1024)


def test_a_trial_of_a_few_epochs_warms_up_for_a_tenth_of_them():
    section = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}, "method": {"name": "simclr"}}
    warmup = {
        epochs: base.resolve({**section, "training": {"epochs": epochs}}).training.warmup_epochs for epochs in (5, 11)
    }
    assert warmup == {5: 0.5, 11: 10}
