"""Cost of evaluations on cached features: logistic regression, nearest neighbours and linear probe, beside peers.

Each case runs in a fresh process and reports CPU seconds of all threads and the rise of peak resident memory. The sides
take turns; a ratio is the median over the turns. Where a peer would take long, only our side runs.

    python benchmarks/evaluation.py --output evaluation.json
    python benchmarks/evaluation.py --quick
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import machine  # pyright: ignore[reportMissingImports]
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from memory import peak_bytes  # pyright: ignore[reportMissingImports]
from torch import Tensor

from ssl_core.config import Dataset, Training
from ssl_core.evaluations import knn, logistic
from ssl_core.evaluations.parts.features import Features
from ssl_core.evaluations.parts.probe import Probe

CLASSES, DIM, K, TEMPERATURE = 10, 512, 200, 0.1
RATE = 0.01
BATCH, QUERIES = 256, 512  # the probe's batch size; queries per batch of lightly's kNN, which the user chooses


class Case(NamedTuple):
    """One comparison: a task, its sizes and its sides."""

    task: str
    train: int
    test: int
    amount: int  # penalties of the grid, or epochs of the probe
    sides: tuple[str, ...]


TASKS = ("logistic", "knn", "linear")
FULL = [
    Case("logistic", 5_000, 1_000, 45, ("ours", "scikit-learn")),
    Case("logistic", 50_000, 10_000, 45, ("ours",)),
    Case("knn", 50_000, 50_000, 0, ("ours", "lightly", "scikit-learn")),
    Case("linear", 50_000, 10_000, 20, ("ours", "lightly", "scikit-learn")),
]
QUICK = [
    Case("logistic", 1_000, 200, 5, ("ours", "scikit-learn")),
    Case("knn", 2_000, 1_000, 0, ("ours", "lightly", "scikit-learn")),
    Case("linear", 2_000, 500, 2, ("ours", "lightly", "scikit-learn")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", choices=("logistic", "knn", "linear"), default=("logistic", "knn", "linear")
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small sizes, once: to see that all of it runs")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # one side of one case as JSON, in its own process
    arguments = parser.parse_args()
    if arguments.case:
        *case, side, threads = json.loads(arguments.case)
        print(json.dumps(measure(Case(*case), side, threads)))
        return
    about, results = machine.describe(), []
    repeats = 1 if arguments.quick else arguments.repeats
    print(f"{'':10} {'train x test':>16} {'':13} {'CPU s':>8} {'wall s':>8} {'MB':>7} {'top1':>6} {'ratio':>6}")
    for case in QUICK if arguments.quick else FULL:
        if case.task not in arguments.tasks:
            continue
        turns = [{side: run(case, side, arguments.threads) for side in case.sides} for _ in range(repeats)]
        for side in case.sides:
            row = summary(turns, side)
            sizes = {"task": case.task, "train": case.train, "test": case.test, "amount": case.amount}
            results.append({**sizes, "side": side, "threads": arguments.threads, **row})
            size = f"{case.train} x {case.test}"
            numbers = f"{row['cpu_seconds']:>8.2f} {row['seconds']:>8.2f} {row['megabytes']:>7.0f} {row['top1']:>6.2f}"
            print(f"{case.task:10} {size:>16} {side:13} {numbers} {row['ratio']:>6.2f}")
    machine.write(arguments.output, about, {"rows": results})


def summary(turns: list[dict[str, dict[str, float]]], side: str) -> dict[str, float]:
    """Return the medians of one side over the turns, and its CPU time divided by ours."""
    medians = {name: statistics.median(turn[side][name] for turn in turns) for name in turns[0][side]}
    ratio = statistics.median(turn[side]["cpu_seconds"] / turn["ours"]["cpu_seconds"] for turn in turns)
    return {**medians, "ratio": ratio}


def run(case: Case, side: str, threads: int) -> dict[str, float]:
    """Measure one side of a case in its own process."""
    command = [sys.executable, __file__, "--case", json.dumps([*case, side, threads])]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(answer.stderr)
    return json.loads(answer.stdout)


def measure(case: Case, side: str, threads: int) -> dict[str, float]:
    """Time one side on new features, and measure how far memory rises above the level before."""
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(threads)
    train, test = make_features(case.train, 0), make_features(case.test, 1)
    work = {"logistic": LOGISTIC, "knn": KNN, "linear": LINEAR}[case.task][side]
    with threadpool_limits(threads), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of fits that run out of iterations
        few_train, few_test = ((rows[:64], labels[:64]) for rows, labels in (train, test))
        work(few_train, few_test, 1)  # imports and first calls
        before, wall, cpu = psutil.Process().memory_info().rss, time.perf_counter(), time.process_time()
        top1 = work(train, test, case.amount)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_seconds": cpu, "seconds": wall, "megabytes": max(0, peak_bytes() - before) / 1e6, "top1": top1}


Half = tuple[Tensor, Tensor]  # features and labels
Work = Callable[[Half, Half, int], float]  # returns top-1 in percent, which shows that the sides do equal work


def make_features(images: int, seed: int) -> Half:
    """Return non-negative features of overlapping classes with correlated dimensions."""
    shared = torch.Generator().manual_seed(7)
    centers = torch.randn(CLASSES, DIM, generator=shared)
    mixing = torch.randn(DIM, DIM, generator=shared) / DIM**0.5
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (images,), generator=generator)
    rows = torch.empty(images, DIM)
    for start in range(0, images, 8192):  # never twice in memory
        part = labels[start : start + 8192]
        noise = torch.randn(len(part), DIM, generator=generator) @ mixing
        rows[start : start + 8192] = (0.15 * centers[part] + noise).relu()
    return rows, labels


def top1(predicted: Tensor, labels: Tensor) -> float:
    return 100 * (predicted == labels).double().mean().item()


def our_logistic(train: Half, test: Half, penalties: int) -> float:
    """Choose the penalty on the last fifth of the training images, fit to all again, as in the protocol."""
    known = Features({"x": train[0]}, train[1], torch.arange(len(train[1])))
    sets = logistic.Sets(known, len(train[1]) * 4 // 5, known, "")
    config = logistic.Config(dataset=Dataset(name="x"), l2_steps=penalties)
    weights, _ = logistic.fit_chosen(sets, "x", CLASSES, "top1", config, "cpu")
    return top1(logistic._logits(weights, test[0], "cpu").argmax(dim=1), test[1])


def scikit_logistic(train: Half, test: Half, penalties: int) -> float:
    """Do the same with scikit-learn's L-BFGS, each fit started from the one before it, as in ssl-transfer."""
    from sklearn.linear_model import LogisticRegression

    rows, labels = train[0].numpy(), train[1].numpy()
    fitted = len(rows) * 4 // 5
    model = LogisticRegression(max_iter=1000, warm_start=True)
    scores = {}
    for l2 in np.logspace(5, -6, penalties):
        model.set_params(C=1 / l2).fit(rows[:fitted], labels[:fitted])
        scores[l2] = model.score(rows[fitted:], labels[fitted:])
    model.set_params(C=1 / max(scores, key=lambda l2: scores[l2])).fit(rows, labels)
    return 100 * float(model.score(test[0].numpy(), test[1].numpy()))


def our_knn(train: Half, test: Half, _: int) -> float:
    k = min(K, len(train[0]))
    cosines, nearest = knn.neighbours(train[0], test[0], k, prepare=knn.unit, euclidean=False)
    weights = knn.vote_weights(cosines, TEMPERATURE)
    return knn.accuracy_by_k(train[1][nearest], weights, test[1], [k], CLASSES)[k]


def lightly_knn(train: Half, test: Half, _: int) -> float:
    """Loop over batches of queries, as in lightly's benchmarks."""
    from lightly.utils.benchmarking import knn_predict

    bank, k = F.normalize(train[0], dim=1).T.contiguous(), min(K, len(train[0]))
    predicted = [
        knn_predict(F.normalize(part, dim=1), bank, train[1], CLASSES, knn_k=k, knn_t=TEMPERATURE)[:, 0]
        for part in test[0].split(QUERIES)
    ]
    return top1(torch.cat(predicted), test[1])


def scikit_knn(train: Half, test: Half, _: int) -> float:
    """Find neighbours by brute force, then vote as the other sides."""
    from sklearn.neighbors import NearestNeighbors

    k = min(K, len(train[0]))
    model = NearestNeighbors(n_neighbors=k, algorithm="brute", metric="cosine").fit(train[0].numpy())
    distances, nearest = (torch.from_numpy(found) for found in model.kneighbors(test[0].numpy()))
    weights = ((1 - distances) / TEMPERATURE).exp().float()
    return knn.accuracy_by_k(train[1][nearest], weights, test[1], [k], CLASSES)[k]


def our_linear(train: Half, test: Half, epochs: int) -> float:
    """Train by gradient descent on cached features, one learning rate, tested every epoch."""
    plan = Training(learning_rate=RATE, learning_rate_scaling="none", weight_decay=0, warmup_epochs=0, epochs=epochs)
    probe = Probe(DIM, CLASSES, [plan], seed=0, steps_per_epoch=-(-len(train[0]) // BATCH))
    keep, score = torch.ones(BATCH, dtype=torch.bool), {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(train[0]), generator=generator).split(BATCH):
            probe.step(train[0][rows], train[1][rows], keep)
        (score,) = probe.scores(*test)
    return score["top1"]


def lightly_linear(train: Half, test: Half, epochs: int) -> float:
    """Train lightly's linear classifier without its trainer: SGD, cosine, a loader over tensors."""
    from lightly.utils.benchmarking import LinearClassifier
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    module = LinearClassifier(torch.nn.Identity(), BATCH, feature_dim=DIM, num_classes=CLASSES)
    head = module.classification_head
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE, momentum=0.9)
    loader = DataLoader(TensorDataset(*train), batch_size=BATCH, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    score = 0.0
    for _ in range(epochs):
        for rows, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(module(rows), labels).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            score = top1(head(test[0]).argmax(dim=1), test[1])
    return score


def scikit_linear(train: Half, test: Half, epochs: int) -> float:
    """Run as many passes of scikit-learn's gradient descent, one image per step, one class against the rest."""
    from sklearn.linear_model import SGDClassifier

    model = SGDClassifier(loss="log_loss", alpha=1e-6, max_iter=epochs, tol=None, random_state=0)  # pyright: ignore[reportArgumentType]
    model.fit(train[0].numpy(), train[1].numpy())
    return 100 * float(model.score(test[0].numpy(), test[1].numpy()))


LOGISTIC: dict[str, Work] = {"ours": our_logistic, "scikit-learn": scikit_logistic}
KNN: dict[str, Work] = {"ours": our_knn, "lightly": lightly_knn, "scikit-learn": scikit_knn}
LINEAR: dict[str, Work] = {"ours": our_linear, "lightly": lightly_linear, "scikit-learn": scikit_linear}


if __name__ == "__main__":
    main()
