"""The page "Should I pre-train?": the verdict, a picture, and all numbers. The markup is in `ways_page.html`."""

import base64
from collections.abc import Iterable, Sequence
from typing import Any

from ssl_core.drawing.style import render
from ssl_core.report.page import deviation_text, fill_in, number_text
from ssl_core.report.results import Result, Summary, headline, signed, value
from ssl_core.report.ways import (
    PIXELS,
    SCRATCH,
    TITLES,
    Difference,
    Way,
    collect,
    difference,
    outcome,
    percent,
    verdict,
)
from ssl_core.report.ways_picture import draw_ways

TEMPLATE = "ways_page.html"
MISSING = "–"


def page_of_ways(results: Sequence[Result], tunings: Sequence[Any], pretrainings: Sequence[Any], plan: Any) -> str:
    """Return the page; the arguments are those of `ways.collect`."""
    ways = collect(results, tunings, pretrainings, plan)
    by_name = {way.name: way for way in ways}
    scratch, pretrained = by_name[SCRATCH], by_name["pretrained"]
    shares = sorted(pretrained.accuracies)
    differences = {share: one for share in shares if (one := difference(pretrained, scratch, share))}
    dataset = results[0]["dataset"]
    picture = draw_ways(ways, shares, title=f"Fine-tuned on {dataset}")
    return fill_in(
        TEMPLATE,
        dataset=dataset,
        verdict=verdict(differences, plan["seeds"]),
        picture=base64.b64encode(render(picture)["svg"]).decode(),
        shares=[percent(share) for share in shares],
        lines=[_line(way, scratch, shares) for way in ways],
        titles=TITLES,
        labelled=_labelled(results),
        num_test=results[0]["num_test"],
        sources={name: seconds(cost) for way in ways for name, cost in way.sources.items()},
        settings=_settings(results),
        runs=[_run(result, by_name) for result in results],
        hardware=_distinct(report["hardware"] for report in (*pretrainings, *tunings)),
    )


def _line(way: Way, scratch: Way, shares: Sequence[float]) -> dict[str, Any]:
    """Return a line of the table: accuracies, differences from `scratch`, seconds."""
    cells = []
    for share in shares:
        compared = None if way.name in (SCRATCH, PIXELS) else difference(way, scratch, share)
        cells.append({"accuracy": _summary(way.accuracy(share)), **_compared(compared)})
    own = [summary_text(way.pretraining)] if way.pretraining else []
    others = [f"{seconds(cost)} {name}" for name, cost in way.sources.items()]
    tunings = [tuning.mean for share in shares if (tuning := way.tuning(share))]
    return {
        "title": way.title,
        "cells": cells,
        "pretraining": " + ".join([*own, *others]) or ("0" if way.name == SCRATCH else MISSING),
        "tuning": " / ".join(map(seconds, tunings)) or MISSING,
    }


def _compared(compared: Difference | None) -> dict[str, str]:
    if compared is None:
        return {"difference": "", "outcome": ""}
    text = signed(compared.mean)
    if compared.interval is not None:
        low, high = map(signed, compared.interval)
        text = f"{text} [{low}, {high}]"
    return {"difference": text, "outcome": outcome(compared).replace(" ", "-")}


def _summary(summary: Summary | None) -> dict[str, str]:
    if summary is None:
        return {"mean": MISSING, "deviation": "", "n": ""}
    return {"mean": number_text(summary.mean), "deviation": deviation_text(summary), "n": str(summary.n)}


def summary_text(summary: Summary) -> str:
    """Return seconds as "93 ± 2"."""
    if summary.deviation is None:
        return seconds(summary.mean)
    decimals = 0 if summary.mean >= 10 else 1
    return f"{seconds(summary.mean)} ± {summary.deviation:,.{decimals}f}"


def seconds(number: float) -> str:
    """Return seconds without decimals from ten on."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}"


def _labelled(results: Sequence[Result]) -> dict[str, str]:
    """Return the number of labelled images of each share."""
    images: dict[float, set[int]] = {}
    for result in results:
        images.setdefault(result["hyperparameters"]["fraction"], set()).add(result["num_train"])
    return {percent(share): " or ".join(map(str, sorted(images[share]))) for share in sorted(images)}


def _settings(results: Sequence[Result]) -> list[str]:
    """Return the settings of fine-tuning at each share."""
    lines = []
    for result in sorted(results, key=lambda result: result["hyperparameters"]["fraction"]):
        used = result["hyperparameters"]
        lines.append(
            f"{percent(used['fraction'])}: {used['epochs']} epochs, batches of {used['batch_size']}, learning rate "
            f"{used['backbone_learning_rate']:g} of the backbone and {used['learning_rate']:g} of the classifier"
        )
    return _distinct(lines)


def _run(result: Result, ways: dict[str, Way]) -> dict[str, Any]:
    """Return a line of the list of all runs, with the way from scratch of the same seed."""
    share, seed = result["hyperparameters"]["fraction"], result["seed"]
    own = value(result, "", headline(result)) or 0.0
    other = ways[SCRATCH].accuracies.get(share, {}).get(seed)
    return {
        "experiment": result["experiment"],
        "evaluation": result["evaluation"],
        "share": percent(share),
        "images": result["num_train"],
        "seed": seed,
        "accuracy": number_text(own),
        "scratch": MISSING if other is None else number_text(other),
        "difference": MISSING if other is None else signed(own - other),
    }


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
