"""Two gloo processes must compute what one computes on the concatenated batch (T7)."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from ssl_core.data.loader import Batch
from ssl_core.methods.base import Progress
from ssl_core.methods.ressl import Config, ReSSL
from ssl_core.networks.backbones import Network
from ssl_core.training import distributed

ROWS = 16  # of the whole batch


class Tiny(Network):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, images):
        return self.norm(self.layer(images)).relu().mean(dim=(2, 3))


def train(changes, steps=3):
    """Train some steps on this process's share of fixed batches; return losses, parameters, gradients and queue."""
    torch.manual_seed(0)
    config = Config(queue_size=24, projector_hidden=12, embedding_dim=5, warmup=0.6, **changes)
    method = ReSSL(config, Tiny(), num_images=100, batch_size=ROWS, seed=0)
    module = method
    if distributed.is_distributed():
        distributed.synchronise_batchnorm(method)
        module = nn.parallel.DistributedDataParallel(method, forward_sync_buffers=False)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    own = slice(
        distributed.rank() * ROWS // distributed.world_size(),
        (distributed.rank() + 1) * ROWS // distributed.world_size(),
    )
    losses = []
    for step in range(steps):
        views = {name: [torch.randn(ROWS, 3, 8, 8, generator=generator)[own]] for name in ("student", "teacher")}
        batch = Batch(views, torch.zeros(len(views["teacher"][0])), torch.arange(ROWS)[own])
        optimizer.zero_grad()
        loss = module(batch, Progress(step, 10)).total
        loss.backward()
        optimizer.step()
        method.after_step(Progress(step, 10))
        losses.append(distributed.gather(loss.detach()[None]).mean())
    gradients = {f"gradient of {name}": p.grad for name, p in method.named_parameters() if p.grad is not None}
    state = {name: value for name, value in method.state_dict().items() if "running" not in name or config.predictor}
    return {"losses": torch.stack(losses), **gradients, **{n: v.detach().clone() for n, v in state.items()}}


def in_process(rank, changes, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}.rendezvous", rank=rank, world_size=2)
    result = train(changes)
    if rank == 0:
        torch.save(result, path)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "changes", [{}, {"predictor": False, "batchnorm_splits": 2}], ids=["synchronised", "shuffled and split"]
)
def test_two_processes_equal_one_on_the_concatenated_batch(tmp_path, changes):
    spawn(in_process, (changes, tmp_path / "two.pt"), nprocs=2)
    two, one = torch.load(tmp_path / "two.pt"), train(changes)
    assert two.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_alone_everything_is_the_identity():
    rows = torch.randn(3, 2)
    assert distributed.gather(rows) is rows
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.agree(True, rows.device)


def test_unshuffle_undoes_shuffle_and_the_order_depends_on_seed_and_step_alone():
    images = torch.randn(7, 3, 2, 2)
    shuffled, order = distributed.shuffle(images, seed=1, step=5)
    assert torch.equal(distributed.unshuffle(shuffled.flatten(1), order), images.flatten(1))
    assert torch.equal(distributed.shuffle(images, seed=1, step=5)[1], order)
    assert not torch.equal(distributed.shuffle(images, seed=1, step=6)[1], order)
