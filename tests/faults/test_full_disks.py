"""On a full disk the message names the file, the old content stays, and the same command resumes once there is room."""

import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from ssl_core.evaluations.parts import features
from ssl_core.files import write_json
from ssl_core.networks.backbones import read_tensors, write_tensors
from ssl_core.stages import shard
from ssl_core.training.checkpoint import Identity, load_checkpoint, save_checkpoint

from .conftest import Undisturbed, Warm, contents

MINE = Identity(spec="{}", code="c", data="d")


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Make the kernel refuse files longer than `size` bytes, for this process and those it starts."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN  # Python's default: the write raises instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def refusal(name: str) -> str:
    return rf"{name} cannot be written \(File too large\): make room and run again"


def test_a_checkpoint_without_room_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"step": 1, "weights": torch.ones(9)}, MINE)
    with no_room_beyond(20_000), pytest.raises(ValueError, match=refusal("run.pt")):
        save_checkpoint(path, {"step": 2, "weights": torch.ones(90_000)}, MINE)
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
    state = load_checkpoint(path, MINE)
    assert state is not None
    assert state["step"] == 1


def test_results_without_room_leave_the_old_ones(tmp_path: Path) -> None:
    tensors, results = tmp_path / "a.safetensors", tmp_path / "a.json"
    write_tensors(tensors, {"a": torch.ones(9)}, {})
    write_json(results, {"a": 1})
    with no_room_beyond(20_000):
        with pytest.raises(ValueError, match=refusal("a.safetensors")):
            write_tensors(tensors, {"a": torch.ones(90_000)}, {})
        with pytest.raises(ValueError, match=refusal("a.json")):
            write_json(results, {"a": "1" * 90_000})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "a.safetensors"]
    assert torch.equal(read_tensors(tensors)[0]["a"], torch.ones(9))
    assert results.read_text() == '{\n  "a": 1\n}\n'


def test_features_without_room_do_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MEMORY_LIMIT", 0)  # so that they go into a file, where a full disk would mean SIGBUS
    with no_room_beyond(20_000), pytest.raises(ValueError, match=refusal(r"ssl-core-features-\w+")):
        features.allocate(1000, 10)
    assert features.allocate(1000, 10).fill_(1).sum() == 10_000


def test_shards_without_room_are_not_written(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bare)
    card, output = Path("datasets/tiny.yaml"), tmp_path / "shards"
    with no_room_beyond(30_000), pytest.raises(ValueError, match=refusal(r"extra_a-000000\.\w+")):
        shard.run(card, output, threads=2)
    assert [file.name for file in output.iterdir()] == [".state.jsonl"]
    shard.run(card, output, threads=2)
    shard.run(card, tmp_path / "undisturbed", threads=2)
    for path in (tmp_path / "undisturbed").glob("[a-z]*"):
        assert (output / path.name).read_bytes() == path.read_bytes()


# Stage, folder on a separate disk, kB free on it, files of which the message names one (none: the stage succeeds).
DISKS = [
    ("shard", "shards", 400, ("shards/tiny/",)),
    ("shard", "shards", 8, ("shards/tiny/",)),
    ("pretrain", "checkpoints", 500, ("checkpoints/tiny.pt", "checkpoints/tiny.views.png")),
    ("pretrain", "checkpoints", 30_000, ("checkpoints/tiny.pt",)),  # room for one checkpoint, not for the next
    ("pretrain", "results", 2_000, ("results/tiny/",)),
    ("pretrain", "results", 12_000, ("results/tiny/",)),
    ("evaluate", "results", 0, ("results/tiny/knn.json",)),
    ("evaluate", "logs", 0, ()),
]


@pytest.mark.long
@pytest.mark.parametrize(("stage", "place", "free", "named"), DISKS)
def test_a_stage_on_a_full_disk_goes_on_when_there_is_room(
    stage: str, place: str, free: int, named: tuple[str, ...], warm: Warm, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    if not warm.has_namespace:
        pytest.skip("this machine does not let an unprivileged user mount a disk")
    folder = tmp_path / "project"
    shutil.copytree(undisturbed.before[stage], folder)
    disk = warm.mount(folder / place, "120m")
    if (folder / place).is_dir():
        shutil.copytree(folder / place, disk, dirs_exist_ok=True)
    with suppress(OSError), open(disk / "ballast", "wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size // 4096 * 4096 - free * 1024)
    before = files(disk)
    ended = warm.run(folder, stage, more=["--log", "logs/log.txt"])
    assert ended.status == (2 if named else 0), ended.output
    if named:
        line = ended.output.splitlines()[-1]
        assert line.startswith("error: "), ended.output
        assert "cannot be written (No space left on device): make room and run again" in line
        assert any(name in line for name in named), line
    assert files(disk).items() >= before.items()
    (disk / "ballast").unlink()
    ended = warm.run(folder, stage)
    assert ended.status == 0, ended.output
    if (place, free) == ("checkpoints", 30_000) or (stage, place) == ("pretrain", "results"):
        assert "continuing at step" in ended.output
    assert contents(Path(f"/proc/{warm.process}/root{folder}")) == contents(undisturbed.after[stage])


def files(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder by name."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
