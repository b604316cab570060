"""One run, read top to bottom: prepare, train phase by phase, measure, keep the best."""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from hf_finetune.augment.batch import mix, mixers
from hf_finetune.compilation import compiled
from hf_finetune.data.loaders import iterate_epochs
from hf_finetune.data.targets import soft_targets
from hf_finetune.errors import Interrupted
from hf_finetune.evaluation import evaluate, to_device
from hf_finetune.features.feed import Feed
from hf_finetune.forecast import ready
from hf_finetune.freeze import FreezeScope, average_of, check_frozen, fingerprints, frozen_tensors
from hf_finetune.models.forward import placed
from hf_finetune.monitor import Watch
from hf_finetune.optim import build_optimizer, set_rates
from hf_finetune.parallel import holding, share_buffers, share_out, whole, wrap
from hf_finetune.position import Position, restore, store
from hf_finetune.progress import Progress
from hf_finetune.recipe import Recipe
from hf_finetune.record import Record, Status, start_accelerator
from hf_finetune.runfolder import Run, load_run
from hf_finetune.schedule import ReduceOnPlateau
from hf_finetune.setup import Setup, process_state
from hf_finetune.solve import solve
from hf_finetune.stopping import asked_to_stop, named_failures, non_finite, watched_signals
from hf_finetune.tasks.loss import sample_losses
from hf_finetune.timeline import phase_end, rate_multiple
from hf_finetune.together import by_everyone, together

LOGGED_STEPS = 200
"""Training rows a run writes at most, beside the one before each evaluation."""


def finetune(
    recipe: Recipe,
    *,
    name: str = "recipe",
    quiet: bool = False,
    resume: bool = False,
    allow_changes: bool = False,
) -> Run:
    """Run `recipe` and return the finished run; under several processes each calls this.

    Args:
        recipe: what to do; its `output` is the run folder, null for `runs/<name>-<backbone>-<time>`.
        name: the recipe's name, for the folder.
        quiet: print nothing.
        resume: continue the run in the folder from its newest valid checkpoint; without a run there, start one.
        allow_changes: resume although something differs that changes the result.

    Raises:
        UserError: recipe, data or backbone are wrong, or differ from those of the run to resume.
        TrainingError: the loss became non-finite, a frozen tensor moved, or memory ran out.
        HubError: the recipe's `hub` may not be written to, or a run that is done could not be pushed.
        Interrupted: SIGINT, SIGTERM or `training.max_hours`; the run can be resumed.
    """
    started = time.monotonic()
    state = process_state()
    setup = ready(recipe, state, resumes=name if resume else None)
    progress = Progress(
        setup.timeline.total_steps,
        metric=setup.recipe.monitor.metric,
        quiet=quiet,
        is_main=state.is_main_process,
    )
    record = Record.open(
        setup, state, name=name, started=started, resume=resume, allow_changes=allow_changes, say=progress.say
    )
    if record.finished:
        return load_run(record.path)
    accelerator = start_accelerator(setup, record)
    share = 100 * setup.trainable_size / setup.total_size
    for note in (*setup.splits.report.notes, *setup.notes):
        progress.say(f"note: {note}")
    progress.say(f"{setup.trainable_size:,} of {setup.total_size:,} parameters train ({share:.3g} %)")
    failures = named_failures(setup)
    with watched_signals() as signals, progress, record.closing(accelerator), failures:
        try:
            status, why = _train(setup, accelerator, record, progress, signals)
        except Interrupted as asked:  # between two steps; the state is saved
            status, why = "interrupted", str(asked)
        record.keep_if_none(setup.backbone.model)  # where no evaluation gave a number
        if status == "done":
            progress.doing("comparing")
            record.check_reload(signals)
        record.status, record.why = status, why
    if record.status == "interrupted":
        goes_on = f"the state is saved, `--output {record.path} --resume` continues"
        raise by_everyone(Interrupted(f"{record.why}; {goes_on}"))
    return load_run(record.path)


def _train(
    setup: Setup, accelerator: Accelerator, record: Record, progress: Progress, signals: list[str]
) -> tuple[Status, str]:
    """Train, measure and keep the best; return how and why training ended."""
    recipe, timeline, splits = setup.recipe, setup.timeline, setup.splits
    training, monitor, kind = recipe.training, recipe.monitor, setup.splits.labels.kind
    base_lr, device, world = float(recipe.optimizer.lr), accelerator.device, accelerator.num_processes
    set_seed(training.seed, device_specific=True)

    model = placed(setup.backbone.model, device, splits.modality)
    shared = holding(world) == "fsdp2"
    learned = {name for group in setup.groups for name in group.parameters}
    ema = average_of(model, float(training.ema.decay), learned) if training.ema else None
    measured = ema.module if ema else model
    held = [model, measured] if ema else [model]
    record.whole = together(partial(share_out, setup.backbone, held, accelerator))
    feed = Feed(setup, accelerator, model)
    scope, adapter, parameters = FreezeScope(model), setup.backbone.adapter, dict(model.named_parameters())
    optimizer = build_optimizer(recipe.optimizer, setup.groups, parameters, shared=shared)
    optimizer = accelerator.prepare_optimizer(optimizer)

    mixing = mixers(setup.augmentations)
    weight = torch.tensor(setup.class_weights, device=device) if setup.class_weights else None
    losses_of = partial(sample_losses, kind, class_weights=weight, label_smoothing=training.label_smoothing)

    reduce = recipe.schedule if isinstance(recipe.schedule, ReduceOnPlateau) else None
    at, watch = Position(), Watch.of(monitor, reduce)
    if record.checkpoint:
        restore(record.checkpoint, at, watch, model, optimizer, ema, setup, accelerator)
    save_every = timeline.steps(training.checkpoint.every) if training.checkpoint else 0
    log_every = max(1, timeline.total_steps // LOGGED_STEPS)
    pace = record.pace  # of training and evaluating alone, and how much of that waits for data
    entered, batches = -1, None  # the phase the model is set up for; its batches
    still: dict[str, str] = {}  # fingerprints of what is frozen in this phase

    def save() -> None:
        keep = training.checkpoint.keep if training.checkpoint else 1
        store(record.path, at, watch, model, optimizer, ema, setup, accelerator, keep=keep)

    def while_busy(what: str) -> None:
        progress.doing(what)
        if world == 1 and signals:  # several processes must come to the same end: they stop after it
            save()
            raise Interrupted(f"stopped by {signals[0]}")

    def is_over() -> bool:  # a solver at the end may come before the run's last step
        is_last = at.phase + 1 == len(setup.plans)
        return watch.stops or at.step >= timeline.total_steps or (is_last and at.step == at.phase_end)

    while at.due or not is_over():
        if at.step == at.phase_end and not at.due:
            at.phase, at.phase_start = at.phase + 1, at.step
            at.phase_end = phase_end(setup.plans, at.phase, at.step, timeline)
            watch.enter_phase(setup.plans[at.phase].patience)
            if len(setup.plans) > 1:
                named = f"phase {at.phase + 1} of {len(setup.plans)} from step {at.step}"
                progress.say(f"{named}: {setup.plans[at.phase].described}")
        if entered != at.phase:
            # Other layers learn from here on.
            if entered >= 0:
                together(partial(check_frozen, model, setup.plans[entered], still))
            for each in held if world > 1 else ():
                share_buffers(each)  # statistics that moved: those of the main process's samples are kept
            entered, plan = at.phase, setup.plans[at.phase]
            scope.apply(plan, setup.backbone.anatomy, feed.homes)
            still = fingerprints(frozen_tensors(model, plan))
            # What is frozen is computed once.
            source = feed.enter(at.phase, still, measured, on_batch=while_busy, say=progress.say)
            record.log_features(at.phase, source.note)
            wrapped, batches = wrap(accelerator, model), None
            if training.compile == "on" and source.train is feed.plain.train:  # layers above features are few
                wrapped = compiled(wrapped)

        if plan.solver and not at.due:
            pace.begin()
            solved = solve(setup, plan.solver, source, model, accelerator, losses_of, while_busy)
            loss_value, rates, batch_size = solved.loss, {}, solved.rows
            record.log_solved(at.phase, solved.facts)
            progress.say(solved.note)
            if ema:
                ema.set(model)
        elif not at.due:
            epoch, batch_index = divmod(at.step, timeline.steps_per_epoch)
            if batches is None:
                batches = iterate_epochs(source.train, epoch, batch_index, timeline.total_steps - at.step)
            multiple = at.reduction * rate_multiple(recipe, timeline, at.step, at.phase_start, at.phase_end)
            rates = set_rates(
                optimizer.optimizer, setup.groups, phase=at.phase, base_lr=base_lr, multiple=multiple
            )
            micro_batches = pace.next_of(batches)
            batch_size = micro_batches[0]["batch_size"]  # over all processes
            loss, answers = torch.zeros((), device=device), []
            for number, batch in enumerate(micro_batches, 1):
                inputs = to_device(batch.pop("inputs"), device)
                targets = batch["labels"].to(device, non_blocking=True)
                if mixing:
                    inputs["pixel_values"], targets = mix(
                        inputs["pixel_values"],
                        soft_targets(targets, splits.labels),
                        batch["indices"].tolist(),
                        mixing=mixing,
                        seed=training.seed,
                        epoch=epoch,
                    )
                with nullcontext() if number == len(micro_batches) else accelerator.no_sync(wrapped):
                    with accelerator.autocast():
                        logits = source.forward(wrapped, inputs)
                    losses = losses_of(logits, targets)
                    # Summed over samples and divided by the whole batch: short batches and uneven shares weigh
                    # right. DDP averages over processes, hence the factor.
                    share = (losses * batch["weights"].to(device, non_blocking=True)).sum() / batch_size
                    penalty = adapter.penalty() if adapter and number == len(micro_batches) else 0.0
                    accelerator.backward(share * world + penalty)
                loss += share.detach()
                answers.append((batch["indices"], losses.detach()))
                del inputs, logits, losses, share  # and their graph, before the next pass builds its own
            loss_value = accelerator.reduce(loss, "sum").item()
            if not math.isfinite(loss_value):
                what = f"the loss is {loss_value}"
                raise non_finite(what, at.step, epoch, answers, record, watch.best)
            if training.clip_norm is not None:
                norm = whole(accelerator.clip_grad_norm_(model.parameters(), training.clip_norm))
                if training.precision != "fp16" and not math.isfinite(norm):
                    what = f"the gradient norm is {norm}"
                    raise non_finite(what, at.step, epoch, answers, record, watch.best)
            optimizer.step()
            if adapter:
                adapter.after_step(at.step + 1)
            optimizer.zero_grad()
            if ema:
                ema.update(model)
        if not at.due:
            pace.stepped(batch_size)
            at.step, speed = at.step + 1, None
            at.due = bool(plan.solver) or at.step % timeline.evaluate_every == 0 or is_over()
            if at.due or at.step == 1 or at.step % log_every == 0:
                speed = pace.samples_per_second()
                record.log_training(at.step, at.phase, loss_value, rates, speed)
            progress.step(
                step=at.step, epoch=timeline.epoch(at.step), phase=plan.name, loss=loss_value, lrs=rates,
                samples_per_second=speed,
            )  # fmt: skip
        if why := asked_to_stop(signals, training.max_hours, record.started, accelerator):
            save()
            return "interrupted", why
        if at.due:
            if world > 1:
                share_buffers(measured)
            result = evaluate(
                measured,
                pace.evaluating(source.validation),
                splits.labels,
                record.metrics,
                accelerator,
                forward=source.forward,
                on_batch=lambda: while_busy("evaluating"),  # stopped here, it stays due
            )
            at.due, value = False, result.value(monitor.metric)
            is_best = watch.best.update(
                value, step=at.step, epoch=timeline.epoch(at.step), metrics=result.metrics
            )
            record.log_evaluation(at.step, at.phase, "validation", result)
            progress.evaluated(
                step=at.step,
                epoch=timeline.epoch(at.step),
                loss=result.loss,
                metrics=result.metrics,
                is_best=is_best,
            )
            if is_best:
                record.keep(measured, watch.best, result)
            if reduce and watch.reducing and watch.reducing.exhausted_by(value):
                at.reduction = max(reduce.floor, at.reduction * reduce.factor)
                watch.reducing.restart()
            if watch.plateau and watch.plateau.exhausted_by(value) and at.phase + 1 < len(setup.plans):
                at.phase_end = at.step
            if watch.early and watch.early.exhausted_by(value) and at.phase + 1 < len(setup.plans):
                at.phase_end = at.step  # this phase has given what it can; the next ones have yet to begin
                watch.early.restart()
        if save_every and at.step % save_every == 0 and not is_over():
            save()
    if entered >= 0:
        together(partial(check_frozen, model, setup.plans[entered], still))
    if training.checkpoint:
        save()
    if watch.early and watch.stops:
        return "done", f"no better {monitor.metric} in {watch.early.patience} evaluations"
    return "done", "all steps done"
