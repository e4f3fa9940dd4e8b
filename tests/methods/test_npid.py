import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_core.blocks.cutmix import Mixed, cutmix
from ssl_core.blocks.instance_softmax import instance_loss, instance_softmax
from ssl_core.config import Dataset, Subset
from ssl_core.data.loader import Batch, Loader
from ssl_core.data.shards import Manifest
from ssl_core.methods.base import Progress, resolve
from ssl_core.methods.npid import NPID, Config, gradient_update, sqrt_kl
from ssl_core.stages import pretrain
from tests.methods import harness

SMALL = {"embedding_dim": 5, "projector_hidden": 12}
VARIANTS = {
    "plain": {},
    "paper": {"update": "gradient", "sqrtkl_weight": 2.0, "sqrtkl_temperature": None, "head": "mlp", "calibrate": True},
    "code": {"negatives": 20, "cutmix": 0.5, "sqrtkl_weight": 2.0, "calibrate": True, "head": "mlp"},
    "mixed gradient": {"negatives": 7, "cutmix": 0.5, "update": "gradient", "proximal_weight": 1.0},
}


def small(**changes):
    return Config(**{**SMALL, **changes})


def build(**changes):
    return harness.make(NPID, small(**changes))


def batch(**changes):
    return harness.batch(NPID.views(small(), harness.PIXELS), **changes)


def rows(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def instance_loss_over(embedding, bank, target, *, temperature, mixed=None, chunk=None):
    softmax = instance_softmax(embedding, bank, temperature=temperature, chunk=chunk)
    return instance_loss(softmax, embedding, bank[target], temperature=temperature, mixed=mixed)


def sqrt_kl_over(embedding, bank, *, temperature, terms=("l1", "l2"), chunk=None):
    softmax = instance_softmax(embedding, bank, temperature=temperature, entropy_temperature=temperature, chunk=chunk)
    return sqrt_kl(softmax, terms)


# The streamed softmax against the plain one


def naive(embedding, bank, target, temperature, sqrtkl_temperature):
    similarity = embedding @ bank.T
    log_p = F.log_softmax(similarity / sqrtkl_temperature, dim=1)
    log_u = F.log_softmax(similarity.detach() / sqrtkl_temperature / 2, dim=1)
    divergence = (log_p.exp() * (log_p - log_u)).sum(dim=1).mean()
    return F.cross_entropy(similarity / temperature, target), divergence


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000, None])
@pytest.mark.parametrize("sqrtkl_temperature", [0.2, 1.0], ids=["one temperature", "two temperatures"])
@pytest.mark.parametrize("trained", [False, True], ids=["fixed bank", "trained bank"])
def test_streaming_is_exact_forward_and_backward(chunk, sqrtkl_temperature, trained):
    target = torch.tensor([3, 0, 49, 3])
    found, expected = [], []
    for losses, results in ((streamed, found), (naive, expected)):
        embedding, bank = rows(4, 6).requires_grad_(), rows(50, 6, seed=1).requires_grad_(trained)
        arguments = (chunk,) if losses is streamed else ()
        instance, divergence = losses(embedding, bank, target, 0.2, sqrtkl_temperature, *arguments)
        (instance + 20 * divergence).backward()
        results += [instance, divergence, embedding.grad, *([bank.grad] if trained else [])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


def streamed(embedding, bank, target, temperature, sqrtkl_temperature, chunk):
    """Return both losses from one pass, as in the method."""
    softmax = instance_softmax(
        embedding, bank, temperature=temperature, entropy_temperature=sqrtkl_temperature, chunk=chunk
    )
    return instance_loss(softmax, embedding, bank[target], temperature=temperature), sqrt_kl(softmax)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("entropy_temperature", [None, 0.2, 1.0])
def test_streaming_passes_gradcheck(entropy_temperature, trained):
    embedding, bank = rows(3, 4).requires_grad_(), rows(11, 4, seed=1).requires_grad_(trained)

    def differentiable(embedding, bank):
        return instance_softmax(embedding, bank, temperature=0.2, entropy_temperature=entropy_temperature, chunk=4)[:2]

    assert torch.autograd.gradcheck(differentiable, (embedding, bank))


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_instance_discrimination_counts_own_rows_that_are_nearest(chunk):
    embedding, bank = rows(40, 6), rows(50, 6, seed=1)
    bank[:30] = F.normalize(embedding[:30] + 0.8 * rows(30, 6, seed=2), dim=1)
    own = torch.arange(40)
    nearest = instance_softmax(embedding, bank, temperature=0.2, own=own, chunk=chunk).is_nearest
    expected = (embedding @ bank.T).argmax(dim=1) == own
    assert torch.equal(nearest == 1, expected)
    assert 5 < expected.sum() < 35


def test_equal_rows_are_no_hit():
    bank = rows(1, 6).expand(50, 6)
    assert instance_softmax(bank[:8], bank, temperature=0.2, own=torch.arange(8), chunk=7).is_nearest.sum() == 0


@pytest.mark.parametrize("entropy_temperature", [None, 0.2, 1.0])
@pytest.mark.parametrize("trained", [False, True])
def test_measuring_instance_discrimination_changes_no_bit_of_losses_and_gradients(entropy_temperature, trained):
    results = []
    for own in (None, torch.arange(4)):
        embedding, bank = rows(4, 6).requires_grad_(), rows(50, 6, seed=1).requires_grad_(trained)
        settings = {"temperature": 0.2, "entropy_temperature": entropy_temperature, "chunk": 7}
        softmax = instance_softmax(embedding, bank, **settings, own=own)
        (softmax.log_normalizer.sum() + 3 * softmax.negative_entropy.sum()).backward()
        results.append([*softmax[:3], embedding.grad, *([bank.grad] if trained else [])])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("changes", [{}, {"negatives": 20}], ids=["whole bank", "sampled bank"])
def test_instance_discrimination_is_measured_on_the_images_of_the_batch(changes):
    model, one = build(**changes), batch()
    measure = lambda: model(one, harness.START).measures["instance/top1"].item()  # noqa: E731
    assert measure() < 50
    model.bank.copy_(-model(one, harness.START).embedding[0])
    model.bank[one.indices] = model(one, harness.START).embedding
    assert measure() == 100


@pytest.mark.parametrize("size", [1e-3, 1e4])
def test_logits_of_any_size_stay_finite(size):
    embedding, bank = (rows(4, 6) * size).requires_grad_(), rows(50, 6, seed=1)
    loss = instance_loss_over(embedding, bank, torch.arange(4), temperature=1.0, chunk=7)
    divergence = sqrt_kl_over(embedding, bank, temperature=1.0, chunk=7)
    (loss + divergence).backward()
    assert torch.isfinite(torch.stack([loss, divergence, embedding.grad.sum()])).all()
    assert torch.allclose(loss, F.cross_entropy(embedding @ bank.T, torch.arange(4)))


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest new tensor, not counting views of existing ones."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            old = [argument for argument in args if isinstance(argument, torch.Tensor)]
            if all(result.untyped_storage().data_ptr() != one.untyped_storage().data_ptr() for one in old):
                self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("sqrtkl_temperature", [0.2, 1.0])
def test_nothing_larger_than_batch_times_chunk_is_ever_made(sqrtkl_temperature):
    embedding, bank = rows(8, 4).requires_grad_(), rows(4096, 4, seed=1)
    with Largest() as largest:
        losses = streamed(embedding, bank, torch.arange(8), 0.2, sqrtkl_temperature, 64)
        torch.stack(losses).sum().backward()
    assert largest.elements == 3 * 8 * 64  # three buffers


# SqrtKL (docs/sources.md#worked-sqrtkl)


def test_sqrt_kl_has_the_value_and_gradient_of_the_papers_example():
    logits = torch.tensor([0.91, *[0.01] * 9], dtype=torch.float64).log()[:, None].requires_grad_()
    loss = sqrt_kl_over(torch.ones(1, 1, dtype=torch.float64), logits, temperature=1.0, chunk=3)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert abs(loss.item() - 0.3671687) < 1e-7
    assert np.allclose(gradient[:, 0], [0.1847, *[-0.0205] * 9], atol=1e-4)  # attached: -0.0130, +0.0014


@pytest.mark.parametrize("terms", [("l1",), ("l2",), ("l1", "l2")])
def test_sqrt_kl_is_the_sum_of_its_terms_without_a_gradient_through_the_square_root(terms):
    embedding, bank = rows(3, 6).requires_grad_(), rows(40, 6, seed=1)
    log_p = F.log_softmax(embedding @ bank.T / 0.3, dim=1)
    log_u = F.log_softmax(embedding.detach() @ bank.T / 0.6, dim=1)
    l1, l2 = (log_p.exp() * log_p).sum(dim=1), -(log_p.exp() * log_u).sum(dim=1)
    expected = torch.stack([{"l1": l1, "l2": l2}[term] for term in terms]).sum(dim=0).mean()
    found = sqrt_kl_over(embedding, bank, temperature=0.3, terms=terms, chunk=9)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    gradients = [torch.autograd.grad(loss, [embedding]) for loss in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=1e-12)


# The update of the bank (eq. 5 and 6)


def test_sqrt_kl_of_equal_probabilities_is_0_and_the_root_never_sums_to_more_than_that_of_n():
    assert abs(sqrt_kl_over(rows(3, 4), torch.zeros(9, 4, dtype=torch.float64), temperature=0.1).item()) < 1e-12
    for seed in range(5):
        p = F.softmax(5 * rows(1, 30, seed=seed), dim=1)
        assert 1 <= p.sqrt().sum() <= math.sqrt(30)
        assert sqrt_kl_over(rows(3, 6, seed=seed), rows(30, 6, seed=9), temperature=0.1) > 0


def test_gradient_update_is_the_negative_gradient_of_the_batchs_rows():
    # docs/sources.md#worked-bank
    embedding, bank, own = rows(8, 16), rows(50, 16, seed=1).requires_grad_(), torch.arange(8) * 6
    logits = embedding @ bank.T / 0.2
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, own, reduction="sum"), bank, retain_graph=True)
    probability = F.softmax(logits, dim=1)[:, own].detach()
    found = gradient_update(embedding, probability, torch.eye(8))
    torch.testing.assert_close(found, -0.2 * gradient[own], atol=1e-12, rtol=0)


def test_gradient_update_under_cutmix_is_the_negative_gradient_too():
    embedding, bank, own = rows(4, 16), rows(50, 16, seed=1).requires_grad_(), torch.tensor([5, 9, 2, 30])
    mixed = Mixed(torch.empty(0), torch.tensor([1, 0, 3, 2]), 0.7)
    (gradient,) = torch.autograd.grad(4 * instance_loss_over(embedding, bank, own, temperature=0.2, mixed=mixed), bank)
    probability = F.softmax(embedding @ bank.detach().T / 0.2, dim=1)[:, own]
    label = 0.7 * torch.eye(4, dtype=torch.float64) + 0.3 * torch.eye(4, dtype=torch.float64)[mixed.partner]
    found = gradient_update(embedding, probability, label)
    torch.testing.assert_close(found, -0.2 * gradient[own], atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_batchs_rows_move_after_the_step_and_come_out_with_unit_length(variant):
    model, one = build(**VARIANTS[variant]), batch()
    before = model.bank.clone()
    losses = model(one, harness.START)
    assert torch.equal(model.bank, before)
    harness.remember(model, losses)
    others = [image for image in range(harness.NUM_IMAGES) if image not in one.indices]
    assert torch.equal(model.bank[others], before[others])
    assert not torch.isclose(model.bank[one.indices], before[one.indices]).all(dim=1).any()
    assert torch.allclose(model.bank[one.indices].norm(dim=1), torch.ones(harness.BATCH))


def test_a_moving_average_moves_by_one_minus_the_momentum():
    model, one = build(bank_momentum=0.7), batch()
    losses = model(one, harness.START)
    expected = F.normalize(0.7 * model.bank[one.indices] + 0.3 * losses.embedding, dim=1)
    harness.remember(model, losses)
    assert torch.allclose(model.bank[one.indices], expected)


@pytest.mark.parametrize("negatives", [None, 20])
def test_the_methods_gradient_update_uses_the_probabilities_of_its_loss(negatives):
    model, one = build(update="gradient", negatives=negatives), batch()
    bank, own = model.bank.clone(), one.indices
    candidates = torch.arange(harness.NUM_IMAGES)
    if negatives:
        candidates = torch.cat([own, model._sample(own, np.random.default_rng([0, 0, 0]))])
    losses = model(one, harness.START)
    logits = losses.embedding @ bank.T / 0.1
    normalizer = logits[:, candidates].logsumexp(dim=1, keepdim=True)
    expected = gradient_update(losses.embedding, (logits[:, own] - normalizer).exp(), torch.eye(len(own)))
    harness.remember(model, losses)
    assert torch.allclose(model.bank[own], F.normalize(0.5 * bank[own] + 0.5 * expected, dim=1), atol=1e-6)


def test_each_part_of_an_accumulated_step_moves_its_own_rows():
    model = build()
    parts = [batch(images=4, seed=seed) for seed in (0, 1)]
    before = model.bank.clone()
    harness.remember(model, *[model(part, harness.START) for part in parts])
    moved = set((model.bank != before).any(dim=1).nonzero()[:, 0].tolist())
    assert moved == {*parts[0].indices.tolist(), *parts[1].indices.tolist()}


# The method


@pytest.mark.parametrize("negatives", [None, harness.NUM_IMAGES - harness.BATCH, harness.NUM_IMAGES])
def test_the_loss_is_the_cross_entropy_over_all_rows_as_they_were(negatives):
    # A sample of all other images gives the full softmax.
    model, one = build(negatives=negatives), batch()
    losses = model(one, harness.START)
    expected = F.cross_entropy(losses.embedding @ model.bank.T / 0.1, one.indices)
    assert torch.allclose(losses.total, expected)


def test_without_negatives_the_batch_is_all_there_is():
    model, one = build(negatives=0), batch()
    losses = model(one, harness.START)
    expected = F.cross_entropy(losses.embedding @ model.bank[one.indices].T / 0.1, torch.arange(harness.BATCH))
    assert torch.allclose(losses.total, expected)


def test_sampled_rows_are_never_the_batchs_and_all_others_are_equally_likely():
    model = build(negatives=20)
    indices = batch().indices
    counts = torch.zeros(harness.NUM_IMAGES)
    for seed in range(600):
        sample = model._sample(indices, np.random.default_rng(seed))
        assert len(sample.unique()) == 20
        counts[sample] += 1
    assert counts[indices].sum() == 0
    others = torch.ones(harness.NUM_IMAGES, dtype=torch.bool)
    others[indices] = False
    expected = 600 * 20 / (harness.NUM_IMAGES - harness.BATCH)
    assert ((counts[others] - expected).abs() < 5 * math.sqrt(expected)).all()


def test_samples_differ_from_step_to_step_and_part_to_part_and_come_again_after_a_restart():
    def losses():
        model, one = build(negatives=5).eval(), batch()
        positions = [Progress(0, 9), Progress(0, 9, part=1), Progress(1, 9)]
        return torch.stack([model(one, progress).total for progress in positions])

    first = losses()
    assert len(first.unique()) == 3
    assert torch.equal(first, losses())


def test_parts_add_up_to_the_total():
    model = build(sqrtkl_weight=3.0, proximal_weight=2.0)
    one = batch()
    own = model.bank[one.indices].clone()
    losses = model(one, harness.START)
    assert torch.allclose(losses.parts["proximal"], (losses.embedding - own).square().sum(dim=1).mean())
    assert torch.allclose(losses.parts["sqrt_kl"], sqrt_kl_over(losses.embedding, model.bank, temperature=1.0))
    instance, divergence, proximal = (losses.parts[name] for name in ("instance", "sqrt_kl", "proximal"))
    assert torch.allclose(losses.total, instance + 3 * divergence + 2 * proximal)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.3},
        {"sqrtkl_temperature": 0.3},
        {"sqrtkl_temperature": None},
        {"sqrtkl_terms": ("l1",)},
        {"sqrtkl_weight": 3.0},
        {"proximal_weight": 1.0},
        {"cutmix": 0.5},
        {"negatives": 5},
        {"head": "mlp"},
    ],
    ids=str,
)
def test_every_switch_reaches_the_loss(changes):
    default, changed = build(sqrtkl_weight=2.0), build(**{"sqrtkl_weight": 2.0, **changes})
    assert not torch.isclose(default(batch(), harness.START).total, changed(batch(), harness.START).total)


def test_no_temperature_of_its_own_means_the_cross_entropys():
    losses = build(sqrtkl_weight=1.0, sqrtkl_temperature=None)(batch(), harness.START)
    same = build(sqrtkl_weight=1.0, sqrtkl_temperature=0.1)(batch(), harness.START)
    assert torch.equal(losses.total, same.total)


def test_the_bank_starts_at_about_unit_length():
    model = harness.make(NPID, small(embedding_dim=128), num_images=500)
    assert abs(model.bank.square().sum(dim=1).mean().item() - 1) < 0.02
    assert model.bank.abs().max() <= math.sqrt(3 / 128)


def test_the_mlp_is_the_codes_three_layers_with_biases_and_two_batch_norms():
    layers = build(head="mlp").projector
    assert [type(layer).__name__ for layer in layers] == [*["Linear", "BatchNorm1d", "ReLU"] * 2, "Linear"]
    assert all(layer.bias is not None for layer in layers if isinstance(layer, torch.nn.Linear))


def test_losses_are_computed_in_full_precision_under_autocast():
    model, one = build(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(one, harness.START)
    assert torch.equal(losses.total, instance_loss_over(losses.embedding, model.bank, one.indices, temperature=0.1))


# CutMix


def test_cutmix_exchanges_one_box_and_says_its_exact_share():
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 12, 10).contiguous()
    partners = [1, 0, 3, 2, 4]
    for seed in range(50):
        mixed = cutmix(images, alpha=0.5, generator=np.random.default_rng(seed))
        assert mixed.partner.tolist() == partners
        own = (mixed.images == images).float().mean(dim=(1, 2, 3))
        assert torch.allclose(own[:4], torch.full((4,), mixed.share))
        assert 0.45 < mixed.share <= 1
        assert set(mixed.images.unique().tolist()) <= set(range(5))


def test_cutmix_off_is_the_identity():
    images = torch.randn(3, 3, 4, 4)
    mixed = cutmix(images, alpha=None, generator=np.random.default_rng(0))
    assert mixed.images is images
    assert mixed.share == 1


def test_the_loss_of_mixed_images_is_shared_between_both_labels():
    embedding, bank, target = rows(4, 6), rows(50, 6, seed=1), torch.tensor([3, 0, 49, 7])
    mixed = Mixed(torch.empty(0), torch.tensor([1, 0, 3, 2]), 0.7)
    expected = [
        instance_loss_over(embedding, bank, label, temperature=0.2) for label in (target, target[mixed.partner])
    ]
    found = instance_loss_over(embedding, bank, target, temperature=0.2, mixed=mixed)
    assert torch.allclose(found, 0.7 * expected[0] + 0.3 * expected[1])


def test_a_mixed_image_moves_the_row_of_its_first_label():
    model, one = build(cutmix=0.5, bank_momentum=0.0), batch()
    losses = model(one, harness.START)
    harness.remember(model, losses)
    assert torch.allclose(model.bank[one.indices], losses.embedding, atol=1e-6)


# Calibration


def open_loader(demo):
    views = NPID.views(small(augmentation={"policy": "none"}, area=(1.0, 1.0)), 16)
    dataset = Dataset(name="demo", subset=Subset(images=100, seed=1))
    return Loader(Manifest.load(demo), dataset, views, batch_size=16, seed=5)


def test_calibration_fills_every_row_though_epochs_drop_their_last_batch_and_keeps_the_running_statistics(demo):
    model = harness.make(NPID, small(calibrate=True, head="mlp"), num_images=100)
    model.bank.zero_()
    before = {name: value.clone() for name, value in model.state_dict().items() if name != "bank"}
    with open_loader(demo) as loader:
        assert loader.steps_per_epoch * loader.batch_size < 100
        model.prepare(loader, torch.device("cpu"))
    assert torch.allclose(model.bank.norm(dim=1), torch.ones(100))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name != "bank")
    assert model.training


def test_rows_belong_to_their_images_and_training_then_sees_the_batches_it_would_have_seen(demo):
    config = small(calibrate=True, calibration_mode="eval")
    model = harness.make(NPID, config, num_images=100)
    with open_loader(demo) as loader, open_loader(demo) as untouched:
        training = resolve(
            {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}, "method": {"name": "npid"}}
        ).training.model_copy(update={"precision": "fp32", "epochs": 200})
        trainer = pretrain.Trainer(model, loader, training, device=torch.device("cpu"))
        pretrain._prepare(trainer)
        first, expected = loader.next(), untouched.next()
    assert torch.equal(first.indices, expected.indices)
    assert torch.equal(first.views["student"][0], expected.views["student"][0])
    embedding = model.eval()._embed(first.views["student"][0])
    turned = model._embed(first.views["student"][0].flip(3))
    alike = torch.maximum((embedding * model.bank[first.indices]).sum(1), (turned * model.bank[first.indices]).sum(1))
    assert torch.allclose(alike, torch.ones(16), atol=1e-4)


def test_batch_statistics_spread_the_bank_and_running_ones_do_not_always():
    banks = []
    for mode in ("train", "eval"):
        config = small(head="mlp", calibrate=True, calibration_mode=mode)
        model = harness.make(NPID, config)
        model.prepare(harness.Noise(NPID.views(config, harness.PIXELS), harness.BATCH), torch.device("cpu"))
        banks.append(model.bank)
    cosine = [(bank.sum(dim=0).square().sum() / len(bank) ** 2).item() for bank in banks]
    assert cosine[0] < cosine[1]


def test_without_calibration_the_data_are_not_touched():
    model = build()
    before = model.bank.clone()
    model.prepare(None, torch.device("cpu"))
    assert torch.equal(model.bank, before)


# Switches that no preset combines, and presets


def test_the_gradient_update_of_sampled_mixed_images_resumes_and_runs_in_two_processes(tmp_path):
    config = small(**VARIANTS["mixed gradient"])
    harness.resume_is_exact(NPID, config, optimizer="lars")
    harness.two_processes_equal_one(NPID, config, folder=tmp_path)


def test_a_second_view_is_refused():
    one = batch()
    two = Batch({"student": one.views["student"] * 2}, one.labels, one.indices)
    with pytest.raises(ValueError, match="expected 1"):
        build()(two, harness.START)
