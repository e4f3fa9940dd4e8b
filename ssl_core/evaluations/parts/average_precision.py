"""The average precision of detections, as COCO computes it: torchmetrics with COCO's own evaluation."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

Detections = dict[str, Tensor]  # boxes, scores, labels and, of Mask R-CNN, masks of one image

KEYS = {"map": "ap", "map_50": "ap50", "map_75": "ap75"}  # of torchmetrics -> ours
MASK_THRESHOLD = 0.5
# COCO's thresholds in float64. The defaults of torchmetrics are float32: they miss overlaps and recalls that are equal.
OVERLAPS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0, 1, 101).tolist()


def average_precision(pairs: Iterable[tuple[Detections, Detections]], *, masks: bool) -> dict[str, float]:
    """Return AP (the mean over IoU .5 to .95), AP50 and AP75 in percent, for boxes and with `masks` also for masks.

    `pairs` are the detections and the targets of each image. Detections on objects marked as crowd are neither right
    nor wrong. Raises `ValueError` if no image has an object.
    """
    from torchmetrics.detection import MeanAveragePrecision  # its import takes seconds

    kinds = ("bbox", "segm") if masks else ("bbox",)
    options: dict[str, Any] = {"iou_thresholds": OVERLAPS, "rec_thresholds": RECALLS}
    options["sync_on_compute"] = False  # rank 0 measures alone
    metric = MeanAveragePrecision(iou_type=kinds, backend="pycocotools", **options)
    metric.warn_on_many_detections = False  # COCO too takes the best 100
    for detections, target in pairs:
        metric.update([_plain(detections, masks)], [_truth(target, masks)])
    values = metric.compute()
    results: dict[str, float] = {}
    for kind in kinds:
        prefix = f"{kind}_" if masks else ""
        for key, name in KEYS.items():
            value = values[f"{prefix}{key}"].item()
            if value < 0:
                raise ValueError("the test split has no objects that count: choose another `test_split`")
            results[name if kind == "bbox" else f"mask_{name}"] = 100 * value
    return results


def _plain(detections: Detections, masks: bool) -> dict[str, Any]:
    plain = {key: detections[key].float().cpu() for key in ("boxes", "scores")}
    plain["labels"] = detections["labels"].cpu()
    if masks:
        plain["masks"] = (detections["masks"][:, 0] > MASK_THRESHOLD).cpu()  # (n, 1, height, width) of probabilities
    return plain


def _truth(target: Detections, masks: bool) -> dict[str, Any]:
    truth = {"boxes": target["boxes"], "labels": target["labels"], "iscrowd": target["crowd"].long()}
    truth["area"] = target["area"]
    if masks:
        truth["masks"] = target["masks"].bool()
    return truth
