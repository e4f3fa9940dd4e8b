"""Draw the views of an experiment without training."""

from collections.abc import Sequence
from pathlib import Path

from ssl_core.drawing.views import draw_first_views
from ssl_core.experiments.overlays import load_configuration
from ssl_core.look.subject import find_subject, shard_command


def draw(name: str, overlays: Sequence[Path], picture: Path, *, threads: int) -> str:
    """Write the picture that pre-training writes as views.png; return one line about it.

    Raises `ValueError` with the command to run if the data set is not sharded.
    """
    layers = load_configuration(overlays)
    subject = find_subject(layers.experiment(name), layers.address)
    resolved, manifest, views = subject.resolved, subject.shards, subject.views
    if subject.manifest is None:
        dataset = subject.card.name
        raise ValueError(f"the data set '{dataset}' is not sharded yet: run `{shard_command(dataset)}` first")
    if manifest is None:
        command = f"snakemake --cores all results/{name}/views.png"
        raise ValueError(f"the shards of '{subject.card.name}' are at {layers.address}: `{command}` copies them")
    if picture.suffix.lower() != ".png":
        raise ValueError(f"{picture}: the picture is a PNG: give a name that ends in .png")
    draw_first_views(manifest, resolved.dataset, views, picture, seed=resolved.training.seed, threads=threads)
    return f"{picture}: one column per image of {manifest.dataset}/{resolved.dataset.split}, one row per view"
