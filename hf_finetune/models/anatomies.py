"""The anatomy of timm's and transformers' networks: the one place that knows model families.

timm says where its blocks are; in a transformers model they are the list of layers that holds most
parameters, and what surrounds the base model is the head. What has no place by this lies in the stem when it
is defined before the first block, with the block that follows when it is defined between two, and else above
the last: in the head. One exception: a convolution above the last block (MobileNet's `conv_head`), and the
normalisation after it, hold pretrained features and make a last block of their own.
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
Place = int | str
"""A block's number, or `STEM`, or `HEAD`."""

_TIMM_JOINS_PREVIOUS = (99999,)  # how timm's matchers say "with the group before": here position decides

EXCEPTIONS: dict[str, tuple[tuple[str, Place], ...]] = {
    # One table of relative positions and one norm serve every layer; the convolution runs beside the first.
    "deberta": ((r"encoder\.(rel_embeddings|LayerNorm)\.", STEM),),
    "deberta-v2": ((r"encoder\.(rel_embeddings|LayerNorm)\.", STEM), (r"encoder\.conv\.", 0)),
    "mpnet": ((r"encoder\.relative_attention_bias\.", STEM),),
}
"""transformers' model type -> (regex on the name under the base model, place) where order does not tell."""

TWIN_HEADS = (
    ("cls_classifier", "distillation_classifier"),
    ("classifier", "classifier_distill"),
    ("head", "dist_head"),
)
"""Attributes of transformers' distilled models, whose logits are the mean of two output layers'."""

UNDECAYED = (
    "cls_token",
    "mask_token",
    "distillation_token",
    "position_embeddings",
    "relative_position_bias_table",
)
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
    base = getattr(model, model.base_model_prefix or " ", None)
    prefix = f"{model.base_model_prefix}." if base is not None else ""
    # What surrounds the base model is the classification head, wherever the class defines it.
    places: dict[str, Place] = {n: HEAD for n, _ in model.named_parameters() if not n.startswith(prefix)}
    count = 0
    for paths in _layer_lists(model if base is None else base):
        pattern = re.compile(rf"{re.escape(prefix)}(?:{'|'.join(map(re.escape, paths))})\.(\d+)\.")
        matches = [(name, match) for name, _ in model.named_parameters() if (match := pattern.match(name))]
        places |= {name: count + int(match[1]) for name, match in matches}
        count += len({match[1] for _, match in matches})
    for regex, place in EXCEPTIONS.get(model.config.model_type, ()):
        places |= {n: place for n, _ in model.named_parameters() if re.match(re.escape(prefix) + regex, n)}
    return _anatomy(
        model,
        places,
        outputs,
        new=new,
        exempt=lambda name: name.endswith(UNDECAYED),
        family="text" if text else None,
    )


def output_layers(where: str, model: Any, count: int) -> dict[str, nn.Module]:
    """Return the layers whose outputs are the logits, by name: one, or one per head of a distilled model.

    Raises:
        ModelError: none with `count` outputs is found.
    """
    if hasattr(model, "get_classifier"):
        heads = list(_heads(model.get_classifier()))
    elif twins := [pair for pair in TWIN_HEADS if all(hasattr(model, name) for name in pair)]:
        heads = [getattr(model, name) for name in twins[0]]
    else:
        base = getattr(model, getattr(model, "base_model_prefix", "") or " ", None)
        inside = set() if base is None else {id(module) for module in base.modules()}
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


def _timm_places(model: Any, outputs: Mapping[str, nn.Module]) -> dict[str, Place]:
    if not hasattr(model, "group_matcher"):
        (paths,) = _layer_lists(model)
        pattern = re.compile(rf"(?:{'|'.join(map(re.escape, paths))})\.(\d+)\.")
        return {n: int(match[1]) for n, _ in model.named_parameters() if (match := pattern.match(n))}
    matcher = _matcher(model)
    if isinstance(matcher, dict):
        matcher = {key: _without_joins(entry) for key, entry in matcher.items()}
    ids: dict[str, int] = group_parameters(model, matcher, reverse=True)
    # What no pattern matches comes last, the output layer with it.
    above = {ids[name] for name in ids if name.rpartition(".")[0] in outputs}
    return {name: number - 1 if number else STEM for name, number in ids.items() if number not in above}


def _matcher(model: Any) -> Any:
    try:
        return model.group_matcher(coarse=True)
    except AssertionError:  # a few architectures know blocks only
        return model.group_matcher(coarse=False)


def _without_joins(entry: Any) -> Any:
    if isinstance(entry, (list, tuple)):
        return [each for each in entry if each[1] != _TIMM_JOINS_PREVIOUS] or None
    return entry


def _layer_lists(base: nn.Module) -> list[tuple[str, ...]]:
    """Return the lists of layers from input to output: an encoder's, or an encoder's and a decoder's.

    Each is the outermost list that holds most parameters, with the lists of the same length beside it, which
    run in step with it (XLM's `attentions` and `ffns`, PVT's `patch_embeddings` and `block`).
    """
    coders = [name for name in ("encoder", "decoder") if isinstance(getattr(base, name, None), nn.Module)]
    if len(coders) == 2:
        inner = [(name, paths) for name in coders for paths in _layer_lists(getattr(base, name))]
        return [tuple(f"{name}.{path}" for path in paths) for name, paths in inner]

    def outermost(module: nn.Module, path: str) -> Iterator[tuple[int, str, nn.Module]]:
        for name, child in module.named_children():
            inner = f"{path}.{name}" if path else name
            layers = sum(1 for layer in child.children() if any(True for _ in layer.parameters()))
            if (isinstance(child, nn.ModuleList) and layers) or (
                isinstance(child, nn.Sequential) and layers > 1
            ):
                yield sum(p.numel() for p in child.parameters()), inner, child
            else:
                yield from outermost(child, inner)

    found = sorted(outermost(base, ""), key=lambda entry: entry[0], reverse=True)
    if not found:
        return []
    _, path, layers = found[0]
    around = path.rpartition(".")[0]
    return [
        tuple(
            p
            for _, p, m in found
            if p.rpartition(".")[0] == around and len(list(m.children())) == len(list(layers.children()))
        )
    ]


def _anatomy(
    model: nn.Module,
    places: Mapping[str, Place],
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
    settled = _join_lone_norms(_settle(model, places, outputs, owners), owners)
    numbers = sorted({place for place in settled.values() if isinstance(place, int)})
    names: dict[Place, str] = {number: f"block.{i}" for i, number in enumerate(numbers)}
    names = {STEM: STEM} | names | {HEAD: HEAD}
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
                in_batch_norm=isinstance(owners[name], _NormBase),
                decays=tensor.ndim > 1 and not is_bias and not in_norm and not exempt(name),
                is_new=name in new,
                is_output=name.rpartition(".")[0] in outputs,
            )
        )
    used = set(settled.values())
    groups = tuple(group for place, group in names.items() if place in used)
    return Anatomy(family or _vision_family(model, parameters), groups, tuple(parameters))


def _settle(
    model: nn.Module,
    places: Mapping[str, Place],
    outputs: Mapping[str, nn.Module],
    owners: Mapping[str, nn.Module],
) -> dict[str, Place]:
    """Return the place of every parameter."""
    names = [name for name, _ in model.named_parameters()]
    in_blocks = [index for index, name in enumerate(names) if isinstance(places.get(name), int)]
    above: Place = 1 + max((place for place in places.values() if isinstance(place, int)), default=-1)
    settled: dict[str, Place] = {}
    after_conv = False
    for index, name in enumerate(names):
        following = next((names[i] for i in in_blocks if i > index), None)
        if name.rpartition(".")[0] in outputs:
            settled[name] = HEAD
        elif name in places:
            settled[name] = places[name]
        elif not in_blocks or index < in_blocks[0]:
            settled[name] = STEM
        elif following:
            settled[name] = places[following]
        else:
            after_conv = isinstance(owners[name], _ConvNd) or (after_conv and is_norm(owners[name]))
            settled[name] = above if after_conv else HEAD
    return settled


def _join_lone_norms(settled: Mapping[str, Place], owners: Mapping[str, nn.Module]) -> dict[str, Place]:
    """Return the places with blocks that are nothing but a norm joined to what is before (VGG's)."""
    joined: dict[Place, Place] = {STEM: STEM, HEAD: HEAD}
    before: Place = STEM
    for number in sorted({place for place in settled.values() if isinstance(place, int)}):
        if not all(is_norm(owners[name]) for name, place in settled.items() if place == number):
            before = number
        joined[number] = before
    return {name: joined[place] for name, place in settled.items()}


def _vision_family(model: nn.Module, parameters: Iterable[Parameter]) -> Family:
    """Return `vit` when at least half of the blocks attend, else `cnn` (ConvNeXt and most hybrids)."""
    groups = {parameter.name: parameter.group for parameter in parameters}
    by_tensor = {id(tensor): groups[name] for name, tensor in model.named_parameters()}
    blocks = {group for group in groups.values() if group.startswith("block.")}
    attending = {by_tensor[id(t)] for m in model.modules() if attends(m) for t in islice(m.parameters(), 1)}
    return "vit" if blocks and len(attending & blocks) * 2 >= len(blocks) else "cnn"


def attends(module: nn.Module) -> bool:
    """Return whether a module is attention: it has heads."""
    return any(
        hasattr(module, name) for name in ("num_heads", "num_attention_heads", "n_heads", "heads", "head_dim")
    )


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
