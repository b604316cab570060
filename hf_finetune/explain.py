"""The plan of a run, printed before any training; figures come from real batches through the real model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from hf_finetune.augment.grid import save_augment_grid
from hf_finetune.data.loaders import Batch, iterate_batches
from hf_finetune.evaluation import evaluate, to_device
from hf_finetune.features.feed import Feed
from hf_finetune.features.plan import Plan
from hf_finetune.forecast import Forecast, foresee, ready, with_features
from hf_finetune.freeze import FreezeScope, fingerprints, frozen_tensors, weights_fingerprint
from hf_finetune.memory import available, in_use
from hf_finetune.optim import build_optimizer
from hf_finetune.precision import accelerator_in
from hf_finetune.recipe import Recipe
from hf_finetune.report.tables import Table, layer_table, phase_table, print_table, short_count, target_table
from hf_finetune.setup import Setup, process_state
from hf_finetune.tasks.loss import sample_losses
from hf_finetune.timeline import phase_end


def explain_recipe(recipe: Recipe, folder: Path) -> None:
    """Print data, weights, choices, layers, phases, memory and time of a run; write `augment.png` to `folder`.

    Raises:
        UserError: what training would raise for the same recipe.
    """
    state = process_state()
    setup = ready(recipe, state)
    # A run reads all its weights before it counts: those of a mapped file are in memory once they are read.
    weights_fingerprint(setup.backbone.model)
    start = in_use(state.device)
    accelerator = accelerator_in(setup.recipe.training.precision)
    _print_data(setup)
    _print_weights(setup)
    choices = [[choice.key, str(choice.value), choice.why] for choice in setup.choices]
    _show(Table("Chosen for you (auto)", ["key", "value", "why"], choices))
    lr = float(setup.recipe.optimizer.lr)
    steps = _phase_steps(setup)
    if setup.backbone.adapter is not None:
        _show(target_table(setup.backbone.adapter))
    _show(layer_table(setup.plans, setup.backbone.anatomy, lr))
    _show(phase_table(setup.plans, setup.backbone.anatomy, lr, steps))
    for note in setup.notes:
        _say(f"note: {note}")
    _say(
        f"{short_count(setup.trainable_size)} of {short_count(setup.total_size)} parameters train "
        f"({100 * setup.trainable_size / setup.total_size:.3g} %)"
    )
    feed = Feed(setup, accelerator, setup.backbone.model.to(accelerator.device))
    for split, samples in (("train", feed.train), ("validation", feed.validation)):
        for note in samples.notes:
            _say(f"note: {split}: {note}")
    _print_cost(setup, accelerator, steps, feed, start)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "augment.png"
    save_augment_grid(feed.train.shown(), path)
    _say(f"what the model receives: {path}")


def _print_data(setup: Setup) -> None:
    report, labels = setup.splits.report, setup.splits.labels
    rows = [
        [role, count, setup.splits.report.skipped.get(role, 0), _counts(report.class_counts.get(role, {}))]
        for role, count in report.rows.items()
    ]
    _show(Table(f"Data: {report.source}", ["split", "rows", "skipped", f"{labels.kind} labels"], rows))
    for note in report.notes:
        _say(f"note: {note}")
    for warning in report.warnings:
        _say(f"warning: {warning}")


def _counts(counts: dict[str, int]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:8])
    return shown + (f", … ({len(counts)} classes)" if len(counts) > 8 else "")


def _print_weights(setup: Setup) -> None:
    backbone, report = setup.backbone, setup.backbone.report
    rows = [
        ["loaded", report.loaded, ""],
        ["new", len(report.new), _names(report.new)],
        ["missing", len(report.missing), _names(report.missing)],
        ["mismatched", len(report.mismatched), _names(report.mismatched)],
        ["unused", len(report.unexpected), _names(report.unexpected)],
    ]
    head = "; output layer kept, it knows these labels" if report.kept_head else ""
    note = (
        f"{100 * report.share:.4g} % of the backbone loaded{head}; {backbone.library} "
        f"{backbone.source.get('architecture')}, family {backbone.anatomy.family}; from {report.source}"
    )
    if quantized := backbone.source.get("quantize"):
        before, after = (size / 1e6 for size in quantized["bytes"])
        note += (
            f"\n{quantized['layers']} linear layers of the blocks in {quantized['kind']}: the weights take "
            f"{after:.4g} MB instead of {before:.4g} MB"
        )
    _show(Table(f"Weights: {setup.recipe.backbone.id}", ["tensors", "count", "names"], rows, note))


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _phase_steps(setup: Setup) -> list[int]:
    """Return the steps of each phase if every plateau comes as late as it can."""
    steps, start = [], 0
    for index in range(len(setup.plans)):
        end = phase_end(setup.plans, index, start, setup.timeline)
        steps.append(end - start)
        start = end
    return steps


def _print_cost(setup: Setup, accelerator: Accelerator, steps: list[int], feed: Feed, start: int) -> None:
    """Foresee the memory of each phase, time a step of it and an evaluation on real batches where that fits; print.

    `start` is what was in use when everything was loaded.
    """
    recipe, device, labels, timeline = setup.recipe, accelerator.device, setup.splits.labels, setup.timeline
    model = feed.model
    began = time.monotonic()
    micro_batches = next(iterate_batches(feed.plain.train, 0))
    loading = time.monotonic() - began
    held_out = next(iter(feed.plain.validation))
    scope = FreezeScope(model)
    optimizer = build_optimizer(recipe.optimizer, setup.groups, dict(model.named_parameters()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the measurement leaves the weights where they are
    rows, notes = [], []
    room = available(device)
    memory: list[list[Any]] = []
    training = measuring = computing = 0.0
    for number, (plan, count) in enumerate(zip(setup.plans, steps, strict=True)):
        scope.apply(plan, setup.backbone.anatomy, feed.homes)
        once = feed.plan(number, fingerprints(frozen_tensors(model, plan)), model)
        if plan.solver:
            notes.append(
                f"{plan.name}: what {plan.solver} takes on these features, as a rule seconds, is not in the estimate"
            )
        notes.append(f"{plan.name}: {once}")
        forecast = foresee(setup, number, model, accelerator, (feed.train, feed.validation), once)
        memory.append(_memory_row(number, plan.name, forecast, setup, start))
        if forecast.total(setup.micro_batch_size) - forecast.weights > room:
            rows.append([number + 1, plan.name, None, None])
            continue  # to time it would end like the run
        batches, taken = _stand_ins(once, "train", micro_batches, model, accelerator)
        (measured,), also = _stand_ins(once, "validation", [held_out], model, accelerator)
        if feed.starts_pass(number):
            computing += (taken + also) / accelerator.num_processes
        run = once.forward
        seconds, evaluating = [], []
        for _ in range(3 if number == 0 else 2):  # the first one pays for warming up
            began = time.monotonic()
            for batch in batches:
                with accelerator.autocast():
                    logits = run(model, to_device(batch["inputs"], device))
                sample_losses(labels.kind, logits, batch["labels"].to(device)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.monotonic() - began)
            began = time.monotonic()
            evaluate(model, [measured], labels, [], accelerator, forward=run)
            evaluating.append(time.monotonic() - began)
        cost = [f"{min(seconds):.3g} s", f"{min(seconds) * count:.3g} s"]
        if plan.solver:
            cost = ["-", "-"]
        else:
            training += min(seconds) * count
        share = len(setup.splits.validation) / len(held_out["indices"]) / accelerator.num_processes
        measuring += min(evaluating) * share * (1 if plan.solver else count / timeline.evaluate_every)
        rows.append([number + 1, plan.name, *cost])
    _show(Table("Time on this machine", ["phase", "trains", "per step", "in all"], rows))
    _show(_memory_table(memory, setup, device, start))
    if any(row[2] is None for row in rows):
        _say(
            f"warning: {room / 1e9:.3g} GB of memory may be used beside what is loaded, and a phase needs more: "
            "training.micro_batch_size=auto takes as many samples at once as fit"
        )
    for note in notes:
        _say(f"frozen layers: {note}")
    if recipe.data.cache == "decoded":
        for split in ("train", "validation"):
            _say(f"images: {feed.decoding(split)}, where a phase reads them")
    total = training + measuring + computing
    _say(
        f"{timeline.total_steps} steps, {timeline.steps_per_epoch} per epoch, "
        f"{-(-timeline.total_steps // timeline.evaluate_every)} evaluations: about {total:.0f} s ({training:.0f} s "
        f"training, {measuring:.0f} s measuring, {computing:.0f} s computing frozen layers once); "
        f"the first batch loaded in {loading:.2g} s"
    )


def _stand_ins(
    once: Plan, split: str, batches: list[Batch], model: nn.Module, accelerator: Accelerator
) -> tuple[list[Batch], float]:
    """Return batches with features in place of samples where a split has them, and the seconds all its rows take."""
    want = once.wants.get(split)
    if want is None:
        return batches, 0.0
    began = time.monotonic()
    replaced = [with_features(want, batch, model, accelerator) for batch in batches]
    per_row = (time.monotonic() - began) / sum(len(batch["indices"]) for batch in batches)
    return replaced, per_row * want.rows


def _memory_row(number: int, name: str, forecast: Forecast, setup: Setup, start: int) -> list[Any]:
    size = setup.micro_batch_size
    parts = (
        forecast.weights,
        forecast.gradients,
        forecast.optimizer + forecast.average,
        forecast.activations(size),
    )
    total = forecast.total(size) + (start - forecast.weights if forecast.on_cpu else 0)
    return [number + 1, name, *(f"{part / 1e6:.3g} MB" for part in parts), f"{total / 1e9:.3g} GB"]


def _memory_table(rows: list[list[Any]], setup: Setup, device: torch.device, start: int) -> Table:
    columns = ["phase", "trains", "weights", "gradients", "optimizer", "activations", "at most"]
    if device.type == "cpu":
        what = (
            f"At most: the resident set of a process, gaps of its heap included; {start / 1e9:.3g} GB of it are there "
            "once all is loaded."
        )
    else:
        what = "At most: what torch allocates on the device."
    note = f"At {setup.micro_batch_size} samples a forward pass; an average counts as the optimizer's. {what}"
    return Table("Memory", columns, rows, note)


def _show(table: Table) -> None:
    print_table(*table)
    _say("")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
