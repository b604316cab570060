"""A model at work: its forward pass, whichever library built it, and what that does with its layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_finetune.models.backbone import Backbone, ImageInput, Modality


def placed(model: nn.Module, device: torch.device, modality: Modality) -> nn.Module:
    """Return the model where it computes, and in the memory format it computes fastest in: images in channels_last.

    Layers with adapters keep torch's own format, which peft's DoRA and BOFT take for granted.
    """
    model = model.to(device)
    if modality == "image":
        model = model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if hasattr(module, "base_layer"):
                for parameter in module.parameters():
                    parameter.data = parameter.data.contiguous()
    return model


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return logits (N, outputs) of a model of either library, wrapped or not."""
    # Every vision model takes its pixels first; timm's name for the argument differs from transformers'.
    output: Any = model(inputs["pixel_values"]) if "pixel_values" in inputs else model(**inputs)
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    return logits


def trial_inputs(backbone: Backbone) -> dict[str, Tensor]:
    """Return the smallest batch that the backbone runs on."""
    if isinstance(backbone.input, ImageInput):
        return {"pixel_values": torch.zeros(1, len(backbone.input.mean), *backbone.input.size)}
    return dict(backbone.input.tokenizer("a", return_tensors="pt"))


class _Probe(nn.Module):
    """Stands where peft would put its wrapper around a layer, and notes what the network does with it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.called = False
        self.read: str | None = None
        """An attribute of the layer that the wrapper would not have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in ("weight", "bias", "in_features", "out_features"):
                self.read = name
            return getattr(self.layer, name)


def unwrappable(backbone: Backbone, names: Iterable[str]) -> dict[str, str]:
    """Return which of these layers the network would not find behind peft's wrapper, and why, by one forward pass.

    timm's BEiT reads a weight and leaves its layer out; transformers' MobileNet reads a convolution's stride.
    """
    model = backbone.model.eval()
    probes = {name: _Probe(model.get_submodule(name)) for name in names}
    inputs = trial_inputs(backbone)
    device = next(model.parameters()).device
    for name, probe in probes.items():
        model.set_submodule(name, probe)
    try:
        with torch.no_grad():
            forward(model, {name: tensor.to(device) for name, tensor in inputs.items()})
    finally:
        for name, probe in probes.items():
            model.set_submodule(name, probe.layer)
    unread = {
        name: "its weight is read without calling the layer" for name, p in probes.items() if not p.called
    }
    read = {name: f"the network reads its {p.read}, which peft hides" for name, p in probes.items() if p.read}
    return read | unread
