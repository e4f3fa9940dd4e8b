"""SEED: the loss, the queue, and teachers from every kind of file."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import nn
from torchvision.transforms.v2.functional import normalize

from ssl_core.blocks.losses import info_nce
from ssl_core.config import Backbone, parse
from ssl_core.methods.seed import SEED, Config, load_projector, seed_loss
from ssl_core.networks.backbones import build_backbone, load_backbone, save_backbone, write_tensors
from ssl_core.networks.heads import mlp
from tests.methods.harness import CPU, START, Noise, batch, make, resolved, resume_is_exact

NETWORK = Backbone(name="mobilenet_v3_small", stem="small")  # its teacher sees 16 pixels, the student 8
TEMPERATURES = {"student_temperature": 0.2, "teacher_temperature": 0.01}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A backbone file of this project, its projector, and the same backbone as a plain file."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    backbone, projector = build_backbone(NETWORK, 16), mlp([1024, 12, 5])
    with torch.no_grad():
        backbone.train()(torch.randn(64, 3, 16, 16))  # BatchNorm statistics that are not the initial ones
        projector.train()(torch.randn(64, 1024))
    header = {"mean": "[0.1, 0.2, 0.3]", "std": "[0.5, 0.5, 0.5]"}
    save_backbone(folder / "backbone.safetensors", backbone, NETWORK, 16, header)
    weights = {f"projector.{name}": weight for name, weight in projector.state_dict().items()}
    write_tensors(folder / "model.safetensors", {**weights, "queue.rows": torch.ones(3, 5)}, {"experiment": "teacher"})
    write_tensors(folder / "plain.safetensors", {**backbone.state_dict(), "classifier.3.weight": torch.ones(2)}, {})
    return folder


def config(files, **changes):
    teacher = {
        "weights": str(files / "backbone.safetensors"),
        "projector": str(files / "model.safetensors"),
        "size": 16,
    }
    return Config(**{"teacher": teacher, "queue_size": 24, **changes})


def views(files):
    return SEED.views(config(files), 8)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


# The loss


def test_seed_loss_matches_scipy_in_double_precision():
    student, teacher, queue = unit(3, 5).double(), unit(3, 5, seed=1).double(), unit(7, 5, seed=2).double()
    expected = []
    for s, t in zip(student, teacher):
        support = torch.cat([t[None], queue])
        expected.append(-(softmax(support @ t / 0.01) * log_softmax(support @ s / 0.2)).sum())
    found = seed_loss(student, teacher, queue, **TEMPERATURES)
    assert abs(found.item() - np.mean(expected)) < 1e-12


def test_a_sharp_teacher_makes_it_contrastive_learning_with_the_teachers_own_embedding():
    # The code's temperature of 1e-4 gives a one-hot target (docs/sources.md#seed).
    student, teacher, queue = unit(8, 16), unit(8, 16, seed=1), unit(32, 16, seed=2)
    found = seed_loss(student, teacher, queue, student_temperature=0.2, teacher_temperature=1e-4)
    torch.testing.assert_close(found, info_nce(student, teacher, queue, temperature=0.2))


# Queue and teacher


def test_the_teacher_stays_in_evaluation_mode(files):
    model = make(SEED, config(files)).train()
    before = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    model(batch(views(files)), START)
    assert all(torch.equal(value, before[name]) for name, value in model.teacher.state_dict().items())
    assert model.backbone.training


def test_both_see_the_same_picture_and_the_teacher_at_its_own_size(files):
    model, one = make(SEED, config(files)), batch(views(files))
    seen = []
    model.teacher[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
    model(one, START)
    assert (seen, model.backbone.seen) == ([16], [(16, 3, 8, 8)])
    assert SEED.views(config(files), 8)["both"].seen_by == ("student", "teacher")


def test_the_teacher_sees_its_own_normalisation(files):
    pixels, mean, std = torch.rand(4, 3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # the loader's
    plain = {"weights": str(files / "plain.safetensors"), "backbone": NETWORK.model_dump(), "size": 16}
    other = {**plain, "mean": (0.2, 0.2, 0.2), "std": (0.3, 0.3, 0.3)}
    for teacher, own_mean, own_std in [
        ({"weights": str(files / "backbone.safetensors")}, (0.1, 0.2, 0.3), (0.5, 0.5, 0.5)),
        (plain, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        (other, (0.2, 0.2, 0.2), (0.3, 0.3, 0.3)),
    ]:
        model = make(SEED, config(files, teacher=teacher)).train()
        model.prepare(Noise(views(files), 16), CPU)
        expected = F.normalize(model.teacher(normalize(pixels, [*own_mean], [*own_std])), dim=1)
        torch.testing.assert_close(model._teach(normalize(pixels, [*mean], [*std])), expected, atol=1e-5, rtol=1e-4)


def test_teachers_come_from_our_files_with_or_without_projector_and_from_plain_ones(files):
    ours = make(SEED, config(files))
    reference, _ = load_backbone(files / "backbone.safetensors")
    images = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        feature = reference.eval()(images)
        assert ours.teacher(images).shape == (4, 5)
        bare = make(SEED, config(files, teacher={"weights": str(files / "backbone.safetensors")}))
        torch.testing.assert_close(bare.teacher(images), feature)
        assert bare.queue.rows.shape == (24, 1024)
        plain = {"weights": str(files / "plain.safetensors"), "backbone": NETWORK.model_dump(), "size": 16}
        torch.testing.assert_close(make(SEED, config(files, teacher=plain)).teacher(images), feature)


def test_a_rebuilt_projector_computes_what_the_original_did(tmp_path):
    torch.manual_seed(0)
    for number, original in enumerate(
        [
            mlp([6, 12, 5]),
            mlp([6, 12, 5], batch_norm=False),
            mlp([6, 8, 8, 5], bias=False, final_batch_norm=True, final_affine=False),
            nn.Sequential(nn.Linear(6, 5)),
        ]
    ):
        path = tmp_path / f"{number}.safetensors"
        original(torch.randn(32, 6))
        write_tensors(path, {f"projector.{name}": value for name, value in original.state_dict().items()}, {})
        rebuilt, dim = load_projector(path, 6)
        rows = torch.randn(4, 6)
        assert dim == 5
        torch.testing.assert_close(rebuilt.eval()(rows), original.eval()(rows))


def test_a_projector_that_is_not_there_or_does_not_fit_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"has no projector of plain layers: leave out teacher\.projector"):
        load_projector(files / "backbone.safetensors", 6)
    with pytest.raises(ValueError, match="its projector takes 1024 features, its backbone gives 7"):
        load_projector(files / "model.safetensors", 7)


def test_a_teacher_that_is_not_there_is_refused(files):
    with pytest.raises(ValueError, match=r"nowhere\.safetensors does not exist"):
        make(SEED, config(files, teacher={"weights": "nowhere.safetensors"}))
    with pytest.raises(ValueError, match=r"method\.teacher: this key is missing"):
        parse(Config, {}, "method")


def test_the_code_preset_has_the_codes_temperature():
    teacher = {"weights": "some.safetensors"}
    assert resolved("seed", preset="code", teacher=teacher).method.teacher_temperature == 1e-4


def test_a_teacher_with_a_projector_resumes_exactly(files):
    resume_is_exact(SEED, config(files), accumulation=2)
