"""The kit for a machine with a GPU: `pytest tests/gpu`.

Without a GPU all of it is skipped. `pytest tests/gpu --device cpu --quick` runs the parts that need no CUDA, with the
CPU on both sides. Tests of other folders run here again, with their `DEVICE` set to the GPU.
"""

from pathlib import Path

import pytest
import torch

from tests.data import test_pipeline
from tests.data.conftest import make_shards, pictures, tiny
from tests.methods import harness
from tests.training import test_loop

__all__ = ["make_shards", "pictures", "tiny"]

NO_GPU = "no GPU: `pytest tests/gpu --device cpu --quick` runs the parts that need no CUDA"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    on_cpu, quick = config.getoption("--device") == "cpu", config.getoption("--quick")
    for item in here:
        if not on_cpu and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
        elif on_cpu and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs CUDA itself"))
        elif quick and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="not quick"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device that is compared with the CPU."""
    return str(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def set_devices(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of other folders run on the device, in full float32."""
    for module in (test_pipeline, harness, test_loop):
        monkeypatch.setattr(module, "DEVICE", device)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    # A stage that an earlier test ran in this process sets both.
    torch.set_float32_matmul_precision("highest")
    torch.set_deterministic_debug_mode("default")
