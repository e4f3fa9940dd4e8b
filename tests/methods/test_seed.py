"""SEED: the loss, the queue and the views."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax

from ssl_core.blocks.losses import info_nce
from ssl_core.config import Backbone, parse
from ssl_core.methods.seed import SEED, Config, seed_loss
from ssl_core.networks.backbones import build_backbone, save_backbone, write_tensors
from ssl_core.networks.heads import mlp
from tests.methods.harness import START, batch, make, resolved, resume_is_exact

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
    before = [value.clone() for value in (*model.teacher.parameters(), *model.teacher.buffers())]
    model(batch(views(files)), START)
    after = (*model.teacher.parameters(), *model.teacher.buffers())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert model.backbone.training


def test_both_see_the_same_picture_and_the_teacher_at_its_own_size(files):
    model, one = make(SEED, config(files)), batch(views(files))
    seen = []
    model.teacher.network[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[-1]))
    model(one, START)
    assert (seen, model.backbone.seen) == ([16], [(16, 3, 8, 8)])
    assert SEED.views(config(files), 8)["both"].seen_by == ("student", "teacher")


def test_the_queue_is_as_wide_as_the_teachers_embedding(files):
    bare = make(SEED, config(files, teacher={"weights": str(files / "backbone.safetensors")}))
    assert bare.queue.rows.shape == (24, 1024)
    assert make(SEED, config(files)).queue.rows.shape == (24, 5)


def test_a_teacher_is_required():
    with pytest.raises(ValueError, match=r"method\.teacher: this key is missing"):
        parse(Config, {}, "method")


def test_the_code_preset_has_the_codes_temperature():
    teacher = {"weights": "some.safetensors"}
    assert resolved("seed", preset="code", teacher=teacher).method.teacher_temperature == 1e-4


def test_a_teacher_with_a_projector_resumes_exactly(files):
    resume_is_exact(SEED, config(files), accumulation=2)
