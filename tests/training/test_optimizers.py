"""Optimizers: LARS against NumPy, parameter groups as in the papers, and exact resumption from a checkpoint."""

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ssl_core.config import Backbone, Training
from ssl_core.networks.backbones import build_backbone
from ssl_core.networks.heads import mlp
from ssl_core.training.optimizers import Lars, build_optimizer, parameter_groups, set_learning_rate

EXCLUSIONS = ["none", "norm_bias", "norm_bias_depthwise", "named"]


def training(**changes: Any) -> Training:
    return Training.model_validate(
        {"learning_rate_scaling": "none", "learning_rate": 0.5, "weight_decay": 0.1} | changes
    )


def lars_oracle(value: np.ndarray, gradients: list[np.ndarray], *, decay: float, trusted: bool) -> np.ndarray:
    """LARS of docs/sources.md#lars with lr 0.5, momentum 0.9 and coefficient 0.001."""
    velocity = np.zeros_like(value)
    for gradient in gradients:
        update = gradient + decay * value
        lengths = np.linalg.norm(value), np.linalg.norm(update)
        trust = 0.001 * lengths[0] / lengths[1] if trusted and min(lengths) > 0 else 1.0
        velocity = 0.9 * velocity + trust * update
        value = value - 0.5 * velocity
    return value


@pytest.mark.parametrize(("decay", "trusted"), [(0.1, True), (0.0, True), (0.0, False)])
def test_lars_equals_numpy(decay: float, trusted: bool):
    random = np.random.default_rng(0)
    values = [random.normal(size=(4, 3)), random.normal(size=5), np.zeros((2, 2))]
    gradients = [[random.normal(size=value.shape) for value in values] for _ in range(4)]
    gradients[1][0] = np.zeros_like(values[0])  # without decay a zero norm
    parameters = [nn.Parameter(torch.from_numpy(value.copy())) for value in values]
    groups = [{"params": parameters, "weight_decay": decay, "trusted": trusted}]
    optimizer = Lars(groups, lr=0.5, momentum=0.9)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
    for index, parameter in enumerate(parameters):
        expected = lars_oracle(values[index], [step[index] for step in gradients], decay=decay, trusted=trusted)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12)


def test_lars_changes_neither_gradients_nor_parameters_without_gradient():
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    used.grad = torch.ones(3)
    groups = [{"params": [used, unused], "weight_decay": 0.1, "trusted": True}]
    Lars(groups, lr=1.0, momentum=0.9).step()
    assert torch.equal(used.grad, torch.ones(3))
    assert torch.equal(unused, torch.ones(3))


def sorted_names(module: nn.Module, exclusion: str) -> dict[str, tuple[float, bool]]:
    """Return each parameter's weight decay and whether LARS scales it."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, training(decay_exclusion=exclusion))
    return {names[id(p)]: (group["weight_decay"], group["trusted"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("features.1.conv.1.weight", [(0.1, True), (0.1, True), (0.1, True), (0.1, True)]),  # 1x1 convolution
        ("features.1.conv.0.0.weight", [(0.1, True), (0.1, True), (0.0, True), (0.1, True)]),  # depthwise
        ("features.0.1.weight", [(0.1, True), (0.0, False), (0.0, False), (0.1, True)]),  # a batch norm without "bn"
        ("features.0.1.bias", [(0.1, True), (0.0, False), (0.0, False), (0.0, False)]),
    ],
)
def test_parameters_that_each_exclusion_spares_in_mobilenet(name: str, expected: list[tuple[float, bool]]):
    backbone = build_backbone(Backbone(name="mobilenet_v2"), 32)
    assert [sorted_names(backbone, exclusion)[name] for exclusion in EXCLUSIONS] == expected


def test_named_exclusion_decays_downsampling_batch_norms_as_ressl_does():
    groups = sorted_names(build_backbone(Backbone(name="resnet18"), 32), "named")
    assert groups["bn1.weight"] == (0.0, False)
    assert groups["layer2.0.downsample.1.weight"] == (0.1, True)
    assert groups["layer2.0.downsample.1.bias"] == (0.0, False)


@pytest.mark.parametrize("exclusion", EXCLUSIONS)
def test_each_trained_parameter_is_in_one_group_and_no_frozen_one_is(exclusion: str):
    backbone = build_backbone(Backbone(name="deit_tiny"), 32)
    grouped = [p for group in parameter_groups(backbone, training(decay_exclusion=exclusion)) for p in group["params"]]
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trained))
    assert len(trained) == len(list(backbone.parameters())) - 2


def test_constant_groups_keep_the_peak_learning_rate():
    module = nn.ModuleDict(
        {"projector": nn.Linear(2, 2), "predictor": nn.Linear(2, 2), "predictor_two": nn.Linear(2, 2)}
    )
    optimizer = build_optimizer(
        module, training(learning_rate_scaling="linear", batch_size=512), constant=["predictor"]
    )
    set_learning_rate(optimizer, 0.25)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(parameter)] for parameter in module.parameters()] == [0.25, 0.25, 1.0, 1.0, 0.25, 0.25]


def test_nesterov_is_for_sgd_only():
    with pytest.raises(ValueError, match="nesterov exists for sgd only, not for lars"):
        build_optimizer(nn.Linear(2, 2), training(optimizer="lars", nesterov=True))
    assert build_optimizer(nn.Linear(2, 2), training(nesterov=True)).param_groups[0]["nesterov"]


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), mlp((4, 8, 4))
    )
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(images.to(memory_format=torch.channels_last)).square().sum().backward()
        optimizer.step()


def values(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_training_resumes_exactly_from_a_weights_only_checkpoint(name: str):
    plan = training(optimizer=name, learning_rate=0.01, decay_exclusion="norm_bias")
    network = small_network()
    optimizer = build_optimizer(network, plan)
    train(network, optimizer, range(2))
    file = io.BytesIO()
    torch.save({"network": network.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(network, optimizer, range(2, 4))

    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = small_network()
    resumed.load_state_dict(state["network"])
    again = build_optimizer(resumed, plan)
    again.load_state_dict(state["optimizer"])
    train(resumed, again, range(2, 4))
    assert torch.equal(values(resumed), values(network))


def test_fused_adamw_is_the_unfused_one_on_channels_last_weights():
    # The fused kernel iterates over memory: a gradient with another layout than its weight would update the wrong
    # elements. Without batch norm, because it cancels biases, whose gradients are noise that Adam scales to full steps.
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    twin = copy.deepcopy(network)
    train(network, build_optimizer(network, training(optimizer="adamw", learning_rate=0.01)), range(3))
    train(twin, torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1, foreach=False), range(3))
    torch.testing.assert_close(values(network), values(twin))
