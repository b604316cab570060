"""The adapters inside a model: where they are, and what their method asks of the training loop."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_finetune.strategies.methods import AdapterSpec, Layer

if TYPE_CHECKING:
    from peft import PeftModel

NAME = "default"
"""What peft calls an adapter that has no name."""


@dataclass(frozen=True)
class Target:
    """A layer that gets an adapter."""

    name: str
    kind: Layer
    group: str
    shape: tuple[int, ...]
    """Of its weight."""
    size: int
    """Elements of its adapter."""


# Where AdaLoRA's rank allocator keeps the importance of each singular value, and its running averages.
_MEMORIES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


@dataclass
class Adapter:
    """The adapters inside a model, and what is needed to save them apart from it."""

    spec: AdapterSpec
    shell: PeftModel
    """peft's wrapper; the network inside is the backbone's model."""
    targets: tuple[Target, ...]
    left_out: dict[str, str]
    """Layer of the blocks -> why it gets no adapter."""
    pretrained: dict[str, str]
    """Fingerprints of the base model's tensors, by their names in the base model; without those it has not."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """Where the method takes its start out of the weights (PiSSA): the adapters' first state."""
    residual: dict[str, str] = field(default_factory=dict)
    """And the fingerprints of what is left of these weights."""

    @property
    def config(self) -> Any:
        """peft's configuration."""
        return self.shell.peft_config[NAME]

    def penalty(self) -> Tensor | float:
        """Return what the method adds to the loss of a step: AdaLoRA keeps its singular vectors orthogonal."""
        weight = getattr(self.config, "orth_reg_weight", 0.0)
        found = [
            p @ p.T if "lora_A" in name else p.T @ p
            for name, p in self.shell.named_parameters()
            if weight and p.requires_grad and re.search(r"\.lora_[AB]\.", name)
        ]
        if not found:
            return 0.0
        distances = [torch.linalg.norm(each - torch.eye(len(each), device=each.device)) for each in found]
        return weight * torch.stack(distances).mean()

    def after_step(self, step: int) -> None:
        """Let the method rearrange itself after optimizer step `step` (from 1), while the gradients are there.

        AdaLoRA moves its ranks to the layers where they matter.
        """
        allocator = getattr(self.shell.base_model, "rankallocator", None)
        if allocator is None:
            return
        adapters = [p for n, p in self.shell.named_parameters() if "lora_" in n and p.requires_grad]
        if not adapters or any(p.grad is None for p in adapters):
            return  # a phase in which the adapters do not learn
        last = self.config.total_step - self.config.tfinal
        if step < last or (step == last and allocator.ipt) or (step > last and self.config.rank_pattern):
            self.shell.base_model.update_and_allocate(step)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the method remembers from step to step, tensors and plain values, for a checkpoint."""
        allocator = getattr(self.shell.base_model, "rankallocator", None)
        if allocator is None:
            return {}, {}
        tensors = {f"{each}//{name}": t for each in _MEMORIES for name, t in getattr(allocator, each).items()}
        return tensors, {"rank_pattern": self.config.rank_pattern}

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Put back what `state` returned."""
        allocator = getattr(self.shell.base_model, "rankallocator", None)
        if allocator is None:
            return
        for place, tensor in tensors.items():
            each, name = place.split("//")
            getattr(allocator, each)[name] = tensor
        self.config.rank_pattern = plain["rank_pattern"]

    def facts(self) -> dict[str, Any]:
        """Return what a run records about its adapters."""
        return {
            "method": self.spec.method,
            "peft_type": str(self.config.peft_type.value),
            "layers": len(self.targets),
            "left_out": len(self.left_out),
            "size": sum(target.size for target in self.targets),
        }
