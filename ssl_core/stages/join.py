"""The stage `join`: train as a further node of a training that another node leads; it writes no files."""

from ssl_core.stages import pretrain


def run(*, threads: int) -> None:
    """Train the experiment that the first node sends."""
    pretrain.join(threads)
