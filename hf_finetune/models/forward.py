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


def sample_inputs(backbone: Backbone, count: int, device: torch.device) -> dict[str, Tensor]:
    """Return inputs for a model to try itself on: black images of its size, or texts of one short word."""
    if isinstance(backbone.input, ImageInput):
        pixels = torch.zeros(count, len(backbone.input.mean), *backbone.input.size, device=device)
        return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last)}
    inputs = backbone.input.tokenizer(["a"] * count, return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def compute_in_fp32(layer: nn.Module) -> None:
    """Let a layer leave autocast: in 16 bits logits lose the digits by which classes differ."""
    layer.register_forward_pre_hook(_leave_autocast)
    layer.register_forward_hook(_return_to_autocast, always_call=True)


_left: list[torch.autocast | None] = []
"""What the layers that are running now have left."""


def _leave_autocast(layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
    kind = inputs[0].device.type
    context = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else None
    _left.append(context)
    if context is None:
        return None
    context.__enter__()
    return tuple(
        each.float() if isinstance(each, Tensor) and each.is_floating_point() else each for each in inputs
    )


def _return_to_autocast(layer: nn.Module, inputs: Any, output: Any) -> None:
    context = _left.pop()
    if context is not None:
        context.__exit__(None, None, None)


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
    inputs = sample_inputs(backbone, 1, next(model.parameters()).device)
    for name, probe in probes.items():
        model.set_submodule(name, probe)
    try:
        with torch.no_grad():
            forward(model, inputs)
    finally:
        for name, probe in probes.items():
            model.set_submodule(name, probe.layer)
    unread = {
        name: "its weight is read without calling the layer" for name, p in probes.items() if not p.called
    }
    read = {name: f"the network reads its {p.read}, which peft hides" for name, p in probes.items() if p.read}
    return read | unread
