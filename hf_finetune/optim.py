"""From layer groups to an optimizer: by name, through timm's factory and torch's fused implementations."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from hf_finetune.spec import Auto, Spec


class OptimizerSpec(Spec):
    """The update rule and its base rate."""

    name: str = "auto"
    """Any name of timm's optimizer factory; auto = adamw."""
    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    """The base learning rate, which phases and layers multiply."""
    weight_decay: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Not applied to biases and normalisation layers."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    options: dict[str, Any] = {}
    """Passed to the optimizer's constructor (`betas`, `eps`, …)."""
