"""Self-supervised pre-training of small networks. `load` and `embed` use a trained network from Python."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssl_core.inference.embedding import Embeddings, embed
    from ssl_core.inference.network import LoadedNetwork, load

__all__ = ["Embeddings", "LoadedNetwork", "embed", "load"]


def __getattr__(name: str) -> Any:
    """Import torch and DALI, which takes seconds, when one of these names is first used."""
    if name in ("Embeddings", "embed"):
        from ssl_core.inference import embedding

        return getattr(embedding, name)
    if name in ("LoadedNetwork", "load"):
        from ssl_core.inference import network

        return getattr(network, name)
    raise AttributeError(f"module 'ssl_core' has no attribute {name!r}")
