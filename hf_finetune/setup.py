"""From a recipe to everything a run needs, with every `auto` resolved and nothing trained yet.

`train` runs what this builds, `explain` prints it: both see the same plan.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import parse_flag_from_env
from torch.utils.data import DataLoader

from hf_finetune import deepspeed, host
from hf_finetune.augment.presets import resolve_augment
from hf_finetune.augment.spec import BATCH_AUGMENTATIONS, AugmentationSpec
from hf_finetune.compilation import resolve_compile
from hf_finetune.data.loaders import EvalSet, TrainSet, eval_loader, eval_tokens, train_loader
from hf_finetune.data.spec import AugmentOn
from hf_finetune.data.splits import Splits, load_splits
from hf_finetune.data.stream_loader import StreamSet
from hf_finetune.data.stream_splits import load_streams
from hf_finetune.data.streams import Stream
from hf_finetune.data.targets import class_weights
from hf_finetune.data.tokens import kept_tokens
from hf_finetune.defaults import Choice, resolve
from hf_finetune.errors import RecipeError, UserError
from hf_finetune.features.spec import CacheSpec
from hf_finetune.models.load import (
    Backbone,
    ImageInput,
    TextInput,
    checkpoint_gradients,
    load_backbone,
    start_small,
)
from hf_finetune.optim import SHAREABLE, ParamGroup, build_optimizer, group_parameters
from hf_finetune.parallel import holding, unseen
from hf_finetune.precision import resolve_precision
from hf_finetune.recipe import Recipe
from hf_finetune.solvable import choose_solver, why_unsolvable
from hf_finetune.strategies.phase import PhasePlan, Solver, check_head_learns, plan_phases
from hf_finetune.tasks import TASKS
from hf_finetune.tasks.metrics import EVALUATE_PREFIX, default_metric, load_from_evaluate, metric_mode
from hf_finetune.timeline import Timeline, build_timeline, reachable

AUGMENT_ON = "data.augment_on"
MOST_WORKERS = 16
"""Processes that `data.workers: auto` starts at most for one that trains."""
ENOUGH_CORES = 8
"""Cores for each process that prepare some 2,000 images a second, at 3 ms each: from here on workers augment."""
SMALL_IMAGE_SET = 200
"""Images that are loaded before worker processes would have started."""
EVALUATED = 32
"""Samples that are measured together at least: without gradients they take little memory."""


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start."""

    recipe: Recipe
    """With every `auto` written out."""
    choices: list[Choice]
    notes: list[str]
    splits: Splits
    backbone: Backbone
    plans: list[PhasePlan]
    groups: list[ParamGroup]
    timeline: Timeline
    micro_batch_size: int
    class_weights: list[float] | None
    """By class, mean 1 over the training samples; None for none."""

    @property
    def trainable_size(self) -> int:
        """Number of parameter elements that some phase trains."""
        return sum(group.size for group in self.groups)

    @property
    def total_size(self) -> int:
        """Number of parameter elements of the model."""
        return sum(parameter.size for parameter in self.backbone.anatomy.parameters)

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed in pairs."""
        return any(each.name in BATCH_AUGMENTATIONS for each in self.augmentations)

    @property
    def augmentations(self) -> list[AugmentationSpec]:
        """What `augment` was resolved to."""
        assert isinstance(self.recipe.augment, list)
        return self.recipe.augment


def process_state() -> PartialState:
    """Return what this process knows of the others; several processes without an accelerator meet over gloo."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (several and not torch.accelerator.is_available())
    if several:
        atexit.register(_leave_group)
    host.keep_freed_memory()
    with unseen():
        state = PartialState(cpu=cpu)
    if state.device.type == "cpu" and (threads := host.threads_to_use()):
        torch.set_num_threads(threads)
    return state


def _leave_group() -> None:
    """Leave the other processes in order: left to the interpreter's end, gloo's threads at times abort the process."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def prepare(recipe: Recipe, *, world_size: int, device: torch.device) -> Setup:
    """Load data and backbone, resolve every `auto`, plan the phases.

    Raises:
        DataError: the data is wrong or missing.
        ModelError: the backbone is wrong or missing, or does not fit the data.
        RecipeError: the recipe does not fit the data, the backbone or the hardware.
    """
    _check_trackers(recipe)
    shared = holding(world_size) == "fsdp2"
    if shared:
        _check_shareable(recipe)
    splits = _load_data(recipe)
    recipe, choices = _fit_to_data(recipe, splits)
    backbone = _load_network(recipe, splits, device)
    recipe, more = _fit_to_machine(recipe, splits, backbone, world_size, device)
    choices += more
    solver, timeline = _plan_time(recipe, splits, backbone, world_size, device)
    micro_batch_size = _micro_batch_size(recipe, world_size)
    _check_micro_batch_tokens(recipe, backbone.input)
    if shared and recipe.training.precision == "fp16":
        raise RecipeError(
            f"{recipe.where('training.precision')}: fp16 is not supported under FSDP2. Use bf16 or fp32, or DDP."
        )
    recipe, more = resolve(
        recipe,
        anatomy=backbone.anatomy,
        train_samples=len(splits.train),
        micro_batch_size=micro_batch_size,
        total_steps=timeline.total_steps,
        solver=solver,
    )
    choices += more
    if recipe.backbone.head_init == "small":
        start_small(backbone, recipe.training.seed)
    if recipe.training.gradient_checkpointing:
        checkpoint_gradients(backbone)
    backbone = _adapt(recipe, backbone, timeline.total_steps)
    plans, notes = _plan_phases(recipe, backbone, timeline)
    if not solver[0]:  # else it has been tried
        _check_solvers(recipe, plans, backbone, splits, device, world_size)
    check_head_learns(plans, backbone.anatomy)
    compiling, why = resolve_compile(
        recipe.training.compile, device, timeline.total_steps, len(plans), shared=shared
    )
    if recipe.training.compile == "auto":
        choices.append(Choice("training.compile", compiling, why))
        recipe = _with(recipe, "training.compile", compiling)
    groups = group_parameters(plans, backbone.anatomy)
    # An optimizer that cannot be built is refused here, before a run folder is made for it.
    optimizer = build_optimizer(recipe.optimizer, groups, dict(backbone.model.named_parameters()))
    if zero := deepspeed.asked():
        told = recipe.model_dump(mode="json")
        told["optimizer"]["options"] = optimizer.defaults | told["optimizer"]["options"]
        notes += zero.agree(told, world_size, micro_batch_size)
    weights = class_weights(recipe.data, splits.labels, splits.train_counts)
    return Setup(recipe, choices, notes, splits, backbone, plans, groups, timeline, micro_batch_size, weights)


def _load_data(recipe: Recipe) -> Splits:
    """Return the data, opened and labelled; of a stream the splits that are held."""
    data, seed, steps = recipe.data, recipe.training.seed, recipe.training.steps
    if data.streaming:
        samples = steps and steps * recipe.training.batch_size
        return load_streams(data, seed=seed, task=recipe.task, samples=samples)
    return load_splits(data, seed=seed, task=recipe.task)


def _fit_to_data(recipe: Recipe, splits: Splits) -> tuple[Recipe, list[Choice]]:
    """Return the recipe with what the data alone decide, and why."""
    choices: list[Choice] = []
    if recipe.task == "auto":
        task = next(name for name, task in TASKS.items() if task.modality == splits.modality)
        choices.append(Choice("task", task, f"the data holds {splits.modality}s"))
        recipe = _with(recipe, "task", task)
    if splits.modality == "text" and recipe.data.cache:
        raise RecipeError(
            f"{recipe.where('data.cache')}: '{recipe.data.cache}' keeps images, and the data holds texts, which are "
            "tokenised once in any case. Remove the key."
        )
    if splits.modality == "text" and recipe.data.augment_on == "accelerator":
        raise RecipeError(
            f"{recipe.where('data.augment_on')}: 'accelerator' changes images, and the data holds texts, whose words "
            "are changed before they are tokenised. Remove the key."
        )
    if recipe.strategy.from_scratch and recipe.backbone.pretrained:
        why = f"strategy {recipe.strategy.name} starts from random weights"
        choices.append(Choice("backbone.pretrained", False, why))
        recipe = _with(recipe, "backbone.pretrained", False)
    return recipe, choices


def _load_network(recipe: Recipe, splits: Splits, device: torch.device) -> Backbone:
    """Return the backbone with an output layer for the data's labels."""
    if recipe.backbone.quantize:
        from hf_finetune.models.quantize import check_device

        check_device(recipe.backbone.quantize, device)
    with unseen():
        return load_backbone(recipe.backbone, splits.labels, splits.modality, seed=recipe.training.seed)


def _fit_to_machine(
    recipe: Recipe, splits: Splits, backbone: Backbone, world_size: int, device: torch.device
) -> tuple[Recipe, list[Choice]]:
    """Return the recipe with what data, backbone and hardware decide together, and why."""
    choices: list[Choice] = []
    augment, why = _augmentations(recipe, splits, backbone)
    if not isinstance(recipe.augment, list):
        choices.append(Choice("augment", ", ".join(each.name for each in augment) or "none", why))
    where = recipe.where("training.precision")
    precision, why = resolve_precision(
        recipe.training.precision, device, where, backbone, alone=world_size == 1
    )
    if recipe.training.precision == "auto":
        choices.append(Choice("training.precision", precision, why))
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))  # processes of this node share its cores
    workers, why = worker_count(recipe.data.workers, splits.modality, len(splits.train), beside, device)
    if recipe.data.workers == "auto":
        choices.append(Choice("data.workers", workers, why))
    augment_on, why = augmenting_on(recipe.data.augment_on, splits.modality, beside, device)
    if recipe.data.augment_on == "auto":
        choices.append(Choice(AUGMENT_ON, augment_on, why))
    metric, kind = recipe.monitor.metric, splits.labels.kind
    if metric == "auto":
        metric = default_metric(kind)
        choices.append(Choice("monitor.metric", metric, f"the usual one for {kind} labels"))
    for each in (metric, *recipe.monitor.metrics):
        if each.startswith(EVALUATE_PREFIX):
            load_from_evaluate(each.removeprefix(EVALUATE_PREFIX), kind)
    mode = recipe.monitor.mode if recipe.monitor.mode != "auto" else metric_mode(metric)
    cache = recipe.cache
    if cache == "auto":
        cache, why = CacheSpec(), "frozen layers run once for each view that comes again, where that fits"
        choices.append(Choice("cache", f"up to {cache.budget}", why))
    for key, value in {
        "augment": augment,
        "training.precision": precision,
        "data.workers": workers,
        AUGMENT_ON: augment_on,
        "monitor.metric": metric,
        "monitor.mode": mode,
        "cache": cache,
    }.items():
        recipe = _with(recipe, key, value)
    return recipe, choices


def _augmentations(recipe: Recipe, splits: Splits, backbone: Backbone) -> tuple[list[AugmentationSpec], str]:
    """Return what `augment` means for this data and backbone, and why."""
    if recipe.strategy.solver_steps and recipe.augment == "auto" and not getattr(recipe.cache, "views", None):
        return [], "a solver fits the rows as they are measured; `cache: {views: 4}` gives it random views"
    image_side = min(backbone.input.size) if isinstance(backbone.input, ImageInput) else None
    sides = [side for side in (image_side, splits.report.image_side) if side]
    return resolve_augment(
        recipe.augment, splits.modality, len(splits.train), image_side=min(sides, default=None)
    )


def _plan_time(
    recipe: Recipe, splits: Splits, backbone: Backbone, world_size: int, device: torch.device
) -> tuple[tuple[Solver | None, str], Timeline]:
    """Return what `solver: auto` means here, and why, and the run in steps."""
    solver: tuple[Solver | None, str] = (None, "")
    strategy = recipe.strategy
    if getattr(strategy, "solver", None) == "auto":
        solver = choose_solver(recipe, backbone, splits, device, world_size)
        strategy = strategy.model_copy(update={"solver": solver[0]})
    return solver, build_timeline(recipe.model_copy(update={"strategy": strategy}), len(splits.train))


def _adapt(recipe: Recipe, backbone: Backbone, total_steps: int) -> Backbone:
    """Return the backbone with the strategy's adapters in it, if it has any."""
    adapter = recipe.strategy.to_adapter()
    if not adapter:
        return backbone
    from hf_finetune.models.adapters import add_adapters

    if "adapter_of" in backbone.source and not adapter.merge:
        raise RecipeError(
            f"{recipe.where('strategy')}: backbone '{recipe.backbone.id}' is an adapter itself, merged into its "
            "base for this run: nobody could load another adapter on that. Set `strategy.merge: true` to save the "
            "whole model, or start from a run that did."
        )
    return add_adapters(backbone, adapter, seed=recipe.training.seed, total_steps=total_steps)


def _plan_phases(recipe: Recipe, backbone: Backbone, timeline: Timeline) -> tuple[list[PhasePlan], list[str]]:
    """Return the phases that the run reaches, and notes."""
    phases = recipe.strategy.to_phases(backbone.anatomy)
    plans, notes = plan_phases(phases, backbone.anatomy, float(recipe.optimizer.lr))
    notes = [*_found(backbone), *notes]
    reached = reachable(plans, timeline)
    if len(reached) < len(plans):
        notes.append(
            f"the run of {timeline.total_steps} steps ends before {len(plans) - len(reached)} of {len(plans)} phases; "
            f"the last one reached trains {reached[-1].name}"
        )
    return reached, notes


def _with(recipe: Recipe, key: str, value: Any) -> Recipe:
    """Return the recipe with another value at a key, of a section or its own."""
    section, _, name = key.rpartition(".")
    part = getattr(recipe, section).model_copy(update={name: value}) if section else value
    return recipe.model_copy(update={section or name: part})


def _check_solvers(
    recipe: Recipe,
    plans: list[PhasePlan],
    backbone: Backbone,
    splits: Splits,
    device: torch.device,
    world_size: int,
) -> None:
    """Refuse a solver that the recipe names where it has nothing to fit."""
    for number, plan in enumerate(plans, 1):
        if plan.solver and (why := why_unsolvable(plan, recipe, backbone, splits, device, world_size)):
            raise RecipeError(
                f"{recipe.where('strategy')}: phase {number}: `solver: {plan.solver}` cannot fit the head: {why}. "
                "Leave `solver` out (null): gradient steps train it."
            )


def _found(backbone: Backbone) -> list[str]:
    """Return what to know of how the backbone was found."""
    notes = [backbone.report.note] if backbone.report.note else []
    if backbone.report.kept_head:
        notes.append(
            "the backbone's output layer is kept: it was trained on these labels "
            "(backbone.keep_head=false starts a new one)"
        )
    return notes


def _check_shareable(recipe: Recipe) -> None:
    """Refuse what does not work where processes share out every parameter (FSDP2)."""
    adapter, name = recipe.strategy.to_adapter(), recipe.optimizer.name
    if recipe.training.compile == "on":
        raise RecipeError(
            f"{recipe.where('training.compile')}: a compiled step is not supported under FSDP2. Set it to off."
        )
    if recipe.backbone.quantize:
        raise RecipeError(
            f"{recipe.where('backbone.quantize')}: quantised weights cannot be shared out by FSDP2. Remove it, or "
            "train with DDP: each process then holds the quantised backbone."
        )
    if name != "auto" and name not in SHAREABLE:
        raise RecipeError(
            f"{recipe.where('optimizer.name')}: '{name}' does not make the same steps under FSDP2 as in one process. "
            f"Those that do: {', '.join(sorted(SHAREABLE))}. Or train with DDP."
        )
    if adapter and adapter.method == "adalora":
        raise RecipeError(
            f"{recipe.where('strategy')}: adalora moves ranks between whole matrices, which FSDP2 shares out. Take "
            "lora or dora, or train with DDP."
        )


def _check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker whose package is missing: accelerate would pass over it without a word."""
    available = {str(tracker) for tracker in get_available_trackers()}
    for tracker in recipe.trackers:
        if tracker not in available:
            raise UserError(
                f"{recipe.where('trackers')}: '{tracker}' is not installed. Install it with "
                f"`pip install {tracker.replace('_', '-')}`, or take it out of the list."
            )


def _micro_batch_size(recipe: Recipe, world_size: int) -> int:
    """Return the samples per device and forward pass; all of a process's share for `auto`, see `forecast.ready`."""
    training = recipe.training
    share = training.batch_size // world_size
    if training.batch_size % world_size or share == 0:
        raise RecipeError(
            f"{recipe.where('training.batch_size')}: {training.batch_size} samples per optimizer step cannot be shared "
            f"equally by {world_size} processes. Choose a multiple of {world_size}."
        )
    asked = training.micro_batch_size
    size = asked if isinstance(asked, int) else share
    if share % size:
        raise RecipeError(
            f"{recipe.where('training.micro_batch_size')}: {size} does not divide the {share} samples each of "
            f"{world_size} processes has per optimizer step. Choose a divisor of {share}."
        )
    return size


def _check_micro_batch_tokens(recipe: Recipe, model_input: ImageInput | TextInput) -> None:
    """Refuse a bound that the longest text may exceed alone, or one for images."""
    tokens, where = recipe.training.micro_batch_tokens, recipe.where("training.micro_batch_tokens")
    if tokens is None:
        return
    if isinstance(model_input, ImageInput):
        raise RecipeError(f"{where}: images have no tokens. Set training.micro_batch_size instead.")
    longest = kept_tokens(model_input, recipe.data.max_length)
    if tokens < longest:
        raise RecipeError(
            f"{where}: {tokens} tokens do not hold one text, of which up to {longest} are kept. Set it to at least "
            f"{longest}, or data.max_length to at most {tokens}."
        )


def build_sets(setup: Setup) -> tuple[TrainSet, EvalSet]:
    """Return train and validation as the model reads them."""
    recipe, splits, model_input = setup.recipe, setup.splits, setup.backbone.input
    max_length = recipe.data.max_length
    on_device = recipe.data.augment_on == "accelerator"
    common: dict[str, Any] = {"seed": recipe.training.seed, "max_length": max_length, "on_device": on_device}
    train: TrainSet
    if isinstance(splits.train, Stream):
        train = StreamSet(splits.train, splits.labels, model_input, setup.augmentations, **common)
    else:
        common["shrink"] = recipe.data.cache == "decoded"
        train = TrainSet(splits.train, splits.labels, model_input, setup.augmentations, **common)
    return train, EvalSet(
        splits.validation, splits.labels, model_input, max_length=max_length, on_device=on_device
    )


def build_loaders(
    setup: Setup, accelerator: Accelerator, sets: tuple[TrainSet, EvalSet] | None = None
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of this process's share of train and validation."""
    train, validation = sets or build_sets(setup)
    size, micro = setup.recipe.training.batch_size, setup.micro_batch_size
    tokens = setup.recipe.training.micro_batch_tokens

    def common(data: EvalSet) -> dict[str, Any]:
        return {
            "rank": accelerator.process_index,
            "world": accelerator.num_processes,
            "pin_memory": accelerator.device.type == "cuda",
            "workers": 0 if data.features else int(setup.recipe.data.workers),  # features lie in memory
        }

    return (
        train_loader(
            train, batch_size=size, micro_batch_size=micro, micro_batch_tokens=tokens, **common(train)
        ),
        eval_loader(
            validation,
            batch_size=max(EVALUATED, micro),
            tokens=eval_tokens(validation.lengths, max(EVALUATED, micro), accelerator.device, tokens),
            **common(validation),
        ),
    )


def worker_count(
    asked: int | str, modality: str, rows: int, world_size: int, device: torch.device
) -> tuple[int, str]:
    """Return how many processes load data for each training process, and why."""
    if asked != "auto":
        return int(asked), "as the recipe says"
    cores = cores_per_process(world_size)
    if modality == "text":
        return 0, "texts are tokenised faster than they are handed over"
    if rows <= SMALL_IMAGE_SET:
        return 0, f"{rows} images load faster than workers start"
    if device.type == "cpu":
        return min(2, cores), f"the model computes on the same {cores} cores"
    return min(MOST_WORKERS, max(1, cores - 1)), f"{cores} cores for each process"


def augmenting_on(
    asked: AugmentOn, modality: str, world_size: int, device: torch.device
) -> tuple[AugmentOn, str]:
    """Return where images of the model's size are augmented, and why: where something is likely to be idle."""
    if asked != "auto":
        return asked, "as the recipe says"
    if modality == "text":
        return "workers", "words are changed before they are tokenised"
    cores = cores_per_process(world_size)
    if device.type != "cuda":
        return (
            "workers",
            f"the model computes on a {device.type} device; only a GPU is taken to have time left",
        )
    if cores >= ENOUGH_CORES:
        return "workers", f"{cores} cores for each process"
    return "accelerator", f"{cores} cores for each process, under {ENOUGH_CORES}: the GPU would wait for them"


def cores_per_process(world_size: int) -> int:
    """Return the CPU cores that each training process on this machine may use."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ours // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def less_waiting(setup: Setup) -> list[str]:
    """Return what lets a run wait less for its data."""
    if setup.splits.modality == "text":
        return []
    data, helps = setup.recipe.data, []
    if data.cache != "decoded":
        helps.append("`data.cache: decoded` decodes every image once")
    if int(data.workers) < (idle := cores_per_process(int(os.environ.get("WORLD_SIZE", "1"))) - 1):
        helps.append(f"`data.workers: {idle}` loads with more of the cores (now {data.workers})")
    if data.augment_on == "workers" and torch.cuda.is_available():
        helps.append(f"`{AUGMENT_ON}: accelerator` leaves workers less to do")
    return helps
