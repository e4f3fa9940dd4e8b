"""The files that come with the package: Snakefile, rules, schema, demonstration, cards and recipes. Torch-free.

A clone has them at its root; a wheel has a copy of them in `ssl_core/_bundled/`, which `setup.py` makes.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
COPY = PACKAGE / "_bundled"
ROOT = COPY if COPY.is_dir() else PACKAGE.parent

SNAKEFILE = ROOT / "Snakefile"
CONFIG = ROOT / "config.yaml"
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.json"
CARDS = ROOT / "datasets"
RECIPES = ROOT / "recipes"

USER_CARDS = Path("datasets")  # relative to the working directory


def card_path(name: str) -> Path:
    """Return the file of a data set's card: the one in `datasets/` of the working directory, else the package's."""
    path = USER_CARDS / f"{name}.yaml"
    bundled = CARDS / path.name
    return bundled if bundled.is_file() and not path.is_file() else path


def card_names() -> list[str]:
    """Return the names of all data sets that have a card, in the working directory's `datasets/` or in the package."""
    names = {path.stem for folder in (USER_CARDS, CARDS) for path in folder.glob("*.yaml")}
    return sorted(names)


def recipe_path(name: str) -> Path:
    """Return the file of a recipe; an unknown name is a `ValueError` that lists the recipes."""
    path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(recipe.stem for recipe in RECIPES.glob("*.yaml")))
        raise ValueError(f"no recipe '{name}'; the recipes are {names}")
    return path
