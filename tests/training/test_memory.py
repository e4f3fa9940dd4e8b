"""Memory before a run: an estimate that does not fit names the settings that make it fit."""

import pytest

from ssl_core.config import Training
from ssl_core.training.memory import shortage

USES = {"weights and memory": 10e9, "activations": 64e9, "views": 0.0}


def test_a_batch_that_fits_has_no_shortage():
    assert shortage(USES, Training(batch_size=64), 80e9) is None


def test_a_batch_that_does_not_fit_names_accumulation_and_processes():
    message = shortage(USES, Training(batch_size=64), 30e9)  # 20 GB for images: 16 of 64 at once
    assert message is not None
    assert "needs about 74 GB per process for 64 images at once, this machine has 30 GB" in message
    assert "training.accumulation to 4 (BatchNorm then sees 16 images at once) or training.gpus to 4" in message


def test_parts_multiply_those_that_are_set():
    message = shortage(USES, Training(batch_size=64, gpus=2, accumulation=2), 30e9)
    assert message is not None
    assert "training.accumulation to 8" in message
    assert "training.gpus to 8" in message


@pytest.mark.parametrize("available", [9e9, 11e9])
def test_without_a_batch_that_fits_the_rest_must_shrink(available):
    assert "use a smaller network" in str(shortage(USES, Training(batch_size=64), available))
