"""The momentum teacher: a copy of the student whose parameters are a moving average of the student's."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.blocks import distributed
from ssl_core.blocks.schedules import cosine


class MomentumTeacher(nn.Sequential):
    """Copies of the student's modules, applied in order; no gradient reaches their parameters.

    The momentum goes from `momentum` to `final_momentum` on a cosine over the run; None keeps it constant.
    """

    def __init__(self, *student: nn.Module, momentum: float, final_momentum: float | None = None) -> None:
        super().__init__(*copy.deepcopy(nn.Sequential(*student)))
        self.momentum, self.final_momentum = momentum, final_momentum
        self.requires_grad_(False)
        for module in self.modules():
            if type(module).__name__ == "DropPath":  # timm's; the teacher drops no path (docs/sources.md#dino)
                setattr(module, "drop_prob", 0.0)  # noqa: B010

    @torch.no_grad()
    def update(self, *student: nn.Module, fraction: float) -> None:
        """Set each parameter to m * teacher + (1 - m) * student, with the momentum m at this fraction of the run.

        BatchNorm statistics are not averaged but come from the teacher's forward passes
        (docs/sources.md#teacher-batchnorm).
        """
        momentum = self.momentum
        if self.final_momentum is not None:
            momentum = cosine(self.momentum, self.final_momentum, fraction)
        averages: list[Tensor] = [*self.parameters()]
        current: list[Tensor] = [*nn.Sequential(*student).parameters()]
        torch._foreach_lerp_(averages, current, 1 - momentum)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def shuffled_embedding(teacher: nn.Module, view: Tensor, *, splits: int, seed: int, step: int) -> Tensor:
    """Return the teacher's unit embeddings (batch, dim) of `view`.

    With BatchNorm over several `splits` of the global batch, the images are shuffled over them beforehand, so that
    statistics do not reveal the positive pair (docs/sources.md#batchnorm-leak).
    """
    if splits == 1:
        return F.normalize(teacher(view).float(), dim=1)
    shuffled, order = distributed.shuffle(view, seed=seed, step=step)
    return distributed.unshuffle(F.normalize(teacher(shuffled).float(), dim=1), order)
