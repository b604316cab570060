"""Adapters inside a backbone: which layers they go to by anatomy, and what of the model an adapter has to carry.

peft puts them in; the network stays the library's own, with a few of its layers wrapped. What is saved is a plain peft
adapter: whatever differs from the base model is found by comparing tensors, not by names, and goes with it.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from hf_finetune.errors import ModelError, RecipeError, did_you_mean
from hf_finetune.freeze import fingerprints
from hf_finetune.models.adapter import NAME, Adapter, Target
from hf_finetune.models.anatomies import attends, is_norm, module_groups
from hf_finetune.models.anatomy import HEAD, Anatomy
from hf_finetune.models.backbone import Backbone, ImageInput, TextInput
from hf_finetune.models.load import forward, save_beside, seeded
from hf_finetune.strategies.methods import METHODS, TARGETS, AdapterSpec, Layer, Method

WEIGHTS = "adapter_model.safetensors"
_ROOT = "base_model.model."
"""What peft puts before the names of the network's own tensors."""
_BASE = ".base_layer."
_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
_KINDS: tuple[tuple[type[nn.Module], Layer], ...] = ((nn.Linear, "linear"), (nn.modules.conv._ConvNd, "conv"))


def add_adapters(backbone: Backbone, spec: AdapterSpec, *, seed: int, total_steps: int) -> Backbone:
    """Return the backbone with adapters inside, its anatomy knowing them; the model is changed in place.

    Args:
        seed: of the adapters' random start.
        total_steps: of the run, which AdaLoRA's budget follows.

    Raises:
        ModelError: the method can adapt none of the layers asked for.
        RecipeError: peft has no such method or option, or refuses a value.
    """
    model, anatomy = backbone.model, backbone.anatomy
    method = _known(spec)
    groups = module_groups(model, anatomy)
    chosen, left_out = _choose(spec, method, backbone, groups)
    if not chosen:
        raise ModelError(_no_target(spec, method, backbone, left_out))
    report = backbone.report
    absent = {*report.new, *report.missing, *report.mismatched}
    before = fingerprints({name: tensor for name, tensor in model.state_dict().items() if name not in absent})
    modules = dict(model.named_modules())
    layers = {name: (_kind(modules[name]), tuple(_weight(modules[name]).shape)) for name in chosen}

    config = _config(spec, method, modules, chosen, total_steps)
    with seeded(seed), _quiet():
        try:
            shell = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        except (
            TypeError,
            ValueError,
            KeyError,
            NotImplementedError,
            RuntimeError,
            ZeroDivisionError,
        ) as error:
            raise RecipeError(
                f"strategy: peft {peft.__version__} cannot put {spec.method} into {backbone.source['architecture']} "
                f"with options {spec.peft_options()}: {error}"
            ) from error
    owners = _tuner_layers(model)
    assert set(owners) == set(chosen), "peft adapts the layers it was given"
    anatomy = _with_adapters(model, anatomy, owners, groups)
    sizes = {name: sum(p.numel() for _, p in _own(owners[name])) for name in chosen}
    targets = tuple(Target(name, *_first(layers[name], groups[name]), sizes[name]) for name in chosen)
    adapter = Adapter(spec, shell, targets, left_out, before)
    after = {_plain(name): name for name in model.state_dict() if _BASE in name}
    marks = fingerprints(
        {plain: model.state_dict()[name] for plain, name in after.items() if plain in before}
    )
    adapter.residual = {plain: mark for plain, mark in marks.items() if mark != before[plain]}
    if adapter.residual:
        adapter.start = {
            name: tensor.detach().cpu().clone()
            for name, tensor in model.state_dict().items()
            if ".lora_" in name
        }
    return replace(backbone, model=model.eval(), anatomy=anatomy, adapter=adapter)


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
    plain = {_plain(name): name for name in own if not _is_adapter(name, backbone.model)}
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
        with seeded(0), _quiet():
            shell = peft.PeftModel.from_pretrained(backbone.model, str(folder), torch_device="cpu")
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{folder}: this adapter does not fit the base model '{backbone.source['id']}': {error}"
        ) from error
    return replace(backbone, model=shell.get_base_model().eval())


def merged(backbone: Backbone) -> Backbone:
    """Return a copy of the backbone with its adapters merged into the weights: a plain network again."""
    model = copy.deepcopy(backbone.model)
    for name, layer in _tuner_layers(model).items():
        layer.merge()
        _put(model, name, layer.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)
    return replace(backbone, model=model, adapter=None)


def _known(spec: AdapterSpec) -> Method:
    method = spec.table_row
    known = {each.value for each in PEFT_TYPE_TO_TUNER_MAPPING if hasattr(_tuner(each), "tuner_layer_cls")}
    if method.peft_type not in known:
        names = sorted({*METHODS, *(each.lower() for each in known)})
        raise RecipeError(
            f"strategy.method: peft {peft.__version__} has no adapters '{spec.method}'."
            f"{did_you_mean(spec.method, names)} It has {', '.join(names)}."
        )
    return method


def _tuner(peft_type: Any) -> Any:
    return PEFT_TYPE_TO_TUNER_MAPPING[peft_type]


def _choose(
    spec: AdapterSpec, method: Method, backbone: Backbone, groups: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the names of the layers that get adapters, and why others of those asked for do not.

    Raises:
        ModelError: the backbone has no layers of the kind asked for.
    """
    model = backbone.model
    asked = [name for name in _layers(model, groups) if _asked(spec.targets, name, model, method)]
    if not asked:
        some = [name for name, _ in zip(_layers(model, groups), range(3), strict=False)]
        raise ModelError(
            f"strategy.targets: '{spec.targets}' finds no layer in the blocks of {backbone.source['architecture']}. "
            f"Choose from {', '.join(TARGETS)}, or a regular expression on names such as {', '.join(some)}."
        )
    modules = dict(model.named_modules())
    reasons = {name: _unsuitable(spec, method, modules, name) for name in asked}
    reasons |= _unwrappable(backbone, [name for name, reason in reasons.items() if reason is None])
    chosen = [name for name, reason in reasons.items() if reason is None]
    return chosen, {name: reason for name, reason in reasons.items() if reason is not None}


def _layers(model: nn.Module, groups: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of all layers with a weight in the blocks."""
    for name, module in model.named_modules():
        if groups.get(name, HEAD).startswith("block.") and (_kind(module) or is_norm(module)):
            yield name


def _asked(targets: str, name: str, model: nn.Module, method: Method) -> bool:
    kind = _kind(model.get_submodule(name))
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
    kind = _kind(module)
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
    if size and math.prod(_weight(module).shape[1:]) % size:
        return f"its inputs are no multiple of {method.block} {size}"
    return None


_WORDS: dict[Layer, str] = {"linear": "linear layers", "conv": "convolutions", "norm": "normalisation layers"}


def _kind(module: nn.Module) -> Any:
    kind = next((kind for cls, kind in _KINDS if isinstance(module, cls)), None)
    return kind or ("norm" if is_norm(module) and list(module.parameters(recurse=False)) else None)


def _weight(module: nn.Module) -> Tensor:
    return next(module.parameters(recurse=False))


def _is_quantised(module: nn.Module) -> bool:
    return not _weight(module).is_floating_point()


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


def _unwrappable(backbone: Backbone, names: Iterable[str]) -> dict[str, str]:
    """Return which of these layers the network would not find behind peft's wrapper, and why, by one forward pass.

    timm's BEiT reads a weight and leaves its layer out; transformers' MobileNet reads a convolution's stride.
    """
    model = backbone.model.eval()
    probes = {name: _Probe(model.get_submodule(name)) for name in names}
    inputs: dict[str, Tensor]
    if isinstance(backbone.input, ImageInput):
        inputs = {"pixel_values": torch.zeros(1, len(backbone.input.mean), *backbone.input.size)}
    else:
        inputs = dict(backbone.input.tokenizer("a", return_tensors="pt"))
    device = next(model.parameters()).device
    for name, probe in probes.items():
        _put(model, name, probe)
    try:
        with torch.no_grad():
            forward(model, {name: tensor.to(device) for name, tensor in inputs.items()})
    finally:
        for name, probe in probes.items():
            _put(model, name, probe.layer)
    unread = {
        name: "its weight is read without calling the layer" for name, p in probes.items() if not p.called
    }
    read = {name: f"the network reads its {p.read}, which peft hides" for name, p in probes.items() if p.read}
    return read | unread


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    around, _, last = name.rpartition(".")
    setattr(model.get_submodule(around), last, module)


def _no_target(spec: AdapterSpec, method: Method, backbone: Backbone, left_out: Mapping[str, str]) -> str:
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


def _config(
    spec: AdapterSpec, method: Method, modules: Mapping[str, nn.Module], chosen: list[str], total_steps: int
) -> Any:
    """Return peft's configuration.

    Raises:
        RecipeError: an option does not exist, or has a value that peft refuses.
    """
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method.peft_type)]
    options = {"target_modules": list(chosen), **_derived(spec, method, modules, chosen, total_steps)}
    options |= spec.peft_options()
    known = [name for name in cls.__dataclass_fields__ if name not in _OURS]
    for name in options:
        if name not in cls.__dataclass_fields__ or (name in spec.options and name in _OURS):
            raise RecipeError(
                f"strategy.options: {method.peft_type} has no option '{name}'.{did_you_mean(name, known)} "
                f"It has {', '.join(known)}."
            )
    try:
        with _quiet():
            return cls(**options)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"strategy: peft refuses {method.peft_type} with {spec.peft_options()}: {error}"
        ) from error


_OURS = ("target_modules", "modules_to_save", "peft_type", "task_type", "inference_mode", "base_model_name_or_path",
         "revision", "auto_mapping", "feedforward_modules", "total_step", "peft_version",
         "exclude_modules")  # fmt: skip
"""Options of peft that follow from the backbone and the run."""


def _derived(
    spec: AdapterSpec, method: Method, modules: Mapping[str, nn.Module], chosen: list[str], total_steps: int
) -> dict[str, Any]:
    """Return the options that follow from the layers and the length of the run."""
    if method.peft_type == "IA3":
        # The paper scales keys, values and the inner activations of the MLP: what a narrowing layer gets.
        narrowing = [n for n in chosen if _kind(modules[n]) == "linear" and _narrows(_weight(modules[n]))]
        return {"feedforward_modules": narrowing}
    if method.peft_type == "ADALORA":
        # A warm-up, then a shrinking budget, then training at the final ranks (the paper's three stages).
        every = max(1, min(10, total_steps // 50))
        return {"init_r": max(spec.rank + 1, round(1.5 * spec.rank)), "total_step": total_steps,
                "tinit": total_steps // 10, "tfinal": total_steps // 4, "deltaT": every}  # fmt: skip
    return {}


def _narrows(weight: Tensor) -> bool:
    return weight.ndim == 2 and weight.shape[0] < weight.shape[1]


def _with_adapters(
    model: nn.Module, anatomy: Anatomy, owners: Mapping[str, nn.Module], groups: Mapping[str, str]
) -> Anatomy:
    """Return the anatomy of a model whose layers `owners` have been wrapped."""
    before = {parameter.name: parameter for parameter in anatomy.parameters}
    ours = {id(p): name for name, layer in owners.items() for _, p in _own(layer)}
    parameters = []
    for name, tensor in model.named_parameters():
        layer = ours.get(id(tensor))
        if layer is None:
            fixed = not tensor.is_floating_point()
            parameters.append(
                replace(before[_plain(name)], name=name, shape=tuple(tensor.shape), is_fixed=fixed)
            )
            continue
        norm = is_norm(owners[layer].get_base_layer())  # type: ignore[operator]
        example = next(p for p in anatomy.parameters if p.name.startswith(f"{layer}."))
        parameters.append(
            replace(
                example, name=name, shape=tuple(tensor.shape), group=groups[layer], is_bias=False, in_norm=norm,
                decays=sum(side > 1 for side in tensor.shape) > 1 and not norm,  # matrices; a scale is no weight
                is_new=True, is_adapter=True, is_fixed=not tensor.requires_grad,
            )
        )  # fmt: skip
    return replace(anatomy, parameters=tuple(parameters))


def _tuner_layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _own(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters a wrapped layer has beside those it had before."""
    return ((name, p) for name, p in layer.named_parameters() if not f".{name}".startswith(_BASE))


def _is_adapter(name: str, model: nn.Module) -> bool:
    """Return whether a tensor of the state dict is part of an adapter."""
    path = name
    while path:
        path, _, last = path.rpartition(".")
        if isinstance(model.get_submodule(path), BaseTunerLayer):
            return last != "base_layer"
    return False


def _plain(name: str) -> str:
    """Return a tensor's name in the base model."""
    return name.replace(_BASE, ".")


def _first(layer: tuple[Layer, tuple[int, ...]], group: str) -> tuple[Layer, str, tuple[int, ...]]:
    return layer[0], group, layer[1]


def _adapter_tensors(adapter: Adapter, config: Any, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters' tensors by their names in the file, from a state dict of the network `own`."""
    state = {name: tensor.detach().cpu() for name, tensor in adapter.shell.state_dict().items()}
    state |= {_ROOT + name: tensor for name, tensor in own.items()}
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
        {_plain(name): tensor for name, tensor in own.items() if _plain(name) in adapter.residual}
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
    wrapped = set(_tuner_layers(model))
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep peft's remarks, which speak of its own options, from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
