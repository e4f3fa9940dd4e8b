"""Files laid over config.yaml."""

import copy
from pathlib import Path
from typing import Any

import pytest

from ssl_core.experiments import checks, overlays

from .conftest import CARDS, VALID


def test_null_removes_an_entry_and_its_reported_numbers(schema: dict[str, Any]) -> None:
    overlay = {
        "experiments": {"small": None, "taken": {"image_size": 224}},
        "evaluations": {"linear": None},
        "sweeps": {"heat": None, "many": None},
        "figures": {"heat": None},
    }
    kept = overlays.without_nulls(overlays.merge(VALID, overlay))
    assert list(kept["experiments"]) == ["many", "taken"]
    assert kept["experiments"]["taken"]["image_size"] == 224
    assert list(kept["evaluations"]) == ["knn"]
    assert kept["sweeps"] == {}
    assert {name: entry["results"] for name, entry in kept["reported"].items()} == {
        "many": {"knn": 88.0},
        "many-seed3": {"knn": 88.0},
    }
    checks.check(kept, schema, CARDS)
    assert VALID["experiments"]["small"]["training"]["gradient_clip"] is None  # below an entry null is a value
    assert overlays.without_nulls(VALID) == VALID


def test_overlays_merge_as_snakemake_merges_them() -> None:
    from snakemake.utils import update_config

    overlay = {
        "experiments": {"small": {"training": {"epochs": 2}}, "new": {"dataset": {"name": "demo"}}},
        "sweeps": None,
    }
    expected = copy.deepcopy(VALID)
    update_config(expected, overlay)
    assert overlays.merge(VALID, overlay) == expected


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_a_target_after_configfile_is_refused(absolute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snakemake takes every word after --configfile for a file, and makes its path absolute."""
    monkeypatch.chdir(tmp_path)
    target = Path("results/small/knn.json")
    with pytest.raises(ValueError, match=r"^results/small/knn\.json follows --configfile, but is a target"):
        overlays.check_config_files([tmp_path / target if absolute else target])


def test_a_section_that_contains_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").write_text("experiments: &a {x: *a}\n")
    with pytest.raises(ValueError, match=r"loop\.yaml: a section contains itself by a YAML alias"):
        overlays.read_yaml(tmp_path / "loop.yaml")
