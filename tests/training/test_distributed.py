"""Two gloo processes must compute what one computes on the concatenated batch (T7)."""

import pytest
import torch

from ssl_core.blocks import distributed
from ssl_core.methods.ressl import Config, ReSSL
from tests.methods.harness import two_processes_equal_one


@pytest.mark.parametrize(
    ("changes", "ignore"),
    [({}, ()), ({"predictor": False, "batchnorm_splits": 2}, ("running",)), ({"crops": "two"}, ())],
    ids=["synchronised", "shuffled and split", "two crops"],
)
def test_two_processes_equal_one_on_the_concatenated_batch(tmp_path, changes, ignore):
    config = Config(queue_size=24, projector_hidden=12, embedding_dim=5, warmup=0.6, **changes)
    two_processes_equal_one(ReSSL, config, tmp_path, ignore=ignore)


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
