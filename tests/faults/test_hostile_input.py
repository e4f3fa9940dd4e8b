"""Input made to do harm, or by broken tools, is refused in one line or handled; nothing is written elsewhere."""

import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssl_core.data.card import load_card
from ssl_core.data.shards import Manifest
from ssl_core.stages import shard
from tests.data.test_mutations import join_chunks, split_chunks
from tests.data.test_sources import png, tar

ODD_NAMES = {
    "a newline": "one\ntwo.png",
    "a tab and blanks": " \t  .a b.png",
    "quotes": "a'b\"c$(touch witness)`d`.png",
    "many scripts": "日本語 العربية ñ 🦆.png",
    "not UTF-8": os.fsdecode(b"caf\xe9.png"),
    "right to left": "\u202egnp.exe.png",
    "250 letters": "x" * 246 + ".png",
    "only dots": "...png.png",
    "a leading dash": "-rf.png",
}


def card(folder: Path, source: dict[str, Any], **more: Any) -> Path:
    path = folder / "evil.yaml"
    path.write_text(json.dumps({"name": "evil", "image_size": 8, "source": source, **more}))
    return path


def sharded(folder: Path, source: dict[str, Any], **more: Any) -> Manifest:
    shard.run(card(folder, source, **more), folder / "out", threads=1)
    return Manifest.load(folder / "out" / "manifest.json")


def refusal(folder: Path, source: dict[str, Any], **more: Any) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        sharded(folder, source, **more)
    assert not (folder / "out" / "manifest.json").exists()
    return " ".join(str(caught.value).split())


def outside(folder: Path) -> set[str]:
    """Return all files except those in the output folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "out" not in path.relative_to(folder).parts}


def test_a_tar_of_traps_writes_nothing_outside_and_reads_nothing_outside(tmp_path: Path) -> None:
    archive = tar(
        tmp_path / "evil.tar",
        {"cat/1.png": png(0), "../2.png": png(0), "/tmp/3.png": png(0), "cat/../../4.png": png(0), "dog/..": png(0)},
    )
    (tmp_path / "secret.png").write_bytes(png(0))
    with tarfile.open(archive, "a") as file:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        for number, kind in enumerate(kinds):
            for target in ("/dev/zero", "../secret.png", str(tmp_path / "secret.png")):
                member = tarfile.TarInfo(f"cat/{number}{len(target)}.png")
                member.type, member.linkname, member.devmajor, member.devminor = kind, target, 1, 5
                file.addfile(member)
    before = outside(tmp_path)
    manifest = sharded(tmp_path, {"type": "image_tar", "path": str(archive), "splits": {"train": {}}})
    assert manifest.split("train").images == 1
    assert manifest.classes == ("cat",)
    assert outside(tmp_path) == before | {"evil.yaml"}


def test_file_names_of_any_kind_become_short_keys(tmp_path: Path) -> None:
    for name in ODD_NAMES.values():
        place = tmp_path / "images" / name.removesuffix(".png").lstrip(".")[:200] / name
        place.parent.mkdir(parents=True)
        place.write_bytes(png(0))
    manifest = sharded(tmp_path, {"type": "image_folder", "path": str(tmp_path / "images"), "splits": {"train": {}}})
    shown = [name for name in ODD_NAMES.values() if not name.startswith(".")]  # as `ls` shows them
    assert manifest.split("train").images == len(shown)
    assert manifest.classes is not None
    assert len(set(manifest.classes)) == len(shown)
    with tarfile.open(manifest.tars("train")[0]) as written:
        assert all(len(name) < 30 and name[:8].isdecimal() for name in written.getnames())


def test_the_manifest_lists_bad_images_with_names_of_any_kind(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "good.png").write_bytes(png(0))
    for name in ODD_NAMES.values():
        (tmp_path / "images" / name).write_bytes(b"no image")
    source = {"type": "image_folder", "path": str(tmp_path / "images"), "splits": {"train": {"labels": "none"}}}
    manifest = sharded(tmp_path, source, on_error="skip")
    names = {rejected.name for rejected in manifest.split("train").rejected}
    assert names == {name.replace("\udce9", "\\xe9") for name in ODD_NAMES.values() if not name.startswith(".")}
    line = refusal(tmp_path, source)
    assert line.endswith("or set on_error: skip in evil's card")


def test_names_of_300_characters_in_a_tar(tmp_path: Path) -> None:
    folder = "/".join(["d" * 150, "é" * 150])
    archive = tar(tmp_path / "evil.tar", {f"{folder}/{number}.png": png(number) for number in range(3)})
    manifest = sharded(tmp_path, {"type": "image_tar", "path": str(archive), "splits": {"train": {}}})
    assert manifest.split("train").images == 3


@pytest.mark.parametrize("members", [5_000, pytest.param(500_000, marks=pytest.mark.long)])
def test_very_many_tiny_members_cost_little_memory(members: int, tmp_path: Path) -> None:
    block = b"".join(
        header(f"cat/{number:07d}.{'png' if number % 500 == 0 else 'txt'}", png(0) if number % 500 == 0 else b"")
        for number in range(members)
    )
    (tmp_path / "evil.tar").write_bytes(block + bytes(1024))
    card(tmp_path, {"type": "image_tar", "path": str(tmp_path / "evil.tar"), "splits": {"train": {}}})
    code = (
        "import pathlib, re\n"
        "from ssl_core.stages import shard\n"
        "used = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', pathlib.Path('/proc/self/status').read_text())[1])\n"
        "before = used()\n"
        "shard.run(pathlib.Path('evil.yaml'), pathlib.Path('out'), threads=1)\n"
        "print('KB', used() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert Manifest.load(tmp_path / "out" / "manifest.json").split("train").images == -(-members // 500)
    assert int(run.stdout.split()[-1]) < 60_000  # the list of names is on disk


def header(name: str, content: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def bomb_png(side: int) -> bytes:
    """Return a black picture of `side` squared pixels in a few kB."""
    deflate = zlib.compressobj(9)
    rows = b"".join(deflate.compress(bytes(1 + side // 8)) for _ in range(side)) + deflate.flush()
    size = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return join_chunks([(b"IHDR", size), (b"IDAT", rows), (b"IEND", b"")])


def bomb_text() -> bytes:
    """Return a small picture with a comment of 64 MB, compressed."""
    head, *rest = split_chunks(png(0))
    return join_chunks([head, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 26))), *rest])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: bomb_png(10_000), "it has more than 89478485 pixels"),
        (lambda: bomb_png(14_000), "it has more than 89478485 pixels"),
        (bomb_text, "it cannot be decoded: Decompressed data too large"),
        (
            lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run",
            "it is no image of a format that is read",
        ),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "it is no image of a format that is read"),
        (lambda: b"", "the file is empty"),
    ],
)
def test_images_that_would_blow_up_or_run_something_are_refused(
    make: Callable[[], bytes], words: str, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "evil.png").write_bytes(make())
    source = {"type": "image_folder", "path": str(tmp_path / "images"), "splits": {"train": {"labels": "none"}}}
    assert words in refusal(tmp_path, source)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (b"\xff\xfe", "is not text"),
        (b"--5", "some labels are class names ('--5') and others are numbers"),
        (b"-3", "the label -3 is below 0"),
    ],
)
def test_labels_that_are_none_are_refused(label: bytes, words: str, tmp_path: Path) -> None:
    archive = tar(tmp_path / "evil.tar", {"a.png": png(0), "a.cls": label, "b.png": png(0), "b.cls": b"0"})
    line = refusal(tmp_path, {"type": "webdataset", "splits": {"train": {"tars": str(archive)}}})
    assert words in line


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch witness']",
        "name: !!python/object/new:subprocess.Popen [[touch, witness]]",
        "name: !!python/name:os.system",
        "name: !include /etc/passwd",
        "name: !!timestamp 2024-99-99",
        "name: 2024-99-99",
        f"name: {'9' * 5000}",
        "name: !!binary '%%%'",
        "? [a, b]\n: c",
        "name: &a [*a]",
        "[" * 2_000,
        "name: \x00",
        "%YAML 9.9\n---\nname: evil",
        "- a",
        "",
    ],
)
def test_yaml_that_is_no_card_is_refused_in_one_line_and_runs_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"evil\.yaml") as caught:
        load_card(path)
    assert len(str(caught.value)) < 2000
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["evil.yaml"]


def test_yaml_in_the_configuration_runs_nothing(root: Path, tmp_path: Path) -> None:
    for name in ("workflow", "ssl_core", "Snakefile", "datasets"):
        (tmp_path / name).symlink_to(root / name)
    (tmp_path / "config.yaml").write_text("experiments: !!python/object/apply:os.system ['touch witness']\n")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = subprocess.run(
        ["snakemake", "-n"], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode != 0
    assert "config" in run.stdout + run.stderr
    assert not (tmp_path / "witness").exists()


LAUGHS = "".join(f'<!ENTITY l{number} "{f"&l{number - 1};" * 10}">' for number in range(1, 10))


@pytest.mark.parametrize(
    "text",
    [
        f'<!DOCTYPE a [<!ENTITY l0 "lol">{LAUGHS}]><annotation><object><name>&l9;</name></object></annotation>',
        '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><object><name>&x;</name></object></annotation>',
    ],
    ids=["entities of entities", "an entity out of a file"],
)
def test_xml_that_blows_up_or_reads_files_is_refused(text: str, tmp_path: Path) -> None:
    for name, content in (("ImageSets/Main/train.txt", "a\n"), ("Annotations/a.xml", text)):
        (tmp_path / "voc" / name).parent.mkdir(parents=True)
        (tmp_path / "voc" / name).write_text(content)
    source = {"type": "voc", "path": str(tmp_path / "voc"), "splits": {"train": {"images": "train"}}}
    assert "Annotations/a.xml is not XML" in refusal(tmp_path, source)


@pytest.mark.parametrize("up", ["../secret.png", "a/../../secret.png"])
def test_a_list_of_images_cannot_name_files_outside_its_data_set(up: str, tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    (tmp_path / "secret.png").write_bytes(png(0))
    listed = {"images": [{"id": 1, "file_name": up}], "categories": [{"id": 1, "name": "cat"}]}
    listed["annotations"] = [{"image_id": 1, "category_id": 1}]
    (tmp_path / "coco" / "train.json").write_text(json.dumps(listed))
    splits = {"train": {"annotations": "train.json"}}
    line = refusal(tmp_path, {"type": "coco", "path": str(tmp_path / "coco"), "splits": splits})
    assert f"{up!r} lies outside" in line
