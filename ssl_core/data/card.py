"""A card: one YAML file that says where a data set comes from and what is true of it. Torch-free.

A card holds no code. What a source may say is a typed section below; how it is read stands in `sources.py`.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from ssl_core.config import Strict, nearest
from ssl_core.files import YamlLoader

VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Section(Strict):
    """A strict section that names the nearest valid key when it meets one it does not know."""

    @model_validator(mode="before")
    @classmethod
    def _know_every_key(cls, content: Any) -> Any:
        unknown = [str(key) for key in content if key not in cls.model_fields] if isinstance(content, dict) else []
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}{nearest(unknown[0], cls.model_fields)}")
        return content


def expand(text: Any) -> Any:
    """Replace `${NAME}`, `${NAME:-default}` and a leading `~`; an unset one without a default is a `ValueError`."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None:
            raise ValueError(f"the environment variable {match[1]} is not set: export {match[1]}=... or edit the path")
        return found

    return os.path.expanduser(VARIABLE.sub(value, text)) if isinstance(text, str) else text


Location = Annotated[str, BeforeValidator(expand)]  # relative ones are relative to the repository root
SplitName = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]  # it becomes a file name that DALI must read
Channels = tuple[float, float, float]


class Annotations(Section):
    """A text file inside the source, one image a line, that says which class an image is of (Tiny-ImageNet's val)."""

    file: str
    separator: str = "\t"
    image_column: NonNegativeInt = 0  # the image's path inside the split's folder
    class_column: NonNegativeInt = 1


class FolderSplit(Section):
    """A folder inside the source; the folder below it is an image's class, unless the other keys say otherwise."""

    folder: str = ""
    labels: Literal["folder", "none"] = "folder"
    annotations: Annotations | None = None


class ImageFolder(Section):
    """Images in a folder (`image_folder`) or in a .tar, .tar.gz, .tar.bz2 or .tar.xz of one (`image_tar`)."""

    type: Literal["image_folder", "image_tar"]
    path: Location
    sha256: str | None = None  # of the archive
    splits: dict[SplitName, FolderSplit] = Field(min_length=1)


class TorchvisionSplit(Section):
    """The arguments that make torchvision's data set give this split."""

    arguments: dict[str, Any] = Field(default_factory=dict)


class Torchvision(Section):
    """Any data set of torchvision that gives pictures and class ids."""

    type: Literal["torchvision"]
    dataset: str
    root: Location | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)  # for all splits, for example `download: true`
    splits: dict[SplitName, TorchvisionSplit] = Field(min_length=1)


class DigitsSplit(Section):
    """How many digits the split takes from a seeded permutation; the splits take theirs one after the other."""

    images: PositiveInt


class SklearnDigits(Section):
    """The coloured digits: scikit-learn's bundled digits, moved and coloured at random."""

    type: Literal["sklearn_digits"]
    seed: NonNegativeInt = 0
    size: PositiveInt = 16  # pixels
    rotation: float = Field(10.0, ge=0, le=180)  # degrees, either way
    zoom: float = Field(0.1, ge=0, lt=1)  # a share of the size, either way
    shift: float = Field(1.25, ge=0)  # pixels, either way, in both directions
    splits: dict[SplitName, DigitsSplit] = Field(min_length=1)


class WebDatasetSplit(Section):
    """Tars by glob or brace pattern, for example `train-{000000..000146}.tar`."""

    tars: Location


class WebDataset(Section):
    """WebDataset tars: members of one key stand together, the image and the label told apart by their extensions."""

    type: Literal["webdataset"]
    image: str | None = None  # the image's extension, where a key has several images
    label: str | None = "cls"  # the label's extension: a class id or a class name as text; null: unlabelled
    splits: dict[SplitName, WebDatasetSplit] = Field(min_length=1)


class TableSplit(Section):
    """A CSV or Parquet file; `where` keeps the rows whose columns have these values."""

    file: Location
    where: dict[str, str | int | bool] = Field(default_factory=dict)


class Table(Section):
    """Rows of image paths and, unless `label` is null, class names or class ids."""

    type: Literal["table"]
    folder: Location | None = None  # what the paths are relative to; the table's own folder if not given
    image: str = "path"  # names of columns
    label: str | None = "label"
    splits: dict[SplitName, TableSplit] = Field(min_length=1)


class VocSplit(Section):
    """The images that `ImageSets/Main/<images>.txt` lists."""

    images: str


class Voc(Section):
    """A year of PASCAL VOC: a folder or a tar of `JPEGImages`, `Annotations`, `ImageSets`; several labels an image."""

    type: Literal["voc"]
    path: Location
    splits: dict[SplitName, VocSplit] = Field(min_length=1)


class CocoSplit(Section):
    """A folder of images inside the source and the JSON file of their instances."""

    folder: str = ""
    annotations: str


class Coco(Section):
    """Images with annotations of COCO's format, a folder or a tar: several labels an image."""

    type: Literal["coco"]
    path: Location
    splits: dict[SplitName, CocoSplit] = Field(min_length=1)


Source = Annotated[
    ImageFolder | Torchvision | SklearnDigits | WebDataset | Table | Voc | Coco, Field(discriminator="type")
]

Change = Literal[
    "flip", "brightness", "contrast", "saturation", "hue", "jitter", "grayscale", "blur", "solarize", "randaugment"
]


class Card(Section):
    """A data set: its source and splits, its classes and statistics, and who made it."""

    name: SplitName
    source: Source
    image_size: PositiveInt  # pixels; what crops are scaled to unless an experiment says otherwise
    classes: tuple[str, ...] | None = None  # label ids follow this order; found and sorted if not given
    mean: Channels | None = None  # of pixels in 0..1; measured on the first split if not given
    std: Channels | None = None
    avoid: tuple[Change, ...] = ()  # augmentations that change what the label says
    on_error: Literal["fail", "skip"] = "fail"  # what an image that cannot be used does
    homepage: str | None = None
    licence: str | None = None
    citation: str | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits, in the card's order."""
        return tuple(self.source.splits)

    @property
    def labels(self) -> dict[str, Literal["none", "one", "several"]]:
        """Labels per image of each split, as far as the card tells: torchvision's data sets count as labelled."""
        return {name: _labels_of(self.source, split) for name, split in self.source.splits.items()}

    @model_validator(mode="after")
    def _agree(self) -> "Card":
        if (self.mean is None) != (self.std is None):
            raise ValueError("mean and std go together: give both, or neither to have them measured")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be above zero")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError("classes names one class twice")
        return self


def _labels_of(source: Source, split: Any) -> Literal["none", "one", "several"]:
    if isinstance(source, Voc | Coco):
        return "several"
    if isinstance(source, WebDataset | Table):
        return "none" if source.label is None else "one"
    if isinstance(split, FolderSplit):
        return "none" if split.labels == "none" else "one"
    return "one"


def load_card(path: Path) -> Card:
    """Read and check a card; raise a one-line `ValueError` with the file, the key and what would be valid."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), YamlLoader)  # a safe loader
    except FileNotFoundError:
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml"))) or "none"
        raise ValueError(f"{path} does not exist. Data sets in {path.parent}: {known}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, no date, too long a number
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a mapping with the keys name, source and image_size")
    try:
        card = Card.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {_explain(error)}") from None
    if card.name != path.stem:
        raise ValueError(f"{path}: name is {card.name!r}, but the file's name says {path.stem!r}: make them agree")
    return card


def _explain(error: ValidationError) -> str:
    """Tell the first problem in one line, with the path of the key."""
    problem = error.errors(include_url=False)[0]
    tags = {"image_folder", "image_tar", "torchvision", "sklearn_digits", "webdataset", "table", "voc", "coco"}
    where = [str(part) for part in problem["loc"]]
    where = where[:1] + where[2:] if where[:1] == ["source"] and where[1:2] and where[1] in tags else where
    message = problem["msg"].removeprefix("Value error, ")
    return f"{'.'.join(where)}: {message}" if where else message
