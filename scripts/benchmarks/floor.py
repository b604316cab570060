"""The floor: forward, backward and optimizer step on ready tensors, nothing else.

Texts are the batches of our first epoch with their lengths, whole epochs of them; images, whose batches are all alike,
are random pixels in the sizes of ours. The same adapters and the same learning layers as ours.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

from benchmarks.job import answer, finish_queued, read_job, since_start
from benchmarks.plan import recipe_overrides

if TYPE_CHECKING:
    import torch

    from hf_finetune.setup import Setup

Ready = list[tuple[dict[str, "torch.Tensor"], "torch.Tensor"]]
"""The micro-batches of one optimizer step: inputs, labels."""


def main() -> None:
    """Measure samples per second in the precision and memory format that the arm's name says."""
    job = read_job()
    _, precision, layout = job.arm.split(":")
    import torch

    from hf_finetune.memory import Meter
    from hf_finetune.models.forward import forward, placed
    from hf_finetune.precision import _cpu_has_bf16
    from hf_finetune.recipe import load_recipe
    from hf_finetune.setup import prepare, process_state

    device = process_state().device
    if precision == "bf16" != job.precision and device.type == "cpu" and not _cpu_has_bf16():
        answer(skipped="this CPU has no bf16 instructions")  # without them a step takes minutes
        return
    overrides = [*recipe_overrides(job), f"training.precision={precision}"]
    setup = prepare(load_recipe(job.recipe, overrides), world_size=1, device=device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    model = setup.backbone.model.to(device)
    if layout == "channels_last":
        model = placed(model, device, setup.splits.modality)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name in job.learning
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    lower = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(batches: Ready) -> int:
        for inputs, labels in batches:
            with torch.autocast(device.type, dtype=lower, enabled=lower is not None):
                logits = forward(model, inputs)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels) / len(batches)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return sum(len(labels) for _, labels in batches)

    memory = Meter.start(device)
    epoch = ready_epoch(setup, device, channels_last=layout == "channels_last")
    step(max(epoch, key=elements))
    finish_queued()
    first = since_start()
    step(min(epoch, key=elements))
    finish_queued()
    began, samples, seconds = time.monotonic(), 0, 0.0
    whole = len(epoch) if job.modality == "text" else 1  # steps that are alike when taken together
    for number in itertools.count(1):
        samples += step(epoch[(number - 1) % len(epoch)])
        finish_queued() if number % whole == 0 else None
        seconds = time.monotonic() - began
        # Where a single epoch takes long, part of it must do: its batches come in random order.
        if seconds > job.floor_seconds * (1 if number % whole == 0 else 4):
            break
    finish_queued()
    speed, used = samples / (time.monotonic() - began), memory.facts()
    answer(first_step=first, samples_per_second=speed, above_gb=(used["peak"] - used["ready"]) / 1e9)


def ready_epoch(setup: Setup, device: torch.device, *, channels_last: bool) -> list[Ready]:
    """Return the optimizer steps of our first epoch, on the device."""
    import torch
    from accelerate import Accelerator

    from hf_finetune.data.loaders import TrainBatches, iterate_batches
    from hf_finetune.evaluation import to_device
    from hf_finetune.models.backbone import ImageInput
    from hf_finetune.setup import build_loaders

    loader, _ = build_loaders(setup, Accelerator(cpu=device.type == "cpu"))
    read: Any = setup.backbone.input
    if not isinstance(read, ImageInput):
        return [
            [(to_device(batch["inputs"], device), batch["labels"].to(device)) for batch in step]
            for step in iterate_batches(loader, 0)
        ]
    largest = setup.micro_batch_size
    generator = torch.Generator().manual_seed(setup.recipe.training.seed)
    pixels = torch.randn(largest, len(read.mean), *read.size, generator=generator).to(device)
    labels = torch.randint(setup.splits.labels.outputs, (largest,), generator=generator).to(device)
    if channels_last:
        pixels = pixels.to(memory_format=torch.channels_last)
    assert isinstance(loader.batch_sampler, TrainBatches)
    return [
        [({"pixel_values": pixels[: len(indices)]}, labels[: len(indices)]) for indices, _ in micro_batches]
        for _, micro_batches in loader.batch_sampler.micro_batches()
    ]


def elements(step: Ready) -> int:
    """Return how large the inputs of a step are."""
    return sum(tensor.numel() for inputs, _ in step for tensor in inputs.values())


if __name__ == "__main__":
    main()
