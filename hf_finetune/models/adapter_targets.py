"""Which layers of a network a method adapts: asked for by anatomy, left out with a reason where peft would go wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hf_finetune.errors import ModelError
from hf_finetune.models.anatomies import attends, is_norm
from hf_finetune.models.anatomy import HEAD
from hf_finetune.models.backbone import Backbone
from hf_finetune.models.forward import unwrappable
from hf_finetune.strategies.methods import METHODS, TARGETS, AdapterSpec, Layer, Method

_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_KINDS: tuple[tuple[type[nn.Module], Layer], ...] = ((nn.Linear, "linear"), (nn.modules.conv._ConvNd, "conv"))


def choose_targets(
    spec: AdapterSpec, method: Method, backbone: Backbone, groups: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the layers that get adapters, and why others of those asked for do not.

    Raises:
        ModelError: the backbone has no layers of the kind asked for.
    """
    model = backbone.model
    asked = [name for name in block_layers(model, groups) if _asked(spec.targets, name, model, method)]
    if not asked:
        some = [name for name, _ in zip(block_layers(model, groups), range(3), strict=False)]
        raise ModelError(
            f"strategy.targets: '{spec.targets}' finds no layer in the blocks of {backbone.source['architecture']}. "
            f"Choose from {', '.join(TARGETS)}, or a regular expression on names such as {', '.join(some)}."
        )
    modules = dict(model.named_modules())
    reasons = {name: _unsuitable(spec, method, modules, name) for name in asked}
    reasons |= unwrappable(backbone, [name for name, reason in reasons.items() if reason is None])
    chosen = [name for name, reason in reasons.items() if reason is None]
    return chosen, {name: reason for name, reason in reasons.items() if reason is not None}


def block_layers(model: nn.Module, groups: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of all layers with a weight in the blocks."""
    for name, module in model.named_modules():
        if groups.get(name, HEAD).startswith("block.") and (layer_kind(module) or is_norm(module)):
            yield name


def _asked(targets: str, name: str, model: nn.Module, method: Method) -> bool:
    kind = layer_kind(model.get_submodule(name))
    if "norm" in method.layers:
        return kind == "norm" and (targets in TARGETS or re.search(targets, name) is not None)
    if targets == "all":
        return kind != "norm"
    if targets == "all-linear":
        return kind == "linear"
    if targets in ("attention", "mlp"):
        inside = any(name.startswith(f"{each}.") for each in _attention(model))
        return kind == "linear" and inside == (targets == "attention")
    return kind != "norm" and re.search(targets, name) is not None


def _attention(model: nn.Module) -> list[str]:
    """Return the names of the modules that are attention: an attending module and the projections around it.

    From a module that has heads upwards, until the module around it holds a layer that widens what it gets, as every
    MLP does.
    """
    modules = dict(model.named_modules())

    def linears(path: str) -> set[str]:
        return {n for n, m in modules.items() if n.startswith(f"{path}.") and isinstance(m, nn.Linear)}

    found = []
    heads = [name for name, module in modules.items() if name and attends(module) and linears(name)]
    for path in heads:
        if any(other.startswith(f"{path}.") for other in heads):
            continue
        around = path.rpartition(".")[0]
        while around:
            added = [modules[name] for name in linears(around) - linears(path)]
            if any(isinstance(m, nn.Linear) and m.out_features > m.in_features for m in added):
                break
            path, around = around, around.rpartition(".")[0]
        found.append(path)
    return found


def _unsuitable(spec: AdapterSpec, method: Method, modules: Mapping[str, nn.Module], name: str) -> str | None:
    """Return why a layer cannot get an adapter of this method; None if it can."""
    module = modules[name]
    kind = layer_kind(module)
    if kind not in method.layers:
        return f"{spec.method} adapts no {_WORDS[kind]}"
    if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
        return "torch's attention reads its weight without calling the layer"
    if kind != "norm" and type(module).forward not in _PLAIN_FORWARDS and not _is_quantised(module):
        return "a layer with a forward of its own, which peft would bypass"
    if isinstance(module, nn.modules.conv._ConvNd):
        if method.pointwise and max(module.kernel_size) > 1:
            return f"{spec.method} adapts convolutions of 1 x 1 only"
        if max(module.dilation) > 1:
            return "dilated, which peft's adapters are not"
        if module.groups == module.in_channels > 1:
            return "depthwise: an adapter would be larger than the layer"
        if module.groups > 1 and (not method.grouped or spec.merge or spec.rank % module.groups):
            return f"{module.groups} groups" + (f", rank {spec.rank}" if method.grouped else "")
    size = spec.peft_options().get(method.block or "")
    if size and math.prod(layer_shape(module)[1:]) % size:
        return f"its inputs are no multiple of {method.block} {size}"
    return None


_WORDS: dict[Layer, str] = {"linear": "linear layers", "conv": "convolutions", "norm": "normalisation layers"}


def layer_kind(module: nn.Module) -> Any:
    """Return `linear`, `conv` or `norm`, None for what is no layer with a weight."""
    kind = next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)
    return kind or ("norm" if is_norm(module) and list(module.parameters(recurse=False)) else None)


def layer_shape(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a layer's weight; that of a quantised one as if it were not."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(_weight(module).shape)


def _weight(module: nn.Module) -> Tensor:
    return next(module.parameters(recurse=False))


def _is_quantised(module: nn.Module) -> bool:
    return not _weight(module).is_floating_point()


def no_target(spec: AdapterSpec, method: Method, backbone: Backbone, left_out: Mapping[str, str]) -> str:
    """Return the text of the error when none of the layers asked for can be adapted."""
    modules = dict(backbone.model.named_modules())
    # What the method could adapt and is left out still, no method can.
    layers = [name for name in left_out if _unsuitable(spec, method, modules, name)]
    able = [
        name
        for name, each in METHODS.items()
        if any(_unsuitable(AdapterSpec(method=name), each, modules, layer) is None for layer in layers)
    ]
    remedy = "Take another implementation of this architecture (timm's, transformers'), or other `targets`."
    if able:
        remedy = f"Methods that can: {', '.join(able)}."
    return (
        f"strategy: {spec.method} can adapt none of the {len(left_out)} layers that targets '{spec.targets}' finds in "
        f"{backbone.source['architecture']} ({'; '.join(dict.fromkeys(left_out.values()))}). {remedy}"
    )
