"""The stage `sample-views`: a picture of the views that each network of an experiment sees, before any training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssl_core.data.shards import Manifest
from ssl_core.drawing.views import draw_first_views
from ssl_core.experiments import needs
from ssl_core.methods.base import resolve, views_of


def splits(arguments: Mapping[str, Any]) -> list[str]:
    """Return the splits that the stage reads."""
    return [needs.training_split(arguments["spec"])]


def run(experiment: str, *, spec: dict[str, Any], manifest: Path, output: Path) -> None:
    """Draw the views of the first images of the experiment's data set as the PNG `output`.

    Raises `ValueError` for a wrong key in `spec`, the experiment's own section, and for missing shards.
    """
    resolved, data = resolve(spec), Manifest.load(manifest)
    views = views_of(resolved, data.image_size, avoid=data.avoid)
    draw_first_views(data, resolved.dataset, views, output, seed=resolved.training.seed)
    print(f"{experiment}: views -> {output}")
