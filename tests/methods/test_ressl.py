# The tests use attributes that `nn.Module` does not declare.
# pyright: reportIndexIssue=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import nn

from ssl_core.config import parse
from ssl_core.data.loader import Batch
from ssl_core.methods.base import Progress, resolve
from ssl_core.methods.ressl import Config, ReSSL, relation_loss
from tests.methods import harness
from tests.methods.harness import START

SMALL = {"queue_size": 16, "projector_hidden": 12, "embedding_dim": 5, "warmup": 0.0}


def build(**changes):
    return harness.make(ReSSL, Config(**{**SMALL, **changes}))


def batch(crops="one", seed=0):
    return harness.batch(ReSSL.views(Config(crops=crops), 8), images=8, seed=seed)


def test_relation_loss_matches_scipy_in_double_precision():
    student, teacher, queue = (torch.randn(n, 5, dtype=torch.float64) for n in (3, 3, 7))
    target = softmax(teacher @ queue.T / 0.04, axis=1)
    expected = -(target * log_softmax(student @ queue.T / 0.1, axis=1)).sum(1).mean()
    found = relation_loss(student, teacher, queue, student_temperature=0.1, teacher_temperature=0.04)
    assert abs(found.item() - expected) < 1e-12


@pytest.mark.parametrize(("alike", "low", "high"), [(False, 8.3, 8.6), (True, 7.3, 8.0)])
def test_initial_loss_on_a_noise_queue(alike, low, high):
    # docs/sources.md#worked-ressl
    torch.manual_seed(0)
    teacher, other, queue = (F.normalize(torch.randn(n, 256), dim=1) for n in (256, 256, 4096))
    student = teacher if alike else other
    loss = relation_loss(student, teacher, queue, student_temperature=0.1, teacher_temperature=0.04)
    assert low < loss < high


def test_the_teacher_sees_only_the_weak_view():
    model = build()
    first, second = batch(seed=0), batch(seed=1)
    mixed = Batch({"student": second.views["student"], "teacher": first.views["teacher"]}, first.labels, first.indices)
    assert torch.equal(model(first, START).memory["keys"], model(mixed, START).memory["keys"])


def test_one_crop_costs_one_student_and_one_teacher_forward():
    model = build()
    model(batch(), START)
    assert (len(model.backbone.seen), len(model.teacher[0].seen)) == (1, 1)


def test_two_crops_average_both_students_against_one_teacher():
    model = build(crops="two").eval()
    both = batch("two")
    alone = [Batch({**both.views, "student": [view]}, both.labels, both.indices) for view in both.views["student"]]
    expected = sum(model(one, START).total for one in alone) / 2
    model.teacher[0].seen.clear()
    assert torch.allclose(model(both, START).total, expected)
    assert len(model.teacher[0].seen) == 1


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
