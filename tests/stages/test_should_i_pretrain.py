"""The page "Should I pre-train?": paired differences, the verdict in words, and the page of small results."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from ssl_core.report.ways import Difference, Way, difference, paired_difference, signed, verdict
from ssl_core.stages import should_i_pretrain

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("number", [2, 3, 10])
def test_the_interval_is_that_of_a_paired_t_test(number: int) -> None:
    random = np.random.default_rng(number)
    first, second = random.normal(80, 3, number), random.normal(78, 3, number)
    found = paired_difference(first.tolist(), second.tolist(), range(number))
    expected = ttest_rel(first, second).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(first - second))
    assert found.interval == pytest.approx((expected.low, expected.high))


def test_equal_differences_have_an_interval_of_no_width_and_one_pair_has_none() -> None:
    assert paired_difference([3.0, 5.0], [1.0, 3.0], (0, 1)) == Difference(2.0, (2.0, 2.0), (0, 1))
    assert paired_difference([3.0], [1.0], (7,)) == Difference(2.0, None, (7,))


def test_only_seeds_of_both_are_paired_whatever_their_order() -> None:
    first = Way("pretrained", {0.1: {2: 90.0, 0: 70.0, 5: 1.0}})
    second = Way("scratch", {0.1: {0: 60.0, 1: 99.0, 2: 60.0}})
    found = difference(first, second, 0.1)
    assert found is not None
    assert (found.seeds, found.mean) == ((0, 2), 20.0)
    assert difference(first, second, 1.0) is None


BETTER = Difference(12.34, (8.06, 16.5), SEEDS)
WORSE = Difference(-2.0, (-3.1, -0.9), SEEDS)
UNCLEAR = Difference(0.3, (-0.94, 1.5), SEEDS)


@pytest.mark.parametrize(
    ("differences", "seeds", "sentence"),
    [
        (
            {0.01: BETTER, 0.1: BETTER, 1.0: UNCLEAR},
            SEEDS,
            "Pre-training here is better than training from scratch at 1 % of the labels (+12.3 points, +8.1 to +16.5) "
            "and at 10 % (+12.3 points, +8.1 to +16.5); a difference is not shown at 100 % (+0.3 points, "
            "−0.9 to +1.5); 95 % intervals, paired over 3 seeds.",
        ),
        (
            {0.01: UNCLEAR, 1.0: WORSE},
            SEEDS,
            "Pre-training here is worse than training from scratch at 100 % of the labels (−2.0 points, −3.1 to −0.9); "
            "a difference is not shown at 1 % (+0.3 points, −0.9 to +1.5); 95 % intervals, paired over 3 seeds.",
        ),
        (
            {0.1: UNCLEAR},
            SEEDS,
            "A difference between pre-training here and training from scratch is not shown at 10 % of the labels "
            "(+0.3 points, −0.9 to +1.5); 95 % intervals, paired over 3 seeds.",
        ),
        (
            {0.1: Difference(4.0, None, (0,))},
            (0,),
            "Pre-training here and training from scratch were measured with one seed only at 10 % of the labels (+4.0 "
            "points); an interval needs two seeds or more.",
        ),
        (
            {0.01: BETTER, 0.1: Difference(4.0, (1.0, 7.0), (0, 1))},
            (0, 1, 2),
            "Pre-training here is better than training from scratch at 1 % of the labels (+12.3 points, +8.1 to +16.5) "
            "and at 10 % (+4.0 points, +1.0 to +7.0); 95 % intervals, paired over 2 to 3 seeds; no result "
            "of seed 2 at 10 %.",
        ),
        (
            {0.01: BETTER, 1.0: Difference(-4.0, None, (1,))},
            (0, 1, 2),
            "Pre-training here is better than training from scratch at 1 % of the labels (+12.3 points, +8.1 to "
            "+16.5); one seed only at 100 % (−4.0 points); 95 % intervals, paired over 3 seeds; an interval needs two "
            "seeds or more; no result of seed 0 and 2 at 100 %.",
        ),
    ],
)
def test_the_verdict_is_one_sentence(differences: Any, seeds: tuple[int, ...], sentence: str) -> None:
    assert verdict(differences, seeds) == sentence


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 0.0), (0.0, 0.0)])
def test_an_interval_that_holds_zero_shows_no_difference(bounds: tuple[float, float]) -> None:
    sentence = verdict({1.0: Difference(sum(bounds) / 2, bounds, SEEDS)}, SEEDS)
    assert sentence.startswith("A difference between pre-training here and training from scratch is not shown")


# Accuracies of the pre-trained network and of the one from scratch for each seed.
MEASURED = {0.01: [(50.0, 30.0), (53.0, 30.0), (50.0, 29.0)], 1.0: [(90.0, 89.0), (88.0, 89.5), (91.0, 90.0)]}


def result(experiment: str, share: float, seed: int, top1: float, untrained: float) -> dict[str, Any]:
    return {
        "experiment": experiment,
        "evaluation": f"labels_{100 * share:g}-seed{seed}",
        "protocol": "finetune-full/v1",
        "dataset": "a<b",
        "headline": "top1",
        "metrics": {"top1": top1},
        "baselines": {"untrained": {"top1": untrained}, "pixels": {"top1": 40.0}},
        "hyperparameters": {
            "fraction": share,
            "epochs": 9,
            "batch_size": 8,
            "learning_rate": 0.2,
            "backbone_learning_rate": 0.02,
        },
        "num_train": round(share * 1000),
        "num_test": 360,
        "seed": seed,
    }


def write_page(folder: Path, results: list[dict[str, Any]], ways: dict[str, Any], seconds: dict[str, float]) -> str:
    """Write files of `results` and of costs; return the page."""
    written: dict[str, list[Path]] = {"results": [], "tunings": [], "pretrainings": []}
    for number, content in enumerate(results):
        names = {"experiment": content["experiment"], "evaluation": content["evaluation"]}
        tuning = {**names, "seconds": 12.0, "hardware": "1 x abacus"}
        written["results"].append(folder / f"{number}.json")
        written["results"][-1].write_text(json.dumps(content))
        written["tunings"].append(folder / f"{number}.cost.json")
        written["tunings"][-1].write_text(json.dumps(tuning))
    for name, cost in seconds.items():
        report = {"experiment": name, "cost": {"seconds": cost}, "hardware": "1 x abacus"}
        written["pretrainings"].append(folder / f"{name}.pretrain.json")
        written["pretrainings"][-1].write_text(json.dumps(report))
    plan = {"seeds": list(SEEDS), "ways": ways}
    should_i_pretrain.run(**written, output=folder / "page.html", plan=plan)
    return (folder / "page.html").read_text()


def rows(text: str) -> dict[str, list[str]]:
    """Return the cells of each way, tags left out."""
    body = text.split("<tbody>")[1].split("</tbody>")[0]
    lines = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", body, flags=re.DOTALL)
    return {way: [re.sub(r"<[^>]+>", "", cell) for cell in re.findall(r"<td.*?</td>", line)] for way, line in lines}


def made_up_page(folder: Path) -> str:
    """Return a page with three ways, one of them with a single seed at a single share."""
    results = [
        result(f"pretrained-seed{seed}", share, seed, *pair)
        for share, pairs in MEASURED.items()
        for seed, pair in enumerate(pairs)
    ]
    results += [result("given", 0.01, seed, 60.0 + seed, 31.0) for seed in SEEDS]
    results += [result("distilled-seed1", 0.01, 1, 45.0, 30.0)]
    ways = {
        "given": {"experiments": ["given"], "sources": []},
        "pretrained": {"experiments": [f"pretrained-seed{seed}" for seed in SEEDS], "sources": []},
        "distilled": {"experiments": ["distilled-seed1"], "sources": ["larger"]},
    }
    seconds = {"pretrained-seed0": 90.0, "pretrained-seed1": 100.0, "pretrained-seed2": 110.0}
    return write_page(folder, results, ways, {**seconds, "distilled-seed1": 80.0, "larger": 333.0})


def test_the_page_has_each_way_with_differences_and_costs(tmp_path: Path) -> None:
    text = made_up_page(tmp_path)
    shown = rows(text)
    scratch, given, pretrained, distilled, pixels = shown.values()
    assert list(shown) == ["from scratch", "given weights", "pre-trained here", "distilled here", "raw pixels"]
    assert scratch == ["29.7 ± 0.6 (3)", "89.5 ± 0.5 (3)", "0", "12 / 12"]
    low, high = ttest_rel([50, 53, 50], [30, 30, 29]).confidence_interval(0.95)
    assert pretrained[0] == f"51.0 ± 1.7 (3)+21.3 [{signed(low)}, {signed(high)}]"
    assert pretrained[2] == "100 ± 10"
    assert given[:3] == ["61.0 ± 1.0 (3)+31.3 [+27.5, +35.1]", "–", "–"]  # against 30, 30, 29 of the same seeds
    assert distilled == ["45.0 (1)+15.0", "–", "80 + 333 larger", "12"]
    assert pixels == ["40.0 ± 0.0 (3)", "40.0 ± 0.0 (3)", "–", "–"]
    sentence = re.search('<p class="verdict">(.*?)</p>', text)
    assert sentence is not None
    assert sentence[1].startswith("Pre-training here is better than training from scratch at 1 % of the labels (+21.3")
    assert "a difference is not shown at 100 %" in sentence[1]
    assert "1 x abacus." in text
    assert '<a href="pretrained-seed0/labels_1-seed0.json">' in text
    assert not re.search(r"https?:|src=(?!\"data:)|@import|url\(|<link|a<b", text)


def test_two_results_of_one_share_and_seed_are_refused(tmp_path: Path) -> None:
    twice = [result("pretrained", 0.01, 0, 50.0, 30.0), result("pretrained", 0.01, 0, 51.0, 30.0)]
    with pytest.raises(ValueError, match=r"labels_1-seed0: a second one with 1 % of the labels and seed 0: change or"):
        write_page(tmp_path, twice, {"pretrained": {"experiments": ["pretrained"], "sources": []}}, {})
