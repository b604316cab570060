"""How the processes of a run hold its model: each the whole (DDP), or each a share of every parameter (FSDP2).

accelerate's config says which, by the environment that `accelerate launch` sets; the recipe says nothing of it. torch's
`fully_shard` is called here, with layer groups as its units: accelerate's own way shards on GPUs alone, knows blocks by
the names of their classes, and expects an optimizer that was built before. DeepSpeed's ZeRO stages run on it as well.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from hf_finetune import deepspeed
from hf_finetune.errors import ModelError, UserError, first_line
from hf_finetune.models.anatomies import module_groups
from hf_finetune.models.anatomy import Anatomy
from hf_finetune.models.backbone import Backbone
from hf_finetune.models.forward import forward, sample_inputs

Holding = Literal["whole", "ddp", "fsdp2"]
Parts = dict[str, dict[str, Tensor]]

UNIT_SHARE = 0.01
"""A layer outside the blocks is gathered by itself from this share of the model's parameters on, else with the root."""

_REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported. Take scripts/launch/fsdp.yaml or ddp.yaml.",
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "`parallelism_config` is not supported: all processes share samples. Take scripts/launch/fsdp.yaml or ddp.yaml."
    ),
}
_REFUSED_OF_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "`fsdp_offload_params` is not supported. Set it to false; more processes hold less each.",
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "`fsdp_activation_checkpointing` is not supported. Set it to false, and `training.gradient_checkpointing=true`."
    ),
}
_UNSEEN = ("ACCELERATE_USE_FSDP", deepspeed.FLAG, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")


def holding(processes: int) -> Holding:
    """Return how each of so many processes holds the model, as accelerate's environment asks.

    Raises:
        UserError: it asks for something that is not supported.
    """
    for flag, why in _REFUSED.items():
        if parse_flag_from_env(flag):
            raise UserError(f"accelerate's config: {why}")
    zero = deepspeed.asked()
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if zero:
            raise UserError("accelerate's environment asks for FSDP and for DeepSpeed. Ask for one of them.")
        _check_fsdp()
    elif not (zero and zero.stage):
        return "whole" if processes == 1 else "ddp"
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise UserError(f"FSDP2 needs a newer torch than {torch.__version__}. Update it, or train with DDP.")
    return "whole" if processes == 1 else "fsdp2"


def _check_fsdp() -> None:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(
            f"accelerate's config: FSDP version {version} is not supported. Set `fsdp_version: 2` in its `fsdp_config` "
            "(FSDP_VERSION=2 with torchrun), or take scripts/launch/fsdp.yaml."
        )
    for flag, why in _REFUSED_OF_FSDP.items():
        if parse_flag_from_env(flag):
            raise UserError(f"accelerate's config: {why}")
    if os.environ.get("FSDP_IGNORED_MODULES"):
        raise UserError("accelerate's config: `fsdp_ignored_modules` is not supported. Remove it.")


def reshards() -> bool:
    """Return whether weights are dropped between the forward and the backward pass, and gathered again."""
    if zero := deepspeed.asked():
        return zero.stage == 3
    return parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True)


@contextmanager
def unseen() -> Iterator[None]:
    """Hide from libraries that FSDP or DeepSpeed is asked for, inside.

    transformers would load the weights in the first process alone; accelerate would expect to wrap the model itself,
    want DeepSpeed's package, and divide every loss by the steps that its config accumulates over.
    """
    asked = {name: value for name in _UNSEEN if (value := os.environ.pop(name, None)) is not None}
    try:
        yield
    finally:
        os.environ.update(asked)


def share_out(backbone: Backbone, models: Sequence[nn.Module], accelerator: Accelerator) -> nn.Module | None:
    """Leave each process its share of `models` where FSDP2 is asked for; return a whole copy to write models from.

    Args:
        backbone: of the run; its model is the first of `models`.
        models: what trains, and the average of its weights if there is one; they are changed in place.
        accelerator: of the run.

    Returns:
        In the main process a copy of the model on the CPU, as `write_whole` fills it; else None.

    Raises:
        ModelError: the architecture does not run with its parameters shared out.
    """
    if holding(accelerator.num_processes) != "fsdp2":
        return None
    whole = copy.deepcopy(backbone.model).to("cpu") if accelerator.is_main_process else None
    inputs = sample_inputs(backbone, 1, accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    names = units(backbone.model, backbone.anatomy, inputs)
    reshard = reshards()
    where = f"backbone '{backbone.source['id']}'"
    if scalars := [name for name, p in backbone.model.named_parameters() if not p.ndim]:
        raise ModelError(
            f"{where}: {scalars[0]} is a single number, which FSDP2 cannot share out. Train with DDP."
        )
    try:
        for model in models:
            for parameter in model.parameters():
                parameter.data = parameter.data.contiguous()
            for name in names:
                fully_shard(model.get_submodule(name), mesh=mesh, reshard_after_forward=reshard)
            root = fully_shard(model, mesh=mesh)
            with torch.no_grad():
                forward(model.eval(), inputs)
            root.reset_iter_state()
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        NotImplementedError,
    ) as error:
        first = first_line(error)
        raise ModelError(
            f"{where}: {backbone.source['architecture']} does not run with its parameters shared out by FSDP2 "
            f"({first}). Train with DDP."
        ) from error
    return whole


def units(model: nn.Module, anatomy: Anatomy, inputs: dict[str, Tensor]) -> list[str]:
    """Return the names of the modules whose parameters are gathered together: the outermost of one layer group each.

    Small ones outside the blocks stay with the root. So does a module that is read without being called, and one that
    returns a view of a tensor: something written into that would leave its gradients wrong.
    """
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def noted(module: nn.Module, args: Any, output: Any) -> None:
            if not any(isinstance(each, Tensor) and each._is_view() for each in tree_leaves(output)):
                called.add(name)

        return noted

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(note(name)).remove)
        forward(model.eval(), inputs)
    homes = module_groups(model, anatomy)
    total = sum(parameter.numel() for parameter in model.parameters())
    found = []
    for name, group in homes.items():
        inner = any(name.startswith(f"{outer}.") for outer in homes if outer != name)
        size = sum(parameter.numel() for parameter in model.get_submodule(name).parameters())
        large = size > 0 and (group.startswith("block.") or size >= UNIT_SHARE * total)
        if name and name in called and large and not inner:
            found.append(name)
    return found


def wrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Return `model` as its processes train it together in a phase; an earlier wrapping is taken off first.

    DDP hooks the parameters that need gradients when it wraps. FSDP2 looks when it gathers them, and stays.
    """
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator._models.clear()
    if accelerator.num_processes == 1 or isinstance(model, FSDPModule):
        return model
    return accelerator.prepare_model(model)


def share_buffers(model: nn.Module) -> None:
    """Give every process the main one's buffers, as kept with the model: each has statistics of its own share."""
    for buffer in model.buffers():
        broadcast(buffer)


@contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """Let every process hold all of `models` inside; they run there without the other processes.

    So processes may run unlike numbers of batches, or the main one some by itself. Gradients are lost.
    """
    shared = [m for model in models for m in model.modules() if isinstance(m, FSDPModule)]
    roots = {id(model) for model in models}
    reshard = reshards()
    for module in shared:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for model in models:
            # Shares it out again, and forgets passes that ended before their end, as those over a frozen prefix do.
            if isinstance(model, FSDPModule):
                model.reset_iter_state()
        for module in shared:
            module.set_reshard_after_forward(reshard and id(module) not in roots, recurse=False)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the shares of all processes; where it is shared out, every process calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def write_whole(model: nn.Module, copied: nn.Module | None) -> nn.Module:
    """Return `model` if this process holds all of it; else bring `copied` up to it, tensor by tensor, and return that.

    Every process calls this; those that have no copy get the model back.
    """
    if not isinstance(model, FSDPModule):
        return model
    own = tensors_of(copied) if copied is not None else {}
    for name, tensor in tensors_of(model).items():
        values = whole(tensor)
        if own:
            own[name].copy_(values)
    return copied if copied is not None else model


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, as they are: a state dict would share out what is gathered."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def split_shares(parts: Mapping[str, Mapping[str, Tensor]]) -> tuple[Parts, Parts]:
    """Return of tensors by part and name those that every process holds alike, and this process's shares of others."""
    alike = {
        part: {n: t for n, t in tensors.items() if not isinstance(t, DTensor)}
        for part, tensors in parts.items()
    }
    shares = {
        part: found
        for part, tensors in parts.items()
        if (found := {n: t.to_local() for n, t in tensors.items() if isinstance(t, DTensor)})
    }
    return alike, shares


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> Tensor:
    """Copy `values`, a whole tensor, into `tensor`, of which this process may hold a share; return `tensor`."""
    if not isinstance(tensor, DTensor):
        return tensor.copy_(values)
    rows = -(-len(values) // tensor.device_mesh.size())  # `fully_shard` cuts as torch.chunk does
    start = tensor.device_mesh.get_local_rank() * rows
    tensor.to_local().copy_(values[start : start + rows])
    return tensor
