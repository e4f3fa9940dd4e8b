import pytest
import torch
import torch.nn.functional as F

from ssl_core.blocks.losses import info_nce
from ssl_core.methods.sce import SCE, Config, sce_losses
from tests.methods.harness import START, batch, make

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.05}


def rows(*sizes: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [F.normalize(torch.randn(size, 5, dtype=torch.float64), dim=1) for size in sizes]


def test_the_loss_is_the_cross_entropy_with_the_mixed_target():
    student, teacher, queue = rows(3, 3, 7)
    contrast, relation = sce_losses(student, teacher, queue, **TEMPERATURES)
    for weight in (0.0, 0.3, 1.0):
        losses = []
        for one, other in zip(student, teacher, strict=True):
            logits = torch.stack([one @ key for key in (other, *queue)]) / 0.1
            similarities = torch.stack([(other @ key / 0.05).exp() for key in queue])
            target = [weight, *((1 - weight) * similarities / similarities.sum())]
            losses.append(-sum(p * logit for p, logit in zip(target, logits, strict=True)) + logits.logsumexp(0))
        expected = torch.stack(losses).mean()
        torch.testing.assert_close(weight * contrast + (1 - weight) * relation, expected)


def test_the_contrast_is_info_nce_and_the_teacher_gets_no_gradient():
    student, teacher, queue = rows(3, 3, 7)
    losses = sce_losses(student.requires_grad_(), teacher.requires_grad_(), queue, **TEMPERATURES)
    torch.testing.assert_close(losses[0], info_nce(student, teacher, queue, temperature=0.1))
    assert torch.autograd.grad(losses[0] + losses[1], teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_total_compares_the_second_view_with_the_first_and_back(symmetric):
    config = Config(
        queue_size=8, projector_hidden=12, embedding_dim=5, symmetric=symmetric, predictor_hidden=7, batchnorm_splits=1
    )
    model, one = make(SCE, config).eval(), batch(SCE.views(config, 8))
    first, second = one.views["first"][0], one.views["second"][0]
    losses = []
    for seen, taught in ((second, first), (first, second))[: 1 + symmetric]:
        student = F.normalize(model.predictor(model.projector(model.backbone(seen))), dim=1)
        teacher = F.normalize(model.teacher(taught), dim=1)
        losses += sce_losses(student, teacher, model.queue.rows, **TEMPERATURES)
    assert torch.allclose(model(one, START).total, torch.stack(losses).mean())
