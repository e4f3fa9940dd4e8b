import csv
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from ssl_core.config import Backbone, Dataset, Subset
from ssl_core.data.loader import draw_subset
from ssl_core.files import read_json
from ssl_core.methods.base import method_class, resolve
from ssl_core.networks.backbones import build_backbone, load_backbone
from ssl_core.provenance import file_digest
from ssl_core.stages import nodes, pretrain, ranks
from tests.methods.harness import failing_at

SPEC = {
    "dataset": {"name": "demo", "subset": {"images": 96}},
    "backbone": {"name": "mobilenet_v3_small", "stem": "small"},
    "method": {"name": "ressl", "queue_size": 40, "projector_hidden": 32, "embedding_dim": 16, "warmup": 0.5},
    "training": {"epochs": 4, "batch_size": 32, "warmup_epochs": 1, "monitor_epochs": 2, "precision": "fp32"},
}


def spec(**changes):
    return {key: {**section, **changes.get(key, {})} for key, section in SPEC.items()}


def run(manifest: Path, folder: Path, section: dict = SPEC) -> Path:
    pretrain.run(
        "tiny",
        spec=section,
        code="code",
        manifest=manifest,
        output=folder / "results",
        checkpoint=folder / "checkpoints" / "tiny.pt",
        threads=1,
    )
    return folder / "results"


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    return run(demo, tmp_path_factory.mktemp("finished"))


def test_writes_every_output_and_leaves_no_checkpoint(finished):
    assert sorted(path.name for path in finished.iterdir()) == sorted(pretrain.OUTPUTS)
    assert list((finished.parent / "checkpoints").iterdir()) == []


def test_a_rerun_gives_the_same_bytes(finished, demo, tmp_path):
    again = run(demo, tmp_path)
    for name in ("backbone.safetensors", "model.safetensors", "history.csv"):
        assert (again / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.long
def test_backbones_of_epochs_to_keep_are_written_also_over_an_interruption(demo, tmp_path):
    section = spec(training={"keep_epochs": [2, 4], "checkpoint_minutes": 1e-9})
    whole, interrupted = run(demo, tmp_path / "whole", section), tmp_path / "interrupted"
    with failing_at(8):  # in the third epoch
        run(demo, interrupted, section)
    run(demo, interrupted, section)
    kept = {epoch: whole / "kept" / f"epoch-{epoch}.safetensors" for epoch in (2, 4)}
    assert kept[4].read_bytes() == (whole / "backbone.safetensors").read_bytes() != kept[2].read_bytes()
    for path in kept.values():
        assert (interrupted / "results" / "kept" / path.name).read_bytes() == path.read_bytes()
    assert list((interrupted / "checkpoints").iterdir()) == []
    load_backbone(kept[2])


def test_a_batch_that_cannot_fit_is_refused_before_the_data_are_read(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "capacity", lambda training: 0.9e9)
    monkeypatch.setattr(pretrain, "Loader", None)
    with pytest.raises(ValueError, match="batch_size 32 needs about 1 GB per process for 32 images at once"):
        run(demo, tmp_path)


def test_files_of_weights_are_part_of_the_data_digest(demo, tmp_path):
    def digest(**method):
        job = pretrain.Job(
            experiment="tiny", spec={"method": {"name": "ressl", **method}}, code="c", manifest=demo, output=tmp_path,
            checkpoint=tmp_path / "c.pt", threads=1,
        )  # fmt: skip
        return pretrain._data_digest(job)

    start = tmp_path / "start.safetensors"
    assert digest() == file_digest(demo)
    with pytest.raises(ValueError, match=r"start\.safetensors does not exist"):
        digest(initial=str(start))
    start.write_text("weights")
    first = digest(initial=str(start))
    start.write_text("other weights")
    assert len({digest(), first, digest(initial=str(start)), digest(teacher={"weights": str(demo)})}) == 4


def test_the_backbone_loads_back_and_differs_from_its_initialisation(finished):
    network, header = load_backbone(finished / "backbone.safetensors")
    torch.manual_seed(0)
    untrained = build_backbone(Backbone(name="mobilenet_v3_small", stem="small"), 16)
    names = dict(untrained.named_parameters())
    assert all(not torch.equal(value, names[name]) for name, value in network.named_parameters() if value.dim() > 1)
    assert header["seed"] == "0"


def test_the_untrained_baseline_is_the_initial_network(demo, tmp_path):
    slow = run(demo, tmp_path, spec(training={"epochs": 2, "learning_rate": 1e-30, "weight_decay": 0.0}))
    torch.manual_seed(0)
    untrained = dict(build_backbone(Backbone(name="mobilenet_v3_small", stem="small"), 16).named_parameters())
    network, _ = load_backbone(slow / "backbone.safetensors")
    for name, value in network.named_parameters():
        torch.testing.assert_close(value, untrained[name], atol=1e-20, rtol=0)


def test_history_has_a_row_per_log_and_the_online_knn_in_its_epochs(finished):
    rows = list(csv.DictReader((finished / "history.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert [bool(row["online/knn"]) for row in rows] == [False, True, False, True]
    assert float(rows[0]["loss/contrast"]) > 0
    assert rows[-1]["loss/contrast"] == ""  # faded out


def test_the_summary_has_resolved_settings_and_cost(finished):
    summary = read_json(finished / "pretrain.json")
    assert summary["steps"] == 12
    assert summary["resolved"]["method"]["teacher_temperature"] == 0.04
    assert summary["cost"]["backward_passes"] == 12 * 32
    assert summary["cost"]["images_per_second"] > 0


@pytest.mark.parametrize(
    ("method", "passes"),
    [({"name": "ressl"}, 1), ({"name": "simclr"}, 2), ({"name": "swav", "num_locals": 6}, 8), ({"name": "jigclu"}, 1)],
)
def test_backward_passes_count_the_images_that_the_student_sees(method, passes):
    """JigClu joins four patches into one montage; SwAV has two large and six small crops."""
    resolved = resolve({**SPEC, "method": method})
    assert pretrain.students_views(method_class(method["name"]).views(resolved.method, 32)) == passes


def test_the_model_holds_teacher_and_queue_too(finished):
    with safe_open(finished / "model.safetensors", framework="pt") as file:
        assert {"queue.rows", "queue.position", "projector.0.weight", "teacher.0.features.0.0.weight"} <= set(
            file.keys()
        )


def test_processes_that_do_not_meet_on_the_loopback_address_give_one_line(demo, tmp_path, monkeypatch):
    def launch(config, _work):
        assert (config.rdzv_endpoint, config.local_addr) == ("127.0.0.1:0", "127.0.0.1")
        assert config.rdzv_configs["join_timeout"] == ranks.START_SECONDS

        def start(*_):
            raise RendezvousTimeoutError

        return start

    monkeypatch.setattr(ranks, "elastic_launch", launch)
    with pytest.raises(ValueError, match=r"2 processes of training.gpus did not meet on 127\.0\.0\.1"):
        run(demo, tmp_path, spec(training={"gpus": 2}))


@pytest.fixture(scope="module")
def two_processes(demo, tmp_path_factory):
    return run(demo, tmp_path_factory.mktemp("two"), spec(training={"gpus": 2, "epochs": 2}))


def test_two_processes_train_from_the_same_recipe(two_processes):
    assert read_json(two_processes / "pretrain.json")["steps"] == 6


def test_two_nodes_give_the_bytes_of_two_processes_on_one(two_processes, demo, tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv(nodes.RENDEZVOUS, f"127.0.0.1:{server.getsockname()[1]}")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # and undo what a node sets
    ssl_core = Path(sys.executable).with_name("ssl-core")
    with subprocess.Popen([ssl_core, "join"], cwd=tmp_path, stderr=subprocess.PIPE, text=True) as other:
        results = run(demo, tmp_path, spec(training={"nodes": 2, "epochs": 2}))
        _, output = other.communicate(timeout=60)
    assert other.returncode == 0, output
    for name in ("backbone.safetensors", "model.safetensors", "history.csv"):
        assert (results / name).read_bytes() == (two_processes / name).read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"batch_size": 1}}, "batch_size gives one image per forward pass, .* use at least two images"),
        ({"training": {"batch_size": 256}}, "a batch of 256 images .* is larger than demo/train with 96"),
        ({"training": {"warmup_epochs": 9}}, "warmup_epochs 9 must be below training.epochs 4"),
        ({"method": {"queue_size": 97}}, "queue_size 97 is larger than the data set .96 images."),
        ({"training": {"epoch": 8}}, "training.epoch: unknown key; did you mean 'epochs'"),
        ({"dataset": {"subset": {"images": 5000}}}, "subset.images 5000 is more than demo/train has .1437."),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(changes, words, demo, tmp_path):
    with pytest.raises(ValueError, match=words) as error:
        run(demo, tmp_path, spec(**changes))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_a_checkpoint_of_another_configuration_is_set_aside_with_a_message(demo, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoints" / "tiny.pt"
    stopped(demo, tmp_path)
    run(demo, tmp_path, spec(method={"student_temperature": 0.2}))
    words = capsys.readouterr()
    assert "method.student_temperature (was not set, is 0.2)" in words.out + words.err
    assert checkpoint.with_suffix(".other.pt").exists()


def stopped(manifest: Path, folder: Path) -> None:
    """Start a run and end it by SIGTERM once it has written a checkpoint."""
    checkpoint = folder / "checkpoints" / "tiny.pt"

    def send() -> None:
        while not checkpoint.exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with pytest.raises(SystemExit) as stop:
        run(manifest, folder, spec(training={"epochs": 400, "checkpoint_minutes": 1e-9}))
    assert stop.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("subset", [None, Subset(images=8000, seed=3)])
def test_the_online_knn_uses_images_of_the_subset(subset):
    watched = Subset(images=pretrain.PROBE_IMAGES, seed=subset.seed if subset else 0)
    assert pretrain.watched(Dataset(name="large", subset=subset), 20000).subset == watched
    own = range(20000) if subset is None else draw_subset(20000, subset, "large")
    assert set(draw_subset(20000, watched, "large")) <= set(own)
    few = Dataset(name="small", subset=Subset(images=50))
    assert pretrain.watched(few, 20000) == few
