from collections import deque

import pytest
import torch

from ssl_core.blocks.queue import Queue


@pytest.mark.parametrize("size", [1, 4, 7, 10])
@pytest.mark.parametrize("batches", [[3, 3, 3, 3], [4, 1, 9], [25, 2], [10, 10]])
def test_holds_the_last_rows_whatever_the_sizes(size, batches):
    queue, reference, count = Queue(size, 2), deque(maxlen=size), 0
    for length in batches:
        keys = torch.arange(count, count + length).float().repeat(2, 1).T
        queue.enqueue(keys)
        reference.extend(keys[:, 0].tolist())
        count += length
    filled = [int(slot) for slot in range(size) if slot < count]
    assert sorted(queue.rows[filled, 0].tolist()) == sorted(reference)
    oldest = int(queue.position) if count >= size else 0
    ordered = torch.roll(queue.rows[:, 0], -oldest)[: len(reference)]
    assert ordered.tolist() == list(reference)


def test_starts_with_unit_rows_and_is_in_the_state_dict():
    queue = Queue(5, 3)
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(5))
    assert set(queue.state_dict()) == {"rows", "position"}
