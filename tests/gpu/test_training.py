"""Training on the GPU: the CPU's losses, exact resume, several processes, and errors when memory is exhausted."""

from pathlib import Path

import pytest
import torch

from ssl_core.config import Dataset
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import POLICIES, View
from ssl_core.files import read_json
from ssl_core.methods import base
from ssl_core.mistakes import is_out_of_memory
from ssl_core.stages import pretrain, shard
from ssl_core.training.loop import Trainer
from tests.methods import harness
from tests.methods.test_every_method import each_method, small, training_of, weights
from tests.stages.test_pretrain import run, spec
from tests.training.test_loop import (
    manifest,
    test_training_resumed_in_and_between_epochs_equals_training_undisturbed,
    trainer,
)

# The last test is that of tests/training, with the real loader on the GPU.
__all__ = [
    "manifest",
    "test_training_resumed_in_and_between_epochs_equals_training_undisturbed",
    "trainer",
    "weights",
]

QUICK_METHODS = ("ressl", "dino", "npid")
ROWS = ("loss/total", "embedding/spread")


def two_steps(name: str, weights: Path, precision: str) -> Trainer:
    experiment = small(name, weights)
    training = {**training_of(experiment), "precision": precision}
    trained = harness.trainer(base.method_class(name), experiment.method, **training)
    trained.total_steps = 2
    trained.method.prepare(trained.loader, trained.device)
    harness._run(trained, log=lambda row: None)
    return trained


@pytest.mark.parametrize("name", QUICK_METHODS)
def test_two_steps_have_the_cpus_losses(name: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equal_losses(name, weights, "fp32", 1e-3, monkeypatch)


@pytest.mark.slow
@each_method
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.1)])
def test_two_steps_of_every_method_have_the_cpus_losses(
    name: str, weights: Path, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equal_losses(name, weights, precision, tolerance, monkeypatch)


def assert_equal_losses(
    name: str, weights: Path, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device = two_steps(name, weights, precision)
    monkeypatch.setattr(harness, "DEVICE", "cpu")
    on_cpu = two_steps(name, weights, "fp32")
    for one, other in zip(on_device.history, on_cpu.history, strict=True):
        for key in ROWS:
            assert one[key] == pytest.approx(other[key], rel=tolerance, abs=tolerance), (key, one["step"])


@pytest.mark.slow
@each_method
def test_every_method_resumes_exactly(name: str, weights: Path) -> None:
    experiment = small(name, weights)
    harness.resume_is_exact(base.method_class(name), experiment.method, **training_of(experiment))


@pytest.mark.slow
def test_a_rerun_of_the_whole_stage_gives_the_same_bytes(shards: Path, tmp_path: Path) -> None:
    one, two = (run(shards, tmp_path / part, spec(training={"epochs": 2, "precision": "auto"})) for part in "ab")
    for name in ("backbone.safetensors", "history.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_over_nccl_train_like_one(shards: Path, tmp_path: Path) -> None:
    """Both see the same views in another order, so the losses agree as those of two seeds do."""
    one, two = (run(shards, tmp_path / str(gpus), spec(training={"epochs": 2, "gpus": gpus})) for gpus in (1, 2))
    reports = [read_json(results / "pretrain.json") for results in (one, two)]
    assert reports[0]["steps"] == reports[1]["steps"]
    losses = [report["final"]["loss/total"] for report in reports]
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


@pytest.fixture(scope="module")
def shards(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "demo"
    shard.run(root / "datasets" / "demo.yaml", folder, threads=1)
    return folder / "manifest.json"


def test_an_impossible_tensor_is_an_error_of_memory(device: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50, device=device)
    assert is_out_of_memory(caught.value)


@pytest.mark.cuda
def test_views_without_memory_are_an_error_of_memory(manifest: Manifest, device: str) -> None:
    """The loader gets the last 64 MB of the card; afterwards the memory is there again."""
    views = {"view": View(size=1024, count=4, augmentation=POLICIES["contrastive"])}
    free, _ = torch.cuda.mem_get_info()
    filled = torch.empty(free - 2**26, dtype=torch.uint8, device=device)
    dataset = Dataset(name="demo")
    with Loader(manifest, dataset, views, batch_size=64, seed=0, device=device) as loader:
        with pytest.raises(RuntimeError) as caught:
            loader.next()
        assert is_out_of_memory(caught.value)
        del filled
        torch.cuda.empty_cache()
        assert loader.next().views["view"][0].shape == (64, 3, 1024, 1024)


@pytest.mark.cuda
def test_the_stage_trains_on_the_gpu() -> None:
    assert pretrain.start_process(base.resolve(spec()).training, 1).type == "cuda"
