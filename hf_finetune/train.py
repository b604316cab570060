"""One run, read top to bottom: prepare, train phase by phase, measure, keep the best."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from timm.utils import ModelEmaV3
from torch import nn

from hf_finetune.augment.batch import mix, mixers
from hf_finetune.data.columns import column_values
from hf_finetune.data.loaders import iterate_batches
from hf_finetune.data.targets import soft_targets
from hf_finetune.errors import Interrupted, TrainingError
from hf_finetune.evaluation import evaluate, to_device
from hf_finetune.freeze import FreezeScope, check_frozen, fingerprints, frozen_tensors
from hf_finetune.models.load import forward, module_groups
from hf_finetune.monitor import Best, Mode, Patience
from hf_finetune.optim import build_optimizer, set_rates
from hf_finetune.progress import Progress
from hf_finetune.recipe import Recipe
from hf_finetune.record import Record, start_accelerator
from hf_finetune.runfolder import Run, load_run
from hf_finetune.schedule import ReduceOnPlateau
from hf_finetune.setup import Setup, build_loaders, prepare, process_state
from hf_finetune.spec import resolved
from hf_finetune.tasks.loss import sample_losses
from hf_finetune.timeline import phase_end, rate_multiple

LOGGED_STEPS = 200
"""Training rows a run writes at most, beside the one before each evaluation."""


def finetune(recipe: Recipe, *, name: str = "recipe", quiet: bool = False) -> Run:
    """Run `recipe` and return the finished run; under several processes each calls this.

    Args:
        recipe: what to do; its `output` is the run folder, null for `runs/<name>-<backbone>-<time>`.
        name: the recipe's name, for the folder.
        quiet: print nothing.

    Raises:
        UserError: recipe, data or backbone are wrong.
        TrainingError: the loss became non-finite, a frozen tensor moved, or memory ran out.
        Interrupted: SIGINT or SIGTERM; the run folder is usable.
    """
    started = time.monotonic()
    state = process_state()
    setup = prepare(recipe, world_size=state.num_processes, device=state.device)
    record = Record.open(setup, state, name=name, started=started)
    accelerator = start_accelerator(setup, record)
    progress = Progress(
        setup.timeline.total_steps,
        metric=setup.recipe.monitor.metric,
        quiet=quiet,
        is_main=state.is_main_process,
    )
    with progress, record.closing(accelerator), _sigterm_as_interrupt():
        try:
            record.why = _train(setup, accelerator, record, progress)
            record.status = "done"
            record.keep_if_none(setup.backbone.model)  # where every evaluation gave NaN
        except KeyboardInterrupt:
            record.status, record.why = "interrupted", "stopped by a signal"
            record.keep_if_none(setup.backbone.model)
            raise Interrupted(f"stopped by a signal; what was trained is in {record.path}") from None
        except torch.OutOfMemoryError:
            size = setup.micro_batch_size
            raise TrainingError(
                f"out of memory at {size} samples per forward pass. Set training.micro_batch_size={max(1, size // 2)}: "
                "gradients accumulate to the same batch_size, so the result stays the same."
            ) from None
    return load_run(record.path)


def _train(setup: Setup, accelerator: Accelerator, record: Record, progress: Progress) -> str:
    """Train, measure and keep the best; return why training ended."""
    recipe, timeline, splits = setup.recipe, setup.timeline, setup.splits
    training, monitor, kind = recipe.training, recipe.monitor, setup.splits.labels.kind
    base_lr, device, world = float(recipe.optimizer.lr), accelerator.device, accelerator.num_processes
    set_seed(training.seed, device_specific=True)

    model = setup.backbone.model.to(device)
    if splits.modality == "image":
        model = model.to(memory_format=torch.channels_last)
    groups_of_modules = module_groups(model, setup.backbone.anatomy)
    scope, adapter = FreezeScope(model), setup.backbone.adapter
    if adapter:
        adapter.straighten()
    optimizer = build_optimizer(recipe.optimizer, setup.groups, dict(model.named_parameters()))
    optimizer = accelerator.prepare_optimizer(optimizer)
    ema = ModelEmaV3(model, decay=float(training.ema.decay)) if training.ema else None
    measured = ema.module if ema else model

    loader, validation = build_loaders(setup, accelerator)
    mixing = mixers(setup.augmentations)
    class_weight = torch.tensor(setup.class_weights, device=device) if setup.class_weights else None

    mode: Mode = resolved(monitor.mode)
    best = Best(mode)
    early = Patience(mode, **monitor.early_stopping.model_dump()) if monitor.early_stopping else None
    reduce = recipe.schedule if isinstance(recipe.schedule, ReduceOnPlateau) else None
    reducing = Patience(mode, reduce.patience, reduce.min_delta) if reduce else None
    reduction = 1.0  # what reduce_on_plateau has brought the rates down to
    log_every = max(1, timeline.total_steps // LOGGED_STEPS)
    seen, clock = 0, time.monotonic()  # samples and time since the last training row

    step, index, start, end = 0, -1, 0, 0
    still: dict[str, str] = {}  # fingerprints of what is frozen in this phase
    batches: Iterator[list[dict[str, Any]]] = iter(())
    while step < timeline.total_steps:
        if step == end:
            # A phase begins: other layers learn. DDP hooks the parameters that need gradients when it wraps, so the
            # model is wrapped anew after `requires_grad` has changed.
            if index >= 0:
                check_frozen(model, setup.plans[index], still)
            index, start = index + 1, step
            plan, end = setup.plans[index], phase_end(setup.plans, index, step, timeline)
            scope.apply(plan, setup.backbone.anatomy, groups_of_modules)
            still = fingerprints(frozen_tensors(model, plan))
            wrapped = _wrap(accelerator, model)
            plateau = Patience(mode, **plan.patience.model_dump()) if plan.patience else None
            if early:
                early.restart()
            if len(setup.plans) > 1:
                progress.say(f"phase {index + 1} of {len(setup.plans)} from step {step}: {plan.name} learns")

        epoch, batch_index = divmod(step, timeline.steps_per_epoch)
        if batch_index == 0:
            batches = iterate_batches(loader, epoch)
        multiple = reduction * rate_multiple(recipe, timeline, step, start, end)
        rates = set_rates(optimizer.optimizer, setup.groups, phase=index, base_lr=base_lr, multiple=multiple)

        micro_batches = next(batches)
        batch_size = micro_batches[0]["batch_size"]  # over all processes
        loss, answers = torch.zeros((), device=device), []
        for number, batch in enumerate(micro_batches, 1):
            inputs, targets = (
                to_device(batch["inputs"], device),
                batch["labels"].to(device, non_blocking=True),
            )
            if mixing:
                inputs["pixel_values"], targets = mix(
                    inputs["pixel_values"], soft_targets(targets, splits.labels), batch["indices"].tolist(),
                    mixing=mixing, seed=training.seed, epoch=epoch,
                )  # fmt: skip
            with nullcontext() if number == len(micro_batches) else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    logits = forward(wrapped, inputs)
                losses = sample_losses(
                    kind,
                    logits,
                    targets,
                    class_weights=class_weight,
                    label_smoothing=training.label_smoothing,
                )
                # Summed over samples and divided by the whole batch: short batches and uneven shares weigh right.
                # DDP averages over processes, hence the factor.
                share = (losses * batch["weights"].to(device)).sum() / batch_size
                penalty = adapter.penalty() if adapter and number == len(micro_batches) else 0.0
                accelerator.backward(share * world + penalty)
            loss += share.detach()
            answers.append((batch["indices"], losses.detach()))
        loss_value = accelerator.reduce(loss, "sum").item()
        if not math.isfinite(loss_value):
            raise TrainingError(_non_finite(f"the loss is {loss_value}", step, epoch, answers, record, best))
        if training.clip_norm is not None:
            norm = accelerator.clip_grad_norm_(model.parameters(), training.clip_norm)
            if training.precision != "fp16" and not math.isfinite(norm):
                raise TrainingError(
                    _non_finite(f"the gradient norm is {norm}", step, epoch, answers, record, best)
                )
        optimizer.step()
        if adapter:
            adapter.after_step(step + 1)
        optimizer.zero_grad()
        if ema:
            ema.update(model)
        step, seen = step + 1, seen + batch_size
        epochs, speed = timeline.epoch(step), None
        due = step % timeline.evaluate_every == 0 or step == timeline.total_steps
        if due or step == 1 or step % log_every == 0:
            speed, seen, clock = seen / (time.monotonic() - clock), 0, time.monotonic()
            record.log_training(step, index, loss_value, rates, speed)
        progress.step(
            step=step, epoch=epochs, phase=plan.name, loss=loss_value, lrs=rates, samples_per_second=speed
        )
        if not due:
            continue

        if world > 1:
            _share_buffers(measured)
        result = evaluate(
            measured, validation, splits.labels, record.metrics, accelerator,
            on_batch=lambda: progress.doing("evaluating"),
        )  # fmt: skip
        value = result.value(monitor.metric)
        is_best = best.update(value, step=step, epoch=epochs, metrics=result.metrics)
        record.log_evaluation(step, index, "validation", result)
        progress.evaluated(step=step, epoch=epochs, loss=result.loss, metrics=result.metrics, is_best=is_best)
        if is_best:
            record.keep(measured, best, result)
        clock = time.monotonic()  # evaluating does not count as training time
        if reduce and reducing and reducing.exhausted_by(value):
            reduction = max(reduce.floor, reduction * reduce.factor)
            reducing.restart()
        if plateau and plateau.exhausted_by(value) and index + 1 < len(setup.plans):
            end = step
        if early and early.exhausted_by(value):
            if index + 1 < len(setup.plans):
                end = step  # this phase has given what it can; the next ones have yet to begin
                continue
            check_frozen(model, plan, still)
            return f"no better {monitor.metric} in {early.patience} evaluations"
    check_frozen(model, plan, still)
    return "all steps done"


def _wrap(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Return `model` as its processes train it together; an earlier wrapping is taken off first."""
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator._models.clear()
    return model if accelerator.num_processes == 1 else accelerator.prepare_model(model)


def _share_buffers(model: nn.Module) -> None:
    """Give every process the main one's buffers, as kept with the model: each has statistics of its own share."""
    for buffer in model.buffers():
        broadcast(buffer)


def _non_finite(
    what: str,
    step: int,
    epoch: int,
    answers: list[tuple[torch.Tensor, torch.Tensor]],
    record: Record,
    best: Best,
) -> str:
    """Return the text of the error that stops a run at its first non-finite number; every process calls this.

    `answers` holds (indices, losses) of each micro-batch. All samples are named when no loss tells which is to blame.
    """
    indices, losses = (torch.cat([part.cpu() for part in parts]) for parts in zip(*answers, strict=True))
    mine = [(int(index), bool(finite)) for index, finite in zip(indices, torch.isfinite(losses), strict=True)]
    batch = set(gather_object(mine))
    guilty = {index for index, finite in batch if not finite} or {index for index, _ in batch}
    numbers = column_values(record.setup.splits.train, "row")  # as the data's own file counts
    rows = sorted(int(numbers[index]) for index in guilty)
    named = ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")
    kept = (
        f"The best model so far (step {best.step}) is in {record.path / 'model'}."
        if best.value is not None
        else ""
    )
    return (
        f"step {step + 1}, epoch {epoch + 1}: {what}, in rows {named} of train (the first is 0). "
        f"Look at these samples, lower optimizer.lr, or train in precision: fp32. {kept}"
    ).rstrip()


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let a scheduler's SIGTERM end the run as Ctrl-C does, where this process may handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
