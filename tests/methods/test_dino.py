"""DINO: the loss, its centre and temperatures, the head, the teacher, and the loss over many crops."""

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath

from ssl_core.blocks.multicrop import balance
from ssl_core.config import parse
from ssl_core.data.loader import Loader
from ssl_core.methods.base import Progress, resolve
from ssl_core.methods.base import build as build_method
from ssl_core.methods.dino import DINO, Config, Head
from ssl_core.training.loop import Trainer
from ssl_core.training.memory import random_batch
from tests.methods.harness import (
    START,
    batch,
    make,
    remember,
    resolved,
    resume_is_exact,
    select,
    step,
    two_processes_equal_one,
)

SMALL = {"num_outputs": 10, "head_hidden": 12, "bottleneck_dim": 5, "teacher_momentum": 0.9}
LOCALS = {"num_locals": 3, "local_size": 6, "alpha": 0.4}


def config(**changes):
    return Config(**{**SMALL, **changes})


def views(**changes):
    return DINO.views(config(**changes), 8)


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The loss


@pytest.mark.parametrize(("num_locals", "terms", "share"), [(6, 14, 1 / 7), (10, 22, 1 / 11)])
def test_the_number_of_terms_and_the_alpha_of_the_plain_mean(num_locals, terms, share):
    # docs/sources.md#worked-dino
    pairs = logits(2, 2 + num_locals).abs()
    kept = [pairs[t, s] for t in range(2) for s in range(2 + num_locals) if t != s]
    assert len(kept) == terms
    plain, _ = balance(pairs, None)
    torch.testing.assert_close(plain, torch.stack(kept).mean())
    torch.testing.assert_close(balance(pairs, share)[0], plain)


def test_one_crop_only_is_a_clear_error():
    with pytest.raises(ValueError, match="compares different views of an image, found a single one"):
        balance(torch.ones(1, 1), None)
    one = batch(views())
    del one.views["global_second"]
    with pytest.raises(ValueError, match="compares different views of an image, found a single one"):
        make(DINO, config())(one, START)


def test_one_global_view_may_be_compared_with_local_ones():
    total, parts = balance(torch.tensor([[9.0, 1.0, 3.0]]), 0.4)
    assert total == 2
    assert set(parts) == {"local"}


def test_a_flatter_teacher_is_refused():
    with pytest.raises(ValueError, match=r"up to 0\.2, must be below student_temperature 0\.1"):
        parse(Config, {"teacher_temperature": 0.2}, "method")


def test_the_teachers_temperature_rises_linearly_and_stays():
    model = make(DINO, config(temperature_warmup=0.5))
    found = [model._teacher_temperature(Progress(step, 100)) for step in (0, 25, 50, 99)]
    np.testing.assert_allclose(found, [0.04, 0.055, 0.07, 0.07])
    assert make(DINO, config(temperature_warmup=0.0))._teacher_temperature(START) == 0.07


# Centre


def test_the_centre_is_in_the_checkpoint_and_moves_to_the_batch_mean_after_the_step():
    model, one = make(DINO, config(centre_momentum=0.75)), batch(views())
    assert model.state_dict()["centre"].tolist() == [0.0] * 10
    outputs = model.teacher(torch.cat([one.views["global_first"][0], one.views["global_second"][0]]))
    remember(model, model(one, START))
    torch.testing.assert_close(model.centre, 0.25 * outputs.mean(dim=0))


def test_micro_batches_give_one_centre_update_by_their_common_mean():
    model, one = make(DINO, config(centre_momentum=0.0, teacher_momentum=1.0)).eval(), batch(views())
    outputs = torch.cat([model.teacher(one.views[group][0]) for group in ("global_first", "global_second")])
    remember(model, *[model(select(one, rows), START) for rows in (slice(8), slice(8, 16))])
    torch.testing.assert_close(model.centre, outputs.mean(dim=0).detach())


# Head and teacher


def test_logits_are_cosines_with_unit_directions_whatever_their_length():
    head = Head(6, config()).eval()
    rows = logits(4, 6)
    before = head(rows)
    assert before.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.direction.mul_(3)
    torch.testing.assert_close(head(rows), before)


def test_the_last_layers_lengths_are_trained_only_without_norm_last_layer():
    model = make(DINO, config())
    assert not model.head.length.requires_grad
    free = make(DINO, config(norm_last_layer=False))
    free(batch(views()), START).total.backward()
    assert free.head.length.grad.abs().sum() > 0


def test_the_head_is_that_of_torchs_weight_norm():
    head = Head(6, config(norm_last_layer=False)).eval()
    with torch.no_grad():
        head.length.copy_(logits(10, 1).abs())
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 10, bias=False))
    names = {"parametrizations.weight.original0": head.length, "parametrizations.weight.original1": head.direction}
    layer.load_state_dict(names)
    rows = F.normalize(logits(4, 5), dim=1)
    torch.testing.assert_close(head.classify(rows), layer(rows))


def test_the_last_layer_is_frozen_for_the_configured_share():
    model, one = make(DINO, config(freeze=0.03)), batch(views())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    start, moved = model.head.direction.detach().clone(), []
    for number in range(5):
        step(model, optimizer, one, Progress(number, 100))
        moved.append(not torch.equal(model.head.direction, start))
    assert moved == [False, False, False, True, True]


# Many crops


def test_equal_sizes_share_a_forward_the_head_sees_everything_and_the_teacher_only_global_views():
    model, one = make(DINO, config(**LOCALS)), batch(views(**LOCALS), images=4)
    rows = []
    model.head.layers.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    model(one, START)
    assert model.backbone.seen == [(8, 3, 8, 8), (12, 3, 6, 6)]
    assert model.teacher[0].seen == [(8, 3, 8, 8)]
    assert rows == [20]


def test_views_have_the_papers_augmentations_and_networks():
    views = DINO.views(resolved("dino", preset="sslight").method, 224)
    assert {name: view.seen_by for name, view in views.items()} == {
        "global_first": ("student", "teacher"),
        "global_second": ("student", "teacher"),
        "local": ("student",),
    }
    assert [views[name].augmentation.blur for name in views] == [1.0, 0.1, 0.5]
    assert [views[name].augmentation.solarize for name in views] == [0.0, 0.2, 0.0]
    assert (views["local"].count, views["local"].size, views["local"].area) == (6, 128, (0.05, 0.3))
    assert DINO.views(resolved("dino", preset="official").method, 224)["local"].size == 96


def test_local_views_as_large_as_global_ones_are_refused():
    with pytest.raises(ValueError, match=r"local views of 32 pixels are no smaller than the images \(32\)"):
        DINO.views(config(num_locals=2, local_multiple=32), 32)


# Switches that no preset uses


def test_learned_lengths_and_a_frozen_layer_resume_and_run_in_two_processes(tmp_path):
    variant = config(freeze=0.1, norm_last_layer=False, **LOCALS)
    resume_is_exact(DINO, variant, optimizer="adamw", accumulation=2, learning_rate=1e-3)
    two_processes_equal_one(DINO, variant, folder=tmp_path)


# SSLight's vision transformers

VIT = {
    "dataset": {"name": "imagenet"},
    "backbone": {"name": "vit_tiny_32"},
    "method": {"name": "dino", "preset": "sslight_vit"},
    "training": {
        "batch_size": 4,
        "epochs": 2,
        "warmup_epochs": 1,
        "learning_rate_scaling": "none",
        "precision": "fp32",
    },
}


def test_the_preset_for_transformers_has_the_papers_values():
    resolved = resolve({**VIT, "training": {}})
    training, method = resolved.training, resolved.method
    assert (training.optimizer, training.learning_rate, training.minimum_learning_rate) == ("adamw", 5e-4, 1e-5)
    assert (training.weight_decay, training.final_weight_decay, training.gradient_clip) == (0.04, 0.4, None)
    assert (training.batch_size, training.epochs, training.warmup_epochs) == (1024, 200, 10)
    assert (method.num_outputs, method.head_batchnorm, method.norm_last_layer) == (65536, False, True)
    assert (method.teacher_momentum, method.temperature_warmup * training.epochs) == (0.996, 30)
    assert (method.area, method.num_locals, method.alpha, resolved.backbone.drop_path) == ((0.3, 1.0), 10, 0.4, 0.1)
    views = DINO.views(method, 224)
    assert (views["local"].size, views["local"].count, views["local"].area) == (128, 10, (0.05, 0.3))
    baseline = resolve({**VIT, "method": {"name": "dino", "preset": "sslight_vit_baseline"}}).method
    assert (baseline.area, baseline.local_area, baseline.alpha) == ((0.25, 1.0), (0.05, 0.25), 1 / 11)
    assert DINO.views(baseline, 224)["local"].size == 96


def test_the_preset_for_transformers_trains_two_steps_at_224_pixels(capsys):
    resolved = resolve({**VIT, "method": {**VIT["method"], "num_outputs": 64}})
    views = DINO.views(resolved.method, 224)
    method = build_method(resolved, 224, views, num_images=8)
    assert capsys.readouterr().err == ""
    loader = cast(Loader, SimpleNamespace(steps_per_epoch=1, num_images=4, next=lambda: random_batch(views, 4)))
    trainer = Trainer(method, loader, resolved.training, device=torch.device("cpu"))
    before = method.backbone.state_dict()["blocks.0.attn.qkv.weight"].clone()
    decays = []
    for _ in range(trainer.total_steps):
        trainer._one_step()
        trainer.step += 1
        decays.append([group["weight_decay"] for group in trainer.optimizer.param_groups])
    assert decays == [[0.04, 0.0], [pytest.approx(0.22), 0.0]]  # the start and the middle of the cosine to 0.4
    assert not torch.equal(method.backbone.state_dict()["blocks.0.attn.qkv.weight"], before)


def test_the_teacher_drops_no_path():
    resolved = resolve({**VIT, "method": {**VIT["method"], "num_outputs": 64}})
    method = build_method(resolved, 64, {}, num_images=8)
    student = [layer.drop_prob for layer in method.backbone.modules() if isinstance(layer, DropPath)]
    teacher = [layer.drop_prob for layer in method.get_submodule("teacher").modules() if isinstance(layer, DropPath)]
    assert student[-1] == pytest.approx(0.1)
    assert teacher == [0.0] * len(student)


@pytest.mark.parametrize(
    ("backbone", "preset", "advice"),
    [
        ("vit_tiny_32", "sslight", "use preset sslight_vit_baseline or sslight_vit"),
        ("resnet18", "sslight_vit", "use preset small or official or sslight_baseline or sslight"),
    ],
)
def test_a_preset_on_the_other_kind_of_network_warns(backbone, preset, advice, capsys):
    method = {"name": "dino", "preset": preset, "num_outputs": 64}
    resolved = resolve({**VIT, "backbone": {"name": backbone}, "method": method})
    build_method(resolved, 64, {}, num_images=8)
    assert advice in capsys.readouterr().err
