# The tests use attributes that `nn.Module` does not declare.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_core.config import parse
from ssl_core.data.loader import Batch
from ssl_core.methods.base import Progress, resolve
from ssl_core.methods.ressl import Config, ReSSL, relation_loss
from tests.methods.harness import remember


class Tiny(nn.Module):
    """A backbone of one convolution that counts its forward passes."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.passes = 0

    def forward(self, images):
        self.passes += 1
        return self.norm(self.layer(images)).relu().mean(dim=(2, 3))


def build(num_images=100, batch_size=8, **changes):
    torch.manual_seed(0)
    config = Config(**{"queue_size": 16, "projector_hidden": 12, "embedding_dim": 5, "warmup": 0.0, **changes})
    return ReSSL(config, Tiny(), num_images=num_images, batch_size=batch_size, seed=0)


def batch(students=1, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(size, 3, 8, 8, generator=generator)  # noqa: E731
    views = {"student": [draw() for _ in range(students)], "teacher": [draw()]}
    return Batch(views, torch.zeros(size, dtype=torch.long), torch.arange(size))


START = Progress(0, 100)


def test_relation_loss_matches_a_numpy_oracle_in_double_precision():
    rng = np.random.default_rng(0)
    student, teacher, queue = (unit(rng.normal(size=shape)) for shape in [(3, 5), (3, 5), (7, 5)])
    target = softmax(teacher @ queue.T / 0.04)
    expected = -(target * np.log(softmax(student @ queue.T / 0.1))).sum(1).mean()
    found = relation_loss(
        *map(torch.from_numpy, (student, teacher, queue)), student_temperature=0.1, teacher_temperature=0.04
    )
    assert abs(found.item() - expected) < 1e-12


def test_identical_embeddings_and_temperatures_leave_the_entropy_of_the_target():
    torch.manual_seed(0)
    rows, queue = F.normalize(torch.randn(4, 6), dim=1), F.normalize(torch.randn(9, 6), dim=1)
    target = F.softmax(rows @ queue.T / 0.1, dim=1)
    entropy = -(target * target.log()).sum(dim=1).mean()
    assert torch.allclose(relation_loss(rows, rows, queue, student_temperature=0.1, teacher_temperature=0.1), entropy)


@pytest.mark.parametrize(("alike", "low", "high"), [(False, 8.3, 8.6), (True, 7.3, 8.0)])
def test_initial_loss_on_a_noise_queue(alike, low, high):
    # docs/sources.md#worked-ressl
    torch.manual_seed(0)
    teacher, other, queue = (F.normalize(torch.randn(n, 256), dim=1) for n in (256, 256, 4096))
    student = teacher if alike else other
    loss = relation_loss(student, teacher, queue, student_temperature=0.1, teacher_temperature=0.04)
    assert low < loss < high


def test_a_constant_student_has_the_loss_log_of_the_queue_size():
    # All similarities are equal, so the prediction is uniform for every target.
    queue = torch.eye(8)[:, :4].clone()
    queue[4:] = 0
    student = torch.zeros(3, 4)
    teacher = F.normalize(torch.randn(3, 4), dim=1)
    loss = relation_loss(student, teacher, queue, student_temperature=0.1, teacher_temperature=0.04)
    assert abs(loss.item() - math.log(8)) < 1e-6


def test_the_teacher_sees_only_the_weak_view():
    model = build()
    first, second = batch(seed=0), batch(seed=1)
    mixed = Batch({"student": second.views["student"], "teacher": first.views["teacher"]}, first.labels, first.indices)
    assert torch.equal(model(first, START).memory["keys"], model(mixed, START).memory["keys"])


def test_one_crop_costs_one_student_and_one_teacher_forward():
    model = build()
    model(batch(), START)
    assert (model.backbone.passes, model.teacher[0].passes) == (1, 1)


def test_two_crops_average_both_students_against_one_teacher():
    model = build(crops="two").eval()
    both = batch(students=2)
    alone = [Batch({**both.views, "student": [view]}, both.labels, both.indices) for view in both.views["student"]]
    expected = sum(model(one, START).total for one in alone) / 2
    passes = model.teacher[0].passes
    assert torch.allclose(model(both, START).total, expected)
    assert model.teacher[0].passes == passes + 1


def test_the_loss_uses_the_queue_as_it_stood_before_the_batch():
    model = build()
    before = model.queue.rows.clone()
    losses = model(batch(), START)
    assert torch.equal(model.queue.rows, before)
    remember(model, losses)
    assert torch.equal(model.queue.rows[8:], before[8:])
    assert not torch.isclose(model.queue.rows[:8], before[:8]).any(dim=1).all()
    assert torch.allclose(model.queue.rows.norm(dim=1), torch.ones(16))


def test_the_support_is_the_queue_whatever_the_batch():
    model = build()
    for size in (4, 8):
        model(batch(size=size), START)
    assert model.queue.rows.shape == (16, 5)


def test_accumulated_micro_batches_enqueue_all_keys_and_move_the_teacher_once():
    model = build(teacher_momentum=0.5)
    with torch.no_grad():
        model.backbone.layer.weight.add_(1)
    old = model.teacher[0].layer.weight.clone()
    remember(model, *[model(batch(size=4, seed=seed), START) for seed in (0, 1)])
    assert int(model.queue.position) == 8
    assert torch.allclose(model.teacher[0].layer.weight, old + 0.5)


def test_infonce_fades_out_and_never_comes_back():
    model = build(warmup=0.5).eval()
    one = batch()
    middle = model(one, Progress(25, 100))
    expected = 0.5 * middle.parts["relation"] + 0.5 * middle.parts["contrast"]
    assert torch.allclose(middle.total, expected)
    assert torch.allclose(model(one, START).total, middle.parts["contrast"])
    for step in (50, 75, 99):  # the paper's alpha is not clipped at 1
        late = model(one, Progress(step, 100))
        assert torch.equal(late.total, late.parts["relation"])


def test_first_keys_come_from_the_teacher_before_this_steps_gradient():
    model = build(teacher_momentum=0.0)
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=1.0)
    before = model.teacher[0].layer.weight.clone()
    losses = model(batch(), START)
    losses.total.backward()
    assert torch.equal(model.teacher[0].layer.weight, before)
    optimizer.step()
    remember(model, losses)
    assert torch.equal(model.teacher[0].layer.weight, model.backbone.layer.weight)


def test_without_predictor_batchnorm_is_split_and_with_it_whole():
    assert type(build(predictor=False).backbone.norm).__name__ == "SplitBatchNorm2d"
    assert type(build().backbone.norm) is nn.BatchNorm2d


def test_shuffled_keys_come_back_in_place():
    # In evaluation mode BatchNorm uses running statistics, so the shuffle must change nothing.
    model = build(predictor=False).eval()
    one = batch()
    losses = model(one, START)
    expected = F.normalize(model.teacher(one.views["teacher"][0]), dim=1)
    assert torch.allclose(losses.memory["keys"], expected, atol=1e-6)


def test_losses_are_computed_in_full_precision_under_autocast():
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(batch(), START)
    student, teacher = losses.embedding, losses.memory["keys"]
    expected = relation_loss(student, teacher, model.queue.rows, student_temperature=0.1, teacher_temperature=0.04)
    assert torch.equal(losses.total, expected)


def test_five_crops_have_the_papers_sizes_and_areas():
    views = ReSSL.views(Config(crops="multi"), 224)
    students = [view for view in views.values() if "student" in view.seen_by]
    assert [view.size for view in students] == [224, 192, 160, 128, 96]
    assert [view.area for view in students] == [
        (0.14, 1.0),
        (0.117, 0.86),
        (0.095, 0.715),
        (0.073, 0.571),
        (0.05, 0.429),
    ]
    assert views["teacher"].seen_by == ("teacher",)


@pytest.mark.parametrize("crops", ["one", "two", "multi"])
def test_strong_has_the_codes_areas_and_jitter(crops):
    views = ReSSL.views(Config(crops=crops, strong=True), 224)
    for name, view in views.items():
        if name != "teacher":
            colours = view.augmentation
            assert view.area[0] == 0.08
            assert (colours.brightness, colours.contrast, colours.saturation, colours.hue) == (0.8, 0.8, 0.8, 0.2)


def test_strong_appends_randaugment_to_every_student_view_only():
    views = ReSSL.views(Config(crops="multi", strong=True), 224)
    assert {name: view.augmentation.randaugment for name, view in views.items()} == {
        **{f"student_{size}": 5 for size in (224, 192, 160, 128, 96)},
        "teacher": 0,
    }


def test_a_flatter_teacher_is_refused():
    with pytest.raises(
        ValueError, match=r"method: teacher_temperature 0\.2 must not be above student_temperature 0\.1"
    ):
        parse(Config, {"teacher_temperature": 0.2}, "method")


def test_an_equally_flat_teacher_warns(capsys):
    build(teacher_temperature=0.1, student_temperature=0.1)
    assert "the target is no sharper than the prediction" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"crops": "multi", "student_area": [0.1, 1.0]}, "student_area"),
        ({"multi_smallest": [0.1, 0.1, 0.1, 0.1, 0.1]}, "multi_smallest"),
        ({"strong": True, "student_area": [0.1, 1.0]}, "student_area"),
    ],
)
def test_areas_of_other_crops_are_refused(section, key):
    spec = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}, "method": {"name": "ressl", **section}}
    with pytest.raises(ValueError, match=rf"method\.{key} has no effect here"):
        resolve(spec)


def test_a_queue_larger_than_the_data_set_is_refused():
    with pytest.raises(ValueError, match=r"queue_size 16 is larger than the data set \(10 images\)"):
        build(num_images=10)


def test_presets_have_the_papers_values_and_settings_override_them():
    spec = {
        "dataset": {"name": "demo"},
        "backbone": {"name": "resnet18"},
        "method": {"name": "ressl", "preset": "imagenet", "queue_size": 1024},
        "training": {"epochs": 3},
    }
    resolved = resolve(spec)
    assert (resolved.method.teacher_temperature, resolved.method.queue_size) == (0.03, 1024)
    assert (resolved.training.optimizer, resolved.training.weight_decay, resolved.training.epochs) == ("lars", 1e-6, 3)
    augmentation = resolved.method.student_augmentation
    assert (augmentation.blur, augmentation.solarize, augmentation.saturation) == (0.5, 0.1, 0.2)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
