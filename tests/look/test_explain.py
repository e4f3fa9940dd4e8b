"""`explain`, `views` and `doctor`, in a temporary project with a tiny data set."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ssl_core import cli
from ssl_core.config import Backbone, Training
from ssl_core.data.shards import Manifest, Split, new_shard
from ssl_core.experiments import overlays
from ssl_core.look import doctor, explain, forecast
from ssl_core.methods.base import resolve
from ssl_core.networks.backbones import build_backbone
from ssl_core.training.memory import count, estimate

RunCommand = Callable[..., str]

CONFIG: dict[str, Any] = {
    "experiments": {
        "first": {
            "dataset": {"name": "tiny"},
            "backbone": {"name": "mobilenet_v3_small", "stem": "small"},
            "method": {"name": "ressl", "queue_size": 16, "projector_hidden": 8, "embedding_dim": 8},
            "views": {"teacher": {"augmentation": "none"}},
            "training": {"epochs": 2, "batch_size": 8, "warmup_epochs": 1, "precision": "fp32"},
        }
    },
    "sweeps": {"heat": {"base": "first", "grid": {"method.teacher_temperature": [0.02, 0.05]}}},
}
OVERLAY = {"experiments": {"first": {"method": {"student_augmentation": "simclr"}, "training": {"epochs": 3}}}}


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data set has twenty images, sharded."""
    folder = tmp_path_factory.mktemp("project")
    random = np.random.default_rng(0)
    for number in range(20):
        path = folder / "images" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    (folder / "workflow").symlink_to(root / "workflow")
    (folder / "datasets").mkdir()
    source = {"type": "image_folder", "path": str(folder / "images"), "splits": {"train": {}}}
    for name in ("tiny", "unsharded"):
        card = {"name": name, "image_size": 16, "avoid": ["flip"], "source": source}
        (folder / "datasets" / f"{name}.yaml").write_text(yaml.safe_dump(card))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "mine.yaml").write_text(yaml.safe_dump(OVERLAY))
    assert cli.main(["shard", str(folder / "datasets" / "tiny.yaml"), "--output", str(folder / "shards" / "tiny")]) == 0
    return folder


@pytest.fixture
def run_command(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCommand:
    """Return a function that runs a command in the project and returns its output."""
    monkeypatch.chdir(project)

    def run(*arguments: str) -> str:
        assert cli.main(arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def explained(project: Path) -> str:
    """The output of `explain` for the first experiment with the overlay."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.chdir(project)
        assert cli.main(["explain", "first", "--no-time", "--configfile", "mine.yaml"]) == 0
    return output.getvalue()


def test_the_settings_are_yaml_that_resolves_to_the_same_experiment(explained: str) -> None:
    section = yaml.safe_load(explained)
    assert resolve(section) == resolve(overlays.merge(CONFIG, OVERLAY)["experiments"]["first"])
    assert max(map(len, explained.splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "origin"),
    [
        ("queue_size: 16", "config.yaml"),
        ("epochs: 3", "mine.yaml"),
        ("solarize: 0.0", "mine.yaml (simclr)"),
        ("student_temperature: 0.1", "preset small"),
        ("learning_rate: 0.06", "preset small"),
        ("gradient_clip: null", "default"),
    ],
)
def test_each_value_has_its_origin(line: str, origin: str, explained: str) -> None:
    (row,) = [row for row in explained.splitlines() if row.strip().startswith(line + " ")]
    assert row.endswith(f"  # {origin}")


def test_the_presets_source_is_printed(explained: str) -> None:
    assert "# preset small: Zheng et al., journal version, small images (docs/sources.md#ressl)" in explained


def test_a_batch_that_cannot_fit_names_the_settings(run_command: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain, "capacity", lambda training: 0.902e9)  # little more than the libraries
    output = run_command("explain", "first", "--no-time").replace("\n#      ", "")
    assert "does not fit: training.batch_size 8 needs about 1 GB per process for 8 images at once" in output


def test_a_point_of_a_sweep_names_the_sweep_as_origin(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    loaded = overlays.load_configuration([])
    assert loaded.origin("heat-0.02", ("method", "teacher_temperature")) == "sweep heat"
    assert loaded.origin("heat-0.02", ("method", "queue_size")) == "config.yaml"
    assert loaded.origin("heat-0.02", ("method", "warmup")) is None


def test_it_counts_images_steps_and_batches(explained: str) -> None:
    assert "20 images: 2 steps per epoch, 6 in all (each epoch leaves out 4 other images)" in explained
    assert "effective learning rate: 0.001875 = 0.06 x 8 / 256, sgd" in explained
    assert "seen by teacher" in explained
    assert "tiny's card switches off flip" in explained


def test_it_counts_the_decoded_images_of_a_batch(explained: str) -> None:
    assert "stored images: 256 pixels on average, 256 pixels at most" in explained
    assert "decoded images 6.14 kB" in explained.replace("\n#      ", "")  # 3 bytes x 256 pixels x 8 images


def test_sizes_of_decoded_images_are_read_from_their_headers(tmp_path: Path) -> None:
    with new_shard(tmp_path / "train-000000.tar") as writer:
        for number, side in enumerate((20, 50)):
            file = io.BytesIO()
            Image.new("RGB", (side, 10)).save(file, "JPEG", icc_profile=bytes(100_000))  # a long header
            writer.add(number, "jpg", file.getvalue(), 0)
        shard = writer.close()
    split = Split(images=2, labelled=True, bytes=shard.bytes, class_counts=None, shards=(shard,), rejected=())
    (tmp_path / "manifest.json").write_text(
        Manifest(
            dataset="tiny",
            image_size=8,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
            classes=None,
            avoid=(),
            splits={"train": split},
        ).model_dump_json()
    )
    manifest = Manifest.load(tmp_path / "manifest.json")
    assert forecast.decoded_pixels(manifest, "train").tolist() == [200, 500]


def test_decoded_images_of_a_batch_vary_with_its_images() -> None:
    assert forecast.largest_batch(np.array([100]), 8) == 800
    photographs = np.array([10**7] + [10**5] * 99)
    assert 2e7 < forecast.largest_batch(photographs, 32) < 9e7  # some of 32 are the large one, never all


def test_ten_steps_are_timed_if_there_are_shards(run_command: RunCommand) -> None:
    output = run_command("explain", "first", "--threads", "1")
    assert "for 4 steps, without evaluations" in output
    assert "10 steps of 8 images took" in output
    assert "in float32" in output


def test_without_shards_it_prints_the_command_that_makes_them(
    project: Path, run_command: RunCommand, tmp_path: Path
) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(yaml.safe_dump({"experiments": {"first": {"dataset": {"name": "unsharded"}}}}))
    output = run_command("explain", "first", "--time", "--threads", "1", "--configfile", str(path))
    assert "before `snakemake --cores all shards/unsharded/manifest.json`" in output.replace("\n#      ", "")
    assert "random images, since there are no shards" in output.replace("\n#      ", "")


def test_seeds_and_null_entries_work(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    path = tmp_path / "seeds.yaml"
    repeated = {**CONFIG["experiments"]["first"], "seeds": [0, 7]}
    path.write_text(yaml.safe_dump({"experiments": {"first": None, "again": repeated}, "sweeps": {"heat": None}}))
    loaded = overlays.load_configuration([path])
    assert loaded.experiment("again-seed7")["training"]["seed"] == 7
    assert loaded.origin("again-seed7", ("training", "seed")) == "seeds"
    with pytest.raises(ValueError, match="there is no experiment 'first'"):
        loaded.experiment("first")


def test_views_draws_the_first_views_of_training(run_command: RunCommand, tmp_path: Path) -> None:
    output = run_command("views", "first", "--threads", "1", "--output", str(tmp_path / "views.png"))
    assert "one column per image of tiny/train, one row per view" in output
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.width > picture.height  # eight columns, two rows


def test_flops_are_those_of_the_papers() -> None:
    network = build_backbone(Backbone(name="resnet18"), 224)
    assert forecast.forward_flop(network, 224) == pytest.approx(2 * 1.814e9, rel=0.01)  # 1.8 G multiply-adds


def test_a_step_costs_its_forward_and_backward_passes(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_core.look.subject import find_subject

    monkeypatch.chdir(project)
    subject = find_subject(overlays.load_configuration([]).experiment("first"))
    method = forecast.build(subject.resolved, 16, subject.views, num_images=20)
    walked = forecast.walk(method, subject.views, subject.resolved.training)
    # A student's pass forward and, about twice that, backward, and a teacher's; heads come on top.
    assert 3.7 < walked.step / walked.backbone < 4.5
    uses = {"activations": walked.activations, "num_images": 20}
    memory = estimate(method, subject.views, subject.resolved.training, **uses)
    assert memory["gradients and optimizer"] == 2 * 4 * count(method, trained=True)
    adamw = estimate(method, subject.views, Training(optimizer="adamw", batch_size=16), **uses)
    assert adamw["gradients and optimizer"] == 3 * 4 * count(method, trained=True)
    assert adamw["activations"] == 2 * memory["activations"]


def test_the_doctor_reports_what_works_and_what_fails(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project)
    assert doctor.examine()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["Python", "torch"]
    assert all(line.split()[0] in ("ok", "warning") for line in lines[:-1])
    assert any("tiny: train 20 images, all shards of the right size" in line for line in lines)
    monkeypatch.setattr("sys.executable", "/bin/false")  # DALI is tried in a process of its own
    assert not doctor.examine()
    assert any(line.startswith("fails    DALI") for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("address", ["http://me:secret@127.0.0.1:9", "postgresql://me:secret@host/mlflow"])
def test_the_doctor_prints_no_password(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_TRACKING", "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    (finding,) = doctor._database()
    assert finding.message.startswith(f"{address.partition(':')[0]}://***@")
    assert "secret" not in finding.message
