"""The metadata that model hubs and timm read of an export: `config.json` and the card's `model-index`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_core.config import Backbone
from ssl_core.networks.backbones import Network
from ssl_core.networks.families import architecture, timm_arguments
from ssl_core.report.results import Result, headline, value


def hub_config(network: Network, header: Mapping[str, str]) -> dict[str, Any]:
    """Return the content of config.json, with which `timm.create_model("local-dir:...")` builds networks that it has.

    For other networks it has no `architecture`, so that timm refuses the folder.
    """
    config = Backbone.model_validate_json(header["backbone"])
    library, name = architecture(config)
    size = int(header["image_size"])
    arguments = timm_arguments(network, config, size)
    if arguments is None:
        return {"library_name": library, "network": name, "stem": config.stem, "num_features": network.num_features}
    pretrained = {
        "input_size": [3, size, size],
        "mean": json.loads(header["mean"]),
        "std": json.loads(header["std"]),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": 0,
    }
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": network.num_features,
        "model_args": arguments,
        "pretrained_cfg": pretrained,
    }


def model_index(experiment: str, results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the main metric of each evaluation in the form of the card's `model-index`."""
    entries = []
    for result in results:
        metric = headline(result)
        number = value(result, "", metric)
        if number is not None:
            entries.append(
                {
                    "task": {"type": "image-feature-extraction", "name": result["protocol"]},
                    "dataset": {"type": result["dataset"], "name": result["dataset"], "split": result["split"]},
                    "metrics": [{"type": metric, "name": f"{result['evaluation']} {metric}", "value": number}],
                }
            )
    return [{"name": experiment, "results": entries}] if entries else []
