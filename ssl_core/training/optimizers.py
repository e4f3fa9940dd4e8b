"""Optimizers: SGD, AdamW and LARS over parameter groups with and without weight decay."""

# The foreach functions that torch's optimizers use have no public names.
# pyright: reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from ssl_core.blocks.schedules import effective_learning_rate
from ssl_core.config import Training


def build_optimizer(
    module: nn.Module, training: Training, *, constant: Sequence[str] = (), undecayed: Sequence[str] = ()
) -> Optimizer:
    """Build the optimizer of all parameters that require gradients.

    All groups start at the peak learning rate. `set_learning_rate` does not change those of the submodules named in
    `constant` (SimSiam's predictor). Parameters named in `undecayed` (PID's class weights) have no weight decay. AdamW
    uses `momentum` as its first beta.
    """
    groups = parameter_groups(module, training, constant, undecayed)
    rate, momentum, nesterov = effective_learning_rate(training), training.momentum, training.nesterov
    if training.final_weight_decay is not None and not training.weight_decay * training.final_weight_decay:
        raise ValueError(
            f"training.weight_decay {training.weight_decay:g} goes to final_weight_decay "
            f"{training.final_weight_decay:g}: both must be above 0, else the parameters without decay are unknown"
        )
    if nesterov and training.optimizer != "sgd":
        raise ValueError(f"training.nesterov exists for sgd only, not for {training.optimizer}: leave it out")
    if training.optimizer == "lars":
        return Lars(groups, lr=rate, momentum=momentum)
    if training.optimizer == "adamw":
        return AdamW(groups, lr=rate, betas=(momentum, 0.999), fused=True)
    return SGD(groups, lr=rate, momentum=momentum, nesterov=nesterov)  # fused is no faster here


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Set the learning rate of all groups except the constant ones."""
    for group in optimizer.param_groups:
        if not group["constant"]:
            group["lr"] = rate


def set_weight_decay(optimizer: Optimizer, decay: float) -> None:
    """Set the weight decay of all groups that have one."""
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = decay


def parameter_groups(
    module: nn.Module, training: Training, constant: Sequence[str] = (), undecayed: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the groups of trained parameters that `decay_exclusion` makes, without empty ones.

    `norm_bias`: one-dimensional parameters and biases have no decay and no trust ratio. `norm_bias_depthwise`:
    depthwise convolutions also have no decay, but a trust ratio, as in SSLight's code (its paper excludes them from
    both). `named`: parameters with "bn" or "bias" in their name have neither, as in ReSSL's code, which decays the
    batch norms of downsampling layers.
    """
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        excluded = _is_excluded(name, parameter, training.decay_exclusion)
        depthwise = training.decay_exclusion == "norm_bias_depthwise" and _is_depthwise(parameter)
        decayed = not (excluded or depthwise or name in undecayed)
        fixed = any(name == prefix or name.startswith(f"{prefix}.") for prefix in constant)
        new = {
            "params": [],
            "weight_decay": training.weight_decay if decayed else 0.0,
            "trusted": not excluded,
            "constant": fixed,
        }
        groups.setdefault((decayed, not excluded, fixed), new)["params"].append(parameter)
    return list(groups.values())


def _is_excluded(name: str, parameter: Tensor, exclusion: str) -> bool:
    if exclusion == "named":
        return "bn" in name or "bias" in name
    return exclusion != "none" and (parameter.ndim <= 1 or name.endswith(".bias"))


def _is_depthwise(parameter: Tensor) -> bool:
    """Return whether a weight convolves each channel by itself, from its shape alone, as SSLight does."""
    return parameter.ndim == 4 and parameter.shape[1] == 1


class Lars(Optimizer):
    """Layer-wise adaptive rate scaling as in SSLight and DINO (docs/sources.md#lars).

    u = gradient + weight_decay * p; trust ratio r = coefficient * |p| / |u|, or 1 if a norm is 0 or the group is not
    `trusted`; v = momentum * v + r * u; p = p - lr * v. LARS of timm divides by |gradient| + weight_decay * |p| and has
    no trust ratio for groups without decay; torch has no LARS.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "coefficient": 0.001})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; `closure` is not supported."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update the parameters of one group; norms stay on the device, which avoids synchronisation."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        updates = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
        if group["trusted"]:
            torch._foreach_mul_(updates, _trust(parameters, updates, group["coefficient"]))
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, updates)
        torch._foreach_add_(parameters, buffers, alpha=-group["lr"])


def _trust(parameters: list[Tensor], updates: list[Tensor], coefficient: float) -> list[Tensor]:
    """Return coefficient * |p| / |u| for each parameter, 1 if either norm is 0."""
    lengths = torch.stack(torch._foreach_norm(parameters))
    update_lengths = torch.stack(torch._foreach_norm(updates))
    ratios = coefficient * lengths / update_lengths
    return list(torch.where((lengths > 0) & (update_lengths > 0), ratios, torch.ones_like(ratios)).unbind())
