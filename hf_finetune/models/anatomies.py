"""The anatomy of timm's and transformers' networks: the one place that knows model families.

Every parameter gets a place: a block's number, or none. What has none lies in the stem when it is defined
before the first block, else in the head, with one exception: a convolution above the last block (MobileNet's
`conv_head`), and the normalisation after it, hold pretrained features and make a last block of their own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from hf_finetune.errors import ModelError
from hf_finetune.models.anatomy import HEAD, Anatomy, Family, Parameter

STEM = "stem"
_FIRST = -1  # place of what is known to lie in the stem
_TIMM_JOINS_PREVIOUS = (99999,)  # how timm's matchers say "with the group before": we let position decide

LAYER_LISTS: dict[str, tuple[str, ...]] = {
    "albert": ("encoder.albert_layer_groups",),
    "bart": ("encoder.layers", "decoder.layers"),
    "beit": ("layers",),
    "bert": ("encoder.layer",),
    "convnext": ("encoder.stages",),
    "deberta": ("encoder.layer",),
    "deberta-v2": ("encoder.layer",),
    "deit": ("layers",),
    "dinov2": ("encoder.layer",),
    "distilbert": ("transformer.layer",),
    "electra": ("encoder.layer",),
    "modernbert": ("layers",),
    "resnet": ("encoder.stages",),
    "roberta": ("encoder.layer",),
    "swin": ("encoder.layers",),
    "vit": ("layers",),
}
"""transformers' model type -> where its blocks are, under the base model. Others are read by structure."""

EXCEPTIONS: dict[str, tuple[tuple[str, int], ...]] = {
    # One table of relative positions and one norm serve every layer; the convolution runs beside the first.
    "deberta": ((r"encoder\.(rel_embeddings|LayerNorm)\.", _FIRST),),
    "deberta-v2": ((r"encoder\.(rel_embeddings|LayerNorm)\.", _FIRST), (r"encoder\.conv\.", 0)),
    "mpnet": ((r"encoder\.relative_attention_bias\.", _FIRST),),
}
"""transformers' model type -> (regex on the name under the base model, place) where order does not tell."""

_TOKENS = ("cls_token", "mask_token", "distillation_token", "position_embeddings")
"""Raw parameters of transformers' vision models that timm's `no_weight_decay` exempts under its own names."""


def timm_anatomy(model: Any, outputs: Mapping[str, nn.Module], *, new: frozenset[str]) -> Anatomy:
    """Return the anatomy of a timm model: stages of a CNN or Swin, blocks of a ViT.

    `outputs` are its output layers by name, `new` the tensors the checkpoint did not hold.
    """
    undecayed = frozenset(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else frozenset()
    places = _timm_places(model, outputs)
    return _anatomy(model, places, outputs, new=new, exempt=lambda name: name in undecayed, family=None)


def transformers_anatomy(
    model: Any, outputs: Mapping[str, nn.Module], *, new: frozenset[str], text: bool
) -> Anatomy:
    """Return the anatomy of a transformers model: embeddings, the entries of its layer list, head."""
    prefix = model.base_model_prefix if hasattr(model, model.base_model_prefix or " ") else ""
    base = getattr(model, prefix) if prefix else model
    prefix = f"{prefix}." if prefix else ""
    model_type = model.config.model_type
    lists = LAYER_LISTS.get(model_type) or _find_layer_list(base)
    places: dict[str, int] = {}
    count = 0
    for path in lists:
        for name, _ in model.named_parameters():
            if match := re.match(rf"{re.escape(prefix + path)}\.(\d+)\.", name):
                places[name] = count + int(match[1])
        count = max(places.values(), default=-1) + 1
    for pattern, place in EXCEPTIONS.get(model_type, ()):
        for name, _ in model.named_parameters():
            if re.match(re.escape(prefix) + pattern, name):
                places[name] = place
    return _anatomy(
        model,
        places,
        outputs,
        new=new,
        exempt=lambda name: name.endswith(_TOKENS),
        family="text" if text else None,
    )


def output_layers(where: str, model: Any, count: int) -> dict[str, nn.Module]:
    """Return the layers whose outputs are the logits, by name: one, or one per head of a distilled model.

    Raises:
        ModelError: none with `count` outputs is found.
    """
    if hasattr(model, "get_classifier"):
        heads = list(_heads(model.get_classifier()))
    else:
        base = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
        inside = {id(module) for module in base.modules()} if base is not None else set()
        heads = [nn.ModuleList(m for m in model.modules() if id(m) not in inside and not list(m.children()))]
    found = [layers[-1] for head in heads if (layers := [m for m in head.modules() if _width(m) == count])]
    names = {id(module): name for name, module in model.named_modules()}
    if not found or len(found) < len(heads):
        raise ModelError(
            f"{where}: no output layer of {count} outputs was found in {type(model).__name__}. "
            "Take a backbone its library can put a classifier on."
        )
    return {names[id(module)]: module for module in found}


def module_groups(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """Return module name -> the layer group it belongs to; a container that spans several groups is absent.

    A module belongs where all its parameters do. One without parameters (dropout, pooling) belongs to the
    module around it, or, where that spans several groups, to the group of the last parameter before it.
    """
    groups = {parameter.name: parameter.group for parameter in anatomy.parameters}
    by_tensor = {id(tensor): groups[name] for name, tensor in model.named_parameters()}
    found: dict[str, str] = {}
    last = anatomy.groups[0]

    def walk(name: str, module: nn.Module, around: str | None) -> None:
        nonlocal last
        own = {by_tensor[id(tensor)] for tensor in module.parameters()}
        group = next(iter(own)) if len(own) == 1 else None if own else around or last
        if group is not None:
            found.setdefault(name, group)
        for tensor in module.parameters(recurse=False):
            last = by_tensor[id(tensor)]
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child, group)

    walk("", model, None)
    return found


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises, by type; its own parameters are then scale and shift."""
    known = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    own = list(module.parameters(recurse=False))
    return isinstance(module, known) or ("Norm" in type(module).__name__ and all(p.ndim <= 1 for p in own))


def _timm_places(model: Any, outputs: Mapping[str, nn.Module]) -> dict[str, int]:
    if not hasattr(model, "group_matcher"):
        (path,) = _find_layer_list(model)
        return {
            n: int(n[len(path) + 1 :].split(".")[0])
            for n, _ in model.named_parameters()
            if n.startswith(f"{path}.")
        }
    matcher = _matcher(model)
    if isinstance(matcher, dict):
        matcher = {key: _without_joins(entry) for key, entry in matcher.items()}
    ids: dict[str, int] = group_parameters(model, matcher, reverse=True)
    # What no pattern matches comes last, the output layer with it.
    above = {ids[name] for name, _ in model.named_parameters() if name.rpartition(".")[0] in outputs}
    return {name: number - 1 for name, number in ids.items() if number not in above}


def _matcher(model: Any) -> Any:
    try:
        return model.group_matcher(coarse=True)
    except AssertionError:  # a few architectures know blocks only
        return model.group_matcher(coarse=False)


def _without_joins(entry: Any) -> Any:
    if isinstance(entry, (list, tuple)):
        return [each for each in entry if each[1] != _TIMM_JOINS_PREVIOUS] or None
    return entry


def _find_layer_list(base: nn.Module) -> tuple[str, ...]:
    """Return the path of the outermost list of layers that holds most parameters; empty without one."""

    def outermost(module: nn.Module, path: str) -> Iterator[tuple[int, str]]:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            layers = [layer for layer in child.children() if any(True for _ in layer.parameters())]
            if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(layers) > 1:
                yield sum(p.numel() for p in child.parameters()), inner
            else:
                yield from outermost(child, inner)

    found = max(outermost(base, ""), default=None)
    return (found[1],) if found else ()


def _anatomy(
    model: nn.Module,
    places: Mapping[str, int],
    outputs: Mapping[str, nn.Module],
    *,
    new: frozenset[str],
    exempt: Callable[[str], bool],
    family: Family | None,
) -> Anatomy:
    owners = {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    settled = _settle(model, places, outputs, owners)
    numbers = sorted({place for place in settled.values() if isinstance(place, int) and place != _FIRST})
    names: dict[int | str, str] = {
        _FIRST: STEM,
        HEAD: HEAD,
        **{n: f"block.{i}" for i, n in enumerate(numbers)},
    }
    used = {names[place] for place in settled.values()}
    groups = tuple(name for name in (STEM, *(names[n] for n in numbers), HEAD) if name in used)
    parameters = []
    for name, tensor in model.named_parameters():
        last = name.rpartition(".")[2]
        is_bias = last == "bias" or (last.endswith("_bias") and tensor.ndim == 1)
        in_norm = is_norm(owners[name])
        parameters.append(
            Parameter(
                name=name,
                shape=tuple(tensor.shape),
                group=names[settled[name]],
                is_bias=is_bias,
                in_norm=in_norm,
                decays=tensor.ndim > 1 and not is_bias and not in_norm and not exempt(name),
                is_new=name in new,
            )
        )
    plain = Anatomy(family or "cnn", groups, tuple(parameters))
    return plain if family else Anatomy(_vision_family(model, plain), groups, plain.parameters)


def _settle(
    model: nn.Module,
    places: Mapping[str, int],
    outputs: Mapping[str, nn.Module],
    owners: Mapping[str, nn.Module],
) -> dict[str, int | str]:
    """Return parameter name -> block number, `_FIRST` for the stem, or `HEAD`."""
    names = [name for name, _ in model.named_parameters()]
    top = max(places.values(), default=_FIRST)
    seen_block = False
    after_conv = False
    settled: dict[str, int | str] = {}
    for name in names:
        owner = owners[name]
        if name.rpartition(".")[0] in outputs:
            settled[name] = HEAD
        elif name in places:
            settled[name] = places[name]
            seen_block = seen_block or places[name] != _FIRST
        elif not seen_block:
            settled[name] = _FIRST
        else:
            after_conv = isinstance(owner, _ConvNd) or (after_conv and is_norm(owner))
            settled[name] = top + 1 if after_conv else HEAD
    return _join_lone_norms(settled, owners)


def _join_lone_norms(settled: dict[str, int | str], owners: Mapping[str, nn.Module]) -> dict[str, int | str]:
    """Return the places with blocks that are nothing but a norm joined to the block before (VGG's)."""
    numbers = sorted({place for place in settled.values() if isinstance(place, int)})
    joined: dict[int | str, int | str] = {}
    for before, number in zip([_FIRST, *numbers], numbers, strict=False):
        lone = number != _FIRST and all(
            is_norm(owners[name]) for name, place in settled.items() if place == number
        )
        joined[number] = joined.get(before, before) if lone else number
    return {name: joined.get(place, place) for name, place in settled.items()}


def _vision_family(model: nn.Module, anatomy: Anatomy) -> Family:
    """Return `vit` when at least half of the blocks attend, else `cnn` (ConvNeXt and hybrids included)."""
    groups = {parameter.name: parameter.group for parameter in anatomy.parameters}
    by_tensor = {id(tensor): groups[name] for name, tensor in model.named_parameters()}
    blocks = {group for group in anatomy.groups if group.startswith("block.")}
    attending = {by_tensor[id(t)] for m in model.modules() if _attends(m) for t in islice(m.parameters(), 1)}
    return "vit" if blocks and len(attending & blocks) * 2 >= len(blocks) else "cnn"


def _attends(module: nn.Module) -> bool:
    return any(hasattr(module, name) for name in ("num_heads", "num_attention_heads", "n_heads", "heads"))


def _heads(classifier: Any) -> Iterable[nn.Module]:
    """Yield every head of a timm classifier: distilled models have two, some ensembles a list."""
    if isinstance(classifier, (tuple, list, nn.ModuleList)):
        for each in classifier:
            yield from _heads(each)
    elif hasattr(classifier, "head_dist"):
        yield from (head for head in (classifier.head, classifier.head_dist) if list(head.parameters()))
    else:
        yield classifier


def _width(module: nn.Module) -> int | None:
    if isinstance(module, nn.Linear):
        return module.out_features
    return module.out_channels if isinstance(module, _ConvNd) else None
