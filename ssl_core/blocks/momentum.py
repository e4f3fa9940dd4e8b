"""The momentum teacher: a copy of the student that follows it slowly."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Student = TypeVar("Student", bound=nn.Module)


def make_teacher(student: Student) -> Student:
    """Return a copy of `student` that no gradient reaches."""
    return copy.deepcopy(student).requires_grad_(False)


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set each teacher parameter to momentum * teacher + (1 - momentum) * student.

    Parameters only: the teacher's BatchNorm statistics come from its own forward passes (recipes rule 2).
    """
    followers: list[Tensor] = [*teacher.parameters()]
    torch._foreach_lerp_(followers, [*student.parameters()], 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]
