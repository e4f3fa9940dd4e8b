import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ssl_core.config import parse
from ssl_core.data.loader import Batch
from ssl_core.methods.pid import PID, Config
from tests.methods import harness

SMALL = {"embedding_dim": 5, "projector_hidden": 12}
VARIANTS = {
    "pid": {"bias": True, "cutmix": 0.5},
    "pic": {"cosine": True, "temperature": 0.2, "head": "mlp", "weight_init": 0.01, "decay_weights": False},
}


def build(**changes):
    return harness.make(PID, Config(**{**SMALL, **changes}))


def batch(**changes):
    return harness.batch(PID.views(Config(), harness.PIXELS), **changes)


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_is_the_cross_entropy_over_all_images(bias):
    model, one = build(bias=bias), batch()
    losses = model(one, harness.START)
    logits = losses.embedding @ model.weights[:, :6].T
    if bias:
        logits = logits + model.weights[:, 6]
    assert torch.allclose(losses.total, F.cross_entropy(logits, one.indices))


def test_a_cosine_softmax_matches_a_numpy_oracle():
    model, one = build(cosine=True, temperature=0.2, head="linear"), batch()
    losses = model(one, harness.START)
    embedding, weights = losses.embedding.double().numpy(), model.weights.detach().double().numpy()
    cosine = embedding @ weights.T / np.linalg.norm(embedding, axis=1)[:, None] / np.linalg.norm(weights, axis=1)
    logits = cosine / 0.2
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), one.indices.numpy()])
    assert abs(losses.total.item() - expected) < 1e-5


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_gradients_reach_the_network_and_all_class_vectors_as_autograd_has_them(changes):
    model, one = build(**{**changes, "cutmix": None}), batch()
    model.weights.register_hook(lambda gradient: gradients.append(gradient))
    gradients = []
    model(one, harness.START).total.backward()
    model.backbone.zero_grad()
    streamed = gradients.pop()
    embedding, weights = model.projector(model.backbone(one.views["student"][0])), model.weights
    if model.config.cosine:
        embedding, weights = F.normalize(embedding, dim=1), F.normalize(weights, dim=1)
    else:
        embedding = torch.cat([embedding, torch.ones(len(embedding), 1)], dim=1)
    F.cross_entropy(embedding @ weights.T / model.config.temperature, one.indices).backward()
    torch.testing.assert_close(streamed, gradients.pop(), atol=1e-7, rtol=1e-4)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_instance_discrimination_is_that_of_the_largest_logit():
    model, one = build(), batch()
    losses = model(one, harness.START)
    hits = (losses.embedding @ model.weights.T).argmax(dim=1) == one.indices
    assert losses.measures["instance/top1"].item() == pytest.approx(100 * hits.float().mean().item())
    model = build(cosine=True, head="linear")
    model.weights.data[one.indices] = model(one, harness.START).embedding
    assert model(one, harness.START).measures["instance/top1"].item() == 100


def test_the_first_loss_is_about_the_logarithm_of_the_number_of_images():
    # A learning rate tuned for ten classes meets a loss of 10.8 at 50,000 images (docs/sources.md#pid).
    model = harness.make(PID, Config(weight_init=1e-6), num_images=3000)
    assert abs(model(batch(), harness.START).total.item() - math.log(3000)) < 1e-4


def test_constant_features_without_a_bias_give_the_log_of_the_number_of_images():
    assert abs(harness.collapse_alarms(PID, Config()) - math.log(harness.NUM_IMAGES)) < 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.3},
        {"cosine": True},
        {"bias": True, "weight_init": 1.0},
        {"cutmix": 0.5},
        {"head": "mlp"},
        {"weight_init": 1.0},
    ],
    ids=str,
)
def test_every_switch_reaches_the_loss(changes):
    assert not torch.isclose(build()(batch(), harness.START).total, build(**changes)(batch(), harness.START).total)


def test_several_views_are_averaged():
    model, one, other = build().eval(), batch(seed=0), batch(seed=1)
    views = [*one.views["student"], *other.views["student"]]
    both = model(Batch({"student": views}, one.labels, one.indices), harness.START).total
    alone = [model(Batch({"student": [view]}, one.labels, one.indices), harness.START).total for view in views]
    assert torch.allclose(both, torch.stack(alone).mean())


@pytest.mark.parametrize("decay", [True, False])
def test_decay_weights_false_excludes_only_the_class_vectors_from_decay(decay):
    trainer = harness.trainer(PID, Config(decay_weights=decay), weight_decay=0.5)
    decays = {p: group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    weights = trainer.method.get_parameter("weights")
    assert decays.pop(weights) == (0.5 if decay else 0.0)
    assert set(decays.values()) == {0.5}


def test_losses_are_computed_in_full_precision_under_autocast():
    model, one = build(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(one, harness.START)
    expected = F.cross_entropy(losses.embedding @ model.weights.T, one.indices)
    assert losses.total.dtype is torch.float32
    assert torch.allclose(losses.total, expected, atol=1e-6)


def test_a_cosine_with_a_bias_is_refused():
    with pytest.raises(ValueError, match=r"a cosine has no bias: set one of them"):
        parse(Config, {"cosine": True, "bias": True}, "method")


def test_mixed_images_with_a_bias_resume_and_run_in_two_processes(tmp_path):
    config = Config(**SMALL, **VARIANTS["pid"])
    harness.resume_is_exact(PID, config, accumulation=2)
    harness.two_processes_equal_one(PID, config, folder=tmp_path)
