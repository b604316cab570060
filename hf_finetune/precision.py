"""Which number format training computes in, by what the hardware does well."""

from __future__ import annotations

from typing import Literal

import torch

from hf_finetune.errors import RecipeError
from hf_finetune.recipe import Precision

MixedPrecision = Literal["no", "bf16", "fp16"]


def resolve_precision(precision: Precision, device: torch.device, where: str) -> tuple[Precision, str]:
    """Return the precision to use on `device` and why.

    Raises:
        RecipeError: the hardware cannot compute in the precision asked for.
    """
    if precision == "fp16" and device.type == "cpu":
        raise RecipeError(
            f"{where}: fp16 does not train on a CPU. Use bf16 or fp32, or auto for what suits it."
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name(device)
        raise RecipeError(f"{where}: {name} has no bf16. Use fp16 or fp32, or auto for what suits it.")
    if precision != "auto":
        return precision, "as the recipe says"
    if device.type == "cuda":
        # Emulated bf16 counts as supported on older cards, where fp16 is the fast format.
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return "bf16", f"{torch.cuda.get_device_name(device)} computes in bf16"
        return "fp16", f"{torch.cuda.get_device_name(device)} has no fast bf16"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16", "this CPU has bf16 instructions"
    return "fp32", f"no fast 16-bit format on this {device.type}"


def mixed_precision(precision: Precision) -> MixedPrecision:
    """Return accelerate's name for a resolved precision."""
    return "no" if precision in {"fp32", "auto"} else precision  # type: ignore[return-value]


def _cpu_has_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
