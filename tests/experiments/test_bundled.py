"""The files that come with the package, and the user's own cards before them."""

from pathlib import Path

import pytest

from ssl_core.experiments import bundled


def test_the_files_of_the_clone_are_found(root: Path) -> None:
    assert root == bundled.ROOT
    for path in (bundled.SNAKEFILE, bundled.CONFIG, bundled.SCHEMA, bundled.CARDS / "demo.yaml"):
        assert path.is_file(), path


def test_a_card_of_the_folder_comes_before_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundled.card_path("demo") == bundled.CARDS / "demo.yaml"
    assert bundled.card_path("mine") == Path("datasets/mine.yaml")  # missing, so named where the user would write it
    for name in ("demo", "mine"):
        Path("datasets").mkdir(exist_ok=True)
        Path("datasets", f"{name}.yaml").touch()
        assert bundled.card_path(name) == Path("datasets", f"{name}.yaml")
    assert {"demo", "mine", "cifar10"} <= set(bundled.card_names())


def test_an_unknown_recipe_is_refused_with_the_names_of_all() -> None:
    assert bundled.recipe_path("ressl_cifar10").is_file()
    with pytest.raises(ValueError, match=r"no recipe 'resl'; the recipes are .*, ressl_cifar10, "):
        bundled.recipe_path("resl")
