"""Whether a solver can fit the head of a backbone on its data, tried before anything is trained or written."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset as Rows
from torch import nn

from hf_finetune.augment.spec import BATCH_AUGMENTATIONS
from hf_finetune.data.loaders import EvalSet, collate
from hf_finetune.data.splits import Splits
from hf_finetune.data.streams import Stream
from hf_finetune.evaluation import to_device
from hf_finetune.features.cut import Cut, Inputs
from hf_finetune.features.plan import column_of
from hf_finetune.features.spec import CacheSpec
from hf_finetune.features.store import bytes_of
from hf_finetune.features.trials import NoCutError, find_cut
from hf_finetune.freeze import sleeping_modules
from hf_finetune.models.load import Backbone, forward, module_groups
from hf_finetune.parallel import holding
from hf_finetune.recipe import Recipe
from hf_finetune.spec import Duration, Size
from hf_finetune.strategies.phase import PhasePlan, Solver, why_not_linear

TRIED = 3
"""Rows that are sent through the network, in two batches."""


def choose_solver(
    recipe: Recipe, backbone: Backbone, splits: Splits, device: torch.device, processes: int = 1
) -> tuple[Solver | None, str]:
    """Return what `solver: auto` means for a head that is trained first, and why.

    Args:
        recipe: with augmentation, cache and strategy's length as given or resolved.
        backbone: with the data's output layer.
        splits: of the data.
        device: where the model computes.
        processes: of the run.
    """
    probe = getattr(recipe.strategy, "probe", "auto")
    if probe not in ("auto", Duration(1, "steps")):
        return None, f"strategy.probe asks for {probe} of gradient steps"
    why = why_not_linear(backbone.anatomy)
    if why is None:
        fitted = {p.name: 1.0 for p in backbone.anatomy.parameters if p.is_output}
        plan = PhasePlan("head", fitted, "frozen", None, None, "lbfgs")
        why = why_unsolvable(plan, recipe, backbone, splits, device, processes)
    if why:
        return None, f"gradient steps: {why}"
    return "lbfgs", "the frozen layers run once, then the head is fitted to convergence"


def why_unsolvable(
    plan: PhasePlan,
    recipe: Recipe,
    backbone: Backbone,
    splits: Splits,
    device: torch.device,
    processes: int = 1,
) -> str | None:
    """Return why a solver cannot fit a phase's output layer on features that are computed once; None if it can.

    Args:
        plan: the phase.
        recipe: with augmentation and cache resolved.
        backbone: adapters included; its model is moved to `device`.
        splits: of the data.
        device: where the model computes.
        processes: of the run.
    """
    cache, augment = recipe.cache, recipe.augment
    if isinstance(splits.train, Stream):
        return "a stream may be larger than the memory"
    if not isinstance(cache, CacheSpec):
        return "`cache: off` keeps no features"
    if recipe.training.gradient_checkpointing:
        return "training.gradient_checkpointing runs layers again instead of keeping what they compute"
    if isinstance(augment, list) and any(each.name in BATCH_AUGMENTATIONS for each in augment):
        return "mixup and cutmix mix targets that a solver takes row by row"
    if holding(processes) == "fsdp2":
        return "FSDP2 shares the output layer out among the processes"
    model = backbone.model.to(device)
    batches = _batches(splits, backbone, device)
    name = next(iter(plan.multiples)).rpartition(".")[0]
    layer = model.get_submodule(name)
    if type(layer) is not nn.Linear:
        return f"the output layer ({name}) is a {type(layer).__name__}, not a plain linear layer"
    if (shape := _read_by(model, layer, batches[1])) != (TRIED, layer.in_features):
        return f"the output layer ({name}) reads {shape} for {TRIED} rows, not one vector for each"
    asleep = sleeping_modules(model, plan, backbone.anatomy, module_groups(model, backbone.anatomy))
    try:
        cut = find_cut(model, plan.multiples.keys(), set(asleep), batches)
    except NoCutError as error:
        return f"its frozen layers cannot be cut off ({error})"
    views = (cache.views or 1) if augment else 1
    size = sum(_bytes(cut, cache, rows, splits, backbone) * times
               for rows, times in ((splits.train, views), (splits.validation, 1)))  # fmt: skip
    if size > cache.budget.bytes:
        return f"their features, {Size(size)} at the least, exceed `cache.budget` ({cache.budget})"
    return None


def _batches(splits: Splits, backbone: Backbone, device: torch.device) -> list[Inputs]:
    """Return two small batches of unlike size and length."""
    few = splits.validation.select(range(min(TRIED, len(splits.validation))))
    data = EvalSet(few, splits.labels, backbone.input)
    tokenizer = None if data.tokens is None else data.tokens.tokenizer
    picks = [[n % len(data) for n in numbers] for numbers in (range(TRIED - 1), range(TRIED))]
    batches = [collate([data[n] for n in pick], tokenizer=tokenizer)["inputs"] for pick in picks]
    if tokenizer is not None and batches[0]["input_ids"].shape[1] == batches[1]["input_ids"].shape[1]:
        batches[0] = {name: tensor[:, :-1] for name, tensor in batches[0].items()}
    return [to_device(batch, device) for batch in batches]


@torch.no_grad()
def _read_by(model: nn.Module, layer: nn.Module, batch: Inputs) -> tuple[int, ...]:
    """Return the shape of what enters a layer; empty when it is not called."""
    shapes: list[tuple[int, ...]] = []
    hook = layer.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
    try:
        forward(model, batch)
    finally:
        hook.remove()
    return shapes[0] if len(shapes) == 1 else ()


def _bytes(cut: Cut, cache: CacheSpec, rows: Rows, splits: Splits, backbone: Backbone) -> int:
    """Return the least that features of these rows take: in fp16 unless the recipe names a format."""
    smallest = cache.model_copy(update={"dtype": cache.dtype or "fp16"})
    columns = {name: column_of(leaf, smallest) for name, leaf in cut.stored.items()}
    ends = np.zeros(0, np.int64)
    if any(column.ragged for column in columns.values()):  # texts of which every token is kept
        lengths = EvalSet(rows, splits.labels, backbone.input).lengths
        assert lengths is not None
        ends = np.cumsum(lengths)
    return bytes_of(columns, ends, len(rows))
