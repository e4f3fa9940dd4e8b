"""The model card beside exported weights: what they are, how they came about, how good they are, how to use them.

Markdown with the front matter that model hubs read. Its Python runs as it stands, from top to bottom.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ssl_core.config import Backbone
from ssl_core.data.card import Card
from ssl_core.experiments.checks import files
from ssl_core.methods.base import load_method_module, resolve
from ssl_core.networks.backbones import Network
from ssl_core.networks.plain import architecture, rebuilding_code, stem_in_words

BASELINES = ("untrained", "pixels")


def write_model_card(
    experiment: str,
    spec: Mapping[str, Any],
    network: Network,
    header: Mapping[str, str],
    *,
    card: Card,
    results: Sequence[Mapping[str, Any]],
) -> str:
    """Return the card of `network`, whose file has `header`: `spec` is its experiment, `results` its evaluations."""
    config = Backbone.model_validate_json(header["backbone"])
    size = int(header["image_size"])
    origin = _adoption(spec, card) if "weights" in spec else _pretraining(spec, card)
    parts = [
        _front_matter(spec, config),
        f"# {experiment}",
        f"{'/'.join(architecture(config))} without its classifier: pictures of {size} x {size} pixels in, "
        f"{network.num_features} features out.",
        *origin,
        "## Results",
        *_results(results),
        "## Use",
        *_use(network, config, header, size),
        "## Files",
        *_files(header),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(spec: Mapping[str, Any], config: Backbone) -> str:
    library, name = architecture(config)
    method = [] if "weights" in spec else [spec["method"]["name"]]
    content = {
        "library_name": library,
        "pipeline_tag": "image-feature-extraction",
        "license": "unknown",  # nobody but the user can say
        "tags": ["self-supervised-learning", *method, name, "onnx"],
    }
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _pretraining(spec: Mapping[str, Any], card: Card) -> list[str]:
    """Say by which method, with which settings and on which data."""
    resolved = resolve(spec)
    title = (load_method_module(resolved.method.name).__doc__ or resolved.method.name).splitlines()[0].rstrip(".")
    settings = yaml.safe_dump(resolved.model_dump(mode="json", serialize_as_any=True), sort_keys=False)
    for file in files(spec).values():  # where it lay is nobody's business
        settings = settings.replace(file, Path(file).name)
    subset = resolved.dataset.subset
    images = f"{subset.images} images, drawn with seed {subset.seed}, of the" if subset else "The"
    return [
        "## Pre-training",
        f"Without labels, by {title}. Every setting:",
        f"```yaml\n{settings}```",
        "## Data",
        f"{images} split `{resolved.dataset.split}` of `{card.name}`.",
        *_about(card),
    ]


def _adoption(spec: Mapping[str, Any], card: Card) -> list[str]:
    """Say that the weights came from elsewhere."""
    return [
        "## Pre-training",
        f"Not done here: the weights are those of the file `{Path(spec['weights']).name}`, which does not say how they "
        "were trained.",
        "## Data",
        "On what they were trained is not known here. Unless the results say otherwise, they were measured on "
        f"`{card.name}`.",
        *_about(card),
    ]


def _about(card: Card) -> list[str]:
    """List what the data set's card says of itself."""
    known = {"Homepage": card.homepage, "Licence": card.licence, "Citation": card.citation}
    lines = [f"- {name}: {text}" for name, text in known.items() if text]
    return ["\n".join(lines)] if lines else []


def _results(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the evaluations as a table; numbers of different protocols do not compare."""
    rows = [_row(result) for result in results if result["metrics"].get(_headline(result)) is not None]
    if not rows:
        return ["Not evaluated."]
    head = [
        "evaluation",
        "protocol",
        "data",
        "metric",
        "these weights",
        *BASELINES,
        "images to learn from",
        "tested on",
    ]
    lines = [head, ["---"] * 4 + ["---:"] * 5, *rows]
    return [
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        "In percent, by the same probe: these weights, the same network `untrained`, raw `pixels` without a network.",
    ]


def _headline(result: Mapping[str, Any]) -> str:
    return result.get("headline", "top1")


def _row(result: Mapping[str, Any]) -> list[str]:
    metric = _headline(result)
    values = [result["metrics"], *(result["baselines"].get(name, {}) for name in BASELINES)]
    numbers = [f"{value[metric]:.1f}" if value.get(metric) is not None else "–" for value in values]
    data = f"{result['dataset']}/{result['split']}"
    counts = [str(result["num_train"]), str(result["num_test"])]
    return [result["evaluation"], result["protocol"], data, metric, *numbers, *counts]


def _use(network: Network, config: Backbone, header: Mapping[str, str], size: int) -> list[str]:
    """Show the code: pictures to tensors, then torch, then ONNX Runtime."""
    mean, std = json.loads(header["mean"]), json.loads(header["std"])
    library, _ = architecture(config)
    return [
        f"Pixels in 0..1 are normalised by mean {mean} and standard deviation {std} of the channels red, green and "
        "blue; neither file does that by itself.",
        f"""```python
import torch
from PIL import Image
from torchvision.transforms import v2

prepare = v2.Compose([
    v2.Resize({size}),
    v2.CenterCrop({size}),
    v2.PILToTensor(),
    v2.ToDtype(torch.float32, scale=True),
    v2.Normalize(mean={mean}, std={std}),
])
images = prepare(Image.open("picture.png").convert("RGB"))[None]  # (1, 3, {size}, {size})
```""",
        f"With {library}. {stem_in_words(network, config)}",
        f"""```python
from safetensors.torch import load_file
{rebuilding_code(network, config, size)}
model.load_state_dict(load_file("backbone.safetensors"))
model.eval()
features = model(images)  # (1, {network.num_features})
```""",
        "With ONNX Runtime, any number of images at once:",
        f"""```python
import onnxruntime

session = onnxruntime.InferenceSession("backbone.onnx")
(features,) = session.run(None, {{"images": images.numpy()}})  # (1, {network.num_features})
```""",
    ]


def _files(header: Mapping[str, str]) -> list[str]:
    lines = [
        "- `backbone.safetensors`: the weights; its header says architecture, stem, image size, mean and std. "
        "ssl_core takes it up again as `weights` of an experiment.",
        "- `backbone.onnx`: the same network in float32, batch norm folded into the convolutions; the same facts as "
        "metadata.",
    ]
    if "version" in header:
        lines.append(f"- Version of the pre-training (settings, code and data): `{header['version']}`.")
    return ["\n".join(lines)]
