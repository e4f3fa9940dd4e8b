"""Features do not depend on how images come, in batches or to several processes, nor on whether they are in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ssl_core.data.loader import Loader
from ssl_core.evaluations import knn, linear, logistic, low_shot
from ssl_core.evaluations.parts import features
from ssl_core.evaluations.parts.features import center_view, extract, make_loader

from .conftest import SQUARES, quiet


def read(subjects, manifest, batch_size, **part):
    views = {"probe": center_view(16)}
    options = {"seed": 0, "shuffle": False, "mean": subjects.mean, "std": subjects.std, **part}
    with Loader(manifest, SQUARES, views, batch_size=batch_size, **options) as loader:
        return extract(subjects.networks, loader)


def test_features_do_not_depend_on_batches_or_processes(subjects, manifest):
    whole = read(subjects, manifest, 256)
    for batch_size in (1, 7):
        other = read(subjects, manifest, batch_size)
        assert torch.equal(whole.indices, other.indices)
        for name in subjects.networks:
            torch.testing.assert_close(whole.by_network[name], other.by_network[name], atol=1e-6, rtol=0)
    halves = [read(subjects, manifest, 7, rank=rank, world_size=2) for rank in (0, 1)]
    assert torch.equal(whole.indices, torch.cat([half.indices for half in halves]))
    assert torch.equal(whole.labels, torch.cat([half.labels for half in halves]))
    for name, rows in whole.by_network.items():
        torch.testing.assert_close(rows, torch.cat([half.by_network[name] for half in halves]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        (knn, {"k": 5}),
        (knn, {"variant": "best"}),
        (linear, {"variant": "features", "epochs": 2, "normalize": True}),
        (logistic, {"l2_steps": 3}),
        (low_shot, {"shots": (4,), "draws": 1}),
    ],
)
def test_features_in_a_file_give_the_same_results(protocol, options, subjects, manifest, monkeypatch):
    config = protocol.Config.model_validate({"dataset": {"name": "squares"}, **options})
    results = []
    for limit in (features.MEMORY_LIMIT, 0):
        monkeypatch.setattr(features, "MEMORY_LIMIT", limit)
        results.append(protocol.run(config, subjects, manifest, quiet))
    assert results[0] == results[1]


def test_more_features_than_the_limit_are_in_a_file(subjects, manifest, monkeypatch):
    monkeypatch.setattr(features, "MEMORY_LIMIT", 60 * 8 * 4)  # what the network gives fits, pixels do not
    with make_loader(subjects, manifest, SQUARES, center_view(16)) as loader:
        found = extract(subjects.networks, loader)
    (mapped,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if "ssl-core-features-" in line]
    first, last = (int(end, 16) for end in mapped.split()[0].split("-"))
    assert first <= found.by_network["pixels"].data_ptr() < last
    assert mapped.endswith("(deleted)")  # nothing is left behind, whatever ends the process
    del found
    assert "ssl-core-features-" not in Path("/proc/self/maps").read_text()


# 288 MB of features, then three times 244 MB, in a process that may take 192 MB more of its own memory (private and
# writable: mapped files do not count). It needs half of that.
PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from ssl_core.config import Dataset
from ssl_core.data.shards import Manifest
from ssl_core.evaluations import knn, logistic
from ssl_core.evaluations.base import Subjects
from ssl_core.evaluations.parts import features
from ssl_core.evaluations.parts.features import Features, Pixels, allocate, center_view, extract, make_loader


torch.set_num_threads(1)
features.MEMORY_LIMIT = 2**20
LARGE = (250_000, 256)


def own():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")]
    return 1024 * int(line.split()[1])


class Wide(torch.nn.Module):
    def forward(self, images):
        return images.mean(dim=(2, 3)).repeat(1, 400_000)


def random(generator):
    rows = allocate(*LARGE)
    for part in rows.split(8192):
        part.normal_(generator=generator)
    return rows


wide = {"wide": Wide()}
subjects = Subjects(wide, 16, (0.5,) * 3, (0.25,) * 3)
loader = make_loader(subjects, Manifest.load(Path(sys.argv[1])), Dataset(name="squares"), center_view(16), batch_size=1)
for _ in range(2):  # DALI's and the progress bar's threads, with their stacks and heaps
    extract({"pixels": Pixels()}, loader)
resource.setrlimit(resource.RLIMIT_DATA, (own() + 192 * 2**20, resource.RLIM_INFINITY))

found = extract(wide, loader).by_network["wide"]
report = {"extracted": 4 * found.numel(), "filled": bool((found[-1] != 0).all())}
del found
generator = torch.Generator().manual_seed(0)
rows = random(generator)
_, nearest = knn.neighbours(rows, rows[:50], 3, prepare=knn.into_space(rows, "raw"), euclidean=True)
report["nearest"] = nearest[:, 0].tolist() == list(range(50))
known = Features({"x": rows}, (rows[:, 0] > 0).long(), torch.arange(len(rows)))
known = logistic._take(known, torch.arange(len(rows)).flip(0))
config = logistic.Config(dataset=Dataset(name="x"), l2_steps=1, max_iterations=3)
sets = logistic.Sets(known, 200_000, known, "")
weights, _ = logistic.fit_chosen(sets, "x", 2, "top1", config, "cpu")
predicted = logistic._logits(weights, known.by_network["x"], "cpu").argmax(dim=1)
report["right"] = (predicted == known.labels).double().mean().item()
features.MEMORY_LIMIT = 2**40
try:
    random(generator)
    report["refused"] = False
except RuntimeError:
    report["refused"] = True  # the limit holds: in memory they would not fit
print(json.dumps(report))
"""


@pytest.mark.long
def test_own_memory_stays_bounded_however_many_features_there_are(manifest_path):
    run = subprocess.run([sys.executable, "-c", PROGRAM, manifest_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report.pop("right") > 0.95
    assert report == {"extracted": 60 * 400_000 * 12, "filled": True, "nearest": True, "refused": True}
