"""Settings and fixtures of all tests: one thread, no writing into the repository, the folder of real data sets."""

import multiprocessing
import os
import tempfile
from pathlib import Path

# Set before this process or a process started by a test imports torch or MLflow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# Tracking takes seconds per stage; its own tests and the test of the whole workflow switch it on.
os.environ["SSL_TRACKING"] = "off"
_tracking = tempfile.TemporaryDirectory(prefix="ssl-core-mlflow-")
os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{_tracking.name}/mlflow.db"

import pytest  # noqa: E402
import torch  # noqa: E402

from ssl_core import late_compiler  # noqa: E402
from ssl_core.stages import shard  # noqa: E402

late_compiler.postpone()  # as the command line does, before a test imports torchvision
torch.set_num_threads(1)
multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.preloaded"])

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data")
    return folder


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of the demonstration's data set, sharded."""
    folder = tmp_path_factory.mktemp("shards") / "demo"
    shard.run(ROOT / "datasets" / "demo.yaml", folder, threads=1)
    return folder / "manifest.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked `long`")
    parser.addoption("--slurm", action="store_true", help="also run tests/slurm, which start a SLURM cluster")
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="of tests/gpu")
    parser.addoption("--quick", action="store_true", help="of each kind of test in tests/gpu, only the fastest")


# Started first and in this order, so that no process is left with a slow file when the others have finished.
SLOWEST = ("workflow", "tracking", "methods", "faults", "stages", "training", "evaluations")
SLOWEST += ("test_recipes.py", "test_docs.py", "experiments", "data", "look")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def position(item: pytest.Item) -> int:
        part = item.path.relative_to(ROOT / "tests").parts[0]
        return SLOWEST.index(part) if part in SLOWEST else len(SLOWEST)

    items.sort(key=position)
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: run `make test-long`"))
