"""Boxes, classes, flags and masks from VOC's and COCO's annotations to the shards."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as codec

from ssl_core.data.boxes import Annotation, fit_objects, read_objects
from ssl_core.data.sharding import summary
from ssl_core.data.shards import Manifest
from ssl_core.stages import shard
from tests.rectangles import (
    CLASSES,
    coco_content,
    coco_source,
    draw,
    write_card,
    write_coco,
    write_instances,
    write_voc,
)

NUMBERS = range(1, 8)


def make(folder: Path, source: dict[str, Any], **keys: Any) -> Manifest:
    shard.run(write_card(folder / "rectangles.yaml", source, **keys), folder / "shards", threads=1)
    return Manifest.load(folder / "shards/manifest.json")


def make_coco(folder: Path, change=lambda content: None, numbers=NUMBERS, **keys: Any) -> Manifest:
    write_coco(folder / "coco", {"train": numbers})
    content = coco_content(numbers)
    change(content)
    write_instances(folder / "coco", "train", content)
    return make(folder, coco_source(folder / "coco", "train"), **keys)


def boxes_of(number: int) -> list[tuple[str, tuple[int, ...]]]:
    return [(rectangle.name, rectangle.box) for rectangle in draw(number)[1]]


def stored_boxes(member: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    return [(CLASSES[each["label"]], tuple(map(round, each["box"]))) for each in member["objects"]]


def test_coco_gives_boxes_and_masks(tmp_path):
    manifest = make_coco(tmp_path)
    for number, member in zip(NUMBERS, read_objects(manifest, "train"), strict=True):
        assert member["size"] == [64, 48]
        assert stored_boxes(member) == boxes_of(number)
        for each in member["objects"]:
            left, top, right, bottom = map(round, each["box"])
            expected = np.zeros((48, 64), np.uint8)
            expected[top:bottom, left:right] = 1
            assert (codec.decode(each["mask"]) == expected).all()
    objects = manifest.split("train").objects
    assert objects is not None
    assert objects.count == objects.masks == sum(len(boxes_of(number)) for number in NUMBERS)


def test_years_of_voc_are_joined_with_their_difficult_objects(tmp_path):
    write_voc(tmp_path / "VOC2007", {"trainval": range(1, 5), "test": range(20, 23)})
    write_voc(tmp_path / "VOC2012", {"trainval": range(5, 8)})
    lists = {"train": ["VOC2007/trainval", "VOC2012/trainval"], "test": "VOC2007/test"}
    splits = {name: {"images": images} for name, images in lists.items()}
    manifest = make(tmp_path, {"type": "voc", "path": str(tmp_path), "splits": splits})
    members = read_objects(manifest, "train")
    assert [stored_boxes(member) for member in members] == [boxes_of(number) for number in NUMBERS]
    for number, member in zip(NUMBERS, members, strict=True):
        assert all(each.get("difficult", 0) == (number % 5 == 0) for each in member["objects"])
    assert len(read_objects(manifest, "test")) == 3


def test_data_without_boxes_keep_their_tars(tmp_path, root):
    shard.run(root / "datasets/demo.yaml", tmp_path / "shards", threads=1)
    manifest = Manifest.load(tmp_path / "shards/manifest.json")
    assert "objects" not in (tmp_path / "shards/manifest.json").read_text()
    with tarfile.open(manifest.tars("train")[0]) as tar:
        assert {name.split(".", 1)[1] for name in tar.getnames()} == {"png", "meta.i64"}
    with pytest.raises(ValueError, match=r"the shards of 'demo' have no boxes: .*shard demo again"):
        read_objects(manifest, "train")


def test_annotations_without_boxes_label_images_only(tmp_path):
    def remove_boxes(content):
        for entry in content["annotations"]:
            del entry["bbox"]

    manifest = make_coco(tmp_path, remove_boxes)
    assert manifest.split("train").objects is None
    assert manifest.split("train").images == len(NUMBERS)


def test_an_image_without_objects_is_kept_and_counted(tmp_path):
    manifest = make_coco(tmp_path, lambda content: content.update(annotations=[]))
    assert all(member["objects"] == [] for member in read_objects(manifest, "train"))
    assert "objects: train 0, 7 images without any" in summary(manifest)


def outside(content):
    content["annotations"][0]["bbox"] = [50, 5, 20, 20]


def flat(content):
    content["annotations"][0]["bbox"][3] = 0


def unknown(content):
    content["annotations"][0]["category_id"] = 91


def other_mask(content):
    content["annotations"][0]["segmentation"] = codec.encode(np.asfortranarray(np.ones((40, 64), np.uint8)))
    content["annotations"][0]["segmentation"]["counts"] = content["annotations"][0]["segmentation"]["counts"].decode()


def line_as_mask(content):
    content["annotations"][0]["segmentation"] = [[1, 1, 5, 5]]


def mask_elsewhere(content):
    content["annotations"][0].update(bbox=[0, 0, 10, 10], segmentation=[[30, 30, 40, 30, 40, 40]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (outside, r"annotation 1 \(\w+\): its box \[50.0, 5.0, 70.0, 25.0\] is not inside the image of 64x48 pixels"),
        (flat, r"annotation 1 \(\w+\): its box \[.*\] has no area"),
        (unknown, r"annotation 1 \(category 91\): its class is unknown"),
        (other_mask, r"annotation 1 \(\w+\): its mask has 64x40 pixels, the image 64x48"),
        (line_as_mask, r"annotation 1 \(\w+\): a polygon of its mask is not three or more points"),
        (mask_elsewhere, r"annotation 1 \(\w+\): its mask is outside its box"),
    ],
)
def test_an_object_that_cannot_be_used_fails_or_is_left_out(tmp_path, change, reason):
    with pytest.raises(ValueError, match=rf"^train2017/000000000001.jpg: {reason}. Repair .*on_error: skip"):
        make_coco(tmp_path, change)
    manifest = make(tmp_path, coco_source(tmp_path / "coco", "train"), on_error="skip")
    objects = manifest.split("train").objects
    assert objects is not None
    assert len(objects.unused) == 1
    assert "(1 left out)" in summary(manifest)
    assert stored_boxes(read_objects(manifest, "train")[0]) == boxes_of(1)[1:]
    with pytest.raises(ValueError, match="annotation 1"):  # shards that left it out are not kept
        make(tmp_path, coco_source(tmp_path / "coco", "train"))


def test_an_annotation_of_an_image_that_is_not_listed(tmp_path, capsys):
    def change(content):
        content["annotations"][0]["image_id"] = 99

    with pytest.raises(ValueError, match="1 annotations, such as 1, are of images that are not listed"):
        make_coco(tmp_path, change)
    make(tmp_path, coco_source(tmp_path / "coco", "train"), on_error="skip")
    assert "they are left out" in capsys.readouterr().err


def test_a_missing_image_takes_its_boxes_with_it(tmp_path):
    write_coco(tmp_path / "coco", {"train": NUMBERS})
    (tmp_path / "coco/train2017/000000000003.jpg").unlink()
    with pytest.raises(ValueError, match=r"000000000003.jpg: .*on_error: skip"):
        make(tmp_path, coco_source(tmp_path / "coco", "train"))
    manifest = make(tmp_path, coco_source(tmp_path / "coco", "train"), on_error="skip")
    members = read_objects(manifest, "train")
    assert [stored_boxes(member) for member in members] == [boxes_of(number) for number in NUMBERS if number != 3]


def rotate_file(path: Path) -> None:
    """Store the image on its side, with the EXIF orientation that turns it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise
    with Image.open(path) as image:
        image.rotate(90, expand=True).save(path, exif=exif, quality=95)


def test_boxes_refer_to_the_image_upright_by_exif(tmp_path):
    write_coco(tmp_path / "coco", {"train": NUMBERS})
    rotate_file(tmp_path / "coco/train2017/000000000002.jpg")
    manifest = make(tmp_path, coco_source(tmp_path / "coco", "train"))
    assert stored_boxes(read_objects(manifest, "train")[1]) == boxes_of(2)


def test_an_image_of_another_size_than_its_annotation_is_refused(tmp_path):
    write_coco(tmp_path / "coco", {"train": NUMBERS})
    path = tmp_path / "coco/train2017/000000000002.jpg"
    with Image.open(path) as image:
        image.rotate(90, expand=True).save(path)
    message = "000000000002.jpg: its annotation is for an image of 64x48 pixels, the upright image has 48x64"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, coco_source(tmp_path / "coco", "train"))


def test_boxes_and_masks_scale_with_a_smaller_stored_image():
    square = [[16, 8, 48, 8, 48, 24, 16, 24]]
    described = {"name": "a", "label": 0, "box": [16, 8, 48, 24], "area": 512, "mask": square}
    fitted = fit_objects(Annotation((64, 48), [described]).encode(), (64, 48), (32, 24))
    (each,) = json.loads(fitted.member)["objects"]
    assert each["box"] == [8, 4, 24, 12]
    assert each["area"] == 128
    assert codec.decode(each["mask"]).shape == (24, 32)
    assert codec.toBbox(each["mask"]).tolist() == [8, 4, 16, 8]


def test_rounding_over_the_edge_is_cut():
    described = {"name": "a", "label": 0, "box": [-0.4, 3, 64.6, 9]}
    fitted = fit_objects(Annotation(None, [described]).encode(), (64, 48), (64, 48))
    assert fitted.objects[0]["box"] == [0, 3, 64, 9]
    assert not fitted.unused
    assert io.BytesIO(fitted.member).read().startswith(b'{"size":[64,48]')


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ({"size": [48, 64]}, "neither polygons nor a run-length code"),
        ({"size": [48, 64], "counts": "zzzzzzzz~~~"}, "do not cover the image of 64x48 pixels"),
        ({"size": [48, 64], "counts": [10, 10**9]}, "do not cover the image of 64x48 pixels"),
        ([["a"] * 6], "is not a list of numbers"),
        ([[float("nan")] * 6], "is far outside of the image"),
        ([[0, 0, 1e12, 0, 1e12, 1e12]], "is far outside of the image"),
    ],
)
def test_a_mask_that_the_library_would_not_survive_cannot_be_used(mask, reason):
    annotation = {"name": "annotation 1", "label": 0, "box": [1, 1, 9, 9], "mask": mask}
    fitted = fit_objects(Annotation((64, 48), [annotation]).encode(), (64, 48), (64, 48))
    assert reason in fitted.unused[0][1]


def test_values_of_coco_that_hide_images_or_have_another_type_are_named(tmp_path):
    write_coco(tmp_path / "coco", {"train": NUMBERS})
    for part, key, value, reason in (
        ("images", "id", 2, "images has the id 2 twice"),
        ("categories", "id", 2, "categories has the id 2 twice"),
        ("images", "file_name", None, "images id 1: file_name is None: expected a text"),
        ("images", "width", "64", "images id 1: width is '64': expected a number"),
        ("annotations", "area", "9", "annotations id 1: area is '9': expected a number"),
    ):
        content = coco_content(NUMBERS)
        content[part][0][key] = value
        write_instances(tmp_path / "coco", "train", content)
        with pytest.raises(ValueError, match=reason):
            make(tmp_path, coco_source(tmp_path / "coco", "train"))
    (tmp_path / "coco/annotations/instances_train2017.json").write_bytes(json.dumps(content).encode("utf-16"))
    with pytest.raises(ValueError, match=r"instances_train2017\.json is not UTF-8"):
        make(tmp_path, coco_source(tmp_path / "coco", "train"))


@pytest.mark.parametrize(
    ("old", "new", "encoding", "reason"),
    [
        ("<width>64<", "<width>x<", "utf-8", "000001.xml: expected numbers in size, found x, 48"),
        ("<xmin>", "<xmin>,", "utf-8", "000001.xml: expected four numbers in bndbox, found ,"),
        ("<name>", "<name/><name>", "utf-8", "000001.xml: object 1 has no name"),
        ("<name>", "<name>\xe9", "latin-1", "000001.xml is not XML"),
        ("<width>64<", "<width>64.0<", "utf-8", None),
        ("<annotation>", '<?xml version="1.0" encoding="utf-16"?><annotation>', "utf-16", None),
    ],
)
def test_a_file_of_voc_is_read_or_named(tmp_path, old, new, encoding, reason):
    folder = write_voc(tmp_path / "voc", {"trainval": [1]})
    path = folder / "Annotations/000001.xml"
    path.write_text(path.read_text().replace(old, new), encoding=encoding)
    source = {"type": "voc", "path": str(folder), "splits": {"train": {"images": "trainval"}}}
    if reason is None:
        assert make(tmp_path, source).split("train").images == 1
        return
    with pytest.raises(ValueError, match=reason):
        make(tmp_path, source)


def test_an_image_that_a_list_of_voc_has_twice_is_named(tmp_path):
    folder = write_voc(tmp_path / "voc", {"trainval": [1, 2, 1]})
    with pytest.raises(ValueError, match=r"lists JPEGImages/000001.jpg twice: keep one of the lines"):
        make(tmp_path, {"type": "voc", "path": str(folder), "splits": {"train": {"images": "trainval"}}})
