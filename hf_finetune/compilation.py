"""Whether a network's training step is compiled, and how."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

BACKEND = "inductor"
COMPILE_FROM_STEPS = 1_000
"""Steps of a phase from which on a GPU's compiler, which takes about a minute, is worth its time."""


def resolve_compile(
    asked: Literal["auto", "on", "off"],
    device: torch.device,
    steps: int,
    phases: int,
    *,
    shared: bool = False,
) -> tuple[Literal["on", "off"], str]:
    """Return whether to compile a run of `steps` optimizer steps in `phases` phases, each compiled anew, and why.

    Not where processes hold shares of the parameters (`shared`).
    """
    if asked != "auto":
        return asked, "as the recipe says"
    if device.type != "cuda":
        return "off", f"on a {device.type} a compiled step was no faster (docs/performance.md)"
    if shared:
        return "off", "FSDP2 gathers parameters layer by layer"
    each = steps // phases
    if each < COMPILE_FROM_STEPS:
        return "off", f"{each} steps in a phase do not pay for the minute that compiling takes"
    return "on", f"{each} steps in a phase pay for the minute that compiling takes"


def compiled(model: nn.Module) -> Any:
    """Return what runs `model` compiled; the model itself stays as it is, to be measured and saved.

    What was compiled before, for another phase in which other layers learned, is forgotten: torch gives up on a network
    after a few versions of it, and would go on uncompiled without a word.
    """
    torch.compiler.reset()
    return torch.compile(model, backend=BACKEND)
