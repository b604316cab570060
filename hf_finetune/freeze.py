"""Frozen means frozen: gradients off, BatchNorm statistics and dropout in eval mode whatever `.train()` is called."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_finetune.errors import TrainingError
from hf_finetune.models.anatomy import Anatomy
from hf_finetune.parallel import whole
from hf_finetune.strategies.phase import PhasePlan


class FreezeScope:
    """Keeps the sleeping modules of a model in eval mode.

    A forward pre-hook on the root puts them back to sleep before every training forward, so no `.train()` call, ours or
    a library's, can wake them. Module types and state-dict keys stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.asleep: list[nn.Module] = []
        self._hook = model.register_forward_pre_hook(lambda module, args: self.enforce())

    def enforce(self) -> None:
        """Put every sleeping module in eval mode."""
        for module in self.asleep:
            module.training = False

    def release(self) -> None:
        """Let go of the model: nothing is put to sleep any more."""
        self._hook.remove()

    def apply(self, plan: PhasePlan, anatomy: Anatomy, module_groups: dict[str, str]) -> None:
        """Freeze what the phase does not train, and wake the rest.

        Args:
            plan: the phase, with `batch_norm` resolved.
            anatomy: of the same model.
            module_groups: module name -> layer group, for every module that lies within one group.
        """
        assert plan.batch_norm != "auto"
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in plan.multiples)
            parameter.grad = None
        modules = dict(self.model.named_modules())
        self.asleep = [modules[name] for name in sleeping_modules(self.model, plan, anatomy, module_groups)]
        self.model.train()
        self.enforce()


def average_of(model: nn.Module, decay: float, learned: Collection[str]) -> ModelEmaV3:
    """Return an average of the weights of `model`; parameters not in `learned`, which never move, are the model's own.

    To average a float32 tensor with itself gives the same bits.
    """
    average = ModelEmaV3(model, decay=decay)
    owned = dict(model.named_parameters())
    for name, parameter in average.module.named_parameters():
        if name not in learned and parameter.dtype == torch.float32:
            parameter.data = owned[name].data
    return average


def sleeping_modules(
    model: nn.Module, plan: PhasePlan, anatomy: Anatomy, module_groups: dict[str, str]
) -> list[str]:
    """Return the names of the modules that a phase keeps in eval mode: no layer group in them learns."""
    awake = {parameter.group for parameter in anatomy.parameters if parameter.name in plan.multiples}
    stirring = {
        outer for name, group in module_groups.items() if group in awake for outer in _with_outer(name)
    }
    found = []
    for name, module in model.named_modules():
        sleeps = bool(name) and name not in stirring
        if isinstance(module, _BatchNorm) and plan.batch_norm != "train":
            sleeps = plan.batch_norm == "frozen"
        if sleeps:
            found.append(name)
    return found


def _with_outer(name: str) -> Iterator[str]:
    """Yield a module's name and those of the modules around it."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name


def frozen_tensors(model: nn.Module, plan: PhasePlan) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that must not move during this phase, by name."""
    moving_statistics = {
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training
        for buffer, _ in module.named_buffers(recurse=False)
    }
    still = {name: p for name, p in model.named_parameters() if name not in plan.multiples}
    return still | {name: b for name, b in model.named_buffers() if name not in moving_statistics}


def fingerprints(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Return a hash of the bytes of each tensor; where processes share them out, each calls this."""
    return {
        name: hashlib.blake2b(
            whole(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data, digest_size=16
        ).hexdigest()
        for name, tensor in tensors.items()
        if tensor.numel()
    }


def check_frozen(model: nn.Module, plan: PhasePlan, before: dict[str, str]) -> None:
    """Compare what was frozen in a phase with its state at the phase's start, bit for bit.

    Raises:
        TrainingError: a frozen parameter or buffer moved.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    after = fingerprints({name: tensor for name, tensor in tensors.items() if name in before})
    moved = sorted(name for name, mark in before.items() if after.get(name) != mark)
    if moved:
        raise TrainingError(
            f"phase '{plan.name}': {len(moved)} frozen tensors moved, first of all {moved[0]}. "
            "Something outside the optimizer writes to the model; its weights are not what the recipe says."
        )


def weights_fingerprint(model: nn.Module) -> str:
    """Return one hash of every parameter and buffer of a model."""
    marks = fingerprints(dict(model.named_parameters()) | dict(model.named_buffers()))
    text = "".join(f"{name}{marks[name]}" for name in sorted(marks))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
