"""Cards: those of the project load, and mistakes are reported in one line with their place and the valid values."""

from pathlib import Path

import pytest

from ssl_core.data.card import load_card

GOOD = """\
name: cats
source:
  type: image_folder
  path: data/cats
  splits:
    train: {folder: train}
image_size: 64
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "cats.yaml"
    path.write_text(text)
    return path


def error(path: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        load_card(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "datasets").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_card_of_the_project_loads(path: Path) -> None:
    assert load_card(path).name == path.stem


def test_the_data_sets_of_the_recipes_have_cards(root: Path) -> None:
    names = {path.stem for path in (root / "datasets").glob("*.yaml")}
    assert names >= {"demo", "cifar10", "cifar100", "stl10", "tiny_imagenet", "imagenet"}


def test_stl10_has_its_unlabelled_split(root: Path) -> None:
    assert load_card(root / "datasets" / "stl10.yaml").splits == ("train", "test", "unlabelled")


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("image_size", "image_sise", "unknown key 'image_sise'; did you mean 'image_size'?"),
        ("path:", "pth:", "source: unknown key 'pth'; did you mean 'path'?"),
        ("folder: train", "foldr: train", "source.splits.train: unknown key 'foldr'; did you mean 'folder'?"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_the_nearest_valid_one(
    tmp_path: Path, old: str, new: str, place: str
) -> None:
    path = written(tmp_path, GOOD.replace(old, new))
    assert error(path) == f"{path}: {place}"


def test_an_unknown_type_of_source_lists_the_types(tmp_path: Path) -> None:
    message = error(written(tmp_path, GOOD.replace("image_folder", "image_foldr")))
    assert "image_foldr" in message
    assert "'image_folder'" in message


def test_variables_defaults_and_home_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "/somewhere")
    monkeypatch.setenv("HOME", "/home/me")
    for text, path in (("${PLACE}/cats", "/somewhere/cats"), ("${NOWHERE:-data}/c", "data/c"), ("~/c", "/home/me/c")):
        card = load_card(written(tmp_path, GOOD.replace("data/cats", text)))
        assert card.source.path == path  # type: ignore[union-attr]


def test_an_unset_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    assert "source.path: the environment variable NOWHERE is not set" in error(
        written(tmp_path, GOOD.replace("data/cats", "${NOWHERE}"))
    )


def test_a_missing_card_lists_the_others(tmp_path: Path) -> None:
    written(tmp_path, GOOD)
    assert error(tmp_path / "dogs.yaml").endswith(f"Data sets in {tmp_path}: cats")


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nimage_size: 4\nimage_size: 8\n")
    with pytest.raises(ValueError, match="the key 'image_size' appears twice"):
        load_card(path)


def test_broken_yaml_is_one_line(tmp_path: Path) -> None:
    assert "is not valid YAML" in error(written(tmp_path, GOOD + "mean: [0.1\n"))


def test_the_name_is_the_name_of_the_file(tmp_path: Path) -> None:
    assert "make them agree" in error(written(tmp_path, GOOD.replace("name: cats", "name: dogs")))


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ("mean: [0.5, 0.5, 0.5]", "mean and std go together"),
        ("mean: [0.5, 0.5, 0.5]\nstd: [0, 1, 1]", "above zero"),
        ("classes: [a, a]", "twice"),
        ("avoid: [flp]", "'flip'"),
        ("max_side: 8", "max_side 8 is smaller than image_size: give 64 or more"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, more: str, reason: str) -> None:
    assert reason in error(written(tmp_path, GOOD + more))


def test_a_split_name_that_could_not_be_a_shard_is_refused(tmp_path: Path) -> None:
    assert "source.splits" in error(written(tmp_path, GOOD.replace("train:", "train.v1:")))


def test_a_folder_in_place_of_a_card_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").mkdir()
    with pytest.raises(ValueError, match=r"x\.yaml cannot be read \(Is a directory\): a card is a YAML file"):
        load_card(tmp_path / "x.yaml")
