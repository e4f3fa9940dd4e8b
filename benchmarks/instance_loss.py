"""Time and peak memory of the losses over all N instances, streamed over the bank and computed naively.

Both sides take turns, forward and backward, each time in a fresh process. CPU time is the shortest of the repeats,
which a busy machine distorts less than wall-clock; memory is the rise of the peak above the bank's. Values and ratios
are medians over the turns.

    python benchmarks/instance_loss.py --output instance_loss.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine  # pyright: ignore[reportMissingImports]
import psutil
import torch
import torch.nn.functional as F
from memory import peak_bytes  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ssl_core.blocks.instance_softmax import instance_softmax

TEMPERATURE, WEIGHT = 0.2, 20.0
LOSSES = {"cross-entropy": None, "+ SqrtKL": TEMPERATURE, "+ SqrtKL at 1": 1.0}  # temperature of SqrtKL
TENSORS = 8  # upper bound of (batch, N) tensors in memory during a naive loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 50_000, 200_000, 1_281_167])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="within a process")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one case as JSON, in its own process
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(**json.loads(arguments.case))))
        return
    about = machine.describe()
    print(f"batch {arguments.batch}, dim {arguments.dim}, {arguments.threads} thread(s), forward and backward")
    print(f"{'N':>9} {'loss':<14} {'streamed ms':>13} {'MB':>6} {'naive ms':>13} {'MB':>6} {'time':>6}")
    results = []
    for images in arguments.images:
        for loss in LOSSES:
            case = {name: vars(arguments)[name] for name in ("batch", "dim", "threads", "repeats")}
            case |= {"images": images, "loss": loss}
            sides = {"streamed": False}
            if 4 * TENSORS * arguments.batch * images < psutil.virtual_memory().available:
                sides["naive"] = True
            turns = [
                {side: in_own_process({**case, "naive": naive}) for side, naive in sides.items()}
                for _ in range(arguments.turns)
            ]
            row = {**case, **summary(turns)}
            results.append(row)
            print(f"{images:>9} {loss:<14} {_line(row['streamed'])} {_line(row['naive'])} {_ratio(row):>6}", flush=True)
    machine.write(arguments.output, about, {"rows": results})


def summary(turns: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return each side's median over the turns, and the median over turns of streamed / naive."""
    row: dict[str, Any] = {"naive": None, "ratio": None}
    for side in turns[0]:
        row[side] = {name: statistics.median(turn[side][name] for turn in turns) for name in turns[0][side]}
    if row["naive"]:
        ratios = [turn["streamed"]["milliseconds"] / turn["naive"]["milliseconds"] for turn in turns]
        row["ratio"] = statistics.median(ratios)
    return row


def in_own_process(case: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(
    *, images: int, batch: int, dim: int, loss: str, naive: bool, threads: int, repeats: int
) -> dict[str, float]:
    """Time forward and backward; return milliseconds and the rise of the peak memory in MB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    bank = torch.empty(images, dim).normal_()
    bank /= torch.linalg.vector_norm(bank, dim=1, keepdim=True)
    embedding, target = F.normalize(torch.randn(batch, dim), dim=1), torch.randint(images, (batch,))
    compute = naive_loss if naive else streamed_loss
    compute(embedding.requires_grad_(), bank[:1000], target % 1000, LOSSES[loss]).backward()  # loads the libraries
    before = peak_bytes()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        compute(embedding, bank, target, LOSSES[loss]).backward()
        times.append(1000 * (time.process_time() - start))
    rise = (peak_bytes() - before) / 2**20
    return {"milliseconds": min(times), "megabytes": rise}


def streamed_loss(embedding: Tensor, bank: Tensor, target: Tensor, sqrtkl_temperature: float | None) -> Tensor:
    """Compute the losses as NPID does: one pass over the bank for both."""
    softmax = instance_softmax(embedding, bank, temperature=TEMPERATURE, entropy_temperature=sqrtkl_temperature)
    loss = (softmax.log_normalizer - (embedding * bank[target]).sum(dim=1) / TEMPERATURE).mean()
    if sqrtkl_temperature is None:
        return loss
    entropy = softmax.negative_entropy
    return loss + WEIGHT * (entropy + softmax.to_square_root - 0.5 * (entropy - entropy.detach())).mean()


def naive_loss(embedding: Tensor, bank: Tensor, target: Tensor, sqrtkl_temperature: float | None) -> Tensor:
    similarity = embedding @ bank.T
    loss = F.cross_entropy(similarity / TEMPERATURE, target)
    if sqrtkl_temperature is None:
        return loss
    log_p = F.log_softmax(similarity / sqrtkl_temperature, dim=1)
    log_u = F.log_softmax(similarity.detach() / (2 * sqrtkl_temperature), dim=1)
    return loss + WEIGHT * (log_p.exp() * (log_p - log_u)).sum(dim=1).mean()


def _line(result: dict[str, float] | None) -> str:
    if result is None:
        return f"{'does not fit':>13} {'':>6}"
    return f"{result['milliseconds']:>13.1f} {result['megabytes']:>6.0f}"


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f}" if row["ratio"] else ""


if __name__ == "__main__":
    main()
