"""Diagnostics of the embedding, and errors for runs that diverge or collapse."""

import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_core.data.loader import Loader

COLLAPSED = 0.02  # spread of almost equal embeddings; 1 is uniform on the sphere, about 0.8 an untrained network
LOOK_SECONDS, FREE_SHARE, WAITING = 10.0, 0.75, 0.05  # two threads of a free machine get 0.96 of two cores
NEIGHBOURS = 20
TEMPERATURE = 0.07


def spread(embedding: Tensor) -> Tensor:
    """Return the mean standard deviation per channel of the normalised rows (batch, dim), times sqrt(dim).

    1 is healthy, 0 collapsed (Chen & He, 2021, section 4.1).
    """
    rows = F.normalize(embedding.float(), dim=1)
    return rows.std(dim=0).mean() * math.sqrt(rows.shape[1])


def rankme(embedding: Tensor) -> Tensor:
    """Return exp(entropy) of the normalised singular values of `embedding` (batch, dim) (Garrido et al., 2023)."""
    values = torch.linalg.svdvals(embedding.float())
    share = values / values.sum().clamp_min(1e-12) + 1e-7
    return torch.exp(-(share * share.log()).sum())


class Alarm:
    """Raises an error with advice for a run that has diverged or collapsed."""

    def __init__(self, *, stop_on_collapse: bool = True) -> None:
        self.stop_on_collapse = stop_on_collapse
        self.collapsed_looks = 0

    def check(self, step: int, loss: float, spread: float) -> None:
        """Raise `ValueError` for a loss that is not finite, or at the third consecutive check with equal embeddings.

        Without `stop_on_collapse` equal embeddings print a warning instead.
        """
        if not math.isfinite(loss) or not math.isfinite(spread):
            raise ValueError(
                f"training diverged: the loss is {loss} at step {step}; lower training.learning_rate, increase "
                "training.warmup_epochs or set training.gradient_clip"
            )
        self.collapsed_looks = self.collapsed_looks + 1 if spread < COLLAPSED else 0
        if self.collapsed_looks != 3:
            return
        message = (
            f"training collapsed: embeddings are nearly equal at step {step}, spread {spread:.4f} of 1; "
            "sharpen the teacher, lower training.learning_rate or use more BatchNorm (predictor, batchnorm_splits)"
        )
        if self.stop_on_collapse:
            raise ValueError(f"{message}; training.stop_on_collapse: false trains on")
        print(f"warning: {message}", file=sys.stderr)


class OtherWork:
    """Warns once if other work takes the cores of the training's threads, which then wait for each other.

    Two threads on two cores beside one busy process were half as fast as one thread (docs/benchmarks.md).
    """

    def __init__(self, waited: float) -> None:
        self._warned = False
        self._begin(waited)

    def look(self, waited: float) -> None:
        """Print a warning if it is due; `waited` is the time of the whole run in which no batch was ready."""
        wall = time.monotonic() - self._wall
        if self._warned or wall < LOOK_SECONDS:
            return
        processor = time.process_time() - self._processor
        message = of_other_work(processor, wall, waited - self._waited, threads=torch.get_num_threads())
        if message is not None:
            print(f"warning: {message}", file=sys.stderr)
            self._warned = True
        self._begin(waited)

    def _begin(self, waited: float) -> None:
        self._wall, self._processor, self._waited = time.monotonic(), time.process_time(), waited


def of_other_work(processor: float, wall: float, waited: float, *, threads: int) -> str | None:
    """Return a warning if several threads got few `processor` seconds in `wall` seconds, `waited` of them for data."""
    share = processor / (wall * threads)
    if threads == 1 or share >= FREE_SHARE or waited > WAITING * wall:
        return None
    return (
        f"other work takes {1 - share:.0%} of the {threads} cores of this training, whose threads wait for each other: "
        "fewer threads may be faster (snakemake --cores 1)"
    )


@torch.no_grad()
def online_knn(backbone: nn.Module, loader: Loader, device: torch.device) -> float:
    """Return the leave-one-out kNN accuracy in percent of `backbone` on the loader's labelled images.

    These are training images, so it is not comparable with the `knn` evaluation.
    """
    training = backbone.training
    backbone.eval()
    features, labels = [], []
    for batch in loader.epoch():
        (images,) = batch.views["probe"]
        features.append(F.normalize(backbone(images.to(device)).float(), dim=1))
        labels.append(batch.labels)
    backbone.train(training)
    feature, label = torch.cat(features), torch.cat(labels).to(device)
    similarity = feature @ feature.T
    similarity.fill_diagonal_(-math.inf)
    cosine, neighbour = similarity.topk(min(NEIGHBOURS, len(feature) - 1), dim=1)
    votes = torch.zeros(len(feature), int(label.max()) + 1, device=device)
    votes.scatter_add_(1, label[neighbour], (cosine / TEMPERATURE).exp())
    return (votes.argmax(dim=1) == label).float().mean().item() * 100
