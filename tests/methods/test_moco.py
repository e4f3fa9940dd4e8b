import math

import numpy as np
import torch
import torch.nn.functional as F

from ssl_core.methods.moco import info_nce


def test_matches_a_numpy_oracle_in_double_precision():
    rng = np.random.default_rng(0)
    query, key, queue = (unit(rng.normal(size=shape)) for shape in [(3, 5), (3, 5), (7, 5)])
    logits = np.concatenate([(query * key).sum(1, keepdims=True), query @ queue.T], axis=1) / 0.2
    expected = np.mean(np.log(np.exp(logits).sum(1)) - logits[:, 0])
    found = info_nce(*map(torch.from_numpy, (query, key, queue)), temperature=0.2)
    assert abs(found.item() - expected) < 1e-12


def test_orthogonal_negatives_and_a_perfect_positive_leave_almost_no_loss():
    rows = torch.eye(8)
    assert info_nce(rows[:4], rows[:4], rows[4:], temperature=0.05) < 1e-2


def test_own_key_in_the_queue_costs_ln_2():
    # What a method that enqueues before its loss would pay (T2).
    rows = torch.eye(8)
    assert abs(info_nce(rows[:1], rows[:1], rows[:1], temperature=0.05).item() - math.log(2)) < 1e-6


def test_random_unit_vectors_start_near_log_of_queue_size():
    # recipes section 7, fixture 5
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 128), dim=1) for n in (256, 256, 4096))
    assert abs(info_nce(query, key, queue, temperature=0.2).item() - 8.42) < 0.1


def test_permuting_the_batch_permutes_the_losses():
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 6), dim=1) for n in (4, 4, 9))
    each = torch.stack([info_nce(query[i : i + 1], key[i : i + 1], queue, temperature=0.1) for i in (2, 0, 3, 1)])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(each.mean(), info_nce(query[order], key[order], queue, temperature=0.1))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
