"""SwAV: assignments, swapped predictions, prototypes, queues, and the loss over many crops."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ssl_core.config import parse
from ssl_core.methods.base import Progress
from ssl_core.methods.swav import Config, SwAV, sinkhorn, swapped_prediction
from tests.methods.harness import (
    START,
    batch,
    make,
    remember,
    resolved,
    resume_is_exact,
    start_in_processes,
    step,
    trainer,
    two_processes_equal_one,
)

SMALL = {"num_prototypes": 10, "projector_hidden": 12, "embedding_dim": 5, "queue_size": 32, "queue_start": 0.0}
LOCALS = {"num_locals": 3, "local_size": 6, "alpha": 0.4}


def config(**changes):
    return Config(**{**SMALL, **changes})


def views(**changes):
    return SwAV.views(config(**changes), 8)


def cosines(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(*shape[:-1], 16, generator=generator), dim=-1)
    return rows @ F.normalize(torch.randn(shape[-1], 16, generator=generator), dim=1).T


def sgd(model, rate=0.1):
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=0.1)


# Sinkhorn


def test_samples_sum_to_one_and_prototypes_approach_equal_use():
    # docs/sources.md#worked-sinkhorn
    scores = cosines(64, 8)
    codes = sinkhorn(scores, epsilon=0.05, iterations=3)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(64), atol=1e-6, rtol=0)
    assert ((codes.sum(dim=0) - 8).abs() < 4).all()
    exact = sinkhorn(scores, epsilon=0.05, iterations=300).sum(dim=0)
    torch.testing.assert_close(exact, torch.full((8,), 8.0), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("factor", "epsilon"), [(1, 0.05), (100, 0.05), (1, 0.001)])
def test_sinkhorn_stays_finite_where_half_precision_and_plain_exponentials_do_not(factor, epsilon):
    scores = (cosines(16, 6) * factor).half()
    assert (scores / 0.05).exp().isinf().any() or epsilon < 0.05 or scores.max() < 0.6
    codes = sinkhorn(scores, epsilon=epsilon, iterations=3)
    assert codes.dtype == torch.float32
    assert codes.isfinite().all()


def in_process(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}.rendezvous", rank=rank, world_size=2)
    own = cosines(16, 6)[8 * rank : 8 * rank + 8]
    torch.save(sinkhorn(own, epsilon=0.05, iterations=3), f"{path}.{rank}")
    dist.destroy_process_group()


def test_sinkhorn_over_two_processes_equals_one_on_everything(tmp_path):
    path = str(tmp_path / "codes")
    start_in_processes(in_process, path)
    both = torch.cat([torch.load(Path(f"{path}.{rank}")) for rank in (0, 1)])
    torch.testing.assert_close(both, sinkhorn(cosines(16, 6), epsilon=0.05, iterations=3), atol=1e-6, rtol=1e-5)


# The loss


def test_alpha_moves_weight_from_local_to_global_pairs():
    one = batch(views(**LOCALS))
    losses = make(SwAV, config(**LOCALS))(one, START)
    torch.testing.assert_close(losses.total.detach(), 0.4 * losses.parts["global"] + 0.6 * losses.parts["local"])


def test_no_gradient_reaches_the_codes():
    codes = cosines(2, 4, 6).softmax(dim=2).requires_grad_()
    scores = cosines(2, 4, 6).requires_grad_()
    swapped_prediction(scores, codes, temperature=0.1).sum().backward()
    assert codes.grad is None
    assert scores.grad is not None


# Prototypes and queues


def test_prototypes_stay_unit_rows():
    model, one = make(SwAV, config(freeze=0.0)), batch(views())
    start, optimizer = model.prototypes.detach().clone(), sgd(model, rate=10.0)
    for number in range(3):
        step(model, optimizer, one, Progress(number, 100))
        torch.testing.assert_close(model.prototypes.norm(dim=1), torch.ones(10))
    assert not torch.allclose(model.prototypes, start)


def test_prototypes_are_frozen_for_the_configured_share():
    model, one = make(SwAV, config(freeze=0.03)), batch(views())
    start, moved, optimizer = model.prototypes.detach().clone(), [], sgd(model)
    for number in range(5):
        step(model, optimizer, one, Progress(number, 100))
        moved.append(not torch.equal(model.prototypes, start))
    assert moved == [False, False, False, True, True]


def test_the_training_loop_calls_before_step():
    frozen = trainer(SwAV, config(freeze=1.0), weight_decay=0.1, gradient_clip=1.0)
    method: Any = frozen.method
    prototypes, weights = method.prototypes.clone(), method.backbone.layer.weight.clone()
    frozen.run(save=lambda: None, log=lambda row: None)
    assert torch.equal(method.prototypes, prototypes)
    assert not torch.equal(method.backbone.layer.weight, weights)


def test_the_queue_exists_from_construction_and_is_used_only_when_full():
    model = make(SwAV, config(queue_size=32, queue_start=0.02, freeze=1.0))  # 16 images a step: full after two steps
    assert model.state_dict()["queues.0.rows"].shape == (32, 5)
    used = []
    for number in range(6):
        one, progress = batch(views(), seed=number), Progress(number, 100)
        kept = [queue.rows.clone() for queue in model.queues]
        losses = model(one, progress)
        for queue in model.queues:
            queue.rows.copy_(F.normalize(torch.randn(32, 5), dim=1))
        used.append(not torch.equal(losses.total, model(one, progress).total))
        for queue, rows in zip(model.queues, kept):
            queue.rows.copy_(rows)
        remember(model, losses, progress=progress)
    assert used == [False, False, False, False, True, True]
    assert [int(queue.position) for queue in model.queues] == [4 * 16 % 32] * 2


def test_the_queues_hold_the_last_embeddings_of_their_own_view_and_the_current_prototypes_score_them():
    model = make(SwAV, config(queue_size=32))
    for number in range(2):
        losses = model(batch(views(), seed=number), Progress(number, 100))
        remember(model, losses, progress=Progress(number, 100))
    torch.testing.assert_close(model.queues[1].rows[16:], losses.memory["embeddings"][1])
    scores, progress = cosines(2, 16, 10), Progress(2, 100)
    expected = [
        sinkhorn(torch.cat([queue.rows @ model.prototypes.T, own]), epsilon=0.05, iterations=3)[32:]
        for queue, own in zip(model.queues, scores)
    ]
    torch.testing.assert_close(model._assign(scores, progress), torch.stack(expected))


def test_without_a_queue_there_is_none():
    model = make(SwAV, config(queue_size=0))
    step(model, sgd(model), batch(views()), START)
    assert not any("queue" in name for name in model.state_dict())


def test_accumulated_micro_batches_all_enter_the_queues():
    model = make(SwAV, config())
    remember(model, *[model(batch(views(), images=8, seed=seed), START) for seed in (0, 1)])
    assert int(model.queues[0].position) == 16


# Many crops


def test_equal_sizes_share_a_forward_and_the_head_sees_everything_at_once():
    model, one = make(SwAV, config(**LOCALS)), batch(views(**LOCALS), images=4)
    rows = []
    model.projector.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    model(one, START)
    assert model.backbone.seen == [(8, 3, 8, 8), (12, 3, 6, 6)]
    assert rows == [20]


@pytest.mark.parametrize(("preset", "size"), [("official", 96), ("sslight_baseline", 96), ("sslight", 128)])
def test_presets_have_the_papers_local_views(preset, size):
    assert SwAV.views(resolved("swav", preset=preset).method, 224)["local"].size == size
    assert parse(Config, {"num_prototypes": 50}, "method").queue_size == 3840


# Queues and frozen prototypes in the loop


def test_a_late_queue_and_frozen_prototypes_resume_and_run_in_two_processes(tmp_path):
    resume_is_exact(SwAV, config(freeze=0.2, queue_start=0.2))
    two_processes_equal_one(SwAV, config(queue_size=20, freeze=0.1, **LOCALS), folder=tmp_path)
