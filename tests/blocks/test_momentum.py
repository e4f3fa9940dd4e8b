import torch
from torch import nn

from ssl_core.blocks.momentum import MomentumTeacher


def test_batchnorm_statistics_stay_the_teachers_own():
    student = nn.BatchNorm1d(2)
    teacher = MomentumTeacher(student, momentum=0.5)
    student(torch.randn(8, 2) + 5)
    teacher.update(student, fraction=0.0)
    assert torch.equal(teacher.get_buffer("0.running_mean"), torch.zeros(2))


def test_the_teacher_has_its_own_parameters_without_gradient():
    student = nn.Linear(2, 2)
    teacher = MomentumTeacher(student, momentum=0.5)
    assert teacher.get_parameter("0.weight") is not student.weight
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
