import torch
from torch import nn

from ssl_core.blocks.momentum import MomentumTeacher


def test_five_steps_follow_the_closed_form():
    student = nn.Linear(1, 1, bias=False)
    nn.init.constant_(student.weight, 0.0)
    teacher = MomentumTeacher(student, momentum=0.9)
    nn.init.constant_(student.weight, 1.0)
    for step in range(5):
        teacher.update(student, fraction=step / 5)
    assert torch.allclose(teacher.get_parameter("0.weight"), torch.tensor(1 - 0.9**5))


def test_the_momentum_goes_to_its_final_value_on_a_cosine():
    student = nn.Linear(1, 1, bias=False)
    for fraction, momentum in [(0.0, 0.9), (0.5, 0.945), (1.0, 0.99)]:
        nn.init.constant_(student.weight, 0.0)
        teacher = MomentumTeacher(student, momentum=0.9, final_momentum=0.99)
        nn.init.constant_(student.weight, 1.0)
        teacher.update(student, fraction=fraction)
        assert torch.allclose(teacher.get_parameter("0.weight"), torch.tensor(1 - momentum))


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
