"""The type in which matrix products run."""

import os

import torch

# Values of ONEDNN_MAX_CPU_ISA under which torch reports bfloat16 as supported although oneDNN only emulates it.
EMULATED = {"AVX512_CORE", "AVX512_CORE_VNNI"}


def autocast_type(precision: str, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 for `bf16`, and for `auto` where the hardware has it; None is float32."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            native = has_cpu_bfloat16()
        precision = "bf16" if native else "fp32"
    return torch.bfloat16 if precision == "bf16" else None


def has_cpu_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 natively and no environment variable forbids it."""
    in_hardware = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return in_hardware and not _is_capped()


def _is_capped() -> bool:
    """Return whether ATEN_CPU_CAPABILITY or ONEDNN_MAX_CPU_ISA stop below bfloat16 instructions."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    return (
        torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        or limit.upper() in EMULATED
    )
