"""Draw what the networks would see of an experiment, without training."""

from collections.abc import Sequence
from pathlib import Path

from ssl_core.data.loader import Loader
from ssl_core.data.picture import draw_views
from ssl_core.explain import find, shard_command
from ssl_core.layers import load

IMAGES = 8


def draw(name: str, overlays: Sequence[Path], picture: Path, *, threads: int) -> str:
    """Write the picture that pre-training would write as views.png; return what to tell of it.

    Raises `ValueError`, with the command that mends it, if the data set is not sharded.
    """
    subject = find(load(overlays).experiment(name))
    resolved, manifest, views = subject.resolved, subject.manifest, subject.views
    if manifest is None:
        dataset = subject.card.name
        raise ValueError(f"the data set '{dataset}' is not sharded yet: run `{shard_command(dataset)}` first")
    if picture.suffix.lower() != ".png":
        raise ValueError(f"{picture}: the picture is a PNG, so let its name end in .png")
    images = min(IMAGES, resolved.dataset.subset.images if resolved.dataset.subset else IMAGES)
    options = {"batch_size": images, "seed": resolved.training.seed, "shuffle": False, "threads": threads}
    with Loader(manifest, resolved.dataset, views, **options) as loader:
        draw_views(loader.next(), views, picture, mean=manifest.mean, std=manifest.std)
    return f"{picture}: a column an image of {manifest.dataset}/{resolved.dataset.split}, a row a view"
