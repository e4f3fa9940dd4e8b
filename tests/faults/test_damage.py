"""A damaged file is recognised by any changed bit and named; no stage trains on it or evaluates it."""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from ssl_core.config import Backbone
from ssl_core.data.shards import Manifest, verify
from ssl_core.networks.backbones import build_backbone, load_backbone, read_tensors, save_backbone, write_tensors
from ssl_core.stages import evaluate, pretrain, shard
from ssl_core.training.checkpoint import (
    Identity,
    load_checkpoint,
    previous_checkpoint,
    remove_checkpoint,
    save_checkpoint,
)

from .conftest import KNN, SPEC

FLIPS = 1000 if "--long" in sys.argv else 100
Result = TypeVar("Result")
MINE = Identity(spec='{"method":{"name":"ressl"}}', code="c", data="d")


def flipped(content: bytes, generator: random.Random) -> bytes:
    """Change one bit."""
    changed = bytearray(content)
    changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


def attempt(read: Callable[[Path], Result], path: Path) -> Result | str:
    """Return the result of `read`, or the message of its `ValueError`."""
    try:
        return read(path)
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def shards(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "shards"
    working = os.getcwd()
    os.chdir(bare)
    shard.run(Path("datasets/tiny.yaml"), folder, threads=1)
    os.chdir(working)
    return folder


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shards, tmp_path / "shards")


@pytest.mark.parametrize("name", ["train-000000.tar", "train-000000.idx"])
def test_a_flipped_bit_in_a_shard_is_found(name: str, copy: Path) -> None:
    path, generator = copy / name, random.Random(name)
    whole, manifest = path.read_bytes(), Manifest.load(copy / "manifest.json")
    for _ in range(FLIPS):
        path.write_bytes(flipped(whole, generator))
        with pytest.raises(ValueError, match=rf"{name} (is not the file that was written|has \d+ lines instead)"):
            verify(manifest, "train", deep=True)


# Maps a file, cuts it and reads it, in a thread.
CUT = """
import mmap, os, sys, threading
from ssl_core.experiments.processes import report_bus_error

def check():
    if sys.argv[2] == "changed":
        raise ValueError("x.tar has 0 bytes instead of 4096: shard again")

def cut_and_read():
    with open(sys.argv[1], "rb+") as file:
        content = mmap.mmap(file.fileno(), 0)
        file.truncate(0)
        content[0]

report_bus_error(check)
thread = threading.Thread(target=cut_and_read)
thread.start()
thread.join()
"""


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ("changed", "x.tar has 0 bytes instead of 4096: shard again"),
        ("equal", "all shards are whole; look for a changed file of weights or a failing disk"),
    ],
)
def test_a_bus_error_ends_in_one_line(state: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(4096))
    command = [sys.executable, "-c", CUT, str(tmp_path / "x"), state]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == f"error: a file was cut short while it was read (SIGBUS): {reason}\n"


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("train-000000.tar", lambda path: path.unlink(), "is missing"),
        ("train-000000.idx", lambda path: path.unlink(), "is missing"),
        ("train-000000.tar", lambda path: os.truncate(path, 20_000), "has 20000 bytes instead of"),
        ("train-000000.idx", lambda path: os.truncate(path, 100), "has 2 lines instead of 49"),
    ],
)
def test_stages_refuse_shards_that_are_missing_or_cut(
    name: str, damage: Callable[[Path], None], words: str, copy: Path, tmp_path: Path
) -> None:
    damage(copy / name)
    with pytest.raises(ValueError, match=f"{name} {words}.*: remove .* and run the workflow again"):
        learn(copy, tmp_path)
    assert not (tmp_path / "results").exists()


def learn(shards: Path, folder: Path) -> None:
    """Run the stage `pretrain` with the arguments of its rule."""
    pretrain.run(
        "tiny",
        spec=SPEC,
        code="c",
        manifest=shards / "manifest.json",
        output=folder / "results",
        checkpoint=folder / "checkpoints" / "tiny.pt",
        threads=1,
    )


def test_a_damaged_shard_is_made_again_by_its_stage(copy: Path, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bare)
    whole = {path.name: path.read_bytes() for path in copy.glob("[a-z]*")}
    generator = random.Random(1)
    for name in ("train-000000.tar", "test-000000.idx"):
        (copy / name).write_bytes(flipped(whole[name], generator))
    (copy / "extra_a-000000.tar").unlink()
    (copy / "extra_b-000000.idx").unlink()
    shard.run(Path("datasets/tiny.yaml"), copy, threads=1)
    assert {path.name: path.read_bytes() for path in copy.glob("[a-z]*")} == whole


def test_a_flipped_bit_in_a_manifest_is_found(copy: Path) -> None:
    path, generator = copy / "manifest.json", random.Random(2)
    whole, content, spaces = path.read_bytes(), Manifest.load(path), 0
    for _ in range(FLIPS):
        path.write_bytes(flipped(whole, generator))
        result = attempt(Manifest.load, path)
        if isinstance(result, Manifest):  # one whitespace character became another
            assert result == content
            spaces += 1
        else:
            assert str(path) in result
            assert "\n" not in result
    assert spaces < FLIPS / 3


def test_an_edited_manifest_is_refused_until_its_checksum_is_removed(copy: Path) -> None:
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    content["mean"][0] = 0.25
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"manifest\.json was changed after it was written"):
        Manifest.load(path)
    del content["sha256"]
    path.write_text(json.dumps(content))
    assert Manifest.load(path).mean[0] == 0.25


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("mean", 0), float("nan"), "mean.0: .*finite"),
        (("splits", "train", "images"), 49, "splits.train: .*its shards hold 48"),
        (("splits", "train", "shards", 0, "file"), "../other/train-000000.tar", "splits.train.shards.0.file: "),
        (("version",), 2, "version: "),
        (("splits", "train", "shards"), None, "splits.train.shards: "),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    place: tuple[str | int, ...], value: object, words: str, copy: Path
) -> None:
    path = copy / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    part = content
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"manifest\.json is not a manifest \({words}"):
        Manifest.load(path)


STATE = {"step": 7, "weights": torch.arange(3000.0), "nested": {"rate": 0.5, "rows": [torch.ones(2, 3)]}}


def test_a_flipped_bit_in_a_checkpoint_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, generator, kept = tmp_path / "run.pt", random.Random(3), 0
    save_checkpoint(path, STATE, MINE)
    whole = path.read_bytes()
    for _ in range(FLIPS):
        path.write_bytes(flipped(whole, generator))
        state = load_checkpoint(path, MINE)
        if state is not None:  # the bit was one of padding
            assert same(state, STATE)
            kept += 1
    assert kept < FLIPS / 3
    output = capsys.readouterr()
    assert f"checkpoint {path} is set aside as run.damaged.pt" in output.out + output.err


def same(one: object, other: object) -> bool:
    """Return whether two states are equal bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, Tensor) and isinstance(other, Tensor) else one == other


def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.pt"
    for step in (1, 2, 3):
        save_checkpoint(path, {"step": step}, MINE)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.previous.pt", "run.pt"]
    os.truncate(path, 200)
    assert load_checkpoint(path, MINE) == {"step": 2}
    output = capsys.readouterr()
    assert "the one before it is used" in output.out + output.err
    save_checkpoint(path, {"step": 3}, MINE)
    remove_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.damaged.pt"]


def test_the_checkpoint_before_the_last_is_used_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"step": 1}, MINE)
    path.rename(previous_checkpoint(path))
    assert load_checkpoint(path, MINE) == {"step": 1}


def test_two_damaged_checkpoints_mean_to_start_afresh(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step}, MINE)
    path.write_bytes(b"")
    previous_checkpoint(path).write_bytes(b"nothing")
    assert load_checkpoint(path, MINE) is None
    output = capsys.readouterr()
    assert "training starts afresh" in output.out + output.err


def test_checkpoints_of_another_run_are_both_out_of_the_way(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step}, MINE)
    assert load_checkpoint(path, Identity(spec="{}", code="c", data="d")) is None
    assert [file.name for file in tmp_path.iterdir()] == ["run.other.pt"]


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.witness),)


def test_pickles_that_pose_as_checkpoints_run_no_code(tmp_path: Path) -> None:
    path, witness = tmp_path / "run.pt", tmp_path / "witness"
    path.write_bytes(pickle.dumps(Evil(witness)))
    assert load_checkpoint(path, MINE) is None
    torch.save({"identity": Evil(witness), "step": 1}, path)  # within torch's own format, checksums and all
    assert load_checkpoint(path, MINE) is None
    torch.save(Evil(witness), path, _use_new_zipfile_serialization=False)
    assert load_checkpoint(path, MINE) is None
    assert not witness.exists()


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, config = tmp_path_factory.mktemp("backbone") / "backbone.safetensors", Backbone(name="mobilenet_v3_small")
    metadata = {"seed": "0", "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"}
    save_backbone(path, build_backbone(config, 32), config, 32, metadata)
    return path


def test_a_flipped_bit_in_weights_is_found(tmp_path: Path) -> None:
    path, generator = tmp_path / "a.safetensors", random.Random(4)
    write_tensors(path, {"weight": torch.arange(60.0).reshape(6, 10)}, {"backbone": "resnet18", "mean": "[0.5]"})
    whole, expected, kept = path.read_bytes(), read_tensors(path), 0
    for _ in range(FLIPS):
        path.write_bytes(flipped(whole, generator))
        result = attempt(read_tensors, path)
        if isinstance(result, str):
            assert str(path) in result
            continue
        kept += 1  # the bit is part of the checksum's name
        assert same(result[0], expected[0])
        assert result[1].items() >= expected[1].items()
    assert kept < FLIPS / 10


def test_a_damaged_backbone_is_never_measured(backbone: Path, shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    content = bytearray(backbone.read_bytes())
    content[-100] ^= 64  # the exponent of one weight
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"backbone\.safetensors is not the file that was written"):
        evaluate.run(
            "tiny",
            "knn",
            spec=KNN,
            backbone=path,
            manifest=shards / "manifest.json",
            output=tmp_path / "knn.json",
            code="c",
            threads=1,
        )
    assert not (tmp_path / "knn.json").exists()


def with_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape: list[int], offsets: list[int], kind: str = "F32") -> bytes:
    return json.dumps({"a": {"dtype": kind, "shape": shape, "data_offsets": offsets}}).encode()


LIES = {
    "a header longer than the file": with_header(b"{}", length=1 << 20),
    "a header of 2**63 bytes": with_header(b"{}", length=1 << 63),
    "an empty file": b"",
    "no header": struct.pack("<Q", 0),
    "a header that is not JSON": with_header(b"{" * 64),
    "a header that is not text": with_header(b"\xff" * 64),
    "a header that is a list": with_header(b"[]"),
    "a header nested too deep": with_header(b"[" * 100_000),
    "data beyond the end": with_header(entry([4], [0, 16]), b"1234"),
    "data before the start": with_header(entry([4], [-16, 0]), bytes(16)),
    "a start behind the end": with_header(entry([4], [16, 0]), bytes(16)),
    "a shape of more numbers than data": with_header(entry([1 << 40, 1 << 40], [0, 16]), bytes(16)),
    "a negative shape": with_header(entry([-4], [0, 16]), bytes(16)),
    "an unknown type": with_header(entry([4], [0, 16], "F7"), bytes(16)),
    "data that no tensor claims": with_header(entry([1], [0, 4]), bytes(16)),
    "metadata that are not text": with_header(b'{"__metadata__": {"a": 1}}'),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES.keys())
def test_a_safetensors_header_that_lies_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.safetensors is truncated or no safetensors file"):
        load_backbone(path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"backbone": "{", "image_size": "32"}, "describes no known backbone"),
        ({"backbone": '{"name": "resnet18", "stem": "evil"}', "image_size": "32"}, "describes no known backbone"),
        ({"backbone": '{"name": "resnet18"}', "image_size": "many"}, "describes no known backbone"),
        ({"backbone": '{"name": "resnet18"}', "image_size": "-5"}, "describes no known backbone"),
        ({"backbone": '{"name": "resnet18"}', "image_size": "16000000"}, "describes no known backbone"),
        ({"backbone": '{"name": "resnet18"}'}, "is no backbone of this project"),
    ],
)
def test_a_backbone_whose_description_lies_is_refused(metadata: dict[str, str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(1)}, metadata)
    with pytest.raises(ValueError, match=words):
        load_backbone(path)
