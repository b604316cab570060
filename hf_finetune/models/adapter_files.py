"""Adapters on disk: a plain peft adapter that carries, beside itself, whatever of the model differs from its base.

That is found by comparing tensors, not by names.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_finetune.errors import ModelError
from hf_finetune.freeze import fingerprints
from hf_finetune.models.adapter import NAME, Adapter
from hf_finetune.models.adapters import plain_name, quiet, tuner_layers
from hf_finetune.models.backbone import Backbone, TextInput
from hf_finetune.models.load import save_beside, seeded
from hf_finetune.models.quantize import dequantize_layers

WEIGHTS = "adapter_model.safetensors"
_ROOT = "base_model.model."
"""What peft puts before the names of the network's own tensors."""


def save_adapter(backbone: Backbone, folder: Path, labels: Any) -> None:
    """Write a plain peft adapter to `folder`, with the base model's config (labels) and processor or tokenizer.

    `PeftModel.from_pretrained(base, folder)` gives the logits of `backbone.model`, which may be a copy of the model the
    adapters were added to (an average of its weights).
    """
    adapter = backbone.adapter
    assert adapter is not None
    save_beside(backbone, folder, labels)
    own = {name: tensor.detach().cpu() for name, tensor in backbone.model.state_dict().items()}
    config = copy.deepcopy(adapter.config)
    tensors = _adapter_tensors(adapter, config, own)
    on_base = _start_from_base(adapter, config, tensors, own)

    # What the base model does not hold, or holds otherwise, by its name in the base model.
    modules = dict(backbone.model.named_modules())
    plain = {plain_name(name): name for name in own if not _is_adapter(name, modules)}
    marks = fingerprints({each: own[name] for each, name in plain.items()})
    moved = {each for each, mark in marks.items() if adapter.pretrained.get(each) != mark}
    if on_base:
        moved -= set(adapter.residual)
    whole = _whole_modules(backbone.model, moved, [target.name for target in adapter.targets])
    config.modules_to_save = whole or None
    inside = tuple(f"{name}." for name in whole)
    tensors |= {
        _ROOT + plain[each]: own[plain[each]] for each in plain if each in moved or each.startswith(inside)
    }

    source = backbone.source
    config.inference_mode = True
    config.base_model_name_or_path = source["folder"] if source["commit"] is None else source["id"]
    config.base_model_name_or_path = config.base_model_name_or_path or source["id"]
    config.revision = source["commit"]
    if isinstance(backbone.input, TextInput) and _guessed(backbone.model) <= set(whole):
        config.task_type = peft.TaskType.SEQ_CLS
    config.save_pretrained(str(folder))
    # Copies, because safetensors refuses tensors that share memory.
    save_file(
        {k: v.clone().contiguous() for k, v in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"}
    )


def load_adapter(backbone: Backbone, folder: Path) -> Backbone:
    """Return a base model, as `load_backbone` gives it, with the adapter in `folder`.

    Raises:
        ModelError: it does not fit the base model.
    """
    try:
        with seeded(0), quiet():
            shell = peft.PeftModel.from_pretrained(backbone.model, str(folder), torch_device="cpu")
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: this adapter does not fit the base model '{backbone.source['id']}': {error}"
        ) from error
    return replace(backbone, model=shell.get_base_model().eval())


def merged(backbone: Backbone) -> Backbone:
    """Return a copy of the backbone with its adapters merged into the weights: a plain network again."""
    model = copy.deepcopy(backbone.model)
    if "quantize" in backbone.source:
        model = _on_plain_layers(backbone, model)
    for name, layer in tuner_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    _forget_peft(model)
    return replace(backbone, model=model, adapter=None)


def _on_plain_layers(backbone: Backbone, model: nn.Module) -> nn.Module:
    """Return a network of quantised layers with plain ones in their places, its adapters on those.

    What peft merges into quantised weights it rounds as they are.
    """
    adapter = backbone.adapter
    assert adapter is not None
    own = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(adapter.config)
    tensors = _adapter_tensors(adapter, config, own)
    for name, layer in tuner_layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    _forget_peft(model)
    dequantize_layers(model)
    with seeded(0), quiet():
        shell = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        set_peft_model_state_dict(shell, tensors)
    return shell.get_base_model().eval()


def _forget_peft(model: nn.Module) -> None:
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)


def _is_adapter(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether a tensor of the state dict is part of an adapter."""
    path = name
    while path:
        path, _, last = path.rpartition(".")
        if isinstance(modules.get(path), BaseTunerLayer):  # a quantised weight has tensors below its name
            return last != "base_layer"
    return False


def _adapter_tensors(adapter: Adapter, config: Any, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters' tensors by their names in the file, from a state dict of the network `own`."""
    state = {_ROOT + name: tensor for name, tensor in own.items()}
    # What a method keeps beside the network. No state dict is asked for: that would share out again what is gathered.
    beside = chain(
        adapter.shell.named_parameters(remove_duplicate=False),
        adapter.shell.named_buffers(remove_duplicate=False),
    )
    state |= {name: tensor.detach().cpu() for name, tensor in beside if not name.startswith(_ROOT)}
    if getattr(config, "rank_pattern", None) and config.peft_type == peft.PeftType.ADALORA:
        # Ranks are dropped from the file where the weights measured do not use them; between two allocations they may.
        kept = {
            name.replace(f".{NAME}", ""): torch.tensor(mask) for name, mask in config.rank_pattern.items()
        }
        dropped = [state[f"{_ROOT}{name}.{NAME}"][~mask] for name, mask in kept.items()]
        if any(bool(each.any()) for each in dropped):
            config.rank_pattern = None
    configs = adapter.shell.peft_config
    training = configs[NAME]
    configs[NAME] = config
    try:
        return dict(get_peft_model_state_dict(adapter.shell, state_dict=state, save_embedding_layers=False))
    finally:
        configs[NAME] = training


def _start_from_base(
    adapter: Adapter, config: Any, tensors: dict[str, Tensor], own: Mapping[str, Tensor]
) -> bool:
    """Rewrite adapters that were taken out of the weights (PiSSA) as plain ones on the weights as they were.

    With W = R + s B0 A0 the trained layer R + s B A is W + s [B, -B0] [A; A0]: twice the rank, on the base model.
    Returns False where weights below the adapters were trained too: they have to be carried instead.
    """
    if not adapter.residual:
        return True
    config.init_lora_weights = True
    marks = fingerprints(
        {plain_name(name): tensor for name, tensor in own.items() if plain_name(name) in adapter.residual}
    )
    if marks != adapter.residual:
        return False
    for name, tensor in list(tensors.items()):
        first = adapter.start.get(name.removeprefix(_ROOT).replace(".weight", f".{NAME}.weight"))
        if first is not None:
            is_a = ".lora_A." in name
            tensors[name] = torch.cat([tensor, first if is_a else -first], 0 if is_a else 1)
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    return True


def _whole_modules(model: nn.Module, moved: set[str], targets: Iterable[str]) -> list[str]:
    """Return the modules that peft's `modules_to_save` can name to carry `moved` tensors, none inside another.

    peft compares the ends of names: a name that would mean other modules too is not used, and the tensors are carried
    one by one.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    wrapped = set(tuner_layers(model))
    inside_wrapped = tuple(f"{name}." for name in wrapped)

    def free(name: str) -> bool:
        inner = any(other == name or other.startswith(f"{name}.") for other in wrapped)
        return bool(name) and not inner and not name.startswith(inside_wrapped)

    found: set[str] = set()
    for tensor in moved:
        owner = tensor.rpartition(".")[0]
        if not free(owner) or list(modules[owner].children()):
            continue
        while free(around := owner.rpartition(".")[0]) and all(
            f"{around}.{name}" in moved for name in modules[around].state_dict()
        ):
            owner = around
        found.add(owner)
    found = {name for name in found if not any(name.startswith(f"{other}.") for other in found)}

    def clear(name: str) -> bool:
        meant = {other for other in modules if other.endswith(name)}
        excluded = re.compile(rf"(^|.*\.){name}($|\..*)")
        return meant <= found and not any(excluded.match(target) for target in targets)

    while unclear := {name for name in found if not clear(name)}:
        found -= unclear
    return sorted(found)


def _guessed(model: nn.Module) -> set[str]:
    """Return the modules that peft takes for heads of a text classifier by their names."""
    return {name for name, _ in model.named_modules() if name.endswith(("classifier", "score"))}
