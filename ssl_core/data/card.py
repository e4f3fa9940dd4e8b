"""A card: one YAML file that describes a data set and its source. Torch-free.

A card contains no code. Each kind of source is a typed section below; `sources/` has the code that reads it.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from ssl_core.config import Strict, nearest
from ssl_core.files import YamlLoader
from ssl_core.mistakes import excerpt

HIDDEN = ("derived", "order")  # fields that a section fills in itself
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Section(Strict):
    """A strict section: an unknown key is an error that names the nearest valid key."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        keys = [field.alias or name for name, field in cls.model_fields.items() if name not in HIDDEN]
        for key in map(str, content):
            if key not in (*keys, *HIDDEN):
                raise ValueError(f"unknown key {excerpt(repr(key))}{excerpt(nearest(key, keys))}")
        return content


def expand(text: Any) -> Any:
    """Replace `${NAME}`, `${NAME:-default}` and a leading `~`; raise `ValueError` for an unset name without default."""

    def replacement(match: re.Match[str]) -> str:
        value = os.environ.get(match[1]) or match[2]
        if value is None:
            raise ValueError(f"the environment variable {match[1]} is not set: export {match[1]}=... or edit the path")
        return value

    if not isinstance(text, str):
        return text
    return os.path.expanduser(VARIABLE.sub(replacement, text))


def class_list(value: Any) -> Any:
    """Return class names: of a list, or of a text file with one name per line; `#` begins a comment line."""
    if isinstance(value, list):
        return [str(name) if isinstance(name, int) and not isinstance(name, bool) else name for name in value]
    if not isinstance(value, str):
        return value
    path = Path(expand(value))
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "not UTF-8"
        raise ValueError(f"{excerpt(path)} cannot be read ({reason}): write a list, or a file of names") from None
    return [line for line in lines if line and not line.startswith("#")]


Location = Annotated[str, BeforeValidator(expand)]  # relative to the repository root
SplitName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]  # part of a file name that DALI reads
Classes = Annotated[tuple[str, ...], BeforeValidator(class_list), Field(min_length=1)]
Channels = tuple[float, float, float]


def none_or(value: Any) -> Any:
    """Return None for the text `none`."""
    return None if value == "none" else value


def default_max_side(card: dict[str, Any]) -> int:
    """Return the `max_side` of cards without one: far larger than any view."""
    return max(2048, 4 * card["image_size"])


class DerivedSplit(Section):
    """Images drawn at random from a split of the source, which keeps the others."""

    from_: SplitName = Field(alias="from")
    fraction: float | None = Field(None, gt=0, lt=1)  # of the images of the split in `from`
    images_per_class: PositiveInt | None = None
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _one_size(self) -> "DerivedSplit":
        if (self.fraction is None) == (self.images_per_class is None):
            raise ValueError("a split with `from` has one size: set fraction (such as 0.2) or images_per_class")
        return self


class SourceSection(Section):
    """A source: its own splits, and splits that are drawn from them."""

    derived: dict[SplitName, DerivedSplit] = Field(default_factory=dict)  # the entries of `splits` with `from`
    order: tuple[str, ...] = ()  # names of all splits in the card's order

    @model_validator(mode="before")
    @classmethod
    def _separate_derived(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        for key in HIDDEN:
            if key in content:
                raise ValueError(f"unknown key {key!r}; a split to draw from another is {{from: train, fraction: 0.2}}")
        splits = content.get("splits")
        if not isinstance(splits, dict):
            return content
        derived = {name: split for name, split in splits.items() if isinstance(split, dict) and "from" in split}
        rest = {name: split for name, split in splits.items() if name not in derived}
        if not rest and derived:
            raise ValueError("splits: all are drawn `from` another: describe one of the source, such as train")
        return {**content, "splits": rest, "derived": derived, "order": tuple(map(str, splits))}


class Annotations(Section):
    """A text file inside the source with one line per image, as in Tiny-ImageNet's val or a table of Kaggle."""

    file: str
    separator: str = Field("\t", min_length=1, max_length=1)
    # Numbers of columns from 0, or names of the first line; the image is the path inside the split's folder, the
    # extension may be missing:
    image_column: NonNegativeInt | str = 0
    class_column: NonNegativeInt | str = 1

    @model_validator(mode="after")
    def _numbers_or_names(self) -> "Annotations":
        if isinstance(self.image_column, str) != isinstance(self.class_column, str):
            raise ValueError("image_column and class_column: write both as numbers, or both as names of the first line")
        return self


class FolderSplit(Section):
    """A folder inside the source. By default an image's class is the name of its subfolder."""

    folder: str = ""
    labels: Literal["folder", "none"] = "folder"
    annotations: Annotations | None = None
    class_pattern: str | None = None  # a regular expression; its group in the image's path is the class
    # A text file that names the only images of the split, one per line, by their path in the folder or its last parts,
    # such as SimCLR's lists of the labelled images of ImageNet; `#` begins a comment line.
    labelled: Location | None = None

    @field_validator("class_pattern")
    @classmethod
    def _one_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        example = r"write for example '(cat|dog)\.' for train/cat.0.jpg"
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{excerpt(pattern)} is not a regular expression ({error}): {example}") from None
        if groups != 1:
            raise ValueError(f"{excerpt(pattern)} has {groups} groups, not one: {example}")
        return pattern

    @model_validator(mode="after")
    def _one_origin(self) -> "FolderSplit":
        origins = (self.labels == "none", self.annotations is not None, self.class_pattern is not None)
        if sum(origins) > 1:
            raise ValueError("set one of labels: none, annotations and class_pattern")
        return self


class ImageFolder(SourceSection):
    """Images in a folder, or in a .tar, .tar.gz, .tar.bz2 or .tar.xz (`image_tar`) or .zip (`image_zip`) of it."""

    type: Literal["image_folder", "image_tar", "image_zip"]
    path: Location
    sha256: str | None = None  # of the archive
    splits: dict[SplitName, FolderSplit] = Field(min_length=1)


class TorchvisionSplit(Section):
    """Arguments of torchvision's class that select the split."""

    arguments: dict[str, Any] = Field(default_factory=dict)


class Torchvision(SourceSection):
    """A data set of torchvision that returns images and class ids."""

    type: Literal["torchvision"]
    dataset: str
    root: Location | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)  # of all splits, for example `download: true`
    splits: dict[SplitName, TorchvisionSplit] = Field(min_length=1)


class DigitsSplit(Section):
    """The number of digits of the split; the splits divide one seeded permutation."""

    images: PositiveInt


class SklearnDigits(SourceSection):
    """The coloured digits: scikit-learn's bundled digits, with random colours and motion."""

    type: Literal["sklearn_digits"]
    seed: NonNegativeInt = 0
    size: PositiveInt = 16  # pixels
    rotation: float = Field(10.0, ge=0, le=180)  # at most, in degrees
    zoom: float = Field(0.1, ge=0, lt=1)  # at most, as a share of the size
    shift: float = Field(1.25, ge=0)  # at most, in pixels, in both directions
    splits: dict[SplitName, DigitsSplit] = Field(min_length=1)


class WebDatasetSplit(Section):
    """Tars by glob or brace pattern, for example `train-{000000..000146}.tar`."""

    tars: Location


class WebDataset(SourceSection):
    """WebDataset tars: the members of a sample share a key; extensions distinguish image and label."""

    type: Literal["webdataset"]
    image: str | None = None  # the image's extension, needed if a key has several images
    # the label's extension: a class id or a class name as text; `json.species`: a field of JSON; null: unlabelled
    label: str | None = "cls"
    splits: dict[SplitName, WebDatasetSplit] = Field(min_length=1)


class TableSplit(Section):
    """CSV, Parquet or Arrow files by glob or brace pattern, or a folder; `where` selects rows by values of columns."""

    file: Location
    where: dict[str, str | int | bool] = Field(default_factory=dict)


class Table(SourceSection):
    """Rows of images (paths, bytes, or Hugging Face's struct of both) and, unless `label` is null, their classes."""

    type: Literal["table"]
    folder: Location | None = None  # the base of the paths; default: the folder of the table
    outside: bool = False  # whether paths may lead out of the folder
    image: str = "path"  # names of columns
    label: str | None = "label"
    splits: dict[SplitName, TableSplit] = Field(min_length=1)


class ArraysSplit(Section):
    """Names of the arrays; `{split}` in a name is replaced by the name of the split."""

    images: str = "{split}_images"
    labels: str | None = "{split}_labels"  # null: unlabelled


class Arrays(SourceSection):
    """Arrays of images and labels in an .npz file."""

    type: Literal["npz"]
    path: Location
    splits: dict[SplitName, ArraysSplit] = Field(min_length=1)


class VocSplit(Section):
    """The images that `ImageSets/Main/<images>.txt` lists; several years are joined, as [VOC2007/trainval, ...]."""

    images: str | tuple[str, ...]

    @property
    def lists(self) -> list[tuple[str, str]]:
        """The folder and the name of each list."""
        lists = (self.images,) if isinstance(self.images, str) else self.images
        parts = [name.rpartition("/") for name in lists]
        return [(f"{folder}{slash}", name) for folder, slash, name in parts]


class Voc(SourceSection):
    """PASCAL VOC: a folder or a tar of `JPEGImages`, `Annotations`, `ImageSets`, or of years; with boxes."""

    type: Literal["voc"]
    path: Location
    splits: dict[SplitName, VocSplit] = Field(min_length=1)


class CocoSplit(Section):
    """A folder of images inside the source and the JSON file of their instances."""

    folder: str = ""
    annotations: str


class Coco(SourceSection):
    """Images with annotations in COCO's format, in a folder or a tar; with boxes and masks."""

    type: Literal["coco"]
    path: Location
    splits: dict[SplitName, CocoSplit] = Field(min_length=1)


Source = Annotated[
    ImageFolder | Torchvision | SklearnDigits | WebDataset | Table | Arrays | Voc | Coco, Field(discriminator="type")
]

FOLDERS = ("image_folder", "image_tar", "image_zip")
SOURCE_TYPES = (*FOLDERS, "torchvision", "sklearn_digits", "webdataset", "table", "npz", "voc", "coco")

Change = Literal[
    "flip", "brightness", "contrast", "saturation", "hue", "jitter", "grayscale", "blur", "solarize", "randaugment"
]


class Card(Section):
    """A data set: its source and splits, classes, statistics and authors."""

    name: SplitName
    source: Source
    image_size: PositiveInt  # pixels; the default size of views
    # pixels of the longer side of stored images; larger ones are reduced to it; None: stored as they are
    max_side: Annotated[PositiveInt | None, BeforeValidator(none_or)] = Field(default_factory=default_max_side)
    classes: tuple[str, ...] | None = None  # in the order of the label ids; default: sorted names of the source
    mean: Channels | None = None  # of pixels in 0..1; default: measured on the first split
    std: Channels | None = None
    avoid: tuple[Change, ...] = ()  # augmentations that change the label
    keep_classes: Classes | None = None  # names of classes, or a file with one per line; default: all
    on_error: Literal["fail", "skip"] = "fail"  # for images that cannot be used
    homepage: str | None = None
    licence: str | None = None
    citation: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the card's order."""
        return self.source.order

    @property
    def labels(self) -> dict[str, Literal["none", "one", "several"]]:
        """Labels per image of each split, as far as the card tells: torchvision's data sets count as labelled."""
        labels: dict[str, Literal["none", "one", "several"]]
        labels = {name: _labels_of(self.source, split) for name, split in self.source.splits.items()}
        for name, derived in self.source.derived.items():
            labels[name] = labels[derived.from_]
        return {name: labels[name] for name in self.splits}

    @model_validator(mode="after")
    def _agree(self) -> "Card":
        if self.max_side is not None and self.max_side < self.image_size:
            raise ValueError(f"max_side {self.max_side} is smaller than image_size: give {self.image_size} or more")
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: set both, or neither to have them measured")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be above zero")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("classes has the same name twice: name each class once")
        for name, derived in self.source.derived.items():
            if derived.from_ not in self.source.splits:
                hint = nearest(derived.from_, self.source.splits)
                raise ValueError(f"source.splits.{name}.from: the source has no split {derived.from_!r}{hint}")
        return self


def _labels_of(source: Source, split: Any) -> Literal["none", "one", "several"]:
    if isinstance(source, Voc | Coco):
        return "several"
    if isinstance(source, WebDataset | Table):
        return "none" if source.label is None else "one"
    if isinstance(split, FolderSplit):
        return "none" if split.labels == "none" else "one"
    if isinstance(split, ArraysSplit):
        return "none" if split.labels is None else "one"
    return "one"


def load_card(path: Path) -> Card:
    """Read and check a card; raise a one-line `ValueError` with the file, the key and the valid values."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)  # a safe loader
    except FileNotFoundError:
        names = sorted(other.stem for other in path.parent.glob("*.yaml"))
        raise ValueError(f"{path} does not exist. Data sets in {path.parent}: {', '.join(names) or 'none'}") from None
    except OSError as error:  # a folder, no permission
        raise ValueError(f"{path} cannot be read ({error.strerror}): a card is a YAML file") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8, date or number
        raise ValueError(f"{path} is not valid YAML: {excerpt(error, 400)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping with the keys name, source and image_size")
    try:
        card = Card.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error)}") from None
    if card.name != path.stem:
        raise ValueError(f"{path}: name is {excerpt(repr(card.name))}, but the file is {path.stem!r}: make them agree")
    return card


def _explain(error: ValidationError) -> str:
    """Return the first problem in one line, with the path of the key."""
    problem = error.errors(include_url=False)[0]
    where = [str(part) for part in problem["loc"]]
    if where[0:1] == ["source"] and where[1:2] and where[1] in SOURCE_TYPES:  # pydantic's tag of the union
        del where[1]
    if "derived" in where:
        where[where.index("derived")] = "splits"
    message = _message(problem)
    return f"{'.'.join(where)}: {message}" if where else message


def _message(problem: Any) -> str:
    """Return a problem in the words of config.yaml's messages: the value found, the values expected."""
    kind, value = problem["type"], problem["input"]
    types = ", ".join(SOURCE_TYPES)
    if kind == "missing":
        return "this key is missing"
    if kind == "union_tag_not_found":
        return f"the key 'type' is missing: add one of {types}"
    if kind == "union_tag_invalid":
        tag = str(value.get("type"))
        return f"unknown type {excerpt(repr(tag))}{nearest(tag, SOURCE_TYPES)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"expected a mapping (keys on indented lines below it), found {excerpt(repr(value))}"
    if kind == "literal_error":
        return f"unknown value {excerpt(repr(value))}; possible: {problem['ctx']['expected']}"
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error" or isinstance(value, dict | list):
        return message
    return f"{message[0].lower()}{message[1:]}, found {excerpt(repr(value))}"
