"""Labels of multi-label images, read from the shards. Torch-free.

The sample of a multi-label image has the label -1, so that code for one label per image refuses it, and a third
member, `00000042.labels.u8`: one byte per class, in the order of the manifest's classes.
"""

import numpy as np

from ssl_core.data.shards import LABELS, Manifest, member_position, read_index, read_member, sample_index

ABSENT, PRESENT, DIFFICULT = 0, 1, 2  # difficult: only objects that the annotators marked as difficult (VOC)


def has_labels(manifest: Manifest, split: str) -> bool:
    """Return whether a split is multi-label."""
    first = manifest.tars(split)[0]
    if not first.with_suffix(".idx").is_file():
        return False
    samples = read_index(first)
    return bool(samples) and member_position(samples[0], LABELS) is not None


def read_labels(manifest: Manifest, split: str) -> np.ndarray:
    """Return (images, classes) uint8 of ABSENT, PRESENT and DIFFICULT in the order of the images' indices.

    The images are not read. The split must be multi-label (`has_labels`).
    """
    assert manifest.classes is not None
    labels = np.zeros((manifest.split(split).images, len(manifest.classes)), np.uint8)
    for path in manifest.tars(split):
        with open(path, "rb") as tar:
            for fields in read_index(path):
                labels[sample_index(fields)] = np.frombuffer(read_member(tar, fields, 2), np.uint8)
    return labels
