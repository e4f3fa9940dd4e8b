"""Pairs of images: each image once per epoch, its neighbour from its bag, and exact resume."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ssl_core.config import Dataset, Subset
from ssl_core.data import pipeline
from ssl_core.data.bag_loader import BagLoader
from ssl_core.data.loader import Batch, Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import POLICIES, View, Views

IMAGES, BAG = 101, 3
PLAIN = View(size=8, crop="center")
PAIRS: Views = {"query": PLAIN, "neighbour_query": PLAIN}
AUGMENTED: Views = {group: View(size=8, augmentation=POLICIES["contrastive"]) for group in ("query", "neighbour_query")}


def write_bags(folder: Path, images: int = IMAGES) -> tuple[Path, np.ndarray]:
    """Write bags of images at odd distances."""
    table = ((np.arange(images)[:, None] + np.array([1, 5, 17])) % images).astype(np.int32)
    np.save(folder / "bags.npy", table)
    return folder / "bags.npy", table


def make(manifest: Manifest, bags: Path, views: Views = PAIRS, subset: Subset | None = None, **options: Any) -> Loader:
    options = {"batch_size": 10, "seed": 0, **options}
    return BagLoader(manifest, Dataset(name="tiny", subset=subset), views, bags=bags, **options)


def pictures(manifest: Manifest, subset: Subset | None = None) -> Tensor:
    """Return the center crop of each image, read by the plain loader."""
    dataset = Dataset(name="tiny", subset=subset)
    with Loader(manifest, dataset, {"query": PLAIN}, batch_size=IMAGES, seed=0, shuffle=False) as loader:
        batch = loader.next()
    return batch.views["query"][0][batch.indices.argsort()]


def numbers_of(views: Tensor, known: Tensor) -> list[int]:
    """Recognise images by their pixels."""
    distances = (views[:, None] - known[None]).abs().amax(dim=(2, 3, 4))
    assert distances.amin(dim=1).max() == 0
    return distances.argmin(dim=1).tolist()


def equal(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    for one, other in zip(first, second, strict=True):
        pairs = [(one.labels, other.labels), (one.indices, other.indices)]
        for group in one.views:
            pairs += zip(one.views[group], other.views[group], strict=True)
        if not all(torch.equal(*pair) for pair in pairs):
            return False
    return True


@pytest.mark.parametrize("subset", [None, Subset(images=60)])
def test_the_second_image_is_drawn_from_the_bag_of_the_first(
    tiny: Manifest, tmp_path: Path, subset: Subset | None
) -> None:
    images = IMAGES if subset is None else subset.images
    bags, table = write_bags(tmp_path, images)
    known = pictures(tiny, subset)
    drawn: dict[int, set[int]] = {}
    with make(tiny, bags, subset=subset) as loader:
        for _ in range(12):
            for batch in loader.epoch():
                numbers = batch.indices.tolist()
                assert numbers_of(batch.views["query"][0], known) == numbers
                for number, other in zip(numbers, numbers_of(batch.views["neighbour_query"][0], known), strict=True):
                    assert other in table[number]
                    drawn.setdefault(number, set()).add(other)
    assert len(drawn) == images
    assert sum(len(others) == BAG for others in drawn.values()) > 0.8 * images  # 0.98 expected


def test_labels_are_those_of_the_first_image(tiny: Manifest, tmp_path: Path) -> None:
    with make(tiny, write_bags(tmp_path)[0]) as loader:
        batch = loader.next()
    assert batch.labels.tolist() == [index % 7 for index in batch.indices.tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_gives_ranks_different_images_in_a_new_order(tiny: Manifest, tmp_path: Path, world_size: int) -> None:
    bags, _ = write_bags(tmp_path)
    ranks = [make(tiny, bags, rank=rank, world_size=world_size, batch_size=7) for rank in range(world_size)]
    steps = IMAGES // world_size // 7
    orders = []
    for _ in range(3):
        seen = [batch.indices.tolist() for loader in ranks for batch in loader.epoch()]
        together = [index for batch in seen for index in batch]
        assert len(together) == len(set(together)) == steps * world_size * 7
        orders.append(together)
    assert orders[0] != orders[1] != orders[2]


def test_a_restored_loader_continues_exactly_within_and_after_an_epoch(tiny: Manifest, tmp_path: Path) -> None:
    bags, _ = write_bags(tmp_path)
    with make(tiny, bags, AUGMENTED) as whole:
        batches = [whole.next() for _ in range(24)]
    for cut in (4, 13):
        with make(tiny, bags, AUGMENTED) as first:
            for _ in range(cut):
                first.next()
            state = first.state()
        with make(tiny, bags, AUGMENTED, threads=2) as second:
            second.restore(state)
            assert equal([second.next() for _ in range(24 - cut)], batches[cut:])


def test_the_same_seed_gives_the_same_pairs_and_another_seed_others(tiny: Manifest, tmp_path: Path) -> None:
    bags, _ = write_bags(tmp_path)
    runs = []
    for seed in (0, 0, 1):
        with make(tiny, bags, AUGMENTED, seed=seed) as loader:
            runs.append([loader.next() for _ in range(3)])
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_a_state_does_not_fit_other_bags(tiny: Manifest, tmp_path: Path) -> None:
    bags, table = write_bags(tmp_path)
    state = make(tiny, bags).state()
    np.save(bags, table[:, ::-1])
    with pytest.raises(ValueError, match="the loader's saved state does not fit: the shards or the subset changed"):
        make(tiny, bags).restore(state)


def test_bags_of_other_data_are_refused(tiny: Manifest, tmp_path: Path) -> None:
    bags, _ = write_bags(tmp_path, IMAGES - 1)
    with pytest.raises(ValueError, match=r"bags\.npy has the bags of 100 images, expected 101: remove it"):
        make(tiny, bags)


def test_the_graph_for_gpus_decodes_both_images_there(tiny: Manifest, tmp_path: Path) -> None:
    loader: Any = make(tiny, write_bags(tmp_path)[0], AUGMENTED, device="cuda")
    options: dict[str, Any] = {"batch_size": 10, "num_threads": 1, "device_id": None, "seed": 0}
    graph = pipeline.pair_graph(loader._plan, loader._read, loader._neighbours, **options).serialize()
    assert graph.count(b"mixed") == 2 * pipeline.serialize(loader._plan, batch_size=10).count(b"mixed") > 0
