"""The plan of a run, printed before any training; figures come from real batches through the real model."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils.data import DataLoader

from hf_finetune.augment.grid import save_augment_grid
from hf_finetune.data.loaders import EvalSet, TrainSet, iterate_batches
from hf_finetune.evaluation import evaluate, to_device
from hf_finetune.freeze import FreezeScope
from hf_finetune.models.load import forward, module_groups
from hf_finetune.optim import build_optimizer
from hf_finetune.precision import mixed_precision
from hf_finetune.recipe import Recipe
from hf_finetune.report.tables import Table, layer_table, phase_table, print_table, short_count, target_table
from hf_finetune.setup import Setup, build_loaders, prepare, process_state
from hf_finetune.tasks.loss import sample_losses
from hf_finetune.timeline import phase_end


def explain_recipe(recipe: Recipe, folder: Path) -> None:
    """Print data, weights, choices, layers, phases, memory and time of a run; write `augment.png` to `folder`.

    Raises:
        UserError: what training would raise for the same recipe.
    """
    state = process_state()
    setup = prepare(recipe, world_size=state.num_processes, device=state.device)
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=mixed_precision(setup.recipe.training.precision))
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
    loader, validation = build_loaders(setup, accelerator)
    for split, samples in (("train", loader.dataset), ("validation", validation.dataset)):
        assert isinstance(samples, EvalSet)
        for note in samples.notes:
            _say(f"note: {split}: {note}")
    _print_cost(setup, accelerator, steps, loader, validation)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "augment.png"
    assert isinstance(loader.dataset, TrainSet)
    save_augment_grid(loader.dataset, path)
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


def _print_cost(
    setup: Setup, accelerator: Accelerator, steps: list[int], loader: DataLoader, validation: DataLoader
) -> None:
    """Time one optimizer step of each phase on a real batch, and one evaluation batch; print what the run will take."""
    recipe, device, labels = setup.recipe, accelerator.device, setup.splits.labels
    model = setup.backbone.model.to(device)
    began = time.monotonic()
    micro_batches = next(iterate_batches(loader, 0))
    loading = time.monotonic() - began
    scope, homes = FreezeScope(model), module_groups(model, setup.backbone.anatomy)
    optimizer = build_optimizer(recipe.optimizer, setup.groups, dict(model.named_parameters()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the measurement leaves the weights where they are
    rows, training = [], 0.0
    for number, (plan, count) in enumerate(zip(setup.plans, steps, strict=True), 1):
        scope.apply(plan, setup.backbone.anatomy, homes)
        seconds = []
        for _ in range(3 if number == 1 else 2):  # the first one pays for warming up
            began = time.monotonic()
            for batch in micro_batches:
                with accelerator.autocast():
                    logits = forward(model, to_device(batch["inputs"], device))
                sample_losses(labels.kind, logits, batch["labels"].to(device)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.monotonic() - began)
        training += min(seconds) * count
        rows.append(
            [
                number,
                plan.name,
                f"{min(seconds):.3g} s",
                f"{min(seconds) * count:.3g} s",
                f"{_peak_gb(device):.3g} GB",
            ]
        )
    _show(
        Table("Cost on this machine", ["phase", "trains", "per step", "in all", "peak memory so far"], rows)
    )
    first = [next(iter(validation))]
    evaluate(model, first, labels, [], accelerator)
    began = time.monotonic()
    evaluate(model, first, labels, [], accelerator)
    per_row = (time.monotonic() - began) / len(first[0]["indices"])
    evaluations = -(-setup.timeline.total_steps // setup.timeline.evaluate_every)
    measuring = per_row * len(setup.splits.validation) * evaluations / accelerator.num_processes
    total = training + measuring
    _say(
        f"{setup.timeline.total_steps} steps, {setup.timeline.steps_per_epoch} per epoch, {evaluations} evaluations: "
        f"about {total:.0f} s ({training:.0f} s training, {measuring:.0f} s measuring); "
        f"the first batch loaded in {loading:.2g} s"
    )


def _peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _show(table: Table) -> None:
    print_table(*table)
    _say("")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
