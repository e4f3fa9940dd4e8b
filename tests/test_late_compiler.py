"""torch's compiler stays out until something is compiled, and then works as if it had always been there."""

import subprocess
import sys

CODE = """
import sys
import torch
import ssl_core.stages.evaluate, ssl_core.stages.pretrain
from ssl_core.config import Training
from ssl_core.training.optimizers import build_optimizer

def loaded():
    return any(name.startswith("torch._dynamo.") for name in sys.modules)

network = torch.nn.Linear(2, 2)
for name in ("sgd", "adamw", "lars"):
    network(torch.ones(1, 2)).sum().backward()
    optimizer = build_optimizer(network, Training(optimizer=name, warmup_epochs=0))
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert not loaded(), "a step imports the compiler"

import torch._dynamo.config
assert loaded()
compiled = torch.compile(network, backend="eager")
torch.testing.assert_close(compiled(torch.ones(1, 2)), network(torch.ones(1, 2)))
compiled(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
"""


def test_steps_do_without_it_and_compiling_brings_it():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
