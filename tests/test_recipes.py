"""Every YAML that ships means something: it passes the schema, resolves, and trains two steps (T24)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssl_core import schema
from ssl_core.data.card import load_card
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import adjust
from ssl_core.methods.base import method_class, resolve
from ssl_core.networks.backbones import build_backbone
from ssl_core.stages import evaluate, shard
from ssl_core.training.loop import Trainer

ROOT = Path(__file__).parent.parent
SHIPPED = [ROOT / "config.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))]
EXPERIMENTS = [(path.stem, name) for path in SHIPPED for name in schema.experiments(yaml.safe_load(path.read_text()))]


def configuration(stem: str) -> dict[str, Any]:
    (path,) = [path for path in SHIPPED if path.stem == stem]
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_configuration_is_valid_down_to_the_last_key(path):
    structure = json.loads((ROOT / "workflow/schemas/config.schema.json").read_text())
    configuration = yaml.safe_load(path.read_text())
    schema.check(configuration, structure, [card.stem for card in (ROOT / "datasets").glob("*.yaml")])
    for name, section in (configuration.get("evaluations") or {}).items():
        dataset = {"dataset": {"name": "demo"}, **section}
        evaluate.load(section, name).Config.model_validate(dataset)


@pytest.mark.parametrize("path", sorted((ROOT / "datasets").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_card_is_valid(path):
    assert load_card(path).name == path.stem


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "demo"
    shard.run(ROOT / "datasets" / "demo.yaml", folder, threads=1)
    return Manifest.load(folder / "manifest.json")


@pytest.mark.parametrize(("stem", "name"), EXPERIMENTS)
def test_every_experiment_trains_two_steps(stem, name, demo):
    # On small stand-ins: digits, as small as the stem allows, 8 a step, a queue that fits them; all else as shipped.
    spec = schema.experiments(configuration(stem))[name]
    method = method_class(spec["method"]["name"])
    fits = {"queue_size": 64} if "queue_size" in method.Config.model_fields else {}
    spec = {**spec, "dataset": {"name": "demo"}, "method": {**spec["method"], **fits}}
    spec["training"] = {**spec.get("training", {}), "batch_size": 8, "precision": "fp32"}
    resolved = resolve(spec)
    size = 96 if resolved.backbone.stem == "imagenet" else 32
    views = adjust(method.views(resolved.method, size), resolved.views, avoid=demo.avoid)
    backbone = build_backbone(resolved.backbone, size)
    with Loader(demo, resolved.dataset, views, batch_size=8, seed=0) as loader:
        model = method(resolved.method, backbone, num_images=loader.num_images, batch_size=8, seed=0)
        trainer = Trainer(model, loader, resolved.training, device=torch.device("cpu"))
        trainer.total_steps, trainer.log_steps = 2, 1
        model.prepare(loader, trainer.device)
        before = next(model.backbone.parameters()).clone()
        trainer.run(save=lambda: None, log=lambda row: None)
    assert [row["step"] for row in trainer.history] == [1, 2]
    assert not torch.equal(next(model.backbone.parameters()), before)
