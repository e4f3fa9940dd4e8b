"""Shards: DALI reads every image, in a fixed order; the bytes do not depend on workers and interruptions."""

import importlib
import io
import json
import os
import shutil
import struct
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from webdataset.compat import WebDataset

from ssl_core.data import sharding
from ssl_core.data.image_files import has_plain_structure
from ssl_core.data.shards import Manifest, source_name, tar_header, verify
from ssl_core.stages import shard

from .conftest import encode
from .test_mutations import deep_png, join_chunks, split_chunks

IMAGES = 23
Chunks = list[tuple[bytes, bytes]]


@pytest.fixture(autouse=True)
def few_images_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "IMAGES_PER_SHARD", 5)


def picture(seed: int, width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of JPEG images of three classes."""
    for number in range(IMAGES):
        path = tmp_path / "photos" / "abc"[number % 3] / f"{number:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(number), "JPEG"))
    return tmp_path / "photos"


def card(folder: Path, **more: object) -> Path:
    path = folder.parent / "photos.yaml"
    content = {
        "name": "photos",
        "image_size": 16,
        "source": {"type": "image_folder", "path": str(folder), "splits": {"train": {}}},
        **more,
    }
    path.write_text(json.dumps(content))
    return path


def sharded(folder: Path, output: str = "shards", threads: int = 1, **more: Any) -> Manifest:
    shards = folder.parent / output
    shard.run(card(folder, **more), shards, threads=threads)
    return Manifest.load(shards / "manifest.json")


def samples(manifest: Manifest) -> list[tuple[int, str, bytes, int]]:
    return read(*manifest.tars("train"))


def read(*tars: Path) -> list[tuple[int, str, bytes, int]]:
    """Return index, extension, image and label of each sample, as the library reads them."""
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # the library leaves tars open
        dataset = list(WebDataset([str(tar) for tar in tars], shardshuffle=False))
    entries = []
    for sample in dataset:
        extension = "jpg" if "jpg" in sample else "png"
        label, number = struct.unpack("<qq", sample["meta.i64"])
        assert sample["__key__"] == f"{number:08d}"
        entries.append((number, extension, sample[extension], label))
    return entries


def names(source: Path) -> list[str]:
    return sorted(str(path.relative_to(source)) for path in source.rglob("*.jpg"))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_indices_are_those_of_dalis_own_tool(photos: Path) -> None:
    from wds2idx import IndexCreator

    for tar in sharded(photos).tars("train"):
        creator = IndexCreator(str(tar), str(photos.parent / "reference.idx"), verbose=False)
        creator.create_index()
        creator.close()
        assert tar.with_suffix(".idx").read_bytes() == (photos.parent / "reference.idx").read_bytes()


@pytest.mark.parametrize("threads", [3, 24])  # 24: more than shards, so that a worker has several
def test_the_number_of_workers_changes_nothing(photos: Path, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "AHEAD", 4)
    sharded(photos, "one", threads=1)
    sharded(photos, "more", threads=threads)
    assert content(photos.parent / "one") == content(photos.parent / "more")


def test_every_image_is_there_once_with_its_label_and_its_own_bytes(photos: Path) -> None:
    manifest = sharded(photos)
    entries = sorted(samples(manifest))
    assert [number for number, _, _, _ in entries] == list(range(IMAGES))
    for (_, extension, stored, label), name in zip(entries, names(photos)):
        assert (extension, stored) == ("jpg", (photos / name).read_bytes())
        assert manifest.classes is not None
        assert manifest.classes[label] == name[0]


def test_the_name_of_each_image_in_the_source_is_recorded(photos: Path) -> None:
    (photos / names(photos)[4]).write_bytes(b"broken")
    manifest = sharded(photos, on_error="skip")
    originals = {(photos / name).read_bytes(): name for name in names(photos)}
    for tar in manifest.tars("train"):
        for number, extension, stored, _ in read(tar):
            assert source_name(tar, f"{number:08d}.{extension}") == originals[stored]
    assert source_name(manifest.tars("train")[0], "99999999.jpg") is None


def test_the_order_is_shuffled_and_fixed(photos: Path) -> None:
    order = [number for number, _, _, _ in samples(sharded(photos))]
    assert order == np.random.default_rng(0).permutation(IMAGES).tolist()


def test_the_manifest_has_no_path_of_this_machine(photos: Path) -> None:
    text = (sharded(photos).folder / "manifest.json").read_text()
    assert str(photos.parent) not in text


def test_tars_are_ustar_without_times_and_owners(photos: Path) -> None:
    for path in sharded(photos).tars("train"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert not member.pax_headers
        assert path.read_bytes()[257:263] == b"ustar\0"


def test_the_manifest_counts(photos: Path) -> None:
    manifest = sharded(photos, avoid=["flip"])
    split = manifest.split("train")
    assert (manifest.dataset, manifest.image_size, manifest.avoid) == ("photos", 16, ("flip",))
    assert (manifest.classes, split.class_counts) == (("a", "b", "c"), (8, 8, 7))
    assert (split.images, split.labelled, split.rejected) == (IMAGES, True, ())
    assert [part.images for part in split.shards] == [5, 5, 5, 5, 3]
    assert split.bytes == sum(path.stat().st_size for path in manifest.tars("train"))
    assert str(photos.parent) not in (manifest.folder / "manifest.json").read_text()  # it may move


def test_an_unlabelled_folder_has_no_classes_and_no_counts(photos: Path) -> None:
    source = {"type": "image_folder", "path": str(photos), "splits": {"train": {"labels": "none"}}}
    manifest = sharded(photos, source=source)
    assert (manifest.classes, manifest.split("train").class_counts) == (None, None)
    assert not manifest.split("train").labelled
    assert {label for _, _, _, label in samples(manifest)} == {-1}


def test_mean_and_std_are_the_cards_or_measured(photos: Path) -> None:
    given: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    manifest = sharded(photos, "given", **given)
    assert (manifest.mean, manifest.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pixels = np.stack([np.asarray(Image.open(photos / name)) for name in names(photos)]).reshape(-1, 3) / 255
    manifest = sharded(photos)
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=0), atol=1e-4)


# Interruption and repetition


def test_an_interrupted_run_continues_with_the_shards_that_are_whole(photos: Path) -> None:
    folder = sharded(photos).folder
    whole = content(folder)
    # after a killed process: the state of two shards, a third that was not noted, one half written, no manifest
    state = folder / ".state.jsonl"
    state.write_text("".join(state.read_text().splitlines(keepends=True)[:2]) + '["cut sho')
    for name in ("manifest.json", "train-000003.tar", "train-000004.tar", "train-000004.idx"):
        (folder / name).unlink()
    (folder / ".train-000003.tar.1.tmp").write_bytes(b"half")
    before = {number: (folder / f"train-00000{number}.tar").stat().st_ino for number in range(3)}
    sharded(photos)
    assert content(folder) == whole
    assert not list(folder.glob(".*.tmp"))
    kept = [number for number in range(3) if (folder / f"train-00000{number}.tar").stat().st_ino == before[number]]
    assert kept == [0, 1]


def test_a_damaged_shard_is_made_again(photos: Path) -> None:
    folder = sharded(photos).folder
    whole = content(folder)
    tar = folder / "train-000001.tar"
    tar.write_bytes(tar.read_bytes().replace(b"jpg", b"gpj"))
    sharded(photos)
    assert content(folder) == whole


def test_statistics_in_the_card_leave_the_shards_alone_and_another_source_does_not(photos: Path) -> None:
    tar = sharded(photos).tars("train")[0]
    first = tar.stat().st_ino
    sharded(photos, mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2])
    assert tar.stat().st_ino == first
    (photos / "a" / "00.jpg").write_bytes(encode(picture(99, 30), "JPEG"))
    manifest = sharded(photos)
    assert tar.stat().st_ino != first
    assert sorted(samples(manifest))[0][2] == (photos / "a" / "00.jpg").read_bytes()


def test_shards_of_a_larger_source_do_not_stay_behind(photos: Path) -> None:
    folder = sharded(photos).folder
    shutil.rmtree(photos / "a")
    sharded(photos)
    for suffix in ("tar", "idx"):
        assert {path.name for path in folder.glob(f"*.{suffix}")} == {f"train-00000{n}.{suffix}" for n in range(3)}


def test_a_folder_with_tars_of_others_is_refused(photos: Path) -> None:
    folder = photos.parent / "shards"
    folder.mkdir()
    (folder / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="has tars that sharding did not write"):
        sharded(photos)
    assert (folder / "train-000000.tar").read_bytes() == b"mine"


# Images that need care: each kind has a stated outcome (datasets/README.md)


def exif(turns: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = turns
    return tags.tobytes()


def smooth() -> Image.Image:
    return Image.fromarray(np.add.outer(np.arange(12) * 9, np.arange(20) * 7).astype(np.uint8)).convert("RGB")


def transparent() -> Image.Image:
    image = picture(1)
    image.putalpha(Image.fromarray(np.full((12, 20), 30, np.uint8)))
    return image


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


def with_byte_before(marker: int) -> bytes:
    """Return a JPEG with a zero byte before one of its segments."""
    jpeg = encode(picture(1), "JPEG")
    return jpeg.replace(bytes((0xFF, marker)), bytes((0, 0xFF, marker)), 1)


def with_frame(width: int, height: int) -> bytes:
    """Return a JPEG that announces another size than it has."""
    jpeg = encode(picture(1), "JPEG")
    return jpeg.replace(struct.pack(">HH", 12, 20), struct.pack(">HH", height, width), 1)


def with_exif_twice(first: int, second: int) -> bytes:
    jpeg = encode(smooth(), "JPEG", exif=exif(first))
    start = jpeg.index(b"\xff\xdb")
    return jpeg[:start] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif(second))) + exif(second) + jpeg[start:]


def cmyk_without_adobe() -> bytes:
    jpeg = encode(smooth().convert("CMYK"), "JPEG")
    start = jpeg.index(b"\xff\xee")
    return jpeg[:start] + jpeg[start + 16 :]


def with_chunks(png: bytes, change: Callable[[Chunks], Chunks]) -> bytes:
    return join_chunks(change(split_chunks(png)))


def with_header_byte(place: int, value: int) -> bytes:
    def change(chunks: Chunks) -> Chunks:
        header = bytearray(chunks[0][1])
        header[place] = value
        return [(b"IHDR", bytes(header)), *chunks[1:]]

    return with_chunks(encode(picture(1), "PNG"), change)


def animated_png() -> bytes:
    """Return an animation whose first picture is not the one that other decoders show."""
    return encode(picture(1), "PNG", save_all=True, append_images=[picture(2)], default_image=True)


PNG_END = b"\0\0\0\0IEND\xaeB`\x82"

KEPT: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gray.jpg": ("jpg", lambda: encode(picture(1).convert("L"), "JPEG")),
    "cmyk.jpg": ("jpg", lambda: encode(picture(1).convert("CMYK"), "JPEG")),
    "progressive.jpg": ("jpg", lambda: encode(picture(1), "JPEG", progressive=True)),
    "turned.jpg": ("jpg", lambda: encode(smooth(), "JPEG", exif=exif(6))),
    "mirrored.png": ("png", lambda: encode(picture(1), "PNG", exif=exif(2))),
    "gray.png": ("png", lambda: encode(picture(1).convert("L"), "PNG")),
    "bits.png": ("png", lambda: encode(picture(1).convert("1"), "PNG")),
    "palette.png": ("png", lambda: encode(picture(1).quantize(32), "PNG", transparency=3)),
    "alpha.png": ("png", lambda: encode(transparent(), "PNG")),
    "gray_alpha.png": ("png", lambda: encode(transparent().convert("LA"), "PNG")),
    "rgb16.png": ("png", lambda: deep_png(colour=2, channels=3)),
    "really_a_jpeg.png": ("jpg", lambda: encode(picture(1), "JPEG")),
    "really_a_png.JPEG": ("png", lambda: encode(picture(1), "PNG")),
    "trailing.jpg": ("jpg", lambda: encode(picture(1), "JPEG") + b"garbage"),
}
REDUCED = encode(picture(1).quantize(32), "PNG")
REENCODED: dict[str, Callable[[], bytes]] = {
    "still.gif": lambda: encode(picture(1).quantize(32), "GIF"),
    "moving.gif": lambda: encode(picture(1), "GIF", save_all=True, append_images=[picture(2)]),
    "a.webp": lambda: encode(picture(1), "WEBP", lossless=True),
    "turned.webp": lambda: encode(picture(1), "WEBP", lossless=True, exif=exif(6)),
    "a.bmp": lambda: encode(picture(1), "BMP"),
    "cmyk.tif": lambda: encode(picture(1).convert("CMYK"), "TIFF"),
    "gray.pgm": lambda: encode(picture(1).convert("L"), "PPM"),
    "alpha.webp": lambda: encode(transparent(), "WEBP", lossless=True, exact=True),
    "turned.avif": lambda: encode(picture(1), "AVIF", exif=exif(6)),
    "byte_before_quantizers.jpg": lambda: with_byte_before(0xDB),
    "byte_before_frame.jpg": lambda: with_byte_before(0xC0),
    "byte_before_huffman_tables.jpg": lambda: with_byte_before(0xC4),
    "byte_before_scan.jpg": lambda: with_byte_before(0xDA),
    "cmyk_without_adobe.jpg": cmyk_without_adobe,
    "turned_by_xmp.jpg": lambda: encode(smooth(), "JPEG", xmp=XMP),
    "exif_twice.jpg": lambda: with_exif_twice(6, 3),
    "animated.png": animated_png,
    "compression.png": lambda: with_header_byte(10, 1),
    "fewer_rows.png": lambda: with_header_byte(7, 11),
    "more_rows.png": lambda: with_header_byte(7, 60),
    "two_palettes.png": lambda: with_chunks(REDUCED, lambda chunks: [*chunks[:2], *chunks[1:]]),
    "no_palette.png": lambda: with_chunks(REDUCED, lambda chunks: [chunks[0], *chunks[2:]]),
    "critical.png": lambda: with_chunks(REDUCED, lambda chunks: [chunks[0], (b"ABCD", b"x"), *chunks[1:]]),
    "background.png": lambda: with_chunks(REDUCED, lambda chunks: [*chunks[:2], (b"bKGD", b""), *chunks[2:]]),
}
REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "truncated.jpg": ("truncated", lambda: encode(picture(1), "JPEG")[:-200]),
    "no_end.jpg": ("truncated", lambda: encode(picture(1), "JPEG")[:-2]),
    "truncated.png": ("cannot be decoded", lambda: encode(picture(1), "PNG")[:-300]),
    "no_end.png": ("cannot be decoded", lambda: encode(picture(1), "PNG")[:-12]),
    "checksum.png": ("cannot be decoded", lambda: encode(picture(1), "PNG")[:-16] + bytes(4) + PNG_END),
    "empty.jpg": ("empty", lambda: b""),
    "text.jpg": ("no image of a format", lambda: b"hello"),
    "postscript.jpg": ("no image of a format", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "float.tif": ("no known range", lambda: encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")),
    "strip.png": ("side of more than 1000000", lambda: encode(Image.new("1", (1_000_001, 1)), "PNG")),
    "large.jpg": ("truncated", lambda: encode(large(2600, 2600), "JPEG")[:-2000]),  # decoded at a smaller size
    "bomb.jpg": ("pixels: shrink it", lambda: with_frame(20_000, 20_000)),
    "huge.png": ("pixels: shrink it", lambda: encode(Image.new("1", (10_000, 9_000)), "PNG")),
}  # fmt: skip


def sharded_flat(folder: Path, files: dict[str, bytes], **more: Any) -> Manifest:
    """Write unlabelled files and shard them."""
    source = folder / "odd"
    source.mkdir(exist_ok=True)
    for name, image in files.items():
        (source / name).write_bytes(image)
    flat = {"type": "image_folder", "path": str(source), "splits": {"train": {"labels": "none"}}}
    return sharded(source, source=flat, **more)


def decoded_by_dali(manifest: Manifest) -> dict[int, np.ndarray]:
    dali: Any = importlib.import_module("nvidia.dali")
    fn, types = dali.fn, dali.types

    @dali.pipeline_def(batch_size=4, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline() -> Any:
        image, meta = fn.readers.webdataset(
            paths=[str(path) for path in manifest.tars("train")],
            index_paths=[str(path) for path in manifest.indices("train")],
            ext=["jpg;png", "meta.i64"],
            dtypes=[types.DALIDataType.UINT8, types.DALIDataType.INT64],
            missing_component_behavior="error",
        )
        return fn.decoders.image(image), meta

    running, decoded = pipeline(), {}
    for _ in range(-(-manifest.split("train").images // 4)):
        images, meta = running.run()
        for position in range(4):
            decoded[int(meta.at(position)[1])] = np.array(images.at(position))
    return decoded


def test_odd_images_are_kept_or_reencoded_and_dali_sees_what_pil_sees(tmp_path: Path) -> None:
    files = {name: make() for name, (_, make) in KEPT.items()} | {name: make() for name, make in REENCODED.items()}
    manifest = sharded_flat(tmp_path, files)
    seen = decoded_by_dali(manifest)
    assert sorted(seen) == list(range(len(files)))
    for (number, extension, stored, _), name in zip(sorted(samples(manifest)), sorted(files)):
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(files[name]))).convert("RGB")
        difference = np.abs(seen[number].astype(int) - np.asarray(expected))
        assert difference.max() <= (1 if name in ("cmyk.jpg", "rgb16.png") else 0), name  # rounding
        if name in KEPT:
            assert (extension, stored) == (KEPT[name][0], files[name]), name
        else:
            assert extension == "png", name


def test_statistics_are_those_of_the_pixels_that_training_sees(tmp_path: Path) -> None:
    manifest = sharded_flat(tmp_path, {"cmyk.jpg": cmyk_without_adobe()})
    pixels = decoded_by_dali(manifest)[0].reshape(-1, 3) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=0), atol=1e-4)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=0), atol=1e-4)


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.arange(240, dtype=np.uint16).reshape(12, 20) * 257
    files = {kind: encode(Image.fromarray(values), kind[2:]) for kind in ("a.PNG", "b.TIFF")}
    manifest = sharded_flat(tmp_path, files)
    seen = decoded_by_dali(manifest)
    for number in range(2):
        np.testing.assert_array_equal(seen[number], np.repeat((values // 257)[..., None], 3, axis=2))
    np.testing.assert_allclose(manifest.mean, np.mean(values // 257) / 255, atol=1e-4)
    np.testing.assert_allclose(manifest.std, np.std(values // 257) / 255, atol=1e-4)


def large(width: int, height: int) -> Image.Image:
    """Return a picture without fine structure: red grows to the right, green to the bottom."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, np.full_like(down, 99)], axis=-1).astype(np.uint8))


LARGE: dict[str, tuple[tuple[int, int], Callable[[], bytes]]] = {  # with the size as it is stored for max_side 64
    "photo.jpg": ((64, 48), lambda: encode(large(400, 300), "JPEG")),
    "turned.jpg": ((48, 64), lambda: encode(large(400, 300), "JPEG", exif=exif(6), xmp=XMP)),
    "cmyk.jpg": ((64, 43), lambda: encode(large(90, 60).convert("CMYK"), "JPEG")),
    "gray.png": ((64, 32), lambda: encode(large(80, 40).convert("L"), "PNG")),
    "palette.gif": ((64, 64), lambda: encode(large(80, 80).quantize(), "GIF")),
    "panorama.jpg": ((160, 16), lambda: encode(large(400, 40), "JPEG")),  # its shorter side is bounded
    "strip.png": ((300, 6), lambda: encode(large(300, 6), "PNG")),
    "small.jpg": ((64, 10), lambda: encode(large(64, 10), "JPEG")),
}
UNTOUCHED = {"strip.png", "small.jpg"}


def test_images_above_max_side_are_reduced_and_the_others_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {name: make() for name, (_, make) in LARGE.items()}
    manifest = sharded_flat(tmp_path, files, max_side=64)
    assert manifest.split("train").reduced == len(LARGE) - len(UNTOUCHED)
    assert "train 8 images (6 reduced to max_side)" in capsys.readouterr().out
    seen = decoded_by_dali(manifest)
    for (number, extension, stored, _), name in zip(sorted(samples(manifest)), sorted(files)):
        size, upright = LARGE[name][0], ImageOps.exif_transpose(Image.open(io.BytesIO(files[name])))
        assert has_plain_structure(stored), name
        assert (extension == "jpg") == name.endswith("jpg"), name
        assert (stored == files[name]) == (name in UNTOUCHED), name
        assert seen[number].shape == (size[1], size[0], 3), name
        expected = upright.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        assert np.abs(seen[number].astype(int) - np.asarray(expected)).mean() < 3, name


def test_max_side_is_far_above_views_by_default_and_another_value_shards_again(photos: Path) -> None:
    (photos / "a" / "big.jpg").write_bytes(encode(large(2600, 30), "JPEG"))
    (photos / "b" / "bigger.jpg").write_bytes(encode(large(2600, 700), "JPEG"))
    default = sharded(photos)
    assert default.split("train").reduced == 1
    assert max(Image.open(io.BytesIO(image)).width for _, _, image, _ in samples(default)) == 2600
    assert sharded(photos, max_side=2048).split("train").reduced == 1
    for absent in (None, "none"):
        manifest = sharded(photos, max_side=absent)
        assert "reduced" not in (manifest.folder / "manifest.json").read_text()
        originals = {path.read_bytes() for path in photos.rglob("*.jpg")}
        assert {image for _, _, image, _ in samples(manifest)} == originals
    assert sharded(photos, max_side=17).split("train").reduced == IMAGES + 2


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_image_is_named_with_its_reason(tmp_path: Path, name: str) -> None:
    reason, make = REFUSED[name]
    files = {name: make(), "good.jpg": encode(picture(1), "JPEG")}
    with pytest.raises(ValueError, match=rf"^{name}: .*{reason}.*on_error: skip") as caught:
        sharded_flat(tmp_path, files)
    assert "\n" not in str(caught.value)
    (rejected,) = sharded_flat(tmp_path, files, on_error="skip").split("train").rejected
    assert rejected.name == name
    assert reason in rejected.reason


def test_indices_stay_dense_over_the_images_that_were_taken(photos: Path) -> None:
    bad = names(photos)[3::4]
    for name in bad:
        (photos / name).write_bytes(b"broken")
    good = [name for name in names(photos) if name not in bad]
    for threads in (1, 24, 2):
        manifest = sharded(photos, f"skip{threads}", threads=threads, on_error="skip")
        entries = sorted(samples(manifest))
        assert [number for number, _, _, _ in entries] == list(range(len(good)))
        assert [stored for _, _, stored, _ in entries] == [(photos / name).read_bytes() for name in good]
        assert [rejected.name for rejected in manifest.split("train").rejected] == bad
        verify(manifest, "train", deep=True)
    assert content(photos.parent / "skip1") == content(photos.parent / "skip2") == content(photos.parent / "skip24")
    before = content(manifest.folder)
    sharded(photos, "skip2", on_error="skip")  # finished shards are kept, not numbered a second time
    assert content(manifest.folder) == before
    with pytest.raises(ValueError, match="on_error: skip"):
        sharded(photos, "skip2")  # on_error is fail now


@pytest.mark.parametrize("on_error", ["skip", "fail"])
def test_indices_follow_when_an_image_that_was_left_out_can_be_read_again(photos: Path, on_error: str) -> None:
    whole = content(sharded(photos, "whole").folder)
    path = photos / names(photos)[3]
    good, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(b"x" * len(good))
    os.utime(path, ns=times)  # the source looks the same, as where a disk failed for a moment
    folder = sharded(photos, "again", on_error="skip").folder
    path.write_bytes(good)
    os.utime(path, ns=times)
    if on_error == "skip":  # the shard without the image is lost and made anew, which now holds it
        (lacking,) = (tar for tar in folder.glob("*.tar") if len(read(tar)) not in (5, IMAGES % 5))
        lacking.unlink()
    sharded(photos, "again", on_error=on_error)
    assert content(folder) == whole


def test_the_same_bad_image_is_named_for_any_number_of_workers(photos: Path) -> None:
    for name in names(photos)[::2]:
        (photos / name).write_bytes(b"broken")
    messages = set()
    for threads in (1, 3, 24):
        with pytest.raises(ValueError, match="no image of a format") as caught:
            sharded(photos, f"fail{threads}", threads=threads)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_a_source_without_a_usable_image_is_refused(tmp_path: Path) -> None:
    message = r"no usable image in split 'train'; first failure: a\.jpg: it cannot be decoded: the file is empty"
    with pytest.raises(ValueError, match=message):
        sharded_flat(tmp_path, {"a.jpg": b"", "b.jpg": b""}, on_error="skip")
    assert not (tmp_path / "shards" / "manifest.json").exists()


@pytest.mark.timeout(60)
def test_a_pipe_among_the_images_is_refused_by_name(photos: Path) -> None:
    os.mkfifo(photos / "a" / "x.png")
    with pytest.raises(ValueError, match=r"^a/x\.png: it is a named pipe instead of a regular file\. .*on_error: skip"):
        sharded(photos)
    (rejected,) = sharded(photos, on_error="skip").split("train").rejected
    assert (rejected.name, rejected.reason) == ("a/x.png", "it is a named pipe instead of a regular file")


def test_pictures_that_are_not_read_are_in_the_report_and_the_manifest(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (sharded(photos).folder / "manifest.json").read_text()
    assert "unread" not in text
    assert len(capsys.readouterr().out.splitlines()) == 1
    for name in ("a/x.heic", "b/y.HEIC", "b/z.tga"):
        (photos / name).write_bytes(b"")
    assert sharded(photos).split("train").unread == {".heic": 2, ".tga": 1}
    line = "photos: left out, formats that are not read (convert them): train 2 .heic, 1 .tga"
    assert capsys.readouterr().out.splitlines()[1:] == [line]


# The manifest


def test_a_shard_that_is_missing_or_cut_is_named(photos: Path) -> None:
    manifest = sharded(photos)
    verify(manifest, "train", deep=True)
    tar = manifest.tars("train")[2]
    whole, index = tar.read_bytes(), tar.with_suffix(".idx").read_bytes()

    tar.write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=r"train-000002\.tar has \d+ bytes instead of"):
        verify(manifest, "train")
    tar.write_bytes(whole[:-1] + b"x")
    verify(manifest, "train")
    with pytest.raises(ValueError, match=r"train-000002\.tar is not the file that was written"):
        verify(manifest, "train", deep=True)
    tar.with_suffix(".idx").write_bytes(index[: len(index) // 2])
    with pytest.raises(ValueError, match=r"train-000002\.idx has 3 lines instead of 6"):
        verify(manifest, "train")
    tar.unlink()
    with pytest.raises(ValueError, match=r"train-000002\.tar is missing"):
        verify(manifest, "train")


def test_an_index_is_read_once_until_it_changes(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = sharded(photos)
    index = manifest.indices("train")[1]
    read: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    for _ in range(3):
        verify(manifest, "train")
    assert read == manifest.indices("train")
    index.write_text(index.read_text().replace("jpg", "png"))
    with pytest.raises(ValueError, match=r"train-000001\.idx is not the file that was written"):
        verify(manifest, "train")


def test_an_unknown_split_lists_the_splits(photos: Path) -> None:
    with pytest.raises(ValueError, match=r"photos has no split 'test': it has train"):
        sharded(photos).split("test")


def test_a_file_that_is_not_a_manifest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(ValueError, match=r"manifest\.json does not exist"):
        Manifest.load(path)
    for text, message in (("{", "is not valid JSON"), ('{"version": 2}', r"is not a manifest \(version")):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"manifest\.json {message}"):
            Manifest.load(path)


@pytest.mark.parametrize("name", ["00000000.jpg", "99999999.meta.i64", "12345678.labels.u8"])
@pytest.mark.parametrize("size", [0, 16, 2913, 123_456_789, 8**11 - 1])
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert tar_header(name, size) == member.tobuf(tarfile.USTAR_FORMAT)
