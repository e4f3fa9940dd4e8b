"""What every test stands on: one thread, no writing into the project, the real data where it is."""

import os
import tempfile
from pathlib import Path

# Before torch or MLflow are imported anywhere, in this process or in one that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["SSL_TRACKING"] = (
    "off"  # costs seconds a stage; its own tests and the one of the whole workflow switch it on
)
_tracking = tempfile.TemporaryDirectory(prefix="ssl-core-mlflow-")
os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{_tracking.name}/mlflow.db"

import pytest  # noqa: E402
import torch  # noqa: E402

from ssl_core import late_compiler  # noqa: E402

late_compiler.postpone()  # as the command line does, before a test imports torchvision
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no ../shared/data")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests marked `long`")


SLOWEST = ("workflow", "test_tracking.py", "training", "stages", "evaluations", "faults")  # files go out in this order


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        part = item.path.relative_to(ROOT / "tests").parts[0]
        return SLOWEST.index(part) if part in SLOWEST else len(SLOWEST)

    items.sort(key=place)  # so that no process is left with minutes of one file when the others have ended
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="long: run `make test-long`"))
