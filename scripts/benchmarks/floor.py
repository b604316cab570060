"""The floor: forward, backward and optimizer step on one ready batch, nothing else. `full` and `frozen` alike."""

from __future__ import annotations

import time

import torch

from benchmarks.job import answer, read_job, since_start
from benchmarks.plan import recipe_overrides

SECONDS = 8.0
"""How long each floor is measured, after two steps to warm up."""


def main() -> None:
    """Measure samples per second in the precision and memory format that the arm's name says."""
    job = read_job()
    _, precision, layout = job.arm.split(":")
    from accelerate import Accelerator

    from hf_finetune.data.loaders import iterate_batches
    from hf_finetune.evaluation import to_device
    from hf_finetune.models.load import forward
    from hf_finetune.recipe import load_recipe
    from hf_finetune.setup import build_loaders, prepare, process_state

    device = process_state().device
    setup = prepare(load_recipe(job.recipe, recipe_overrides(job)), world_size=1, device=device)
    loader, _ = build_loaders(setup, Accelerator(cpu=device.type == "cpu"))
    (batch,) = next(iterate_batches(loader, 0))
    model = setup.backbone.model.to(device)
    inputs, labels = to_device(batch["inputs"], device), batch["labels"].to(device)
    if layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    else:
        inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
    job.freeze(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    steps, first, began = -2, 0.0, 0.0
    while steps < 1 or time.monotonic() - began < SECONDS:
        if steps == 0:
            began = time.monotonic()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = forward(model, inputs)
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        first = first or since_start()
        steps += 1
    answer(first_step=first, samples_per_second=steps * len(labels) / (time.monotonic() - began))


if __name__ == "__main__":
    main()
