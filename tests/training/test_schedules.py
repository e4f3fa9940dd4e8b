"""Schedules against closed forms, exact at the ends."""

import math
from typing import Any

import pytest

from ssl_core.blocks.schedules import cosine_momentum, effective_learning_rate, forward_batch_size, learning_rate
from ssl_core.config import Training


def training(**changes: Any) -> Training:
    plain = {"learning_rate_scaling": "none", "learning_rate": 0.8, "epochs": 10, "warmup_epochs": 2}
    return Training.model_validate(plain | changes)


# (processes, accumulation) -> images per forward. The learning rate depends on the global batch only.
@pytest.mark.parametrize(
    ("gpus", "accumulation", "images"), [(1, 1, 512), (1, 4, 128), (2, 1, 256), (4, 2, 64), (8, 1, 64)]
)
def test_batch_is_divided_and_the_rate_scaled_once(gpus: int, accumulation: int, images: int):
    plan = training(
        batch_size=512, gpus=gpus, accumulation=accumulation, learning_rate=0.06, learning_rate_scaling="linear"
    )
    assert forward_batch_size(plan) == images
    assert effective_learning_rate(plan) == 0.12
    assert learning_rate(20, training=plan, steps_per_epoch=10) == 0.12


def test_unscaled_rates_are_absolute():
    assert effective_learning_rate(training(batch_size=1024)) == 0.8


def test_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(ValueError, match=r"multiple of gpus x accumulation \(2 x 3\): choose 96"):
        forward_batch_size(training(batch_size=100, gpus=2, accumulation=3))


def test_cosine_by_step_is_the_closed_form():
    plan = training(minimum_learning_rate=0.1)
    rates = [learning_rate(step, training=plan, steps_per_epoch=5) for step in range(50)]
    assert rates[:10] == pytest.approx([0.08 * step for step in range(10)])
    assert rates[10] == 0.8
    closed = [0.1 + 0.35 * (1 + math.cos(math.pi * step / 40)) for step in range(40)]
    assert rates[10:] == pytest.approx(closed, abs=1e-12)
    assert learning_rate(50, training=plan, steps_per_epoch=5) == 0.1


def test_minimum_is_absolute_under_scaling():
    plan = training(learning_rate_scaling="linear", batch_size=1024, minimum_learning_rate=0.0048)
    assert learning_rate(50, training=plan, steps_per_epoch=5) == 0.0048


def test_cosine_by_epoch_is_constant_within_one():
    plan = training(schedule_unit="epoch", warmup_epochs=0)
    rates = [learning_rate(step, training=plan, steps_per_epoch=3) for step in range(30)]
    closed = [0.4 * (1 + math.cos(math.pi * (step // 3) / 10)) for step in range(30)]
    assert rates == pytest.approx(closed, abs=1e-12)


def test_warmup_moves_every_step_even_when_the_cosine_moves_by_epoch():
    plan = training(schedule_unit="epoch")
    rates = [learning_rate(step, training=plan, steps_per_epoch=4) for step in range(40)]
    assert rates[:8] == pytest.approx([0.1 * step for step in range(8)])
    assert rates[8:12] == [0.8] * 4
    assert rates[12] == pytest.approx(0.4 * (1 + math.cos(math.pi / 8)))


def test_step_schedule_counts_epochs_from_the_start():
    plan = training(schedule="step", milestones=(6, 8), warmup_epochs=0)
    rates = [learning_rate(step, training=plan, steps_per_epoch=2) for step in (0, 11, 12, 15, 16, 19)]
    assert rates == pytest.approx([0.8, 0.8, 0.08, 0.08, 0.008, 0.008])


def test_constant_schedule_warms_up_and_stays():
    plan = training(schedule="constant", warmup_epochs=0.5)
    assert [learning_rate(step, training=plan, steps_per_epoch=4) for step in (0, 1, 2, 39)] == [0, 0.4, 0.8, 0.8]


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match=r"warmup_epochs 10 must be below training.epochs 10"):
        learning_rate(0, training=training(warmup_epochs=10), steps_per_epoch=5)
    with pytest.raises(ValueError, match=r"minimum_learning_rate 1 is above the peak learning rate 0.8"):
        learning_rate(0, training=training(minimum_learning_rate=1.0), steps_per_epoch=5)


def test_t11_momentum_is_exact_at_both_ends_and_a_cosine_between():
    momenta = [cosine_momentum(step, 100, 0.996) for step in range(101)]
    assert (momenta[0], momenta[100]) == (0.996, 1.0)
    closed = [1 - 0.004 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(101)]
    assert momenta == pytest.approx(closed, abs=1e-15)
    assert cosine_momentum(50, 100, 0.9, 0.99) == pytest.approx(0.945)
