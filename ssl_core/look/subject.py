"""An experiment with its data set, found without training or sharding anything."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ssl_core.config import Experiment
from ssl_core.data.card import Card, load_card
from ssl_core.data.remote_shards import find_local
from ssl_core.data.shards import Manifest, verify
from ssl_core.data.views import Views
from ssl_core.experiments import bundled
from ssl_core.methods import base


class Subject(NamedTuple):
    """The experiment that `explain` and `views` show."""

    resolved: Experiment
    card: Card
    manifest: Manifest | None  # None: not sharded yet
    shards: Manifest | None  # the same if its tars are on this machine
    views: Views


def find_subject(spec: Mapping[str, Any], address: str | None = None) -> Subject:
    """Resolve an experiment; load its card and, if there are shards, their verified manifest.

    Of shards at an `address` nothing is copied.
    """
    resolved = base.resolve(spec)
    card = load_card(bundled.card_path(resolved.dataset.name))
    if resolved.dataset.split not in card.splits:
        raise ValueError(f"{card.name} has no split {resolved.dataset.split!r}: it has {', '.join(card.splits)}")
    path = Path("shards", card.name, "manifest.json")
    manifest = Manifest.load(path) if path.exists() else None
    shards = manifest
    if manifest is not None and address is not None:
        local = find_local(path, [resolved.dataset.split])
        shards = Manifest.load(local) if local else None
    if shards is not None:
        verify(shards, resolved.dataset.split)
    return Subject(resolved, card, manifest, shards, base.views_of(resolved, card.image_size, avoid=card.avoid))


def shard_command(dataset: str) -> str:
    """Return the command that shards a data set."""
    return f"snakemake --cores all shards/{dataset}/manifest.json"
