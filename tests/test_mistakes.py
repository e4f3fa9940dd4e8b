"""Common mistakes: each gives one line with a remedy, which docs/errors.md lists."""

import errno
import io
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from ssl_core import cli
from ssl_core.stages import pretrain

ErrorOf = Callable[[list[str]], str]

GOOD: dict[str, Any] = {
    "dataset": {"name": "demo", "subset": {"images": 96}},
    "backbone": {"name": "resnet18", "stem": "tiny"},
    "method": {"name": "ressl", "queue_size": 64, "projector_hidden": 32, "embedding_dim": 16},
    "training": {"epochs": 4, "batch_size": 32, "warmup_epochs": 1},
}


@pytest.fixture
def error_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: Path) -> ErrorOf:
    """Return a function that runs a command, checks for exit code 2 and returns the error line."""
    monkeypatch.chdir(root)

    def run(arguments: list[str]) -> str:
        assert cli.main(arguments) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("error: ")
        return last.removeprefix("error: ")

    return run


@pytest.fixture(scope="session")
def documented(root: Path) -> str:
    """The text of docs/errors.md."""
    return (root / "docs" / "errors.md").read_text(encoding="utf-8")


EXPERIMENTS: list[tuple[dict[str, Any], str]] = [
    ({"training": {"batch_size": 128}}, "is larger than the data set (96 images): give 96 or less"),
    ({"method": {"queue_size": 97}}, "is larger than the data set (96 images), so that images would be"),
    ({"method": {"teacher_temperature": 0.3}}, "must not be above student_temperature"),
    ({"training": {"batch_size": 31, "accumulation": 2}}, "must be a multiple of gpus x accumulation"),
    ({"training": {"warmup_epochs": 9}}, "the learning rate would never come down"),
    ({"training": {"learning_rate": "1e-3"}}, "YAML wants a point in it: 1.0e-3"),
    ({"training": {"optimizer": "adam"}}, "did you mean 'adamw'?"),
    ({"training": {"lr": 0.1}}, "unknown key"),
    ({"training": {"optimizer": "adamw", "nesterov": True}}, "training.nesterov exists for sgd only"),
    ({"method": {"name": "resl"}}, "did you mean 'ressl'?"),
    ({"method": {"preset": "imagenett"}}, "did you mean 'imagenet'?"),
    ({"backbone": {"name": "torchvision/squeezenet1_1"}}, "it does not end in a linear classifier"),
    ({"backbone": {"name": "torchvision/regnet_y_400mf"}}, "has no tiny stem, use imagenet"),
    ({"backbone": {"stem": "imagenet"}}, "which leaves less than 1x1"),
    ({"dataset": {"name": "my_images"}}, "there is no data set"),
    ({"dataset": {"split": "tran"}}, "has no split"),
    ({"views": {"student": {"area": [1.0, 0.2]}}}, "is no range: the first number must not exceed the second"),
    ({"views": {"techer": {"size": 8}}}, "the method has no such views"),
    ({"views": {"teacher": {"count": 2}}}, "takes 1 of these views, found 2: leave it out"),
]


@pytest.mark.parametrize(("changes", "words"), EXPERIMENTS, ids=[words for _, words in EXPERIMENTS])
def test_a_wrong_experiment(
    changes: dict[str, Any], words: str, error_of: ErrorOf, documented: str, tmp_path: Path
) -> None:
    section: dict[str, Any] = dict(GOOD)
    for key, change in changes.items():
        section[key] = {**GOOD.get(key, {}), **change} if isinstance(change, dict) else change
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"experiments": {"mine": section}}))
    assert words in error_of(["explain", "mine", "--no-time", "--configfile", str(path)])
    assert words in documented


FILES = [
    ("experiments:\n\tmine: {}\n", "YAML wants spaces, not tabs"),
    ("experiments:\n  a: {}\n  a: {}\n", "appears twice in one section"),
    ("- mine\n", "expected keys at the top"),
    ("evaluations: {knn: {protocol: knnn}}\n", "did you mean 'knn'?"),
    ("experiments: {my exp: {}}\n", "the key 'dataset' is missing"),
]


@pytest.mark.parametrize(("text", "words"), FILES, ids=[words for _, words in FILES])
def test_a_wrong_file(text: str, words: str, error_of: ErrorOf, documented: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert words in error_of(["explain", "ressl_r18", "--no-time", "--configfile", str(path)])
    assert words in documented


def test_missing_weights(error_of: ErrorOf, documented: str, tmp_path: Path) -> None:
    section = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}, "weights": "no/such.safetensors"}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"experiments": {"mine": section}}))
    assert "mine.weights: there is no file 'no/such.safetensors'" in error_of(
        ["explain", "mine", "--configfile", str(path)]
    )
    assert "weights: there is no file" in documented


def test_a_missing_file_and_a_folder(error_of: ErrorOf, documented: str, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "is a folder: name a YAML file in it")):
        assert words in error_of(["explain", "ressl_r18", "--configfile", str(path)])
        assert words in documented


def test_a_folder_without_a_project(
    error_of: ErrorOf, documented: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "config.yaml does not exist: run in the project's folder (`ssl-core init DIR` makes one)"
    assert words in error_of(["explain", "ressl_r18"])
    assert words in documented


def test_a_target_after_configfile(error_of: ErrorOf, documented: str, root: Path) -> None:
    from ssl_core.experiments.overlays import check_config_files

    with pytest.raises(ValueError, match="write targets before --configfile") as error:
        check_config_files(["config.yaml", "results/ressl_r18/knn.json"])
    assert "follows --configfile, but is a target" in str(error.value)
    assert "follows --configfile, but is a target" in documented


def test_views_before_sharding(
    error_of: ErrorOf, documented: str, root: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    for name in ("config.yaml", "datasets", "workflow"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    words = "is not sharded yet: run `snakemake --cores all shards/demo/manifest.json` first"
    assert words in error_of(["views", "ressl_r18"])
    assert "is not sharded yet: run `snakemake --cores all" in documented


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (200, 30, 30)).save(path)


def write_card(folder: Path, source: dict[str, Any]) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "image_size": 8, "source": source}))
    return path


def broken_picture(folder: Path) -> None:
    picture(folder / "train" / "cat" / "1.png")
    path = folder / "train" / "cat" / "2.png"
    picture(path)
    path.write_bytes(path.read_bytes()[:40])


SOURCES: list[tuple[str, Callable[[Path], Any], dict[str, Any], str]] = [
    ("the path is wrong", lambda folder: None, {"path": "/no/such/folder"}, "does not exist: put the data there"),
    (
        "the variable is not set",
        lambda folder: None,
        {"path": "${NO_SUCH_DATA}"},
        "the environment variable NO_SUCH_DATA",
    ),
    ("the split's folder is missing", lambda folder: picture(folder / "trian" / "cat" / "1.png"), {}, "has no folder"),
    ("class folders are missing", lambda folder: picture(folder / "train" / "1.png"), {}, "is in no class folder"),
    ("there are no images", lambda folder: (folder / "train" / "cat").mkdir(parents=True), {}, "has no images"),
    ("an image is cut short", broken_picture, {}, "Repair or remove it, or set on_error: skip"),
    ("a folder is called a tar", lambda folder: None, {"type": "image_tar"}, "is a folder: set type: image_folder"),
    ("a key is misspelt", lambda folder: None, {"pth": "x"}, "did you mean 'path'?"),
]


@pytest.mark.parametrize(("make", "source", "words"), [case[1:] for case in SOURCES], ids=[case[0] for case in SOURCES])
def test_a_wrong_data_set(
    make: Callable[[Path], Any], source: dict[str, Any], words: str, error_of: ErrorOf, documented: str, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    make(images)
    section = {"type": "image_folder", "path": str(images), "splits": {"train": {"folder": "train"}}, **source}
    assert words in error_of(["shard", str(write_card(tmp_path, section)), "--output", str(tmp_path / "shards")])
    assert words.replace("NO_SUCH_DATA", "").strip() in documented


def test_a_missing_card(error_of: ErrorOf, documented: str, tmp_path: Path) -> None:
    assert "does not exist. Data sets in datasets: " in error_of(
        ["shard", "datasets/nine.yaml", "--output", str(tmp_path)]
    )
    assert "does not exist. Data sets in datasets: " in documented


def test_an_output_in_use(error_of: ErrorOf, documented: str, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "cat" / "1.png")
    card = write_card(tmp_path, {"type": "image_folder", "path": str(tmp_path / "images"), "splits": {"train": {}}})
    (tmp_path / "file").write_text("")
    words = "Not a directory: choose another path or move the file that blocks it"
    assert words in error_of(["shard", str(card), "--output", str(tmp_path / "file" / "mine")])
    assert words in documented
    (tmp_path / "theirs.tar").write_bytes(b"")
    words = "has tars that sharding did not write: choose another folder or empty it"
    assert words in error_of(["shard", str(card), "--output", str(tmp_path)])
    assert words in documented


def too_large() -> None:
    torch.empty(2**50)


def decoder_without_memory() -> None:
    try:
        raise RuntimeError("Error in CPU operator `nvidia.dali.fn.decoders.image`: std::bad_alloc")
    except RuntimeError as error:
        raise ValueError("an image cannot be read") from error


def cuda_without_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def dali_without_gpu_memory() -> None:
    raise RuntimeError(
        "Error in MIXED operator `nvidia.dali.fn.decoders.image`: Can't allocate 129499136 bytes on device 0."
    )


def file_error(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number), "results/x/model.safetensors")

    return fail


MACHINE: list[tuple[Callable[[], None], str]] = [
    (too_large, "out of memory: lower batch_size"),
    (decoder_without_memory, "out of memory: lower batch_size"),
    (dali_without_gpu_memory, "out of memory: lower batch_size"),
    (cuda_without_memory, "out of memory: lower batch_size"),
    (file_error(errno.ENOSPC), "no space left on the disk"),
    (file_error(errno.EACCES), "Permission denied: change the owner or mode"),
    (file_error(errno.EROFS), "change the owner or mode of the folder (chown, chmod) or choose another path"),
    (file_error(errno.EMFILE), "too many open files: raise the limit"),
]


@pytest.mark.parametrize(("fail", "words"), MACHINE)
def test_limits_of_the_machine(
    fail: Callable[[], None],
    words: str,
    error_of: ErrorOf,
    documented: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(pretrain, "run", lambda *names, **options: fail())
    log = tmp_path / "x.log"
    options = ["--spec", "{}", "--code", "c", "--manifest", "m", "--output", "o", "--checkpoint", "k"]
    line = error_of(["pretrain", "x", *options, "--log", str(log)])
    assert words in line
    assert line.endswith(f" (log: {log})")
    assert words in documented


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_a_python_without_venv(root: Path, tmp_path: Path, documented: str) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(root / name, tmp_path)
    python = tmp_path / "bare"
    python.write_text('#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\n')
    python.chmod(0o755)
    result = subprocess.run(["make", "install", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "cannot make environments: apt install python3-venv" in result.stderr
    assert "cannot make environments: apt install python3-venv" in documented


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_a_port_in_use(root: Path, documented: str) -> None:
    import socket
    import sys

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        command = ["make", "--old-file", ".venv/.installed", "ui", f"PORT={port}"]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert f"port {port} is in use" in result.stderr
    assert "is in use, perhaps by another make ui: say make ui PORT=5001" in documented


def test_progress_in_a_log_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_core import progress

    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress.progress_bar(30, "shards/demo", unit="images") as bar:
        bar.update(30)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("shards/demo: 30 of 30 images (100 %), ")
    assert line.endswith("images/s, 00:00 left")
