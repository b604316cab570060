"""From layer groups to an optimizer: by name, through timm's factory and torch's fused implementations.

Every parameter that any phase trains is in exactly one named group from the first step on. A phase boundary changes
rates and `requires_grad`, never the groups: unfreezing cannot be forgotten, and every schedule sees every group.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from hf_finetune.errors import RecipeError, did_you_mean
from hf_finetune.models.anatomy import Anatomy
from hf_finetune.spec import Auto, Spec
from hf_finetune.strategies.phase import PhasePlan

if TYPE_CHECKING:
    import torch

# torch's own fused implementations run one kernel for all tensors of a group, on CPU as well as on CUDA.
_FUSED = frozenset({"adam", "adamw", "sgd"})
_UNFUSED_WHEN_SHARED = frozenset({"sgd"})
SHAREABLE = frozenset(
    ["adabelief", "adadelta", "adafactor", "adafactorbv", "adafactorbvc", "adagrad", "adam", "adamax",
     "adamc", "adamw", "adamwlegacy", "adan", "adanw", "adopt", "adoptc", "adoptw", "lamb", "lambc", "lambcd",
     "lambcw", "lambw", "laprop", "lapropc", "larc", "lars", "lion", "lionc", "madgrad", "madgradw",
     "momentum", "nadam", "nadamc", "nadamlegacy", "nadamw", "nesterov", "nesterovw", "nlarc", "nlars",
     "radabelief", "radam", "radamlegacy", "radamw", "rmsprop", "rmsproptf", "rmsproptfc", "rmsproptfw",
     "sgd", "sgdc", "sgdw"]
)  # fmt: skip
"""Optimizers that were seen to make the same steps where processes share out every parameter (FSDP2) as in one process.

Others fail there, or go elsewhere without a word: Muon's steps are functions of whole matrices."""
# Needs a second backward pass through the graph, which the loop does not make.
_SECOND_ORDER = frozenset({"adahessian"})


class OptimizerSpec(Spec):
    """The update rule and its base rate."""

    name: str = "auto"
    """Any name of timm's optimizer factory; auto = adamw."""
    lr: Annotated[float, Field(gt=0)] | Auto = "auto"
    """The base learning rate, which phases and layers multiply."""
    weight_decay: Annotated[float, Field(ge=0)] | Auto = "auto"
    """Not applied to biases and normalisation layers."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of optimizers that have one (sgd, lion, muon …); Adam's are `options: {betas: […]}`."""
    options: dict[str, Any] = {}
    """Passed to the optimizer's constructor (`betas`, `eps`, …)."""


@dataclass(frozen=True)
class ParamGroup:
    """One optimizer group: parameters of one layer group that share rate and decay in every phase."""

    name: str
    layer_group: str
    parameters: tuple[str, ...]
    multiples: tuple[float, ...]
    """For each phase the multiple of the base rate; 0 where the group is frozen."""
    decays: bool
    size: int
    """Number of elements."""


def group_parameters(plans: Sequence[PhasePlan], anatomy: Anatomy) -> list[ParamGroup]:
    """Return the groups that every phase's rates can be written into, from stem to head.

    A parameter that no phase trains is in none of them.
    """
    grouped: dict[tuple[str, tuple[float, ...], bool], list[str]] = {}
    sizes = {p.name: p.size for p in anatomy.parameters}
    for parameter in sorted(anatomy.parameters, key=lambda p: anatomy.groups.index(p.group)):
        multiples = tuple(plan.multiples.get(parameter.name, 0.0) for plan in plans)
        if any(multiples):
            grouped.setdefault((parameter.group, multiples, parameter.decays), []).append(parameter.name)
    groups: list[ParamGroup] = []
    for (layer_group, multiples, decays), names in grouped.items():
        name = layer_group if decays else f"{layer_group}/no_decay"
        taken = {group.name for group in groups}
        if name in taken:
            name = next(f"{name}/{n}" for n in range(2, len(taken) + 3) if f"{name}/{n}" not in taken)
        groups.append(
            ParamGroup(name, layer_group, tuple(names), multiples, decays, sum(sizes[n] for n in names))
        )
    counted = [name for group in groups for name in group.parameters]
    trained = {name for plan in plans for name in plan.multiples}
    assert sorted(counted) == sorted(trained), "each trained parameter is in one group"
    return groups


def build_optimizer(
    spec: OptimizerSpec,
    groups: Sequence[ParamGroup],
    parameters: dict[str, torch.nn.Parameter],
    *,
    shared: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer over `groups`; `spec` holds no `auto` any more.

    Args:
        spec: its name, base rate and options.
        groups: of parameters, by name.
        parameters: of the model, by name.
        shared: whether processes share out every parameter (FSDP2).

    Raises:
        RecipeError: the name is unknown, its library is absent, or an option does not fit.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    known = list_optimizers()
    if spec.name not in known or spec.name in _SECOND_ORDER:
        why = "needs second-order gradients" if spec.name in _SECOND_ORDER else "is not known"
        raise RecipeError(
            f"optimizer.name: '{spec.name}' {why}.{did_you_mean(spec.name, known)} "
            "Common ones: adamw, sgd, lion, lamb, adafactor, muon; the rest: timm.optim.list_optimizers()."
        )
    options: dict[str, Any] = dict(spec.options)
    if spec.name in (_FUSED - _UNFUSED_WHEN_SHARED if shared else _FUSED):
        options.setdefault("fused", True)
    if spec.name == "sgd" and not spec.momentum:
        options.setdefault("nesterov", False)  # timm's default, which needs a momentum
    torch_groups = [
        {
            "params": [parameters[name] for name in group.parameters],
            "name": group.name,
            "weight_decay": float(spec.weight_decay) if group.decays else 0.0,
        }
        for group in groups
    ]
    try:
        return create_optimizer_v2(
            torch_groups, opt=spec.name, lr=float(spec.lr), weight_decay=float(spec.weight_decay),
            momentum=spec.momentum, **options,
        )  # fmt: skip
    except (TypeError, ValueError, ImportError, AssertionError) as error:
        raise RecipeError(
            f"optimizer: {spec.name} cannot be built with options {options}: {error}.{_accepted(spec.name)}"
        ) from error


def _accepted(name: str) -> str:
    """Return a sentence on an optimizer's options; none where its library is absent."""
    from timm.optim import get_optimizer_class

    try:
        accepted = inspect.signature(get_optimizer_class(name, bind_defaults=False).__init__).parameters
    except (ImportError, AssertionError):
        return ""
    allowed = ", ".join(each for each in accepted if each not in {"self", "params", "lr", "weight_decay"})
    return f" Its options are: {allowed}."


def set_rates(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[ParamGroup],
    *,
    phase: int,
    base_lr: float,
    multiple: float,
) -> dict[str, float]:
    """Write every group's real learning rate for this step; return the rates of the groups that learn."""
    rates = {}
    for torch_group, group in zip(optimizer.param_groups, groups, strict=True):
        rate = base_lr * group.multiples[phase] * multiple
        torch_group["lr"] = rate
        if group.multiples[phase]:
            rates[group.name] = rate
    return rates
