"""All figures of the papers, trained for and drawn by Snakemake on a part of the demonstration's data."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_recipes import PUBLISHED, laid_over
from tests.warm_snakemake import run_snakemake

OF_PAPERS = [path for path in PUBLISHED if not path.stem.startswith("claims")]  # whose figures are no paper's
FIGURES = {name for path in OF_PAPERS for name in laid_over(path).get("figures", {})}
SMALL = {"images": 60, "triangles": 10, "epochs": 1, "images_per_class": 5}


def small(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe with fewer images and epochs."""
    for section in recipe["experiments"].values():
        if "weights" not in section:
            images = 64 if "subset" in section["dataset"] else 128
            section["dataset"] = {"name": "demo", "subset": {"images": images}}
            if "queue_size" in section["method"]:
                section["method"] = {**section["method"], "queue_size": 32}
            section["training"] = {**section["training"], "epochs": 3, "batch_size": 32}
    for section in recipe["evaluations"].values():
        section.update({key: value for key, value in SMALL.items() if key in section})
    return recipe


def test_the_demonstration_has_every_figure_of_the_papers(root: Path) -> None:
    assert set(laid_over(root / "recipes" / "demo_figures.yaml")["figures"]) == FIGURES


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_every_figure_of_the_papers_is_drawn_from_the_demonstrations_data(root: Path, tmp_path: Path) -> None:
    recipe = small(laid_over(root / "recipes" / "demo_figures.yaml"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe))
    targets = [f"results/figures/{name}.svg" for name in sorted(FIGURES)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(root), "SSL_TRACKING": "off"}
    arguments = ["--snakefile", str(root / "Snakefile"), "--cores", "1", "--nocolor", *targets]
    run = run_snakemake(tmp_path, *arguments, environment=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    for target in targets:
        assert (tmp_path / target).stat().st_size > 5000, target
