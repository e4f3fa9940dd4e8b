"""The loader: exact epochs, ranks that share the data, exact resume, and mistakes that are named."""

import gc
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssl_core.config import Dataset, Subset
from ssl_core.data.loader import Batch, Loader, _data_error, draw_subset
from ssl_core.data.shards import Manifest, read_index, sample_index, write_names
from ssl_core.data.views import POLICIES, View, Views
from ssl_core.drawing.views import draw_first_views, draw_views
from tests.methods.harness import start_in_processes

from .conftest import encode

IMAGES = 101
SMALL: Views = {"view": View(size=8, augmentation=POLICIES["weak"])}
BOTH: Views = {
    "student": View(count=2, size=16, augmentation=POLICIES["byol_second"]),
    "teacher": View(size=8, augmentation=POLICIES["weak"], seen_by=("teacher",)),
}


def make(manifest: Manifest, views: Views = SMALL, subset: Subset | None = None, **options: Any) -> Loader:
    options = {"batch_size": 10, "seed": 0, **options}
    return Loader(manifest, Dataset(name="tiny", subset=subset), views, **options)


def indices(batches: list[Batch]) -> list[int]:
    return torch.cat([batch.indices for batch in batches]).tolist()


def equal(first: Batch, second: Batch) -> bool:
    pairs = [(first.labels, second.labels), (first.indices, second.indices)]
    for group in first.views:
        pairs += zip(first.views[group], second.views[group], strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def test_a_batch_has_the_promised_shapes(tiny: Manifest) -> None:
    batch = make(tiny, BOTH).next()
    assert [view.shape for view in batch.views["student"]] == [(10, 3, 16, 16)] * 2
    assert [view.shape for view in batch.views["teacher"]] == [(10, 3, 8, 8)]
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    for view in (*batch.views["student"], *batch.views["teacher"]):
        assert view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == [index % 7 for index in batch.indices.tolist()]


def test_batches_keep_their_pixels_while_more_are_read(tiny: Manifest) -> None:
    loader = make(tiny)
    first = loader.next()
    copy = first.views["view"][0].clone()
    for _ in range(12):
        loader.next()
    assert torch.equal(first.views["view"][0], copy)


@pytest.mark.parametrize("batch_size", [7, 101])
def test_an_unshuffled_epoch_has_every_image_once(tiny: Manifest, batch_size: int) -> None:
    with make(tiny, batch_size=batch_size, shuffle=False) as loader:
        epochs = [list(loader.epoch()) for _ in range(3)]
        assert loader.steps_per_epoch == -(-IMAGES // batch_size)
    for epoch in epochs:
        assert sorted(indices(epoch)) == list(range(IMAGES))
        assert len(epoch[-1].labels) == (IMAGES - 1) % batch_size + 1
    assert indices(epochs[0]) == indices(epochs[1])


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [7, 11])
def test_a_shuffled_epoch_gives_ranks_different_images(tiny: Manifest, world_size: int, batch_size: int) -> None:
    ranks = [make(tiny, rank=rank, world_size=world_size, batch_size=batch_size) for rank in range(world_size)]
    steps = IMAGES // world_size // batch_size
    assert [loader.steps_per_epoch for loader in ranks] == [steps] * world_size
    orders = []
    for _ in range(3):
        seen = [indices(list(loader.epoch())) for loader in ranks]
        together = [index for of_rank in seen for index in of_rank]
        assert len(together) == len(set(together)) == steps * world_size * batch_size
        orders.append(together)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("world_size", [2, 3])
def test_unshuffled_ranks_have_every_image_once_together(tiny: Manifest, world_size: int) -> None:
    for _ in range(2):
        ranks = [make(tiny, rank=rank, world_size=world_size, shuffle=False) for rank in range(world_size)]
        assert sorted(indices([batch for loader in ranks for batch in loader.epoch()])) == list(range(IMAGES))


def test_shuffling_mixes_all_shards(tiny: Manifest) -> None:
    first = [indices([make(tiny, seed=seed, batch_size=IMAGES).next()]) for seed in (0, 1)]
    in_order = indices([make(tiny, batch_size=IMAGES, shuffle=False).next()])
    for order in first:
        places = [in_order.index(index) for index in order]
        assert abs(np.corrcoef(places, range(IMAGES))[0, 1]) < 0.35
    assert first[0] != first[1]


def test_an_epoch_that_was_left_does_not_shorten_the_next(tiny: Manifest) -> None:
    loader = make(tiny, shuffle=False)
    for _ in loader.epoch():
        break
    assert sorted(indices(list(loader.epoch()))) == list(range(IMAGES))


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(tiny: Manifest) -> None:
    first, again, other = make(tiny, BOTH), make(tiny, BOTH, threads=2), make(tiny, BOTH, seed=1)
    for _ in range(3):
        batch = first.next()
        assert equal(batch, again.next())
        assert not equal(batch, other.next())


def test_ranks_and_epochs_see_different_augmentations(
    tmp_path: Path, make_shards: Callable[..., Manifest], pictures: list[Any]
) -> None:
    same = make_shards(tmp_path, [encode(pictures[0])] * 20, [0] * 20)  # so that only the augmentation can differ

    def epochs(rank: int) -> list[Tensor]:
        with make(same, BOTH, rank=rank, world_size=2, shuffle=False) as loader:
            return [next(iter(loader.epoch())).views["student"][0] for _ in range(2)]

    first, second, again = epochs(0), epochs(1), epochs(0)
    assert (first[0] - first[1]).abs().mean() > 0.1
    assert (first[0] - second[0]).abs().mean() > 0.1
    assert torch.equal(first[1], again[1])


def test_a_subset_is_drawn_by_seed_and_counted_from_zero(tiny: Manifest) -> None:
    subset = Subset(images=30, seed=4)
    with make(tiny, subset=subset, shuffle=False, batch_size=8) as loader:
        batches = list(loader.epoch())
        assert loader.num_images == 30
    chosen = sorted(np.random.default_rng(4).permutation(IMAGES)[:30].tolist())
    assert sorted(indices(batches)) == list(range(30))
    for batch in batches:  # position p in the subset is the image chosen[p], whose label is chosen[p] modulo 7
        assert batch.labels.tolist() == [chosen[position] % 7 for position in batch.indices.tolist()]


def test_a_subsets_index_files_go_away(tiny: Manifest) -> None:
    with make(tiny, subset=Subset(images=30)) as loader:
        loader.next()
        folder = Path(loader._plan.indices[0]).parent
        assert folder.exists()
    assert not folder.exists()


def test_a_subset_of_one_image_leaves_shards_out(tiny: Manifest) -> None:
    loader = make(tiny, subset=Subset(images=1, seed=2), shuffle=False)
    (batch,) = loader.epoch()
    assert batch.labels.tolist() == [int(draw_subset(IMAGES, Subset(images=1, seed=2), "tiny")[0]) % 7]


def test_mean_and_standard_deviation_are_applied(tiny: Manifest, pictures: list[Any]) -> None:
    center: Views = {"view": View(size=32, crop="center", augmentation=POLICIES["none"])}
    own = make(tiny, center, shuffle=False).next()
    given = make(tiny, center, shuffle=False, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)).next()
    pixels = torch.stack([torch.from_numpy(np.array(pictures[index])) for index in own.indices.tolist()])
    pixels = pixels.permute(0, 3, 1, 2) / 255

    def normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    torch.testing.assert_close(own.views["view"][0].contiguous(), normalised((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)))
    torch.testing.assert_close(given.views["view"][0].contiguous(), normalised((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))


def test_unlabelled_images_have_label_minus_one(
    tmp_path: Path, make_shards: Callable[..., Manifest], pictures: list[Any]
) -> None:
    manifest = make_shards(tmp_path, [encode(pictures[0], "JPEG")] * 5, [-1] * 5)
    assert make(manifest, batch_size=5).next().labels.tolist() == [-1] * 5


def continue_in_process(rank: int, manifest: Path, folder: Path) -> None:
    saved = torch.load(folder / "state.pt", weights_only=True)
    views = {name: View.model_validate_json(text) for name, text in saved["views"].items()}
    loader = make(Manifest.load(manifest), views, subset=Subset(images=60), threads=2)
    loader.restore(saved["loader"])
    batches = [loader.next() for _ in range(9)]
    torch.save([(batch.views, batch.labels, batch.indices) for batch in batches], folder / "batches.pt")


def test_a_new_process_continues_bit_for_bit(tiny: Manifest, tmp_path: Path) -> None:
    views: Views = {**BOTH, "strong": View(size=16, augmentation=POLICIES["strong"])}
    loader = make(tiny, views, subset=Subset(images=60))
    for _ in range(8):  # into the second epoch
        loader.next()
    saved = {"loader": loader.state(), "views": {name: view.model_dump_json() for name, view in views.items()}}
    torch.save(saved, tmp_path / "state.pt")
    expected = [loader.next() for _ in range(9)]  # over the end of the epoch
    assert loader.steps_per_epoch == 6
    start_in_processes(continue_in_process, tiny.folder / "manifest.json", tmp_path, processes=1)
    found = [Batch(*values) for values in torch.load(tmp_path / "batches.pt", weights_only=True)]
    assert all(equal(one, two) for one, two in zip(expected, found, strict=True))


def private_kilobytes() -> int:
    gc.collect()  # writes to all objects that the process shares with the server it was forked from
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Pss_Anon"].split()[0])


def measure_growth(rank: int, manifests: list[Path], output: Path) -> None:
    loaders, before = [], 0
    for path in manifests:
        before = private_kilobytes()
        loaders.append(make(Manifest.load(path)))
        loaders[-1].next()
    output.write_text(str(private_kilobytes() - before))


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_an_image_in_the_shuffle_buffer_costs_little(tmp_path: Path, make_shards: Any) -> None:
    image, manifests = encode(Image.new("RGB", (8, 8))), []
    for images in (10, 5000):  # the first loader's memory does not depend on the number of images
        manifest = make_shards(tmp_path / str(images), [image] * images, [0] * images, per_shard=images)
        manifests.append(manifest.folder / "manifest.json")
    start_in_processes(measure_growth, manifests, tmp_path / "growth.txt", processes=1)
    assert int((tmp_path / "growth.txt").read_text()) < 3 * 5000  # some 2 an image; with DALI's own default 6


def test_a_state_from_before_the_first_batch_and_one_restored_twice_are_exact(tiny: Manifest) -> None:
    fresh = make(tiny)
    start = fresh.state()
    expected = [fresh.next() for _ in range(2)]
    other = make(tiny)
    other.next()
    other.restore(start)
    assert equal(other.next(), expected[0])
    middle = other.state()
    restored = make(tiny)
    restored.restore(middle)
    restored.restore(restored.state())  # nothing was read in between
    assert equal(restored.next(), expected[1])
    assert restored.step == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9}, "batch_size was 10, is 9"),
        ({"seed": 5}, "seed was 0, is 5"),
        ({"rank": 1, "world_size": 2}, "rank was 0, is 1; world_size was 1, is 2"),
        ({"views": {"view": View(size=8, augmentation=POLICIES["none"])}}, "the views changed"),
        ({"subset": Subset(images=50)}, "the shards or the subset changed"),
        ({"mean": (0.0, 0.0, 0.0)}, "the graph or DALI changed"),
    ],
)
def test_the_state_of_another_loader_is_refused(tiny: Manifest, change: dict[str, Any], message: str) -> None:
    loader = make(tiny)
    loader.next()
    with pytest.raises(ValueError, match=message):
        make(tiny, **change).restore(loader.state())


def test_shards_may_move_between_save_and_restore(tiny: Manifest, tmp_path: Path) -> None:
    loader = make(tiny)
    loader.next()
    state = pickle.loads(pickle.dumps(loader.state()))
    shutil.copytree(tiny.folder, tmp_path / "moved")
    moved = make(Manifest.load(tmp_path / "moved" / "manifest.json"))
    moved.restore(state)
    assert equal(moved.next(), loader.next())


def test_a_batch_larger_than_the_data_is_refused(tiny: Manifest) -> None:
    with pytest.raises(ValueError, match=r"a batch of 102 images .* is larger than tiny/train with 101"):
        make(tiny, batch_size=102)
    with pytest.raises(ValueError, match="batch_size of 50 or less"):
        make(tiny, batch_size=26, rank=1, world_size=2, subset=Subset(images=51))


def test_a_subset_larger_than_the_data_is_refused(tiny: Manifest) -> None:
    with pytest.raises(ValueError, match=r"subset\.images 102 is more than tiny/train has \(101\)"):
        make(tiny, subset=Subset(images=102))


def test_a_shard_with_a_damaged_image_is_named(tiny: Manifest, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder, tmp_path / "damaged")
    damaged = Manifest.load(tmp_path / "damaged" / "manifest.json")
    path = damaged.tars("train")[2]
    content = bytearray(path.read_bytes())
    content[2000:2100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-000002\.tar is not the file that was written"):
        make(damaged)


def test_a_sample_that_dali_names_is_named_and_other_errors_are_unchanged(tiny: Manifest) -> None:
    tar = tiny.tars("train")[1]
    member = read_index(tar)[3][3]
    message = (
        "Critical error in pipeline:\nError in CPU operator `nvidia.dali.fn.decoders.image` encountered:\n\n"
        f"Failed to decode sample #6 : {tar}:15872:{member}\n"
    )
    error = _data_error(RuntimeError(message), tiny.tars("train"))
    assert isinstance(error, ValueError)
    assert f"image {member} in {tar} cannot be read" in str(error)
    full = RuntimeError(f"{message}Can't allocate 129499136 bytes on device 0.")
    assert _data_error(full, tiny.tars("train")) is full
    bug = RuntimeError("Error in CPU operator `nvidia.dali.fn.rotate` encountered: wrong type")
    assert _data_error(bug, tiny.tars("train")) is bug


def test_an_image_of_older_shards_that_dali_cannot_read_is_named_as_in_the_source(
    tmp_path: Path, make_shards: Callable[..., Manifest], pictures: list[Any]
) -> None:
    whole = encode(pictures[0], "JPEG")
    odd = whole.replace(b"\xff\xdb", b"\0\xff\xdb", 1)
    manifest = make_shards(tmp_path, [whole] * 7 + [odd] + [whole] * 2, [0] * 10)
    (tar,) = manifest.tars("train")
    write_names(tar, [f"cat/{sample_index(fields)}.jpg" for fields in read_index(tar)])
    expected = (
        rf"^image cat/7\.jpg \(00000007\.jpg in {tar}\) cannot be read \(.*\): remove {tmp_path} and run again: "
        r"sharding re-encodes images that DALI does not read$"
    )
    with pytest.raises(ValueError, match=expected):
        make(manifest).next()


def test_views_are_drawn_as_a_picture(tiny: Manifest, tmp_path: Path) -> None:
    draw_views(make(tiny, BOTH).next(), BOTH, tmp_path / "views.png", mean=tiny.mean, std=tiny.std, images=4)
    draw_views(make(tiny, BOTH).next(), BOTH, tmp_path / "again.png", mean=tiny.mean, std=tiny.std, images=4)
    with Image.open(tmp_path / "views.png") as picture:
        assert min(picture.size) > 300
    assert (tmp_path / "views.png").read_bytes() == (tmp_path / "again.png").read_bytes()


def test_the_picture_of_the_first_views_reads_only_the_first_shards(
    tmp_path: Path, make_shards: Callable[..., Manifest], pictures: list[Any]
) -> None:
    images = [encode(picture) for picture in pictures[:20]]
    many = make_shards(tmp_path / "shards", images, [0] * 20, per_shard=5)
    loader = make(many, BOTH, batch_size=8, shuffle=False)
    draw_views(loader.next(), BOTH, tmp_path / "all.png", mean=many.mean, std=many.std)
    for tar in many.tars("train")[2:]:  # eight images are in the first two
        tar.unlink()
    draw_first_views(many, Dataset(name="tiny"), BOTH, tmp_path / "first.png", seed=0)
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "all.png").read_bytes()
