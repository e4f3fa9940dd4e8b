"""Classes of images by a fine-tuned network."""

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

import torch

from ssl_core.inference.embedding import Batch
from ssl_core.inference.network import LoadedNetwork, find_backbone
from ssl_core.networks.classifiers import CLASSIFIER, Classifier, load_classifier


class Prediction(NamedTuple):
    """The most probable class of an image, by its name, and its probability."""

    name: str
    label: str
    probability: float


def find_classifier(path: Path, network: LoadedNetwork) -> Classifier:
    """Load the classifier beside a network's file; raise `ValueError` if there is none or it belongs to another."""
    file = find_backbone(path).with_name(CLASSIFIER)
    if not file.is_file():
        raise ValueError(
            f"{path} has no {CLASSIFIER}: give the folder of an evaluation with the protocol finetune, such as "
            "results/<experiment>/finetune"
        )
    classifier = load_classifier(file, on_backbone=True)
    if classifier.header.get("backbone_sha256") != network.digest:
        raise ValueError(f"{file} and the backbone beside it are of different runs: fine-tune again")
    return classifier


@torch.no_grad()
def classify(batches: Iterable[Batch], classifier: Classifier) -> Iterator[Prediction]:
    """Yield the most probable class of each image."""
    for batch in batches:
        probabilities = classifier.layer(batch.features).softmax(dim=1)
        highest = probabilities.max(dim=1)
        for name, label, probability in zip(batch.names, highest.indices.tolist(), highest.values.tolist()):
            yield Prediction(name, classifier.classes[label], probability)


def write_csv(predictions: Iterable[Prediction], file: TextIO) -> int:
    """Write predictions as CSV with a header; return their number."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("name", "class", "probability"))
    count = 0
    for prediction in predictions:
        writer.writerow((prediction.name, prediction.label, f"{prediction.probability:.4f}"))
        count += 1
    return count
