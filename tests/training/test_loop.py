"""An interrupted and resumed run equals an uninterrupted one bit for bit, with the real loader."""

import contextlib
import functools
import io

import pytest
import torch

from ssl_core.config import Backbone, Dataset, Subset, Training
from ssl_core.data.loader import Loader
from ssl_core.data.shards import Manifest
from ssl_core.data.views import View
from ssl_core.methods.ressl import Config, ReSSL
from ssl_core.networks.backbones import build_backbone
from ssl_core.training.loop import Trainer
from ssl_core.training.monitor import online_knn
from tests.methods.harness import Tiny, state_bytes

DEVICE = "cpu"  # tests/gpu sets it


@pytest.fixture(scope="module")
def manifest(demo):
    return Manifest.load(demo)


@pytest.fixture
def trainer(manifest):
    with contextlib.ExitStack() as open_loaders:
        yield functools.partial(build, open_loaders, manifest)


def build(open_loaders, manifest, method=None, backbone=Tiny, **training):
    settings = Training(**{"epochs": 2, "batch_size": 16, "warmup_epochs": 0.5, "precision": "fp32", **training})
    config = Config(**{"queue_size": 40, "projector_hidden": 32, "embedding_dim": 16, "warmup": 0.5, **(method or {})})
    dataset = Dataset(name="demo", subset=Subset(images=100, seed=1))
    views = ReSSL.views(config, 16)
    loader = Loader(manifest, dataset, views, batch_size=16 // settings.accumulation, seed=5, device=DEVICE)
    open_loaders.enter_context(loader)
    torch.manual_seed(0)
    model = ReSSL(config, backbone(), num_images=100, batch_size=16, seed=5)  # pyright: ignore[reportArgumentType]
    result = Trainer(model, loader, settings, device=torch.device(DEVICE))
    result.log_steps = 1
    return result


def mobilenet():
    return build_backbone(Backbone(name="mobilenet_v3_small", stem="small"), 16)


class PowerCut(Exception):
    """The process is gone."""


def final(trained: Trainer) -> list[bytes]:
    return [state_bytes(part.state_dict()) for part in (trained.method, trained.optimizer)]


@pytest.mark.parametrize(
    ("method", "training"),
    [
        ({"predictor": False, "batchnorm_splits": 2}, {"backbone": mobilenet, "accumulation": 2}),
        ({"predictor": False, "batchnorm_splits": 2}, {"optimizer": "lars", "decay_exclusion": "norm_bias"}),
        (
            {"crops": "two", "final_teacher_momentum": 1.0},
            {"optimizer": "adamw", "accumulation": 2, "learning_rate": 1e-3},
        ),
        # `auto` is bfloat16 where it is native; emulated it takes minutes.
        ({"crops": "multi"}, {"nesterov": True, "gradient_clip": 1.0, "precision": "auto"}),
    ],
    ids=["split, accumulated", "split, lars", "two crops, adamw, accumulated", "five crops, native precision"],
)
def test_training_resumed_in_and_between_epochs_equals_training_undisturbed(method, training, trainer):
    whole = trainer(method, **training)
    whole.run(save=lambda: None, log=lambda row: None)
    assert whole.total_steps == 12

    first, saved = trainer(method, **training), {}

    def cut(row):
        if row["step"] in (4, 6):
            saved[row["step"]] = io.BytesIO()
            torch.save(first.state(), saved[row["step"]])
        if row["step"] == 6:
            raise PowerCut

    with pytest.raises(PowerCut):
        first.run(save=lambda: None, log=cut)
    assert saved.keys() == {4, 6}
    expected = final(whole)
    for file in saved.values():
        second = trainer(method, **training)
        second.restore(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        second.run(save=lambda: None, log=lambda row: None)
        assert final(second) == expected
        assert second.history == whole.history


def test_accumulation_takes_one_step_and_one_teacher_update_for_all_parts(trainer):
    accumulated = trainer(accumulation=4)
    accumulated.run(save=lambda: None, log=lambda row: None)
    assert accumulated.step == 12
    assert int(accumulated.method.queue.position) == 12 * 16 % 40


def test_each_part_of_a_step_has_its_number_and_hands_its_memory_to_after_step(trainer):
    run = trainer(accumulation=2)
    positions, memories = [], []
    run.method.register_forward_hook(lambda module, inputs, losses: positions.append(inputs[1]))
    run.method.register_forward_hook(lambda module, inputs, losses: memories.append(losses.memory))
    run.method.after_step = lambda progress, received: positions.append((progress, received == memories))
    run._one_step()
    assert [position.part for position in positions[:2]] == [0, 1]
    assert positions[2] == ((0, 12, 0), True)


def test_the_history_has_a_row_at_the_end_of_each_monitored_epoch(trainer):
    run = trainer(epochs=4, monitor_epochs=2)
    run.log_steps = 5  # 6 steps an epoch
    run.run(save=lambda: None, log=lambda row: None)
    assert [row["step"] for row in run.history] == [5, 10, 12, 15, 20, 24]


def test_milestones_after_the_end_are_refused(trainer):
    with pytest.raises(ValueError, match=r"training\.milestones 3, 8 are not below training\.epochs 3"):
        trainer(epochs=3, schedule="step", milestones=(2, 3, 8))


def test_the_online_knn_leaves_no_trace(trainer, manifest):
    model = trainer().method.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    probe = View(size=16, resize=16, crop="center", seen_by=("probe",))
    dataset = Dataset(name="demo", subset=Subset(images=60))
    with Loader(manifest, dataset, {"probe": probe}, batch_size=32, seed=0, shuffle=False) as images:
        accuracy = [online_knn(model.backbone, images, torch.device("cpu")) for _ in range(2)]
    assert 0 < accuracy[0] == accuracy[1] < 100
    assert model.backbone.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_number_of_processes_is_refused(trainer):
    one = trainer()
    state = one.state()
    state["ranks"] = state["ranks"] * 2
    with pytest.raises(ValueError, match=r"written by 2 processes, training\.gpus x training\.nodes is 1: make it 2"):
        one.restore(state)
