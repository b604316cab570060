"""Which number format training computes in, by what the hardware does well."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from hf_finetune.errors import RecipeError
from hf_finetune.models.backbone import Backbone
from hf_finetune.models.forward import forward, placed, sample_inputs
from hf_finetune.parallel import unseen
from hf_finetune.recipe import Precision

_PROBE_SAMPLES, _PROBE_SECONDS = 4, 0.4
"""How large the batch is that two formats are compared on, and how long each is timed."""
_WORTH = 1.15
"""How many times faster bf16 must be than fp32 on a CPU: below, noise would choose."""


def resolve_precision(
    precision: Precision, device: torch.device, where: str, backbone: Backbone, *, alone: bool = True
) -> tuple[Precision, str]:
    """Return the precision to use for `backbone` on `device` and why.

    A GPU is judged by its generation. On a CPU that has bf16 instructions the network runs in both for a moment, for
    not every layer gains; unless several processes would have to agree on what they measure (`alone` is False).

    Raises:
        RecipeError: the hardware cannot compute in the precision asked for.
    """
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision == "tf32" and not ampere:
        raise RecipeError(
            f"{where}: tf32 is a format of NVIDIA GPUs from Ampere on. Use fp32, or auto for what suits this "
            f"{device.type}."
        )
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
        name = torch.cuda.get_device_name(device)
        return ("bf16", f"{name} computes in bf16") if ampere else ("fp16", f"{name} has no fast bf16")
    if device.type != "cpu" or not _cpu_has_bf16():
        return "fp32", f"no fast 16-bit format on this {device.type}"
    if not alone:
        return "bf16", "this CPU has bf16 instructions"
    gain = bf16_gain(backbone, device)
    if gain < _WORTH:
        return (
            "fp32",
            f"this CPU has bf16 instructions, but with this network bf16 ran at {gain:.2g}x fp32's speed",
        )
    return "bf16", f"this CPU has bf16 instructions; with this network bf16 ran at {gain:.2g}x fp32's speed"


def accelerator_in(precision: Precision, **options: Any) -> Accelerator:
    """Return an accelerator that computes in a resolved precision; `options` are accelerate's own."""
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    if (
        torch.cuda.is_available()
    ):  # torch runs convolutions in TF32 unless told otherwise: here fp32 means fp32
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = precision != "fp32"
    mixed = precision if precision in {"bf16", "fp16"} else "no"
    with unseen():
        return Accelerator(mixed_precision=mixed, **options)


def bf16_gain(backbone: Backbone, device: torch.device) -> float:
    """Return how many times faster a forward and backward pass is in bf16 than in fp32; the model stays as it was."""
    model = placed(backbone.model, device, backbone.modality).eval()
    inputs = sample_inputs(backbone, _PROBE_SAMPLES, device)
    return _seconds(model, inputs, device, bf16=False) / _seconds(model, inputs, device, bf16=True)


def _seconds(model: nn.Module, inputs: dict[str, torch.Tensor], device: torch.device, *, bf16: bool) -> float:
    """Return the seconds of the fastest of several forward and backward passes; the first sets things up."""
    fastest, until = float("inf"), None
    while until is None or time.monotonic() < until:
        began = time.monotonic()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            logits = forward(model, inputs)
        logits.float().sum().backward()
        if until is not None:
            fastest = min(fastest, time.monotonic() - began)
        until = until or time.monotonic() + _PROBE_SECONDS
    model.zero_grad(set_to_none=True)
    return fastest


def _cpu_has_bf16() -> bool:
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
