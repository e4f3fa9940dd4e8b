"""Common mistakes: each gives one line with a remedy, which docs/errors.md lists."""

import errno
import io
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from ssl_core import cli, progress
from ssl_core.experiments.overlays import check_config_files
from ssl_core.stages import pretrain

Refuse = Callable[..., str]

GOOD: dict[str, Any] = {
    "dataset": {"name": "demo", "subset": {"images": 96}},
    "backbone": {"name": "resnet18", "stem": "tiny"},
    "method": {"name": "ressl", "queue_size": 64, "projector_hidden": 32, "embedding_dim": 16},
    "training": {"epochs": 4, "batch_size": 32, "warmup_epochs": 1},
}


@pytest.fixture(scope="session")
def documented(root: Path) -> str:
    """The text of docs/errors.md."""
    return (root / "docs" / "errors.md").read_text(encoding="utf-8")


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], root: Path, documented: str) -> Refuse:
    """Return a function that runs a command and expects exit code 2 and an error line with words of docs/errors.md."""
    monkeypatch.chdir(root)

    def run(words: str, *arguments: str | Path, quoted: str | None = None) -> str:
        assert cli.main([*map(str, arguments)]) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last.startswith("error: ")
        assert words in last
        assert (quoted or words) in documented
        return last

    return run


def configuration(folder: Path, content: str | dict[str, Any]) -> Path:
    """Write an overlay: its text, or the settings of an experiment `mine`."""
    path = folder / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump({"experiments": {"mine": content}}))
    return path


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
def test_a_wrong_experiment(changes: dict[str, Any], words: str, refuse: Refuse, tmp_path: Path) -> None:
    section = GOOD | {key: {**GOOD.get(key, {}), **change} for key, change in changes.items()}
    refuse(words, "explain", "mine", "--no-time", "--configfile", configuration(tmp_path, section))


FILES = [
    ("experiments:\n\tmine: {}\n", "YAML wants spaces, not tabs"),
    ("experiments:\n  a: {}\n  a: {}\n", "appears twice in one section"),
    ("- mine\n", "expected keys at the top"),
    ("evaluations: {knn: {protocol: knnn}}\n", "did you mean 'knn'?"),
    ("experiments: {my exp: {}}\n", "the key 'dataset' is missing"),
]


@pytest.mark.parametrize(("text", "words"), FILES, ids=[words for _, words in FILES])
def test_a_wrong_file(text: str, words: str, refuse: Refuse, tmp_path: Path) -> None:
    refuse(words, "explain", "ressl_r18", "--no-time", "--configfile", configuration(tmp_path, text))


def test_missing_weights(refuse: Refuse, tmp_path: Path) -> None:
    section = {"dataset": {"name": "demo"}, "backbone": {"name": "resnet18"}, "weights": "no/such.safetensors"}
    words = "mine.weights: there is no file 'no/such.safetensors'"
    path = configuration(tmp_path, section)
    refuse(words, "explain", "mine", "--configfile", path, quoted="weights: there is no file")


def test_a_missing_file_and_a_folder(refuse: Refuse, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.yaml", "does not exist"), (tmp_path, "is a folder: name a YAML file in it")):
        refuse(words, "explain", "ressl_r18", "--configfile", path)


def test_a_folder_without_a_project(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = "config.yaml does not exist: run in the project's folder (`ssl-core init DIR` makes one)"
    refuse(words, "explain", "ressl_r18")


def test_a_target_after_configfile(documented: str) -> None:
    with pytest.raises(ValueError, match="follows --configfile, but is a target: write targets before --configfile"):
        check_config_files(["config.yaml", "results/ressl_r18/knn.json"])
    assert "follows --configfile, but is a target" in documented


def test_views_before_sharding(refuse: Refuse, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.yaml", "datasets", "workflow"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    words = "is not sharded yet: run `snakemake --cores all"
    refuse(f"{words} shards/demo/manifest.json` first", "views", "ressl_r18", quoted=words)


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
    make: Callable[[Path], Any], source: dict[str, Any], words: str, refuse: Refuse, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    make(images)
    section = {"type": "image_folder", "path": str(images), "splits": {"train": {"folder": "train"}}, **source}
    quoted = words.replace("NO_SUCH_DATA", "").strip()
    refuse(words, "shard", write_card(tmp_path, section), "--output", tmp_path / "shards", quoted=quoted)


def test_a_missing_card(refuse: Refuse, tmp_path: Path) -> None:
    refuse("does not exist. Data sets in datasets: ", "shard", "datasets/nine.yaml", "--output", tmp_path)


def test_an_output_in_use(refuse: Refuse, tmp_path: Path) -> None:
    picture(tmp_path / "images" / "cat" / "1.png")
    card = write_card(tmp_path, {"type": "image_folder", "path": str(tmp_path / "images"), "splits": {"train": {}}})
    (tmp_path / "file").write_text("")
    words = "Not a directory: choose another path or move the file that blocks it"
    refuse(words, "shard", card, "--output", tmp_path / "file" / "mine")
    (tmp_path / "theirs.tar").write_bytes(b"")
    words = "has tars that sharding did not write: choose another folder or empty it"
    refuse(words, "shard", card, "--output", tmp_path)


def too_large() -> None:
    torch.empty(2**50)


def decoder_without_memory() -> None:
    try:
        raise RuntimeError("Error in CPU operator `nvidia.dali.fn.decoders.image`: std::bad_alloc")
    except RuntimeError as error:
        raise ValueError("an image cannot be read") from error


def reader_without_files() -> None:
    try:
        raise RuntimeError(
            "Error in CPU operator `nvidia.dali.fn.readers.webdataset`: [file_stream.cc:57] Assert on "
            '"fp_ != nullptr" failed: Could not open file train-019997.tar: Too many open files'
        )
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
    (reader_without_files, "too many open files: raise the limit"),
    (cuda_without_memory, "out of memory: lower batch_size"),
    (file_error(errno.ENOSPC), "no space left on the disk"),
    (file_error(errno.EACCES), "Permission denied: change the owner or mode"),
    (file_error(errno.EROFS), "change the owner or mode of the folder (chown, chmod) or choose another path"),
    (file_error(errno.EMFILE), "too many open files: raise the limit"),
]


@pytest.mark.parametrize(("fail", "words"), MACHINE)
def test_limits_of_the_machine(
    fail: Callable[[], None], words: str, refuse: Refuse, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pretrain, "run", lambda *names, **options: fail())
    log = tmp_path / "x.log"
    options = ["--spec", "{}", "--code", "c", "--manifest", "m", "--output", "o", "--checkpoint", "k"]
    assert refuse(words, "pretrain", "x", *options, "--log", log).endswith(f" (log: {log})")


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_a_python_without_venv(root: Path, tmp_path: Path, documented: str) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-slurm.lock"):
        shutil.copy(root / name, tmp_path)
    python = tmp_path / "bare"
    python.write_text('#!/bin/sh\ncase "$*" in *ensurepip*) exit 1 ;; esac\n')
    python.chmod(0o755)
    result = subprocess.run(["make", "install", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert "cannot make environments: apt install python3-venv" in result.stderr
    assert "cannot make environments: apt install python3-venv" in documented


def test_a_port_in_use(documented: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["ui", f"--port={port}"]) == 2
    message = "error: port {} is in use, perhaps by another `ssl-core ui`: choose one with --port {}"
    assert capsys.readouterr().err == f"{message.format(port, port + 1)}\n"
    assert message.format(5000, 5001) in documented


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_ui_passes_the_port(root: Path) -> None:
    command = ["make", "--no-print-directory", "--dry-run", "--old-file", ".venv/.installed", "ui", "PORT=5001"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "ssl-core ui --port 5001"


def test_progress_in_a_log_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    with progress.progress_bar(30, "shards/demo", unit="images") as bar:
        bar.update(30)
    (line,) = stream.getvalue().splitlines()
    assert line.startswith("shards/demo: 30 of 30 images (100 %), ")
    assert line.endswith("images/s, 00:00 left")
