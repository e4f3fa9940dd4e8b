"""torch's compiler is not imported until something is compiled, and then works as usual."""

import subprocess
import sys

import pytest

CODE = """
import sys
from contextlib import suppress
from ssl_core import cli

with suppress(SystemExit):
    cli.main(["--help"])
assert not {"torch", "mlflow"} & set(sys.modules), "the command line imports torch or MLflow"

import torch
import ssl_core.stages.evaluate, ssl_core.stages.pretrain
from ssl_core.config import Training
from ssl_core.training.optimizers import build_optimizer

def loaded():
    return any(name in sys.modules for name in ("torch._dynamo.config", "sympy"))

assert not loaded(), "the stages import the compiler"
network = torch.nn.Linear(2, 2)
for name in ("sgd", "adamw", "lars"):
    network(torch.ones(1, 2)).sum().backward()
    optimizer = build_optimizer(network, Training(optimizer=name, warmup_epochs=0))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert not loaded(), "a step imports the compiler"

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
torch.nn.parallel.DistributedDataParallel(network)(torch.ones(1, 2)).sum().backward()
torch.distributed.destroy_process_group()
assert not loaded(), "a process of several imports the compiler"
"""
COMPILED = """
import torch._dynamo.config
assert loaded()
compiled = torch.compile(network, backend="eager")
torch.testing.assert_close(compiled(torch.ones(1, 2)), network(torch.ones(1, 2)))
compiled(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
"""
# The first access to the compiler in a process
FIRST_USES = [
    "import torch._dynamo.utils; torch._dynamo.utils.counters",
    "from torch._dynamo.utils import counters",
    "from torch._dynamo import config",
    "torch._dynamo.reset()",
    "torch.compile(torch.nn.Linear(2, 2), backend='eager')(torch.ones(1, 2))",
]


def run(code: str) -> None:
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_stages_steps_and_processes_import_no_compiler():
    run(CODE)


@pytest.mark.long
def test_what_is_compiled_after_a_step_is_what_was_trained():
    run(CODE + COMPILED)


@pytest.mark.long
@pytest.mark.parametrize("use", FIRST_USES)
def test_each_first_use_imports_the_real_compiler(use: str):
    run(
        "from ssl_core import late_compiler; late_compiler.postpone()\n"
        f"import sys, torch\n{use}\n"
        "assert not any(isinstance(module, late_compiler.StandIn) for module in sys.modules.values())\n"
        "assert torch._dynamo.utils.counters is not None"
    )
