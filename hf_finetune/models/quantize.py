"""Backbones in 8 or 4 bits (bitsandbytes): the linear layers of the blocks, by anatomy, of either library.

What is quantised takes a quarter or an eighth of the memory and cannot learn; adapters on it, the head, biases and
normalisation layers stay in float32 and can. The arithmetic around it follows the run's precision by autocast.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_finetune.errors import ModelError, first_line
from hf_finetune.models.adapter_targets import block_layers
from hf_finetune.models.anatomies import module_groups
from hf_finetune.models.backbone import Backbone
from hf_finetune.models.forward import unwrappable
from hf_finetune.models.spec import Quantize

_CONFIGS: dict[Quantize, dict[str, Any]] = {
    "8bit": {"load_in_8bit": True, "llm_int8_threshold": 6.0},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
"""What transformers' BitsAndBytesConfig says of it: LLM.int8() (arXiv 2208.07339), NF4 of QLoRA (arXiv 2305.14314)."""


def quantized(backbone: Backbone, kind: Quantize) -> Backbone:
    """Return the backbone with the linear layers of its blocks quantised; the model is changed in place.

    `source["quantize"]` then holds the `kind`, the number of `layers`, the `bytes` of all weights before and after, and
    the arguments `config` of the BitsAndBytesConfig with which transformers loads the same.

    Raises:
        ModelError: bitsandbytes is missing, cannot run here, or finds nothing it could quantise.
    """
    bnb = _bitsandbytes(kind)
    model: Any = backbone.model
    new = {p.name for p in backbone.anatomy.parameters if p.is_new}
    names = [
        name
        for name in block_layers(model, module_groups(model, backbone.anatomy))
        if type(model.get_submodule(name)) is nn.Linear and f"{name}.weight" not in new
    ]
    bypassed = unwrappable(backbone, names)
    names = [name for name in names if name not in bypassed]
    if not names:
        raise ModelError(
            f"backbone.quantize: {backbone.source['architecture']} has no pretrained linear layers in its blocks, and "
            "others are not quantised. Remove backbone.quantize, or take a transformer."
        )
    before = _bytes(model)
    try:
        for name in names:
            model.set_submodule(name, _quantized_layer(bnb, model.get_submodule(name), kind))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ModelError(_cannot(bnb, kind, torch.device("cpu"), error)) from error
    setattr(model, f"is_loaded_in_{kind}", True)  # where peft looks
    fixed = {f"{name}.weight" for name in names}
    parameters = tuple(
        replace(p, is_fixed=True) if p.name in fixed else p for p in backbone.anatomy.parameters
    )
    kept = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    facts = {
        "kind": kind,
        "layers": len(names),
        "bytes": [before, _bytes(model)],
        "config": _CONFIGS[kind] | {"llm_int8_skip_modules": kept},
    }
    return replace(
        backbone,
        anatomy=replace(backbone.anatomy, parameters=parameters),
        source=backbone.source | {"quantize": facts},
    )


def check_device(kind: Quantize, device: torch.device) -> None:
    """Quantise a layer and run it forward and backward where the run will.

    Raises:
        ModelError: bitsandbytes is missing, or cannot compute on this device.
    """
    bnb = _bitsandbytes(kind)
    try:
        layer = _quantized_layer(bnb, nn.Linear(64, 64), kind).to(device)
        layer(torch.ones(2, 64, device=device, requires_grad=True)).sum().backward()
    except (RuntimeError, NotImplementedError, ValueError, AttributeError) as error:
        raise ModelError(_cannot(bnb, kind, device, error)) from error


def dequantized(backbone: Backbone) -> Backbone:
    """Return a copy of a backbone in 4 bits with plain linear layers that compute the same."""
    model = copy.deepcopy(backbone.model)
    dequantize_layers(model)
    source = {key: value for key, value in backbone.source.items() if key != "quantize"}
    return replace(backbone, model=model, source=source)


def dequantize_layers(model: Any) -> None:
    """Put plain linear layers into the places of 4-bit ones."""
    bnb = _bitsandbytes("4bit")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), layer.bias
            model.set_submodule(name, plain.train(layer.training))
    model.is_loaded_in_4bit = False


def _bitsandbytes(kind: Quantize) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"backbone.quantize: {kind} needs bitsandbytes, which is not installed. Install it with "
            "`pip install 'hf_finetune[quantize]'`, or remove backbone.quantize."
        )
    # It remarks on every call of an 8-bit layer that it rounds what comes in.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except Exception as error:  # its native library fails to load in as many ways as there are machines
        raise ModelError(
            f"backbone.quantize: bitsandbytes is installed and cannot be imported ({error}). "
            "Install it anew for this machine's torch, or remove backbone.quantize."
        ) from error


def _quantized_layer(bnb: Any, layer: nn.Module, kind: Quantize) -> nn.Module:
    """Return a linear layer's quantised twin on the same device, its bias the very same parameter."""
    shape = (layer.in_features, layer.out_features)
    new: Any
    if kind == "4bit":
        new = bnb.nn.Linear4bit(
            *shape, bias=False, compute_dtype=torch.float32, quant_type="nf4", device="meta"
        )
        new.weight = bnb.nn.Params4bit(layer.weight.data, quant_type="nf4", module=new)
        # Its other arithmetic for measuring would rearrange frozen weights, and round otherwise than in training.
        new.support_avx512bf16_for_cpu = False
    else:
        new = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False)
        # bitsandbytes turns the bias into its input's type, for good.
        new.register_forward_pre_hook(lambda module, args: (args[0].float(), *args[1:]))
    device = layer.weight.device
    new = new.to(device)  # which quantises
    new.bias = layer.bias
    return new.train(layer.training)


def _bytes(model: nn.Module) -> int:
    tensors = model.state_dict().values()  # unlike the parameters, it holds the scales of quantised weights
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cannot(bnb: Any, kind: Quantize, device: torch.device, error: Exception) -> str:
    reason = first_line(error).rstrip(".")
    return (
        f"backbone.quantize: bitsandbytes {bnb.__version__} cannot compute in {kind} on {device} with torch "
        f"{torch.__version__} ({reason}). Remove backbone.quantize, or run on hardware that it supports."
    )
