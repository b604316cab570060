"""Adapters put into a backbone: peft wraps the layers the anatomy gives, and the anatomy learns of them.

The network stays the library's own, with a few of its layers wrapped.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_finetune.errors import ModelError, RecipeError, did_you_mean
from hf_finetune.freeze import fingerprints
from hf_finetune.models.adapter import Adapter, Target
from hf_finetune.models.adapter_targets import choose_targets, layer_kind, layer_shape, no_target
from hf_finetune.models.anatomies import is_norm, module_groups
from hf_finetune.models.anatomy import Anatomy
from hf_finetune.models.backbone import Backbone
from hf_finetune.models.load import seeded
from hf_finetune.strategies.methods import METHODS, AdapterSpec, Method

BASE = ".base_layer."


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
    chosen, left_out = choose_targets(spec, method, backbone, groups)
    if not chosen:
        raise ModelError(no_target(spec, method, backbone, left_out))
    report = backbone.report
    absent = {*report.new, *report.missing, *report.mismatched}
    before = fingerprints({name: tensor for name, tensor in model.state_dict().items() if name not in absent})
    modules = dict(model.named_modules())
    layers = {name: (layer_kind(modules[name]), layer_shape(modules[name])) for name in chosen}

    config = _config(spec, method, modules, chosen, total_steps)
    with seeded(seed), quiet():
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
    owners = tuner_layers(model)
    assert set(owners) == set(chosen), "peft adapts the layers it was given"
    anatomy = _with_adapters(model, anatomy, owners, groups)
    sizes = {name: sum(p.numel() for _, p in _own(owners[name])) for name in chosen}
    targets = tuple(
        Target(name, kind, groups[name], shape, sizes[name]) for name, (kind, shape) in layers.items()
    )
    adapter = Adapter(spec, shell, targets, left_out, before)
    after = {plain_name(name): name for name in model.state_dict() if BASE in name}
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
        with quiet():
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
        narrowing = [
            n for n in chosen if layer_kind(modules[n]) == "linear" and _narrows(layer_shape(modules[n]))
        ]
        return {"feedforward_modules": narrowing}
    if method.peft_type == "ADALORA":
        # A warm-up, then a shrinking budget, then training at the final ranks (the paper's three stages).
        every = max(1, min(10, total_steps // 50))
        return {"init_r": max(spec.rank + 1, round(1.5 * spec.rank)), "total_step": total_steps,
                "tinit": total_steps // 10, "tfinal": total_steps // 4, "deltaT": every}  # fmt: skip
    return {}


def _narrows(shape: tuple[int, ...]) -> bool:
    return shape[0] < shape[1]


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
            parameters.append(replace(before[plain_name(name)], name=name))
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


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers that peft has wrapped, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _own(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters a wrapped layer has beside those it had before."""
    return ((name, p) for name, p in layer.named_parameters() if not f".{name}".startswith(BASE))


def plain_name(name: str) -> str:
    """Return a tensor's name in the base model."""
    return name.replace(BASE, ".")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep peft's remarks, which speak of its own options, from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
