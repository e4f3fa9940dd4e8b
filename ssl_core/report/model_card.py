"""The model card of exported weights: origin, data, results and use.

Markdown with the front matter that model hubs read. Its Python code runs unchanged from top to bottom.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ssl_core.config import Backbone, Export
from ssl_core.data.card import Card
from ssl_core.experiments.sweeps import weight_files
from ssl_core.methods.base import load_method_module, resolve
from ssl_core.networks.backbones import Network
from ssl_core.networks.families import architecture, family_of, timm_arguments
from ssl_core.report.hub import model_index
from ssl_core.report.results import Result, headline, value

BASELINES = ("untrained", "pixels")  # of the evaluations that the card lists


def write_model_card(
    experiment: str,
    spec: Mapping[str, Any],
    network: Network,
    header: Mapping[str, str],
    *,
    card: Card,
    results: Sequence[Result],
    options: Export | None = None,
) -> str:
    """Return the card of `network`; `header` is of its file, `spec` of its experiment, `results` of its evaluations."""
    config = Backbone.model_validate_json(header["backbone"])
    size = int(header["image_size"])
    loads_in_timm = timm_arguments(network, config, size) is not None
    origin = _adoption(spec, card) if "weights" in spec else _pretraining(spec, card)
    parts = [
        _front_matter(spec, config, loads_in_timm, model_index(experiment, results)),
        f"# {experiment}",
        f"{'/'.join(architecture(config))} without its classifier: images of {size} x {size} pixels in, "
        f"{network.num_features} features out.",
        *origin,
        "## Results",
        *_results(results),
        "## Use",
        *_use(network, config, header, size, options or Export()),
        *(_timm_use(network) if loads_in_timm else []),
        "## Files",
        *_files(header),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(spec: Mapping[str, Any], config: Backbone, loads_in_timm: bool, index: list[dict[str, Any]]) -> str:
    library, name = architecture(config)
    method = [] if "weights" in spec else [spec["method"]["name"]]
    content = {
        "library_name": "timm" if loads_in_timm else library,
        "pipeline_tag": "image-feature-extraction",
        "license": "unknown",  # only the user knows
        "tags": ["self-supervised-learning", *method, name, "onnx"],
    }
    if index:
        content["model-index"] = index
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---"


def _pretraining(spec: Mapping[str, Any], card: Card) -> list[str]:
    """Describe the method, its settings and its data."""
    resolved = resolve(spec)
    title = (load_method_module(resolved.method.name).__doc__ or resolved.method.name).splitlines()[0].rstrip(".")
    settings = yaml.safe_dump(resolved.model_dump(mode="json", serialize_as_any=True), sort_keys=False)
    for file in weight_files(spec).values():  # without the folders of this machine
        settings = settings.replace(file, Path(file).name)
    subset = resolved.dataset.subset
    images = f"{subset.images} images, drawn with seed {subset.seed}, of the" if subset else "The"
    return [
        "## Pre-training",
        f"Without labels, by {title}. All settings:",
        f"```yaml\n{settings}```",
        "## Data",
        f"{images} split `{resolved.dataset.split}` of `{card.name}`.",
        *_about(card),
    ]


def _adoption(spec: Mapping[str, Any], card: Card) -> list[str]:
    """Describe weights that were trained elsewhere."""
    return [
        "## Pre-training",
        f"The weights come from the file `{Path(spec['weights']).name}`, which has no record of their training.",
        "## Data",
        f"The training data are unknown. The results below are on `{card.name}` unless they name other data.",
        *_about(card),
    ]


def _about(card: Card) -> list[str]:
    """List homepage, licence and citation of the data set."""
    facts = {"Homepage": card.homepage, "Licence": card.licence, "Citation": card.citation}
    lines = [f"- {name}: {text}" for name, text in facts.items() if text]
    return ["\n".join(lines)] if lines else []


def _results(results: Sequence[Result]) -> list[str]:
    """Return the evaluations as a table, with the protocol of each."""
    rows = [_row(result) for result in results if value(result, "", headline(result)) is not None]
    if not rows:
        return ["Not evaluated."]
    columns = ["evaluation", "protocol", "data", "metric"]
    numbers = ["these weights", *BASELINES, "images to learn from", "tested on"]
    lines = [columns + numbers, ["---"] * len(columns) + ["---:"] * len(numbers), *rows]
    return [
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
        "In percent, by the same protocol: these weights, the same network `untrained`, and raw `pixels` without a "
        "network.",
    ]


def _row(result: Result) -> list[str]:
    metric = headline(result)
    values = [value(result, source, metric) for source in ("", *BASELINES)]
    numbers = ["–" if number is None else f"{number:.1f}" for number in values]
    data = f"{result['dataset']}/{result['split']}"
    counts = [str(result["num_train"]), str(result["num_test"])]
    return [result["evaluation"], result["protocol"], data, metric, *numbers, *counts]


def _use(network: Network, config: Backbone, header: Mapping[str, str], size: int, options: Export) -> list[str]:
    """Return example code: image to tensor, then torch, then ONNX Runtime."""
    mean, std = json.loads(header["mean"]), json.loads(header["std"])
    library, _ = architecture(config)
    family = family_of(network)
    stem = "The stem is the library's." if config.stem == "imagenet" else family.stem_description(config.stem)
    readers, images, pixels, sizes = "Both files expect", "images", "", ""
    if options.normalise:
        readers, images = "The weights expect", "pixels"
        pixels = """
pixels = v2.Compose(prepare.transforms[:-1])(Image.open("picture.png").convert("RGB"))[None]  # the file normalises
"""
    if options.dynamic_size:
        sizes = " of any height and width"
    return [
        f"{readers} pixels in 0..1 that are normalised by mean {mean} and standard deviation {std} of the "
        "channels red, green and blue.",
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
        f"With {library}. {stem}",
        f"""```python
from safetensors.torch import load_file
{family.rebuilding_code(network, config, size)}
model.load_state_dict(load_file("backbone.safetensors"))
model.eval()
features = model(images)  # (1, {network.num_features})
```""",
        f"With ONNX Runtime, for any number of images{sizes}:",
        f"""```python
import onnxruntime
{pixels}
session = onnxruntime.InferenceSession("backbone.onnx")
(features,) = session.run(None, {{"images": {images}.numpy()}})  # (1, {network.num_features})
```""",
    ]


def _timm_use(network: Network) -> list[str]:
    """Return example code for networks that timm loads from the folder."""
    return [
        "With timm, which reads `config.json` and the weights of the folder:",
        f"""```python
import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()
features = model(images)  # (1, {network.num_features})
```""",
    ]


def _files(header: Mapping[str, str]) -> list[str]:
    lines = [
        "- `backbone.safetensors`: the weights; its header has architecture, stem, image size, mean and std. "
        "An experiment of ssl_core can use the file as its `weights`.",
        "- `backbone.onnx`: the same network in float32 with batch norm folded into the convolutions, and the same "
        "facts as metadata.",
    ]
    lines.append("- `backbone.int8.onnx`, if it was made: 8-bit weights and activations; its metadata has the error.")
    lines.append("- `.tflite` and `.pte`, if they were made: the same for LiteRT and ExecuTorch.")
    if "version" in header:
        lines.append(f"- Version of the pre-training (settings, code and data): `{header['version']}`.")
    return ["\n".join(lines)]
