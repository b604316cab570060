"""What a run will take of memory, phase by phase, before it trains; and `micro_batch_size: auto`.

What is kept is counted: weights, gradients of what learns, the optimizer's state, the average. What a forward and
backward pass adds is watched on two and on three samples, tensor by tensor, and drawn out to the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn

from hf_finetune.augment.device import OPERATIONS
from hf_finetune.data.loaders import Batch, EvalSet, TrainSet, collate
from hf_finetune.defaults import Choice
from hf_finetune.errors import RecipeError
from hf_finetune.evaluation import to_device
from hf_finetune.features.compute import BATCH, Want, run_prefix
from hf_finetune.features.plan import Plan
from hf_finetune.freeze import FreezeScope
from hf_finetune.heap import taken
from hf_finetune.host import malloc_options
from hf_finetune.memory import Growth, available, optimizer_bytes, size_of
from hf_finetune.models.forward import forward, placed
from hf_finetune.models.load import module_groups
from hf_finetune.optim import ParamGroup, build_optimizer
from hf_finetune.precision import accelerator_in
from hf_finetune.recipe import Recipe, load_recipe
from hf_finetune.runfolder import RECIPE, newest_run
from hf_finetune.setup import AUGMENT_ON, EVALUATED, Setup, build_sets, prepare
from hf_finetune.spec import Auto
from hf_finetune.tasks.loss import sample_losses
from hf_finetune.together import together

COUNTS = (2, 3)
"""Samples of the two batches that are watched: BatchNorm cannot learn from one."""
CPU_OVERHEAD = 1.5
"""What a heap's gaps add to the tensors of a pass on a CPU, where the heap itself cannot be asked (`heap.taken`)."""
STEPS_TRIED = 3
"""A heap grows for the first few steps: the optimizer's state comes with the first, and divides what was whole."""
MICRO_BATCH_SIZE = "training.micro_batch_size"
AS_IT_BEGAN = "as the run began"


@dataclass(frozen=True)
class Forecast:
    """Bytes that a phase takes on the device of one process."""

    weights: int
    gradients: int
    states: tuple[int, ...]
    """What the optimizer keeps of each parameter that has learned by the end of the phase."""
    average: int
    samples: int
    """One sample as it waits for its turn."""
    share: int
    """Samples this process has for each optimizer step."""
    processes: int
    on_cpu: bool
    step: Growth
    """A forward and backward pass, gradients included."""
    others: tuple[tuple[Growth, int], ...]
    """Passes without gradients, with their samples: an evaluation, the frozen layers computed once."""

    @property
    def optimizer(self) -> int:
        """Bytes of the optimizer's state."""
        return sum(self.states)

    @property
    def kept(self) -> int:
        """Bytes that stay between steps."""
        return self.optimizer + self._beside

    @property
    def _beside(self) -> int:
        """Bytes that stay, and are there before the first step."""
        buckets = self.gradients if self.processes > 1 else 0  # what processes send each other
        return self.weights + self.average + buckets

    def activations(self, micro_batch_size: int) -> int:
        """Return what a pass over a micro-batch takes beside gradients, at its worst moment."""
        return max(self.step.at(micro_batch_size) + self._waiting(micro_batch_size) - self.gradients, 0)

    def total(self, micro_batch_size: int) -> int:
        """Return the bytes at the phase's worst moment, on a CPU with the gaps of its heap."""
        waiting = self._waiting(micro_batch_size)
        if not self.on_cpu:
            evaluated = [growth.at(count) for growth, count in self.others]
            return self.kept + max(self.step.at(micro_batch_size) + waiting, *evaluated)
        runs = [(self.step, micro_batch_size), *self.others]
        return self._beside + waiting + (self._in_heap(runs) or self._guessed(runs))

    def _waiting(self, micro_batch_size: int) -> int:
        """Return what lies beside a pass: the sums of the gradients before it, and the samples of the step."""
        summed = self.gradients if self.share > micro_batch_size else 0
        return summed + (self.samples * self.share if self.on_cpu else 0)

    def _in_heap(self, runs: list[tuple[Growth, int]]) -> int | None:
        """Return what a heap grows to by these passes and the optimizer's state; None where that cannot be tried."""
        blocks = [growth.blocks_at(count) for growth, count in runs]
        if any(each is None for each in blocks):
            return None
        return taken(
            [each for each in blocks if each is not None],
            kept=self.states,
            repeats=STEPS_TRIED,
            options=malloc_options(),
        )

    def _guessed(self, runs: list[tuple[Growth, int]]) -> int:
        return self.optimizer + round(CPU_OVERHEAD * max(growth.at(count) for growth, count in runs))


def foresee(
    setup: Setup,
    phase: int,
    model: nn.Module,
    accelerator: Accelerator,
    sets: tuple[TrainSet, EvalSet],
    once: Plan | None = None,
) -> Forecast:
    """Return what a phase will take; the model is set up for it, and stays as it is.

    Args:
        setup: the run.
        phase: its number.
        model: on its device.
        accelerator: in the run's precision.
        sets: train and validation, as `build_sets` gives them.
        once: what frozen layers compute once.
    """
    device, labels, train = accelerator.device, setup.splits.labels, sets[0].shown()
    run = once.forward if once else forward
    wants = once.wants if once else {}
    samples, held_out = longest(train, max(COUNTS)), longest(sets[1], max(COUNTS))
    learning, evaluated = samples, held_out
    if "train" in wants:
        learning = with_features(wants["train"], samples, model, accelerator)
    if "validation" in wants:
        evaluated = with_features(wants["validation"], held_out, model, accelerator)

    def pass_over(batch: Batch, count: int) -> Tensor:
        with accelerator.autocast():
            logits = run(model, to_device({k: v[:count] for k, v in batch["inputs"].items()}, device))
        return sample_losses(labels.kind, logits, batch["labels"][:count].to(device))

    def step(count: int) -> None:
        pass_over(learning, count).mean().backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(count: int) -> None:
        pass_over(evaluated, count)

    def prefix(count: int) -> None:
        first = {**samples, "inputs": {name: tensor[:count] for name, tensor in samples["inputs"].items()}}
        run_prefix(list(wants.values())[:1], first, model, accelerator)

    with _untouched(model, device):
        model.train()
        step(min(COUNTS))  # what is built at a first pass is not built again
        grown = Growth.of(step, COUNTS)
        model.eval()
        rows = min(max(EVALUATED, setup.micro_batch_size), max(1, len(sets[1])))
        others = [(Growth.of(evaluate, COUNTS), rows)]
        if wants:
            others.append((Growth.of(prefix, COUNTS), BATCH))
    learned = {name for plan in setup.plans[: phase + 1] for name in plan.multiples}
    parameters = dict(model.named_parameters())
    states = _states(setup, parameters)
    averaged = [parameters[name] for group in setup.groups for name in group.parameters]
    return Forecast(
        weights=size_of([*model.parameters(), *model.buffers()]),
        gradients=size_of([parameters[name] for name in setup.plans[phase].multiples]),
        states=tuple(states[name] for name in sorted(learned)),
        average=size_of([*averaged, *model.buffers()]) if setup.recipe.training.ema else 0,
        samples=size_of([tensor[:1] for tensor in learning["inputs"].values()]),
        share=setup.recipe.training.batch_size // accelerator.num_processes,
        processes=accelerator.num_processes,
        on_cpu=device.type == "cpu",
        step=grown,
        others=tuple(others),
    )


def longest(data: EvalSet, count: int) -> Batch:
    """Return a batch of the longest samples of a split, the shortest of all before them: where texts are padded,
    networks compute with a mask. Rows come again where there are fewer.
    """
    order = np.arange(len(data)) if data.lengths is None else np.argsort(-data.lengths, kind="stable")
    rows = [int(order[at % len(order)]) for at in range(-1, count - 1)]
    keys: list[Any] = [(0, row) if isinstance(data, TrainSet) else row for row in rows]
    return collate(
        [data[key] for key in keys], tokenizer=None if data.tokens is None else data.tokens.tokenizer
    )


def with_features(want: Want, batch: Batch, model: nn.Module, accelerator: Accelerator) -> Batch:
    """Return a batch with what a frozen prefix makes of it in place of images, beside the tokens of texts."""
    given = {
        name: tensor for name, tensor in batch["inputs"].items() if name not in ("pixel_values", OPERATIONS)
    }
    return {**batch, "inputs": given | run_prefix([want], batch, model, accelerator)[0]}


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave the model's buffers and mode, and every generator, as they were."""
    buffers, was_training = [(each, each.clone()) for each in model.buffers()], model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
            with torch.no_grad():
                for buffer, kept in buffers:
                    buffer.copy_(kept)


def _states(setup: Setup, parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    """Return what the optimizer keeps for each parameter that learns in some phase."""
    found: dict[str, int] = {}
    for group in setup.groups:

        def build(name: str, parameter: nn.Parameter, group: ParamGroup = group) -> torch.optim.Optimizer:
            alone = replace(group, parameters=(name,))
            return build_optimizer(setup.recipe.optimizer, [alone], {name: parameter})

        found |= optimizer_bytes(build, {name: parameters[name] for name in group.parameters})
    return found


def ready(recipe: Recipe, state: PartialState, *, resumes: str | None = None) -> Setup:
    """Return what `prepare` does, with `training.micro_batch_size: auto` resolved, alike in every process.

    Args:
        recipe: what to do.
        state: this process among the others.
        resumes: the recipe's name, if the run may have begun earlier: it then goes on as it began.

    Raises:
        UserError: as `prepare`; or not even one sample fits.
    """

    began = together(lambda: _began_with(recipe, resumes), main_only=True) if resumes else {}

    def prepared(size: int | Auto | None) -> Setup:
        sized = _sized(recipe, size)
        setup = together(lambda: prepare(sized, world_size=state.num_processes, device=state.device))
        return _augmenting_alike(setup, began) if recipe.data.augment_on == "auto" else setup

    if recipe.training.micro_batch_size != "auto":
        return prepared(recipe.training.micro_batch_size)
    if isinstance(size := began.get(MICRO_BATCH_SIZE), int):
        setup, why = prepared(size), AS_IT_BEGAN
    else:
        setup = prepared("auto")
        whole = setup.micro_batch_size
        size, why = min(gather_object([together(partial(largest_that_fits, setup, state.device))]))
        if size != whole:
            del setup  # its memory is needed
            setup = prepared(size)
    choices = [*setup.choices, Choice(MICRO_BATCH_SIZE, size, why)]
    return replace(setup, recipe=_sized(setup.recipe, size), choices=choices)


def largest_that_fits(setup: Setup, device: torch.device) -> tuple[int, str]:
    """Return how many samples of this process's share fit into one forward pass, and why.

    The share is halved as long as it does not fit. A GPU tries; on a CPU, where too much ends the process without an
    error, the forecast is held against what is free.

    Raises:
        RecipeError: not even the smallest part fits.
    """
    whole, sizes = setup.micro_batch_size, []
    size = whole
    while not (setup.mixes and size % 2):  # samples are mixed in pairs
        sizes.append(size)
        if size % 2:
            break
        size //= 2
    accelerator, sets = accelerator_in(setup.recipe.training.precision), build_sets(setup)
    model = placed(setup.backbone.model, device, setup.splits.modality)
    homes, scope = module_groups(model, setup.backbone.anatomy), FreezeScope(model)
    fits = _tries if device.type == "cuda" else _has_room
    try:
        chosen, why = sizes[0], f"all {whole} samples fit"
        for phase, plan in enumerate(setup.plans):
            scope.apply(plan, setup.backbone.anatomy, homes)
            forecast = foresee(setup, phase, model, accelerator, sets)
            for tried in sizes[sizes.index(chosen) :]:
                reason = fits(forecast, tried, model, setup, accelerator, sets[0])
                if reason is None:
                    chosen = tried
                    break
                why = f"of {whole} samples, {reason}"
            else:
                raise RecipeError(
                    f"{setup.recipe.where('training.micro_batch_size')}: auto found no size that fits: {reason}. Of "
                    "help are training.gradient_checkpointing: true, strategy: lora or frozen, backbone.quantize, a "
                    "smaller data.max_length, and programs that end."
                )
    finally:
        scope.release()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return chosen, why


def _has_room(
    forecast: Forecast, size: int, model: nn.Module, setup: Setup, accelerator: Accelerator, train: TrainSet
) -> str | None:
    """Return None where a phase fits at `size` samples a pass, else why not."""
    needed = forecast.total(size) - forecast.weights  # which are here already
    room = available(accelerator.device)
    if needed <= room:
        return None
    return f"{size} would take {needed / 1e9:.3g} GB more, and {room / 1e9:.3g} GB may be used"


def _tries(
    forecast: Forecast, size: int, model: nn.Module, setup: Setup, accelerator: Accelerator, train: TrainSet
) -> str | None:
    """As `_has_room`, by two real passes beside a block of the size of what else is kept."""
    device, batch = accelerator.device, longest(train.shown(), size)

    def two_passes() -> None:  # a function of its own: what it held is free when it has failed
        kept = torch.empty(forecast.kept - forecast.weights, dtype=torch.uint8, device=device)
        for _ in range(2):  # the second beside the gradients of an earlier micro-batch
            with accelerator.autocast():
                logits = forward(model, to_device(batch["inputs"], device))
            sample_losses(setup.splits.labels.kind, logits, batch["labels"].to(device)).mean().backward()
        del kept

    with _untouched(model, device):
        model.train()
        try:
            two_passes()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return f"{size} ran out of the memory of {torch.cuda.get_device_name(device)}"
    return None


def _sized(recipe: Recipe, size: int | Auto | None) -> Recipe:
    return recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"micro_batch_size": size})}
    )


def _augmenting_alike(setup: Setup, began: dict[str, Any]) -> Setup:
    """Return a setup that augments where the run began to, else where the main process does: cores may differ."""
    if AUGMENT_ON in began:
        choice = Choice(AUGMENT_ON, began[AUGMENT_ON], AS_IT_BEGAN)
    else:
        choice = together(
            lambda: next(each for each in setup.choices if each.key == AUGMENT_ON), main_only=True
        )
    data = setup.recipe.data.model_copy(update={"augment_on": choice.value})
    return replace(
        setup,
        recipe=setup.recipe.model_copy(update={"data": data}),
        choices=[choice if each.key == AUGMENT_ON else each for each in setup.choices],
    )


def _began_with(recipe: Recipe, name: str | None) -> dict[str, Any]:
    """Return what keys whose `auto` depends on the machine became in the run that is to be resumed, if there is one."""
    folder = Path(recipe.output) if recipe.output else newest_run(str(name), recipe.backbone.id)
    if folder is None or not (folder / RECIPE).is_file():
        return {}
    was = load_recipe(folder / RECIPE)
    values = {MICRO_BATCH_SIZE: was.training.micro_batch_size, AUGMENT_ON: was.data.augment_on}
    return {key: value for key, value in values.items() if value != "auto"}
