"""Write docs/gpu.md from the JSON of gpu.py: `python benchmarks/gpu_page.py`. Without docs/gpu.json nothing was run."""

import sys
from pathlib import Path
from typing import Any

from ssl_core.files import read_json, write_text

DOCS = Path(__file__).parents[1] / "docs"
PAGE, NUMBERS = DOCS / "gpu.md", DOCS / "gpu.json"
HEAD = """# On a GPU

This page is written by `benchmarks/gpu_page.py` from `docs/gpu.json`, the output of `benchmarks/gpu.py`.
"""
NOT_YET_RUN = """
**Not yet run: no line of the GPU path has run on a GPU.** On a machine with one, in this order:

| step | command | time |
|---|---|---|
| the GPU's views, decoders, losses and resume against the CPU's | `pytest tests/gpu` | minutes |
| speed and memory | `python benchmarks/gpu.py --output docs/gpu.json` | at most 9 minutes |
| this page | `python benchmarks/gpu_page.py` | |

Without a GPU, all parts that do not need CUDA itself run by `pytest tests/gpu --device cpu --quick` and
`python benchmarks/gpu.py --device cpu --quick`.
"""
TRAINING = {  # heading -> key and format
    "ours, images/s": ("ours", ",.0f"),
    "floor": ("floor", ",.0f"),
    "ours / floor": ("of_floor", ".3f"),
    "torchvision, 16 workers": ("torchvision", ",.0f"),
    "waiting": ("wait_share", ".1%"),
    "torch, MB": ("torch_peak_mb", ",.0f"),
    "card, MB": ("card_used_mb", ",.0f"),
    "share of the card": ("share_of_card", ".1%"),
}
OPERATORS = {"ms per batch": ("milliseconds", ".2f")}
COMPILED = {"ours, images/s": ("ours", ",.0f")}


def main() -> None:
    results = read_json(NUMBERS) if NUMBERS.is_file() else None
    if results is not None and results["machine"]["device"] != "cuda":
        sys.exit(f"error: {NUMBERS} was measured on the CPU: run `python benchmarks/gpu.py` on a machine with a GPU")
    write_text(PAGE, page(results))


def page(results: dict[str, Any] | None) -> str:
    """Return the page for the content of gpu.py's JSON; None if there is none."""
    if results is None:
        return HEAD + NOT_YET_RUN
    machine, card = results["machine"], results["card"]
    rate = f"{card['tflops']:.0f} TFLOP/s in bfloat16" + (" (data sheet)" if card["listed"] else "")
    lines = [
        HEAD,
        "| | |",
        "|---|---|",
        f"| hardware | {machine['hardware']}, load {machine['load']} at the start |",
        f"| card | {card['name']}, {rate}; a large product of matrices reaches {card['product_tflops']:.0f} |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in machine['versions'].items())} |",
        f"| left out for want of time | {', '.join(results['left_out']) or 'nothing'} |",
        "",
    ]
    lines += ["## CIFAR-10", "", *map(cifar, results.get("cifar10", [])), ""]
    for heading, part, columns in (
        ("Training steps", "training", TRAINING),
        ("Operators of the views at 32 px", "operators", OPERATORS),
        ("With `training.compile`", "compiled", COMPILED),
    ):
        lines += [f"## {heading}", "", *table(results.get(part, []), columns), ""]
    return "\n".join(lines).rstrip() + "\n"


def cifar(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    first, second = row["goals"]
    speed = f"{row['epochs']} epochs took {row['seconds']:.0f} s at {row['images_per_second']:,.0f} images/s"
    return f"{row['name']}: {speed}; 200 take {row['seconds_of_all_epochs']:.0f} s (goals: {first}, then {second})."


def table(rows: list[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> list[str]:
    """Return the lines of a table; a row that failed shows its error."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for key, form in columns.values()]
        if "error" in row:
            cells[0] = row["error"].replace("|", "/").replace("\n", " ")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
