"""The commands `embed`, `neighbours` and `predict`: a trained network on images that are in no data set."""

import sys
from pathlib import Path

import torch

from ssl_core.data.image_files import list_counts
from ssl_core.data.records import SourceSplit
from ssl_core.files import atomic, check_output
from ssl_core.inference.embedding import embed, embed_batches, open_images
from ssl_core.inference.feature_files import SUFFIXES, is_feature_file, new_feature_file, read_features
from ssl_core.inference.neighbours import nearest
from ssl_core.inference.network import load
from ssl_core.inference.prediction import classify, find_classifier, write_csv
from ssl_core.mistakes import excerpt


def write_embeddings(
    folder: Path, *, network: Path, output: Path, skip_unreadable: bool, force: bool, threads: int
) -> None:
    """Write the features of all images below `folder` to `output`, sorted by name."""
    torch.set_num_threads(threads)
    if not is_feature_file(output):
        raise ValueError(f"{output}: expected a name that ends in {' or '.join(SUFFIXES)}")
    check_output(output, force=force)
    loaded, source = load(network), open_images(folder)
    report_unread(source)
    skipped: dict[str, str] | None = {} if skip_unreadable else None
    written = 0
    dim = loaded.num_features
    with new_feature_file(output, rows=source.size, dim=dim, network=loaded.digest) as append:
        for batch in embed_batches(loaded, source, skipped=skipped, threads=threads):
            append(batch)
            written += len(batch.names)
    report_skipped(skipped)
    print(f"{written} images x {dim} features, sorted by name -> {output}")


def print_neighbours(image: Path, *, network: Path, among: Path, k: int, skip_unreadable: bool, threads: int) -> None:
    """Print the `k` images with the largest cosine similarity to `image`, from a folder or a file of features."""
    torch.set_num_threads(threads)
    loaded = load(network)
    if not image.is_file():
        raise ValueError(f"{image} is no file: give the path of one image")
    query = embed(loaded, [image], threads=threads).features[0]
    skipped: dict[str, str] | None = {} if skip_unreadable else None
    if is_feature_file(among):
        batches = read_features(among, network=loaded.digest, dim=loaded.num_features)
    else:
        source = open_images(among)
        report_unread(source)
        batches = embed_batches(loaded, source, skipped=skipped, threads=threads)
    found = nearest(query, batches, k)
    report_skipped(skipped)
    print("cosine  image")
    for similarity, name in found:
        print(f"{similarity:6.4f}  {name}")


def write_predictions(
    folder: Path, *, network: Path, output: Path | None, skip_unreadable: bool, force: bool, threads: int
) -> None:
    """Write the class of all images below `folder` as CSV, to `output` or the terminal, sorted by name."""
    torch.set_num_threads(threads)
    if output is not None:
        check_output(output, force=force)
    loaded = load(network)
    classifier = find_classifier(network, loaded)
    source = open_images(folder)
    report_unread(source)
    skipped: dict[str, str] | None = {} if skip_unreadable else None
    predictions = classify(embed_batches(loaded, source, skipped=skipped, threads=threads), classifier)
    if output is None:
        write_csv(predictions, sys.stdout)
    else:
        with atomic(output) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            count = write_csv(predictions, file)
        print(f"{count} images, sorted by name -> {output}")
    report_skipped(skipped)


def report_unread(source: SourceSplit) -> None:
    """Print the numbers of pictures whose format is not read, if there are any."""
    if source.unread:
        print(f"not read: {list_counts(source.unread)} (convert them to JPEG or PNG)", file=sys.stderr)


def report_skipped(skipped: dict[str, str] | None) -> None:
    """Print the images that were left out, each with the reason."""
    for name, reason in (skipped or {}).items():
        print(f"skipped {excerpt(name)}: {excerpt(reason)}", file=sys.stderr)
    if skipped:
        print(f"unreadable images skipped: {len(skipped)}", file=sys.stderr)
