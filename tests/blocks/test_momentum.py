import torch
from torch import nn

from ssl_core.blocks.momentum import make_teacher, update_teacher


def test_five_steps_follow_the_closed_form():
    student = nn.Linear(1, 1, bias=False)
    nn.init.constant_(student.weight, 0.0)
    teacher = make_teacher(student)
    nn.init.constant_(student.weight, 1.0)
    for _ in range(5):
        update_teacher(teacher, student, 0.9)
    assert torch.allclose(teacher.weight, torch.tensor(1 - 0.9**5))


def test_batchnorm_statistics_stay_the_teachers_own():
    student = nn.BatchNorm1d(2)
    teacher = make_teacher(student)
    student(torch.randn(8, 2) + 5)
    update_teacher(teacher, student, 0.5)
    assert teacher.running_mean is not None
    assert torch.equal(teacher.running_mean, torch.zeros(2))


def test_the_teacher_has_its_own_parameters_without_gradient():
    student = nn.Linear(2, 2)
    teacher = make_teacher(student)
    assert teacher.weight is not student.weight
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
