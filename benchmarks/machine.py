"""The machine that a benchmark ran on: hardware, instruction set and load, for its JSON."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from ssl_core import provenance
from ssl_core.files import write_text
from ssl_core.training.precision import has_cpu_bfloat16

BUSY = 0.2  # of a core: a higher load at the start distorts the numbers
INSTRUCTIONS = {"AVX2": "avx2", "AVX512_CORE": "avx512bw", "AVX512_CORE_BF16": "avx512_bf16"}  # oneDNN's name -> flag


def describe() -> dict[str, Any]:
    """Return hardware, instruction set and load; warn on stderr if the machine is busy. Call it at the start."""
    load = os.getloadavg()[0]
    busy = load > BUSY
    if busy:
        print(f"warning: the load is {load:.1f}: other work distorts the numbers; end it first", file=sys.stderr)
    return {
        "hardware": provenance.hardware(),
        "instructions": instructions(),
        "load": round(load, 2),
        "busy": busy,
        "versions": provenance.versions(),
    }


def instructions() -> str:
    """Return the widest instruction set that torch and oneDNN use here, by oneDNN's name."""
    if has_cpu_bfloat16():
        return "AVX512_CORE_BF16"
    capability = torch.backends.cpu.get_cpu_capability()
    return "AVX512_CORE" if capability == "AVX512" else capability


def supports(instruction_set: str) -> bool:
    """Return whether the processor has one of the `INSTRUCTIONS`."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    return INSTRUCTIONS[instruction_set] in flags


def environment(instruction_set: str | None) -> dict[str, str]:
    """Return the environment of a process limited to an instruction set; None is the machine's widest."""
    if instruction_set is None:
        return dict(os.environ)
    capability = "avx2" if instruction_set == "AVX2" else "avx512"
    return {**os.environ, "ONEDNN_MAX_CPU_ISA": instruction_set, "ATEN_CPU_CAPABILITY": capability}


def write(output: Path | None, machine: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the results with the machine as JSON, if there is a file to write to."""
    if output is not None:
        write_text(output, json.dumps({"machine": machine, **results}, indent=2) + "\n")
