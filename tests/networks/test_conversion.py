"""Public checkpoints: names of the authors' code, safe unpickling, and one line for each mistake."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18

from ssl_core import cli
from ssl_core.blocks.frozen_teacher import FrozenTeacher, Teacher
from ssl_core.config import Backbone
from ssl_core.methods.dino import load_head
from ssl_core.methods.swav import load_prototypes
from ssl_core.networks.backbones import build_backbone, read_tensors
from ssl_core.networks.conversion import LAYOUTS

IMAGES = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
Encoder = Callable[[Tensor], Tensor]


def trained(module: nn.Module) -> nn.Module:
    """Give BatchNorm statistics that are not the initial ones."""
    with torch.no_grad():
        module.train()(torch.randn(8, 3, 64, 64))
    return module.eval()


def network(head: nn.Module) -> Any:
    """Return torchvision's ResNet-18 as the authors build it: the projector takes the place of the classifier."""
    torch.manual_seed(0)
    module: Any = resnet18()
    module.fc = head
    return trained(module)


def wrapped(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in module.state_dict().items()}


def moco() -> tuple[Any, Encoder]:
    module = network(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16)))
    state = {**wrapped("module.encoder_q.", module), **wrapped("module.encoder_k.", network(nn.Linear(512, 16)))}
    return {"epoch": 200, "arch": "resnet18", "state_dict": {**state, "module.queue": torch.ones(16, 4)}}, module


def moco_v1() -> tuple[Any, Encoder]:
    module = network(nn.Linear(512, 16))
    return {"state_dict": wrapped("module.encoder_q.", module)}, module


def swav() -> tuple[Any, Encoder]:
    head = nn.Sequential(nn.Linear(512, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    module = network(head)
    state = {name.replace("fc.", "projection_head."): value for name, value in wrapped("module.", module).items()}
    return {**state, "module.prototypes.weight": torch.ones(5, 16)}, module


def simsiam() -> tuple[Any, Encoder]:
    layers = [nn.Linear(512, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU()]
    head = nn.Sequential(*layers, nn.Linear(512, 16), nn.BatchNorm1d(16, affine=False))
    module = network(head)
    return {
        "state_dict": {**wrapped("module.encoder.", module), "module.predictor.0.weight": torch.ones(4, 16)}
    }, module


def byol() -> tuple[Any, Encoder]:
    head = nn.Sequential(nn.Linear(512, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    module = network(head)
    encoder = nn.Sequential(*list(module.children())[:-1])
    state = wrapped("module.online_network.encoder.", encoder)
    for number, name in enumerate(("l1", "bn1", "relu1", "l2")):
        state |= wrapped(f"module.online_network.projetion.{name}.", head[number])
    target = {name.replace("online", "target"): torch.zeros_like(value) for name, value in state.items()}
    return {"model": {**state, **target}, "steps": 3}, module


def dino() -> tuple[Any, Encoder]:
    module = trained(build_backbone(Backbone(name="vit_tiny_16"), 64))
    head = {"module.head.mlp.0.weight": torch.ones(4, 192), "module.head.last_layer.weight_g": torch.ones(4, 1)}
    student = {**wrapped("module.backbone.", build_backbone(Backbone(name="vit_tiny_16"), 64)), **head}
    teacher = {**wrapped("backbone.", module), "head.mlp.0.weight": torch.ones(4, 192)}
    return {"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(arch="vit_tiny")}, module


def dino_backbone() -> tuple[Any, Encoder]:
    module = network(nn.Identity())
    return module.state_dict(), module


CHECKPOINTS = {
    "moco": (moco, "resnet18", True),
    "moco v1": (moco_v1, "resnet18", True),
    "swav": (swav, "resnet18", True),
    "simsiam": (simsiam, "resnet18", True),
    "byol": (byol, "resnet18", True),
    "dino": (dino, "vit_tiny_16", False),
    "dino backbone": (dino_backbone, "resnet18", False),
}


def convert(folder: Path, content: Any, layout: str, *options: str, backbone: str = "resnet18") -> int:
    torch.save(content, folder / "checkpoint.pth")
    files = [str(folder / "checkpoint.pth"), "-o", str(folder / "out.safetensors")]
    return cli.main(["convert", *files, "--layout", layout, "--backbone", backbone, "--image-size", "64", *options])


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only line that was printed, an error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_converted_checkpoint_computes_what_the_original_did(name: str, tmp_path: Path) -> None:
    make, backbone, has_projector = CHECKPOINTS[name]
    content, original = make()
    assert convert(tmp_path, content, name.split()[0], backbone=backbone) == 0
    out = str(tmp_path / "out.safetensors")
    teacher = FrozenTeacher(Teacher(weights=out, projector=out if has_projector else None))
    with torch.no_grad():
        torch.testing.assert_close(teacher(IMAGES), original(IMAGES), atol=1e-5, rtol=1e-4)
    _, header = read_tensors(Path(out))
    assert header["layout"] == name.split()[0]


def test_swavs_normalisation_is_its_codes(tmp_path: Path) -> None:
    convert(tmp_path, swav()[0], "swav")
    assert read_tensors(tmp_path / "out.safetensors")[1]["std"] == "[0.228, 0.224, 0.225]"


def test_swavs_prototypes_come_with_its_projector(tmp_path: Path, capsys: Any) -> None:
    assert convert(tmp_path, swav()[0], "swav") == 0
    assert "projector to 16 dimensions and 5 prototypes" in capsys.readouterr().out
    prototypes = load_prototypes(tmp_path / "out.safetensors")
    assert prototypes is not None
    assert torch.equal(prototypes, torch.ones(5, 16))


def test_dinos_head_computes_what_the_original_did(tmp_path: Path, capsys: Any) -> None:
    backbone = network(nn.Identity())
    layers = nn.Sequential(nn.Linear(512, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))
    outputs: Any = nn.utils.weight_norm(nn.Linear(4, 5, bias=False))  # as in DINO's code
    outputs.weight_g.data.uniform_(0.5, 2)
    head = {**wrapped("head.mlp.", layers), **wrapped("head.last_layer.", outputs)}
    teacher = {**wrapped("backbone.", backbone), **head}
    assert convert(tmp_path, {"teacher": teacher, "epoch": 3}, "dino") == 0
    assert "DINO's head with 5 outputs" in capsys.readouterr().out
    rebuilt, num_outputs = load_head(tmp_path / "out.safetensors", 512)
    rows = torch.randn(3, 512)
    assert num_outputs == 5
    torch.testing.assert_close(rebuilt(rows), outputs(F.normalize(layers(rows), dim=1)))
    out = str(tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="its projector does not consist of plain layers: leave out"):
        FrozenTeacher(Teacher(weights=out, projector=out))  # of a method that embeds


def test_a_projector_can_be_left_out_and_one_that_is_missing_is_reported(tmp_path: Path, capsys: Any) -> None:
    content = {"state_dict": wrapped("module.encoder_q.", network(nn.Identity()))}
    assert convert(tmp_path, content, "moco") == 2
    assert "has no projector, expected one in the layout moco: add --backbone-only" in error(capsys)
    assert convert(tmp_path, content, "moco", "--backbone-only") == 0
    assert convert(tmp_path, moco()[0], "moco", "--backbone-only", "--force") == 0
    assert not any(name.startswith("projector") for name in read_tensors(tmp_path / "out.safetensors")[0])


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    layout: str, zipped: bool, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {}, "args": Code()}
    torch.save(content, "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    assert cli.main(["convert", "checkpoint.pth", "--layout", layout, "-o", "out.safetensors"]) == 2
    assert "it contains posix.mkdir, which could run code; expected tensors and plain containers" in error(capsys)
    assert os.listdir() == ["checkpoint.pth"]


def test_only_dinos_files_may_contain_their_arguments(tmp_path: Path, capsys: Any) -> None:
    assert convert(tmp_path, {**moco()[0], "args": argparse.Namespace()}, "moco") == 2
    assert "it contains argparse.Namespace, which could run code" in error(capsys)
    assert convert(tmp_path, {"teacher": {}, "args": argparse.Namespace(hook=Code())}, "dino") == 2
    assert "it contains posix.mkdir" in error(capsys)


@pytest.mark.parametrize(
    ("content", "layout", "message"),
    [
        (moco, "swav", "does not have the layout swav: use --layout moco"),
        (swav, "moco", "does not have the layout moco: use --layout swav"),
        (simsiam, "byol", "does not have the layout byol: use --layout simsiam"),
        (dino, "moco", "it contains argparse.Namespace, which could run code"),
        (lambda: ({"model": 3, "epoch": 1}, None), "moco", "it contains model, epoch, expected a checkpoint of one of"),
        (lambda: ({0: torch.ones(1)}, None), "dino", "it contains 0, expected a checkpoint of one of"),
        (lambda: ([1, 2], None), "dino", "it contains list, expected a checkpoint of one of moco, swav"),
    ],
)
def test_another_layout_is_named(content: Any, layout: str, message: str, tmp_path: Path, capsys: Any) -> None:
    assert convert(tmp_path, content()[0], layout) == 2
    assert message in error(capsys)


def test_another_network_a_missing_and_a_damaged_file_are_refused(tmp_path: Path, capsys: Any) -> None:
    assert convert(tmp_path, moco()[0], "moco", backbone="resnet50") == 2
    assert "does not fit ResNet: layer1.0.conv3.weight is missing" in error(capsys)
    content = (tmp_path / "checkpoint.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(content[:5000])
    arguments = ["--layout", "moco", "-o", str(tmp_path / "out.safetensors")]
    assert cli.main(["convert", str(tmp_path / "checkpoint.pth"), *arguments]) == 2
    assert "is truncated or no file by torch.save" in error(capsys)
    assert cli.main(["convert", "nowhere.pth", *arguments]) == 2
    assert "nowhere.pth does not exist" in error(capsys)
    assert not (tmp_path / "out.safetensors").exists()


def test_an_existing_file_is_kept(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "out.safetensors").write_text("mine")
    assert convert(tmp_path, moco()[0], "moco") == 2
    assert "exists: give another name, or --force to replace it" in error(capsys)
    assert (tmp_path / "out.safetensors").read_text() == "mine"


def test_the_checkpoint_is_never_its_own_output(tmp_path: Path, capsys: Any) -> None:
    torch.save(moco()[0], tmp_path / "checkpoint.pth")
    (tmp_path / "link.pth").symlink_to("checkpoint.pth")
    content = (tmp_path / "checkpoint.pth").read_bytes()
    arguments = ["convert", str(tmp_path / "checkpoint.pth"), "--layout", "moco", "--force", "-o"]
    for name in ("checkpoint.pth", "link.pth"):
        assert cli.main([*arguments, str(tmp_path / name)]) == 2
        assert "is the checkpoint itself: give another name" in error(capsys)
    assert (tmp_path / "checkpoint.pth").read_bytes() == content


def test_the_command_line_names_all_layouts() -> None:
    assert set(cli.LAYOUTS) == set(LAYOUTS)
