import json
import os
import subprocess
import sys

import pytest
import torch

from ssl_core.training.precision import autocast_type, has_cpu_bfloat16

CPU = torch.device("cpu")
NAMES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
CAPS = [
    {},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    {"DNNL_MAX_CPU_ISA": "avx2"},
    {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},  # a Xeon without bfloat16
]
# ATen and oneDNN read the environment at their first use, so that a fork of a fresh process can still set it.
PROGRAM = """
import json, os, sys
import torch
from ssl_core.training.precision import autocast_type
for caps in json.loads(sys.argv[1]):
    if os.fork() == 0:
        os.environ.update(caps)
        print(autocast_type("auto", torch.device("cpu")), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def automatic_types() -> list[str]:
    """The type of `precision: auto` under each of `CAPS`."""
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", PROGRAM, json.dumps(CAPS)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


def test_a_named_precision_is_taken_on_any_processor():
    assert autocast_type("fp32", CPU) is None
    assert autocast_type("bf16", CPU) is torch.bfloat16


def test_auto_is_bfloat16_where_the_processor_has_it():
    assert (autocast_type("auto", CPU) is torch.bfloat16) == has_cpu_bfloat16()


def test_auto_is_float32_under_a_cap_on_instruction_sets(automatic_types):
    uncapped, *capped = automatic_types
    if uncapped == "None":
        pytest.skip("this processor has no bfloat16 that a cap could switch off")
    assert uncapped == "torch.bfloat16"
    assert capped == ["None"] * len(capped)
    assert len(capped) == len(CAPS) - 1
