"""Optimizers and what they leave alone: SGD, AdamW and LARS over parameter groups by weight-decay exclusion."""

# torch has foreach functions, the ones its own optimizers use, but no public names for them.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from ssl_core.blocks.schedules import effective_learning_rate
from ssl_core.config import Training


def build_optimizer(
    module: nn.Module, training: Training, *, constant: Sequence[str] = (), undecayed: Sequence[str] = ()
) -> Optimizer:
    """Build the optimizer of all parameters that are trained; frozen ones are left out.

    Its groups start at the peak learning rate. Those of submodules named in `constant` (SimSiam's predictor) stay
    there through `set_learning_rate`; parameters named in `undecayed` (PID's class weights) never decay. AdamW takes
    `momentum` as its first beta.
    """
    groups = parameter_groups(module, training, constant=constant, undecayed=undecayed)
    rate, momentum, nesterov = effective_learning_rate(training), training.momentum, training.nesterov
    if nesterov and training.optimizer != "sgd":
        raise ValueError(f"training.nesterov exists for sgd only, not for {training.optimizer}: leave it out")
    if training.optimizer == "lars":
        return Lars(groups, lr=rate, momentum=momentum)
    if training.optimizer == "adamw":
        return AdamW(groups, lr=rate, betas=(momentum, 0.999), fused=True)
    return SGD(groups, lr=rate, momentum=momentum, nesterov=nesterov)  # fused is no faster here


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Give every group but the constant ones this learning rate."""
    for group in optimizer.param_groups:
        if not group["constant"]:
            group["lr"] = rate


def parameter_groups(
    module: nn.Module, training: Training, *, constant: Sequence[str] = (), undecayed: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Sort the trained parameters by what `decay_exclusion` spares them; empty groups are left out.

    `norm_bias`: one-dimensional parameters and biases, no decay and no trust ratio. `norm_bias_depthwise`: also
    depthwise convolutions, no decay but a trust ratio, as SSLight's code has it (its paper drops both).
    `named`: names with "bn" or "bias" in them, as ReSSL's code has it (downsampling batch norms are decayed).
    """
    groups: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = _spared(name, parameter, training.decay_exclusion)
        kept = training.decay_exclusion == "norm_bias_depthwise" and _is_depthwise(parameter)
        decayed = not (spared or kept or name in undecayed)
        fixed = any(name == prefix or name.startswith(f"{prefix}.") for prefix in constant)
        new = {
            "params": [],
            "weight_decay": training.weight_decay if decayed else 0.0,
            "trusted": not spared,
            "constant": fixed,
        }
        groups.setdefault((decayed, not spared, fixed), new)["params"].append(parameter)
    return list(groups.values())


def _spared(name: str, parameter: Tensor, exclusion: str) -> bool:
    if exclusion == "named":
        return "bn" in name or "bias" in name
    return exclusion != "none" and (parameter.ndim <= 1 or name.endswith(".bias"))


def _is_depthwise(parameter: Tensor) -> bool:
    """Tell whether a weight convolves each channel by itself; SSLight looks at the shape alone."""
    return parameter.ndim == 4 and parameter.shape[1] == 1


class Lars(Optimizer):
    """Layer-wise adaptive rates as in SSLight and DINO (docs/sources.md#lars).

    u = gradient + weight_decay * p; trust r = coefficient * |p| / |u|, or 1 where a norm is 0 or the group is not
    `trusted`; v = momentum * v + r * u; p = p - lr * v. timm's divides by |gradient| + weight_decay * |p| instead, and
    drops the trust ratio exactly where the decay is 0; torch has none.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        coefficient: float = 0.001,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "coefficient": coefficient,
            "trusted": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step; `closure`, if given, recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._update(parameters, group)
        return loss

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Move the parameters of one group; norms stay on the device, so nothing waits for it."""
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
    """Return coefficient * |p| / |u| for each parameter, 1 where either norm is 0."""
    lengths = torch.stack(torch._foreach_norm(parameters))
    update_lengths = torch.stack(torch._foreach_norm(updates))
    ratios = coefficient * lengths / update_lengths
    return list(torch.where((lengths > 0) & (update_lengths > 0), ratios, torch.ones_like(ratios)).unbind())
